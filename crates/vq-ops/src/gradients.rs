//! The gradients of many parameters at once, beside the graph.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

thread_local! {
    static EXPECTED: RefCell<Option<Vec<Expected>>> = const { RefCell::new(None) };
}

/// The parameters of a network, and what the backward pass leaves for them.
struct Expected {
    params: Vec<Tensor>,
    delivery: Delivery,
}

/// Gradients of all parameters of a network, side by side.
#[derive(Clone, Default)]
pub(crate) struct Delivery(Arc<Mutex<Option<Tensor>>>);

impl Delivery {
    /// Adds them to what was delivered before.
    pub(crate) fn add(&self, gradients: Tensor) -> Result<()> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Some(match place.take() {
            Some(before) => (before + gradients)?,
            None => gradients,
        });
        Ok(())
    }
}

/// A way around candle's graph for the parameters of whole networks, of [stacks](crate::Stack) on CUDA and of
/// [`GatedLayers`](crate::GatedLayers) and [`TransformerLayers`](crate::TransformerLayers) on the CPU: where the
/// graph would take their gradients apart and add each to zeros, three operations for every tensor, they stay
/// side by side, and every parameter's gradient is a view of them.
///
/// From [`new`](Self::new) until it is dropped, what this thread runs of these has no gradients for its
/// parameters in the graph; [`backward`](Self::backward) gives them all the same. Elsewhere all is as it
/// always was. One at a time: an inner one takes what an outer one would have had.
#[must_use]
pub struct Gradients {
    before: Option<Vec<Expected>>,
}

impl Gradients {
    /// Concerns this thread, from now on.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self { before: EXPECTED.replace(Some(Vec::new())) }
    }

    /// What [`Tensor::backward`] gives of a graph that was made meanwhile.
    pub fn backward(self, loss: &Tensor) -> Result<GradStore> {
        let mut store = loss.backward()?;
        for Expected { params, delivery } in EXPECTED.take().unwrap_or_default() {
            let gradients = delivery.0.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(gradients) = gradients else { continue };
            let mut first = 0;
            for param in params {
                let count = param.elem_count();
                let mut gradient = gradients.narrow(0, first, count)?.reshape(param.shape())?;
                first += count;
                if !param.track_op() {
                    continue;
                }
                if let Some(other) = store.get(&param) {
                    gradient = (other + gradient)?;
                }
                store.insert(&param, gradient);
            }
        }
        Ok(store)
    }
}

impl Drop for Gradients {
    fn drop(&mut self) {
        EXPECTED.set(self.before.take());
    }
}

/// Where the gradients of these parameters go, if not into the graph. Only parameters themselves have their
/// place in what a backward pass gives; those that were computed need the graph.
pub(crate) fn delivery(params: &[Tensor]) -> Option<Delivery> {
    EXPECTED.with_borrow_mut(|expected| {
        let expected = expected.as_mut()?;
        if !params.iter().all(Tensor::is_variable) {
            return None;
        }
        let delivery = Delivery::default();
        expected.push(Expected { params: params.to_vec(), delivery: delivery.clone() });
        Some(delivery)
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::dispatch::only_primitives;
    use crate::{Conv2d, Layer, Stack};

    fn noise(dims: &[usize], seed: f32) -> Var {
        let n = dims.iter().product::<usize>();
        let values = (0..n).map(|i| (i as f32 * 12.9898 + seed).sin()).collect();
        Var::from_vec(values, dims, &crate::test_device()).unwrap()
    }

    #[test]
    fn gradients_beside_the_graph_are_those_of_the_graph() {
        let conv = |i, o| Layer::Conv2d {
            in_channels: i,
            out_channels: o,
            kernel: 3,
            config: Conv2d { padding: 1, ..Conv2d::default() },
        };
        let layers = vec![conv(3, 4), Layer::Residual { channels: 4, hidden: 2 }];
        let params: Vec<Var> = layers
            .iter()
            .flat_map(Layer::parameters)
            .enumerate()
            .map(|(i, (_, shape))| noise(&shape, i as f32))
            .collect();
        let tensors: Vec<Tensor> = params.iter().map(|var| var.as_tensor().clone()).collect();
        let x = noise(&[2, 5, 6, 3], 9.);
        // The stack twice, so that gradients add up; and a parameter that the graph knows too.
        let loss = || {
            let stack = Stack::new(layers.clone()).unwrap();
            let first = stack.forward(&x, &tensors).unwrap();
            let again = stack.forward(&(x.as_tensor() * 0.5).unwrap(), &tensors).unwrap();
            let sum = (first.sqr().unwrap() + again).unwrap().sum_all().unwrap();
            (sum + tensors[1].sum_all().unwrap()).unwrap()
        };
        let values = |store: &GradStore, var: &Var| {
            store.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        only_primitives(|| {
            let plain = loss().backward().unwrap();
            let beside = Gradients::new();
            let beside = beside.backward(&loss()).unwrap();
            for var in params.iter().chain([&x]) {
                let (ours, theirs) = (values(&beside, var), values(&plain, var));
                let scale = theirs.iter().fold(1f32, |m, v| m.max(v.abs()));
                for (a, b) in ours.iter().zip(&theirs) {
                    assert!((a - b).abs() <= 1e-5 * scale, "{a} {b}");
                }
            }
            // And as before once it is gone.
            assert!(loss().backward().unwrap().get(&params[0]).is_some());
        });
    }
}
