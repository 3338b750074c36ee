//! The softmax of attention and the cross-entropy of codes, each in one pass each way on the CPU.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, D, DType, Device, Layout, Result, Shape, Tensor, bail,
};
use rayon::prelude::*;

use crate::dispatch::on_cpu;
use crate::math::{dot, exp, max_of, sum_of, vectorized};
use crate::storage::{f32_elements, f32_slice};

/// Softmax over the last axis of `scale · scores`, scale > 0 (Vaswani et al. 2017, eq. 1).
///
/// `scores` `[…, T, S]` → the same shape. Where `causal`, query t sees the keys up to t + S − T, and the
/// others get exactly 0; this needs S ≥ T. Differentiable.
pub fn attention_weights(scores: &Tensor, scale: f64, causal: bool) -> Result<Tensor> {
    let (queries, keys) = (scores.dim(D::Minus2)?, scores.dim(D::Minus1)?);
    if scale <= 0.0 {
        bail!("the scale of attention must be above 0, got {scale}");
    }
    if keys < queries && causal {
        bail!("causal attention needs a key per query, got {queries} queries and {keys} keys");
    }
    if on_cpu(scores.device()) {
        let op = AttentionWeights { queries, keys, scale: scale as f32, causal };
        scores.contiguous()?.apply_op1(op)
    } else {
        composed_attention_weights(scores, scale, causal)
    }
}

/// −ln softmax(`logits`)\[target\] of every row. `logits` `[N, K]`, `targets` `[N]` u32 below K → `[N]`, in
/// nats. Differentiable in `logits`. A target of K or more is an error on the CPU.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (rows, _) = logits.dims2()?;
    if targets.dims() != [rows] || targets.dtype() != DType::U32 {
        bail!(
            "cross_entropy takes logits [N, K] and u32 targets [N], got {:?} and {:?} {:?}",
            logits.dims(),
            targets.dtype(),
            targets.dims()
        );
    }
    if on_cpu(logits.device()) {
        logits.contiguous()?.apply_op2(&targets.contiguous()?, CrossEntropy)
    } else {
        composed_cross_entropy(logits, targets)
    }
}

fn composed_attention_weights(scores: &Tensor, scale: f64, causal: bool) -> Result<Tensor> {
    let (queries, keys) = (scores.dim(D::Minus2)?, scores.dim(D::Minus1)?);
    let mut scores = (scores * scale)?;
    if causal {
        scores = scores.broadcast_add(&hidden_keys(queries, keys, scores.device())?)?;
    }
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// −∞ where a query does not see a key, else 0: `[queries, keys]`. Made on the device of little that is uploaded:
/// a recording keeps no more.
fn hidden_keys(queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let all = numbers(keys, device)?;
    let key = all.unsqueeze(0)?.broadcast_as((queries, keys))?;
    let last =
        all.narrow(0, keys - queries, queries)?.unsqueeze(1)?.broadcast_as((queries, keys))?;
    let hidden = Tensor::full(f32::NEG_INFINITY, (queries, keys), device)?;
    key.gt(&last)?.where_cond(&hidden, &hidden.zeros_like()?)
}

/// 0, 1, … below `count`: u32.
fn numbers(count: usize, device: &Device) -> Result<Tensor> {
    const AT_ONCE: usize = 1024;
    if count <= AT_ONCE {
        return Tensor::arange(0, count as u32, device);
    }
    let rows = count.div_ceil(AT_ONCE);
    let first = Tensor::arange_step(0, (rows * AT_ONCE) as u32, AT_ONCE as u32, device)?;
    let all = first.unsqueeze(1)?.broadcast_add(&numbers(AT_ONCE, device)?.unsqueeze(0)?)?;
    all.flatten_all()?.narrow(0, 0, count)
}

fn composed_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let classes = logits.dim(1)?;
    // Another device would have to be waited for.
    if targets.device().is_cpu()
        && let Some(target) =
            targets.to_vec1::<u32>()?.into_iter().find(|&target| target as usize >= classes)
    {
        bail!("target {target} is out of range: there are {classes} classes");
    }
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
    let total = shifted.exp()?.sum(1)?.log()?;
    total - shifted.gather(&targets.unsqueeze(1)?.contiguous()?, 1)?.squeeze(1)?
}

struct AttentionWeights {
    queries: usize,
    keys: usize,
    scale: f32,
    causal: bool,
}

impl AttentionWeights {
    /// Keys that a query sees.
    fn seen(&self, query: usize) -> usize {
        if self.causal { query + 1 + self.keys - self.queries } else { self.keys }
    }
}

impl CustomOp1 for AttentionWeights {
    fn name(&self) -> &'static str {
        "vq-attention-weights"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let scores = f32_elements(scores, layout)?;
        let mut weights = vec![0f32; scores.len()];
        let size = (self.queries * self.keys).max(1);
        weights.par_chunks_mut(size).zip(scores.par_chunks(size)).for_each(|(weights, scores)| {
            vectorized(
                #[inline(always)]
                || {
                    let rows = weights.chunks_mut(self.keys).zip(scores.chunks(self.keys));
                    for (query, (weights, scores)) in rows.enumerate() {
                        let seen = self.seen(query);
                        softmax(&scores[..seen], self.scale, &mut weights[..seen]);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(weights), layout.shape().clone()))
    }

    fn bwd(&self, scores: &Tensor, weights: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let mut ds = vec![0f32; scores.elem_count()];
        let size = (self.queries * self.keys).max(1);
        f32_slice(weights, |weights| {
            f32_slice(&grad, |grad| {
                let tasks = ds
                    .par_chunks_mut(size)
                    .zip(weights.par_chunks(size))
                    .zip(grad.par_chunks(size));
                tasks.for_each(|((ds, weights), grad)| {
                    vectorized(
                        #[inline(always)]
                        || {
                            let rows = ds.chunks_mut(self.keys).zip(weights.chunks(self.keys));
                            for (query, ((ds, p), g)) in
                                rows.zip(grad.chunks(self.keys)).enumerate()
                            {
                                let seen = self.seen(query);
                                let (p, g) = (&p[..seen], &g[..seen]);
                                softmax_gradient(p, self.scale, g, ds);
                            }
                        },
                    );
                });
            })
        })??;
        Tensor::from_vec(ds, scores.shape(), scores.device()).map(Some)
    }
}

/// The gradient of [`softmax`] by the scores, from the weights that it gave.
#[inline(always)]
pub(crate) fn softmax_gradient(weights: &[f32], scale: f32, grad: &[f32], of_scores: &mut [f32]) {
    let mean = dot(weights, grad);
    for ((of_score, weight), grad) in of_scores.iter_mut().zip(weights).zip(grad) {
        *of_score = scale * weight * (grad - mean);
    }
}

struct CrossEntropy;

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "vq-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, classes) = logits_layout.shape().dims2()?;
        let logits = f32_elements(logits, logits_layout)?;
        let targets = match (targets, targets_layout.contiguous_offsets()) {
            (CpuStorage::U32(targets), Some((first, end))) => &targets[first..end],
            _ => bail!("cross_entropy takes contiguous u32 targets"),
        };
        if let Some(target) = targets.iter().find(|&&target| target as usize >= classes) {
            bail!("target {target} is out of range: there are {classes} classes");
        }
        let mut losses = vec![0f32; rows];
        let tasks = losses
            .par_chunks_mut(ROWS)
            .zip(logits.par_chunks(ROWS * classes))
            .zip(targets.par_chunks(ROWS));
        tasks.for_each(|((losses, logits), targets)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((loss, logits), target) in
                        losses.iter_mut().zip(logits.chunks_exact(classes)).zip(targets)
                    {
                        let max = max_of(logits);
                        let total = sum_of(logits, |logit| exp(logit - max));
                        *loss = total.ln() - (logits[*target as usize] - max);
                    }
                },
            );
        });
        Ok((CpuStorage::F32(losses), rows.into()))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, classes) = logits.dims2()?;
        let (targets, grad) = (targets.to_vec1::<u32>()?, grad.to_vec1::<f32>()?);
        let mut dl = vec![0f32; logits.elem_count()];
        f32_slice(logits, |logits| {
            let tasks = dl
                .par_chunks_mut(ROWS * classes)
                .zip(logits.par_chunks(ROWS * classes))
                .zip(targets.par_chunks(ROWS).zip(grad.par_chunks(ROWS)));
            tasks.for_each(|((dl, logits), (targets, grad))| {
                vectorized(
                    #[inline(always)]
                    || {
                        let rows = dl.chunks_exact_mut(classes).zip(logits.chunks_exact(classes));
                        for ((dl, logits), (target, grad)) in rows.zip(targets.iter().zip(grad)) {
                            softmax(logits, 1.0, dl);
                            dl[*target as usize] -= 1.0;
                            for dl in dl {
                                *dl *= grad;
                            }
                        }
                    },
                );
            });
        })?;
        Ok((Some(Tensor::from_vec(dl, logits.shape(), logits.device())?), None))
    }
}

/// Rows that a task takes.
const ROWS: usize = 32;

/// Softmax of `scale` · scores.
#[inline(always)]
pub(crate) fn softmax(scores: &[f32], scale: f32, weights: &mut [f32]) {
    let max = max_of(scores);
    for (weight, score) in weights.iter_mut().zip(scores) {
        *weight = exp((score - max) * scale);
    }
    let factor = 1.0 / sum_of(weights, |weight| weight);
    for weight in weights {
        *weight *= factor;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn random(start: f32, dims: &[usize]) -> Var {
        let n = dims.iter().product();
        let values = (0..n).map(|i| 3.0 * (i as f32 * 12.9898 + start).sin()).collect();
        Var::from_vec(values, dims, &crate::test_device()).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_alike(x: &Var, ours: &Tensor, composed: &Tensor) {
        let weights = random(5.0, ours.dims()).as_detached_tensor();
        let run = |y: &Tensor| {
            let loss = (y * &weights).unwrap().sum_all().unwrap();
            [values(y), values(loss.backward().unwrap().get(x).unwrap())]
        };
        for (ours, theirs) in run(ours).iter().zip(&run(composed)) {
            for (a, b) in ours.iter().zip(theirs) {
                assert!((a - b).abs() < 3e-6, "{a} {b}");
            }
        }
    }

    #[test]
    fn attention_weights_agree_with_candles_operations() {
        for dims in [[2, 3, 5, 5], [1, 2, 1, 7], [1, 1, 3, 40]] {
            for causal in [false, true] {
                let x = random(1.0, &dims);
                let ours = attention_weights(&x, 0.3, causal).unwrap();
                let composed = composed_attention_weights(&x, 0.3, causal).unwrap();
                assert_alike(&x, &ours, &composed);
            }
        }
        assert!(attention_weights(&random(1.0, &[1, 1, 3, 2]), 1.0, true).is_err());
    }

    #[test]
    fn more_keys_than_are_uploaded_at_once_are_hidden_too() {
        let (queries, keys) = (3, 2050);
        let hidden = hidden_keys(queries, keys, &crate::test_device()).unwrap();
        for (query, row) in hidden.to_vec2::<f32>().unwrap().iter().enumerate() {
            let seen = row.iter().filter(|value| value.is_finite()).count();
            assert_eq!(seen, query + keys + 1 - queries);
            assert!(row[..seen].iter().all(|value| value.is_finite()));
        }
    }

    #[test]
    fn cross_entropy_agrees_with_candles_operations() {
        for (rows, classes) in [(1, 1), (5, 3), (70, 40)] {
            let x = random(2.0, &[rows, classes]);
            let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % classes) as u32).collect();
            let targets = Tensor::from_vec(targets, rows, &crate::test_device()).unwrap();
            let ours = cross_entropy(&x, &targets).unwrap();
            assert_alike(&x, &ours, &composed_cross_entropy(&x, &targets).unwrap());
        }
        if !crate::test_device().is_cpu() {
            // Elsewhere nobody looks.
            return;
        }
        let targets = Tensor::new(&[3u32], &crate::test_device()).unwrap();
        let error = cross_entropy(&random(0.0, &[1, 3]), &targets).unwrap_err().to_string();
        assert!(error.contains("target 3 is out of range"), "{error}");
    }
}
