//! `AdamW` over named parameters, with moments that can be saved and a moving average of the weights.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use vq_ops::{AdamWSlot, AdamWStep, adamw_steps, adamw_steps_by, sum_of_squares};

use crate::{Result, TrainConfig};

/// The optimizer's state.
pub(crate) struct Optimizer {
    first: BTreeMap<String, Tensor>,
    second: BTreeMap<String, Tensor>,
    /// Moving averages of the parameters, where they are kept.
    averages: Option<BTreeMap<String, Tensor>>,
}

const FIRST: &str = "first_moment.";
const SECOND: &str = "second_moment.";
const WEIGHT: &str = "weight.";

type Parameters = BTreeMap<String, Var>;

impl Optimizer {
    /// Moments of zero; averages that start at the parameters.
    pub(crate) fn new(parameters: &Parameters, config: &TrainConfig) -> Result<Self> {
        let zeros = || -> Result<BTreeMap<String, Tensor>> {
            parameters.iter().map(|(name, var)| Ok((name.clone(), var.zeros_like()?))).collect()
        };
        let averages = if config.weight_ema > 0.0 { Some(copies(parameters)?) } else { None };
        Ok(Self { first: zeros()?, second: zeros()?, averages })
    }

    /// One step (numbered from 1) on every parameter that has a gradient; the others stay, decay
    /// included.
    pub(crate) fn step(
        &self,
        parameters: &Parameters,
        decays: impl Fn(&str, &Var) -> bool,
        gradients: &GradStore,
        config: &TrainConfig,
        (step, lr): (u64, f64),
        clip: &Clip,
    ) -> Result<()> {
        let slots = self.slots(parameters, decays, gradients);
        let (grad_scale, scale) = match clip {
            Clip::Known(scale) => (*scale, None),
            Clip::Waiting(scale) => (1.0, Some(scale)),
        };
        let settings = AdamWStep { grad_scale, ..self.settings(config, (step, lr)) };
        Ok(adamw_steps(&slots, &settings, scale)?)
    }

    /// [`step`](Self::step) by numbers that lie on the device, as [`set_numbers`](Self::set_numbers) put
    /// them there.
    pub(crate) fn step_by(
        &self,
        parameters: &Parameters,
        decays: impl Fn(&str, &Var) -> bool,
        gradients: &GradStore,
        numbers: &Numbers,
        scale: &Tensor,
    ) -> Result<()> {
        let slots = self.slots(parameters, decays, gradients);
        Ok(adamw_steps_by(&slots, &numbers.adamw, Some(scale))?)
    }

    /// Brings a step's numbers to the device.
    pub(crate) fn set_numbers(
        &self,
        numbers: &Numbers,
        config: &TrainConfig,
        (step, lr): (u64, f64),
    ) -> Result<()> {
        let device = numbers.adamw.device();
        let settings = Tensor::new(&self.settings(config, (step, lr)).numbers(), device)?;
        numbers.adamw.slice_set(&settings, 0, 0)?;
        let step = Tensor::new(&[u32::try_from(step).unwrap_or(u32::MAX)], device)?;
        Ok(numbers.step.slice_set(&step, 0, 0)?)
    }

    fn settings(&self, config: &TrainConfig, (step, lr): (u64, f64)) -> AdamWStep {
        AdamWStep {
            lr,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: config.weight_decay,
            step,
            grad_scale: 1.0,
            ema_decay: self.averages.as_ref().map(|_| average_decay(config.weight_ema, step)),
        }
    }

    fn slots<'a>(
        &'a self,
        parameters: &'a Parameters,
        decays: impl Fn(&str, &Var) -> bool,
        gradients: &'a GradStore,
    ) -> Vec<AdamWSlot<'a>> {
        let mut slots = Vec::with_capacity(parameters.len());
        for (name, var) in parameters {
            let Some(gradient) = gradients.get(var) else { continue };
            let (Some(first), Some(second)) = (self.first.get(name), self.second.get(name)) else {
                continue;
            };
            let average = self.averages.as_ref().and_then(|averages| averages.get(name));
            slots.push(AdamWSlot {
                param: var.as_tensor(),
                grad: gradient,
                first_moment: first,
                second_moment: second,
                ema: average,
                decays: decays(name, var),
            });
        }
        slots
    }

    /// Forgets the moments of rows that were set anew, and sets their average to the new value.
    pub(crate) fn reset_rows(
        &self,
        parameters: &Parameters,
        name: &str,
        rows: &[usize],
    ) -> Result<()> {
        let (Some(var), Some(first), Some(second)) =
            (parameters.get(name), self.first.get(name), self.second.get(name))
        else {
            return Ok(());
        };
        for &row in rows {
            let value = var.as_detached_tensor().narrow(0, row, 1)?.contiguous()?;
            let zeros = value.zeros_like()?;
            first.slice_set(&zeros, 0, row)?;
            second.slice_set(&zeros, 0, row)?;
            if let Some(average) = self.averages.as_ref().and_then(|averages| averages.get(name)) {
                average.slice_set(&value, 0, row)?;
            }
        }
        Ok(())
    }

    /// Runs `f` while the parameters hold their averages, if there are any, and puts them back.
    pub(crate) fn with_averages<T>(
        &self,
        parameters: &Parameters,
        f: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(averages) = &self.averages else { return f() };
        let raw = copies(parameters)?;
        let result = assign(parameters, averages).and_then(|()| f());
        assign(parameters, &raw)?;
        result
    }

    /// What a checkpoint must hold beside the model: the moments and, where the model's file holds
    /// the averages, the parameters themselves.
    pub(crate) fn tensors(&self, parameters: &Parameters) -> BTreeMap<String, Tensor> {
        let mut tensors = BTreeMap::new();
        for (prefix, moments) in [(FIRST, &self.first), (SECOND, &self.second)] {
            for (name, tensor) in moments {
                tensors.insert(format!("{prefix}{name}"), tensor.clone());
            }
        }
        if self.averages.is_some() {
            for (name, var) in parameters {
                tensors.insert(format!("{WEIGHT}{name}"), var.as_detached_tensor());
            }
        }
        tensors
    }

    /// The state that [`tensors`](Self::tensors) gave, for parameters just loaded from the model's
    /// file. `Err` is the name of a tensor that is missing or of another shape.
    pub(crate) fn restore(
        parameters: &Parameters,
        config: &TrainConfig,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<std::result::Result<Self, String>> {
        // The model's file holds the averages: they are what the parameters are now.
        let restored = Self::new(parameters, config)?;
        for (name, var) in parameters {
            for (prefix, moments) in [(FIRST, &restored.first), (SECOND, &restored.second)] {
                let key = format!("{prefix}{name}");
                match (tensors.get(&key), moments.get(name)) {
                    (Some(saved), Some(moment)) if saved.shape() == var.shape() => {
                        set(moment, saved)?;
                    }
                    _ => return Ok(Err(key)),
                }
            }
        }
        for (name, var) in parameters {
            if let Some(weight) = tensors.get(&format!("{WEIGHT}{name}")) {
                if weight.shape() != var.shape() {
                    return Ok(Err(format!("{WEIGHT}{name}")));
                }
                var.set(weight)?;
            }
        }
        Ok(Ok(restored))
    }
}

/// What changes from step to step, on the device.
pub(crate) struct Numbers {
    /// [`AdamWStep::numbers`]
    adamw: Tensor,
    /// u32 `[1]`
    step: Tensor,
}

impl Numbers {
    pub(crate) fn new(device: &Device) -> Result<Self> {
        let adamw = Tensor::zeros(AdamWStep::NUMBERS, DType::F32, device)?;
        Ok(Self { adamw, step: Tensor::zeros(1, DType::U32, device)? })
    }

    /// The step's number, u32 `[1]`.
    pub(crate) fn step(&self) -> &Tensor {
        &self.step
    }
}

/// The factor that clipping puts on the gradients.
pub(crate) enum Clip {
    Known(f64),
    /// One number, on the device.
    Waiting(Tensor),
}

/// `[2]`, left on the device: the global norm of the gradients, and the factor that brings it down to
/// `limit`. None on the CPU, where nothing has to wait.
pub(crate) fn norm_and_scale(
    parameters: &Parameters,
    gradients: &GradStore,
    limit: f64,
) -> Result<Option<Tensor>> {
    let gradients = parameters.values().filter_map(|var| gradients.get(var)).cloned();
    let gradients: Vec<Tensor> = gradients.collect();
    if gradients.first().is_none_or(|gradient| gradient.device().is_cpu()) {
        return Ok(None);
    }
    Ok(vq_ops::norm_and_scale(&gradients, limit)?)
}

/// The global norm of the gradients, in f64 and in the order of the names.
pub(crate) fn gradient_norm(parameters: &Parameters, gradients: &GradStore) -> Result<f64> {
    let mut sum = 0.0;
    for gradient in parameters.values().filter_map(|var| gradients.get(var)) {
        sum += sum_of_squares(&gradient.contiguous()?)?;
    }
    Ok(sum.sqrt())
}

/// The factor that brings a norm down to `limit`; 0 = no limit.
pub(crate) fn clip_scale(norm: f64, limit: f64) -> f64 {
    if limit > 0.0 && norm > limit { limit / norm } else { 1.0 }
}

/// The first weights are far from the later ones: at first the average forgets faster.
fn average_decay(decay: f64, step: u64) -> f64 {
    decay.min((1.0 + step as f64) / (10.0 + step as f64))
}

/// On Metal, `Tensor::copy` gives the same buffer (candle 0.11.1).
fn copies(parameters: &Parameters) -> Result<BTreeMap<String, Tensor>> {
    let copy = |(name, var): (&String, &Var)| {
        Ok((name.clone(), var.as_detached_tensor().force_contiguous()?))
    };
    parameters.iter().map(copy).collect()
}

fn assign(parameters: &Parameters, values: &BTreeMap<String, Tensor>) -> Result<()> {
    for (name, var) in parameters {
        if let Some(value) = values.get(name) {
            var.set(value)?;
        }
    }
    Ok(())
}

/// Copies `value` into the storage of `target`.
pub(crate) fn set(target: &Tensor, value: &Tensor) -> candle_core::Result<()> {
    target.flatten_all()?.slice_set(&value.contiguous()?.flatten_all()?, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(weight_ema: f64) -> TrainConfig {
        TrainConfig { weight_ema, ..TrainConfig::default() }
    }

    fn parameters() -> Parameters {
        let codebook =
            Var::from_slice(&[1f32, 2., 3., 4., 5., 6.], (3, 2), &vq_ops::test_device()).unwrap();
        BTreeMap::from([("codebook".to_owned(), codebook)])
    }

    fn step(optimizer: &Optimizer, parameters: &Parameters, step: u64, weight_ema: f64) {
        let gradients =
            parameters["codebook"].sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let settings = config(weight_ema);
        optimizer
            .step(parameters, |_, _| false, &gradients, &settings, (step, 0.1), &Clip::Known(1.0))
            .unwrap();
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
        tensor.to_vec2().unwrap()
    }

    /// Point 13: a revived row of a gradient codebook starts with fresh moments.
    #[test]
    fn reset_rows_forget_their_moments_and_the_others_do_not() {
        let parameters = parameters();
        let optimizer = Optimizer::new(&parameters, &config(0.9)).unwrap();
        step(&optimizer, &parameters, 1, 0.9);
        let before = (rows(&optimizer.first["codebook"]), rows(&optimizer.second["codebook"]));
        optimizer.reset_rows(&parameters, "codebook", &[1]).unwrap();
        let after = (rows(&optimizer.first["codebook"]), rows(&optimizer.second["codebook"]));
        for (before, after) in [(before.0, after.0), (before.1, after.1)] {
            assert!(before.iter().flatten().all(|&value| value != 0.0));
            assert_eq!(after[1], [0.0, 0.0]);
            assert_eq!((&after[0], &after[2]), (&before[0], &before[2]));
        }
        // The average of the row is what the row was set to.
        let averages = rows(&optimizer.averages.as_ref().unwrap()["codebook"]);
        let now = rows(parameters["codebook"].as_tensor());
        assert_eq!(averages[1], now[1]);
        assert_ne!(averages[0], now[0]);
    }

    #[test]
    fn a_restored_optimizer_goes_on_to_the_bit() {
        for weight_ema in [0.0, 0.9] {
            let straight = parameters();
            let optimizer = Optimizer::new(&straight, &config(weight_ema)).unwrap();
            step(&optimizer, &straight, 1, weight_ema);
            // What the model's file and the training state hold.
            let model = optimizer.with_averages(&straight, || copies(&straight)).unwrap();
            let saved: BTreeMap<String, Tensor> = optimizer
                .tensors(&straight)
                .into_iter()
                .map(|(name, tensor)| (name, tensor.force_contiguous().unwrap()))
                .collect();
            step(&optimizer, &straight, 2, weight_ema);

            let resumed = parameters();
            assign(&resumed, &model).unwrap();
            let restored =
                Optimizer::restore(&resumed, &config(weight_ema), &saved).unwrap().ok().unwrap();
            step(&restored, &resumed, 2, weight_ema);
            let all = |optimizer: &Optimizer, parameters: &Parameters| -> Vec<Vec<Vec<f32>>> {
                let averages = optimizer.averages.iter().flat_map(|averages| averages.values());
                let tensors = optimizer.tensors(parameters);
                tensors
                    .values()
                    .chain(averages)
                    .map(rows)
                    .chain([rows(&parameters["codebook"])])
                    .collect()
            };
            assert_eq!(all(&optimizer, &straight), all(&restored, &resumed));
        }
    }

    #[test]
    fn tensors_that_are_missing_or_of_another_shape_are_named() {
        let parameters = parameters();
        let optimizer = Optimizer::new(&parameters, &config(0.0)).unwrap();
        let restore = |tensors: &BTreeMap<String, Tensor>| {
            Optimizer::restore(&parameters, &config(0.0), tensors).unwrap().err()
        };
        let mut tensors = optimizer.tensors(&parameters);
        assert_eq!(restore(&tensors), None);
        let wrong = Tensor::zeros((2, 2), candle_core::DType::F32, &vq_ops::test_device()).unwrap();
        tensors.insert("second_moment.codebook".into(), wrong);
        assert_eq!(restore(&tensors).as_deref(), Some("second_moment.codebook"));
        tensors.remove("first_moment.codebook");
        assert_eq!(restore(&tensors).as_deref(), Some("first_moment.codebook"));
    }

    #[test]
    fn the_norm_is_that_of_all_gradients_and_clipping_scales_it_down() {
        let parameters = parameters();
        let gradients = parameters["codebook"].sum_all().unwrap().backward().unwrap();
        let norm = gradient_norm(&parameters, &gradients).unwrap();
        assert!((norm - 6f64.sqrt()).abs() < 1e-12);
        assert!((clip_scale(norm, 1.0) * norm - 1.0).abs() < 1e-12);
        assert!((clip_scale(norm, 0.0) - 1.0).abs() < 1e-12);
        assert!((clip_scale(0.5, 1.0) - 1.0).abs() < 1e-12);
    }
}
