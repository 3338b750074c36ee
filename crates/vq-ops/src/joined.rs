//! Maps side by side, as one map.

use candle_core::{D, DType, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;
use crate::feature_map::{Collected, FeatureMap};
use crate::primitives::{enter, leave};
use crate::repeat::{add_pixels, repeat_pixels};

/// One of the maps that a stack takes side by side.
pub(crate) struct Source {
    /// `[B, h, w, ≥ C]`, with zeros beyond the channels; detached.
    pub(crate) values: Tensor,
    /// C, of which more may be there.
    pub(crate) channels: usize,
    /// How often each pixel counts, in both directions.
    pub(crate) times: usize,
    /// Where its gradient goes, if not into the graph.
    gradient: Option<Collected>,
}

/// What a stack takes.
pub(crate) struct Joined {
    sources: Vec<Source>,
    /// What leads to it in the graph: the one map, or the places of all, added up.
    pub(crate) lead: Option<Tensor>,
    /// Whether it is a map of the graph.
    is_in_graph: bool,
    dims: [usize; 4],
}

impl Joined {
    /// The maps, each repeated, all of which must come to the same size.
    pub(crate) fn new(inputs: &[(&FeatureMap, usize)]) -> Result<Self> {
        let dims = joined_dims(inputs)?;
        if let [(map, 1)] = inputs
            && let Some(x) = map.in_graph()
        {
            return Self::of(x);
        }
        let (mut sources, mut lead) = (Vec::new(), None);
        for &(map, times) in inputs {
            let map = map.to_beside()?;
            let gradient = map.place.is_some().then_some(map.gradient);
            lead = match (lead, map.place) {
                (Some(sum), Some(place)) => Some((sum + place)?),
                (sum, place) => sum.or(place),
            };
            sources.push(Source { values: map.values, channels: map.channels, times, gradient });
        }
        Ok(Self { sources, lead, is_in_graph: false, dims })
    }

    /// One map of the graph.
    pub(crate) fn of(x: &Tensor) -> Result<Self> {
        let (b, h, w, channels) = x.dims4()?;
        let x = x.contiguous()?;
        let source = Source { values: x.detach(), channels, times: 1, gradient: None };
        let lead = x.track_op().then_some(x);
        let sources = vec![source];
        Ok(Self { sources, lead, is_in_graph: true, dims: [b, h, w, channels] })
    }

    /// `[B, H, W, C]` of all together.
    pub(crate) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// Any of them, for the device's sake.
    pub(crate) fn any(&self) -> Result<&Tensor> {
        match self.sources.first() {
            Some(source) => Ok(&source.values),
            None => bail!("a stack takes at least one map"),
        }
    }

    /// One map `[B, H, W, channels]` of `dtype`, with zeros beyond the maps' own channels.
    pub(crate) fn join(&self, dtype: DType, channels: usize) -> Result<Tensor> {
        if let [Source { values, channels: own, times: 1, .. }] = &self.sources[..] {
            if values.dtype() == dtype && values.dim(D::Minus1)? == channels {
                return Ok(values.clone());
            }
            if values.dtype() == DType::F32 && values.dim(D::Minus1)? == *own {
                return enter(values, dtype, channels);
            }
        }
        #[cfg(feature = "cuda")]
        if on_cuda(self.any()?.device()) {
            return crate::cuda::joined::join(&self.sources, self.dims, dtype, channels);
        }
        let parts = self.sources.iter().map(|source| {
            let own = source.values.narrow(D::Minus1, 0, source.channels)?;
            let own = own.to_dtype(DType::F32)?.contiguous()?;
            if source.times == 1 { Ok(own) } else { repeat_pixels(&own, source.times) }
        });
        let all = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, D::Minus1)?;
        let missing = channels - all.dim(D::Minus1)?;
        all.pad_with_zeros(D::Minus1, 0, missing)?.to_dtype(dtype)?.contiguous()
    }

    /// Gives each map its part of the gradient `[B, H, W, ≥ C]` of what [`join`](Self::join) gave: that which goes
    /// into the graph.
    pub(crate) fn part(&self, grad: &Tensor) -> Result<Option<Tensor>> {
        if self.is_in_graph {
            return leave(grad, self.dims[3]).map(Some);
        }
        let (mut first, is_only) = (0, self.sources.len() == 1);
        for source in &self.sources {
            if let Some(gradient) = &source.gradient {
                let is_all = is_only && source.times == 1 && source.is_like(grad)?;
                gradient.add(if is_all { grad.clone() } else { source.part(grad, first)? })?;
            }
            first += source.channels;
        }
        // What stands for a map has a gradient too, which says nothing.
        Ok(self.lead.as_ref().map(Tensor::detach))
    }
}

impl Source {
    /// Its gradient, in the format of its values, from `grad`, in which its channels start at `first`.
    fn part(&self, grad: &Tensor, first: usize) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if on_cuda(grad.device()) {
            return crate::cuda::joined::part(self, grad, first);
        }
        let own = grad.narrow(D::Minus1, first, self.channels)?;
        let own = own.to_dtype(DType::F32)?.contiguous()?;
        let own = if self.times == 1 { own } else { add_pixels(&own, self.times)? };
        let missing = self.values.dim(D::Minus1)? - self.channels;
        own.pad_with_zeros(D::Minus1, 0, missing)?.to_dtype(self.values.dtype())?.contiguous()
    }

    /// Whether a gradient has the format of its values.
    fn is_like(&self, grad: &Tensor) -> Result<bool> {
        let is_wide = self.values.dim(D::Minus1)? == grad.dim(D::Minus1)?;
        Ok(is_wide && self.values.dtype() == grad.dtype())
    }
}

/// `[B, H, W, C]` of maps side by side, each repeated.
pub(crate) fn joined_dims(inputs: &[(&FeatureMap, usize)]) -> Result<[usize; 4]> {
    let mut all: Option<[usize; 4]> = None;
    for (map, times) in inputs {
        let (b, h, w, c) = map.dims4()?;
        if *times == 0 {
            bail!("each pixel of a map counts at least once");
        }
        let dims = [b, h * times, w * times, c];
        all = match all {
            None => Some(dims),
            Some([b, h, w, before]) if [b, h, w] == dims[..3] => Some([b, h, w, before + c]),
            Some(before) => bail!("maps side by side differ in size: {before:?} and {dims:?}"),
        };
    }
    all.map_or_else(|| bail!("a stack takes at least one map"), Ok)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::dispatch::only_primitives;
    use crate::testing::{exactly, noise, relative_error, values};
    use crate::{Conv2d, ConvTranspose2d, Gradients, Layer, Precision, Replaced, Stack};

    #[track_caller]
    fn assert_alike(ours: &[Vec<f32>], exact: &[Vec<f32>], allowed: f32) {
        assert_eq!(ours.len(), exact.len());
        for (ours, exact) in ours.iter().zip(exact) {
            let error = relative_error(ours, exact);
            assert!(error < allowed, "{error}");
        }
    }

    fn conv(
        in_channels: usize,
        out_channels: usize,
        kernel: usize,
        stride: usize,
        relu_input: bool,
    ) -> Layer {
        let padding = usize::from(kernel > 1);
        let config = Conv2d { stride, padding, relu_input, ..Conv2d::default() };
        Layer::Conv2d { in_channels, out_channels, kernel, config }
    }

    /// Two levels: features that one stack takes alone and another beside those of half the size and a tensor of
    /// half the size, which are used elsewhere too.
    struct Network {
        stacks: Vec<Stack>,
        params: Vec<Vec<Var>>,
        x: Var,
        small: Var,
    }

    impl Network {
        fn new(channels: usize, precision: Precision) -> Self {
            let layers = [
                vec![conv(3, channels, 3, 1, false)],
                vec![conv(channels, 4, 4, 2, true), Layer::Residual { channels: 4, hidden: 2 }],
                vec![conv(channels + 4 + 2, 6, 1, 1, false)],
            ];
            let params = layers.iter().zip(1u64..).map(|(layers, stack)| {
                let shapes = layers.iter().flat_map(Layer::parameters).zip(0u64..);
                shapes.map(|((_, shape), i)| noise(&shape, 10 * stack + i)).collect()
            });
            let params = params.collect();
            let stacks = layers.into_iter().map(|layers| {
                let mut stack = Stack::new(layers).unwrap();
                stack.set_precision(precision);
                stack
            });
            let stacks = stacks.collect();
            Self { stacks, params, x: noise(&[2, 6, 8, 3], 2), small: noise(&[2, 3, 4, 2], 3) }
        }

        fn loss(&self, is_tracked: bool) -> Tensor {
            let tensor = |var: &Var| {
                if is_tracked { var.as_tensor().clone() } else { var.as_detached_tensor() }
            };
            let params = |i: usize| self.params[i].iter().map(tensor).collect::<Vec<_>>();
            let x = tensor(&self.x).into();
            let small = FeatureMap::from(tensor(&self.small));
            let features = self.stacks[0].forward_map(&[(&x, 1)], &params(0)).unwrap();
            let above = self.stacks[1].forward_map(&[(&features, 1)], &params(1)).unwrap();
            assert_eq!(above.dims4().unwrap(), (2, 3, 4, 4));
            let inputs = [(&features, 1), (&above, 2), (&small, 2)];
            let y = self.stacks[2].forward_joined(&inputs, &params(2)).unwrap();
            assert_eq!(y.dims(), [2, 6, 8, 6]);
            let weighed = |y: &Tensor| {
                let weights = noise(y.dims(), 4).as_detached_tensor();
                (y * weights).unwrap().sum_all().unwrap()
            };
            let above = weighed(&above.tensor().unwrap());
            (weighed(&y) + above + weighed(&tensor(&self.small))).unwrap()
        }

        fn vars(&self) -> impl Iterator<Item = &Var> {
            self.params.iter().flatten().chain([&self.x, &self.small])
        }

        fn run(&self, beside: bool) -> Vec<Vec<f32>> {
            let gradients = beside.then(Gradients::new);
            let loss = self.loss(true);
            let store = match gradients {
                Some(gradients) => gradients.backward(&loss).unwrap(),
                None => loss.backward().unwrap(),
            };
            let of = self.vars().map(|var| values(store.get(var).unwrap()));
            std::iter::once(values(&loss)).chain(of).collect()
        }
    }

    #[test]
    fn maps_beside_the_graph_are_those_of_the_graph() {
        // The first fills 16 bytes in bf16, the others are filled up.
        for channels in [8, 5, 2] {
            for (precision, allowed) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.03)] {
                let network = Network::new(channels, precision);
                let exact = exactly(|| Network::new(channels, precision).run(false));
                for beside in [false, true] {
                    let ours = only_primitives(|| network.run(beside));
                    assert_alike(&ours, &exact, allowed);
                }
                let still = only_primitives(|| network.loss(false));
                assert!(!still.track_op());
                assert_eq!(values(&still), values(&only_primitives(|| network.loss(true))));
            }
        }
    }

    /// Maps of few channels, which the first convolution takes as windows: one map beside the graph alone, then twice
    /// beside a tensor; and one that is used outside of what is descended on.
    #[test]
    fn windows_are_taken_of_maps_too() {
        let layers =
            [conv(3, 2, 3, 1, false), conv(2, 8, 4, 2, false), conv(2 + 2 + 3, 5, 4, 2, false)];
        let run = |precision| {
            let params: Vec<[Var; 2]> = layers
                .iter()
                .zip(1u64..)
                .map(|(layer, stack)| {
                    let shapes: Vec<_> = layer.parameters().into_iter().map(|(_, s)| s).collect();
                    [noise(&shapes[0], 10 * stack), noise(&shapes[1], 10 * stack + 1)]
                })
                .collect();
            let x = noise(&[2, 6, 8, 3], 1);
            let forward = |i: usize, maps: &[(&FeatureMap, usize)]| {
                let mut stack = Stack::new(vec![layers[i].clone()]).unwrap();
                stack.set_precision(precision);
                let params = params[i].each_ref().map(|var| var.as_tensor().clone());
                stack.forward_map(maps, &params).unwrap()
            };
            let image = FeatureMap::from(x.as_tensor().clone());
            let features = forward(0, &[(&image, 1)]);
            let alone = forward(1, &[(&features, 1)]).tensor().unwrap();
            let twice = forward(2, &[(&features, 1), (&features, 1), (&image, 1)]);
            let _unused = forward(1, &[(&features, 1)]);
            let twice = twice.tensor().unwrap().sum_all().unwrap();
            let loss = (alone.sum_all().unwrap() + twice).unwrap();
            let store = loss.backward().unwrap();
            let vars = params.iter().flatten().chain([&x]);
            vars.map(|var| values(store.get(var).unwrap())).collect::<Vec<_>>()
        };
        for (precision, allowed) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.03)] {
            let exact = exactly(|| run(Precision::F32));
            let ours = only_primitives(|| run(precision));
            assert_alike(&ours, &exact, allowed);
        }
    }

    /// Used by a stack and by the error that comes with it, or by only one of them.
    #[test]
    fn a_map_whose_values_were_replaced_has_the_gradients_of_both_uses() {
        for (channels, uses) in
            [(8, [true, true]), (5, [true, true]), (8, [true, false]), (8, [false, true])]
        {
            let layers = [conv(3, channels, 3, 1, false), conv(channels, 4, 4, 2, true)];
            let run = |precision, is_tracked: bool| {
                let params: Vec<Vec<Var>> = layers
                    .iter()
                    .zip(1u64..)
                    .map(|(layer, stack)| {
                        let shapes = layer.parameters().into_iter().zip(0u64..);
                        shapes.map(|((_, shape), i)| noise(&shape, 10 * stack + i)).collect()
                    })
                    .collect();
                let x = noise(&[2, 6, 8, 3], 2);
                let tensor = |var: &Var| {
                    if is_tracked { var.as_tensor().clone() } else { var.as_detached_tensor() }
                };
                let stack = |i: usize, map: &FeatureMap| {
                    let mut stack = Stack::new(vec![layers[i].clone()]).unwrap();
                    stack.set_precision(precision);
                    let params: Vec<Tensor> = params[i].iter().map(tensor).collect();
                    stack.forward_map(&[(map, 1)], &params).unwrap()
                };
                let features = stack(0, &tensor(&x).into());
                let found = features.values().unwrap();
                let others = found.affine(-0.5, 0.1).unwrap();
                let Replaced { map, error } = features.replace(&found, &others).unwrap();
                assert!(!map.values().unwrap().track_op());
                let y = stack(1, &map).tensor().unwrap();
                let weights = noise(y.dims(), 4).as_detached_tensor();
                let of_stack = (y * weights).unwrap().sum_all().unwrap();
                let error = (error * 100.).unwrap();
                let loss = match uses {
                    [true, true] => (of_stack + error).unwrap(),
                    [true, false] => of_stack,
                    _ => error,
                };
                if !is_tracked {
                    return vec![values(&loss)];
                }
                let store = loss.backward().unwrap();
                let vars = params.iter().flatten().chain([&x]);
                // Something that is like nothing else, where there is none.
                let of = vars.map(|var| store.get(var).map_or(vec![77.], values));
                std::iter::once(values(&loss)).chain(of).collect::<Vec<_>>()
            };
            for (precision, allowed) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.03)] {
                let exact = exactly(|| run(Precision::F32, true));
                let ours = only_primitives(|| run(precision, true));
                assert_alike(&ours, &exact, allowed);
                assert_eq!(only_primitives(|| run(precision, false))[0], ours[0]);
            }
        }
    }

    /// The last stack's map is put together of windows where it has few channels.
    #[test]
    fn the_error_of_images_reaches_the_stack_that_gave_them() {
        for channels in [3, 9] {
            let up = Layer::ConvTranspose2d {
                in_channels: 8,
                out_channels: channels,
                kernel: 4,
                config: ConvTranspose2d { stride: 2, padding: 1, ..ConvTranspose2d::default() },
            };
            let layers = vec![conv(3, 8, 3, 1, false), up];
            let shapes = layers.iter().flat_map(Layer::parameters).zip(1u64..);
            let shapes: Vec<_> = shapes.map(|((_, shape), i)| (shape, i)).collect();
            let inputs = || (noise(&[2, 5, 4, 3], 20), noise(&[2, channels, 10, 8], 21));
            let run = |precision| {
                let params: Vec<Var> = shapes.iter().map(|(shape, i)| noise(shape, *i)).collect();
                let (x, images) = inputs();
                let mut stack = Stack::new(layers.clone()).unwrap();
                stack.set_precision(precision);
                let given: Vec<Tensor> = params.iter().map(|var| var.as_tensor().clone()).collect();
                let y = stack.forward_map(&[(&x.as_tensor().clone().into(), 1)], &given).unwrap();
                let error = y.image_error(&images, 1.5).unwrap();
                let twice = y.tensor().unwrap().mean_all().unwrap();
                let store = (&error + twice).unwrap().backward().unwrap();
                assert!(store.get(&images).is_none());
                let still = y.detach().image_error(&images, 1.5).unwrap();
                assert_eq!(values(&still), values(&error));
                let of = params.iter().chain([&x]).map(|var| values(store.get(var).unwrap()));
                std::iter::once(values(&error)).chain(of).collect::<Vec<_>>()
            };
            for (precision, allowed) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.03)] {
                let exact = exactly(|| run(Precision::F32));
                assert_alike(&only_primitives(|| run(precision)), &exact, allowed);
            }
            let (x, images) = inputs();
            let y = FeatureMap::from(x.as_tensor().clone());
            assert!(y.image_error(&images, 1.).is_err());
        }
    }

    #[test]
    fn a_second_backward_pass_gives_the_same() {
        let network = Network::new(5, Precision::Bf16);
        only_primitives(|| {
            let loss = network.loss(true);
            let [first, second] = [loss.backward().unwrap(), loss.backward().unwrap()];
            for var in network.vars() {
                assert_eq!(first.get(var).map(values), second.get(var).map(values));
            }
        });
    }

    #[test]
    fn gradients_of_maps_that_nobody_asks_for_are_not_computed() {
        let network = Network::new(5, Precision::F32);
        only_primitives(|| {
            let params: Vec<Tensor> =
                network.params[0].iter().map(Var::as_detached_tensor).collect();
            let x = FeatureMap::from(network.x.as_detached_tensor());
            let still = network.stacks[0].forward_map(&[(&x, 1)], &params).unwrap();
            assert!(still.to_beside().unwrap().place.is_none());
            let params: Vec<Tensor> =
                network.params[1].iter().map(|var| var.as_tensor().clone()).collect();
            let y = network.stacks[1].forward_map(&[(&still, 1)], &params).unwrap();
            let store = y.tensor().unwrap().sum_all().unwrap().backward().unwrap();
            assert!(network.params[1].iter().all(|var| store.get(var).is_some()));
            assert!(network.params[0].iter().all(|var| store.get(var).is_none()));
        });
    }

    #[test]
    fn maps_of_different_sizes_are_refused() {
        let network = Network::new(5, Precision::F32);
        let x = FeatureMap::from(network.x.as_detached_tensor());
        let small = FeatureMap::from(network.small.as_detached_tensor());
        let params: Vec<Tensor> = network.params[2].iter().map(Var::as_detached_tensor).collect();
        let run = |x: &[(&FeatureMap, usize)]| {
            let run = || network.stacks[2].forward_map(x, &params).unwrap_err().to_string();
            let errors = [run(), only_primitives(run)];
            errors.map(|error| error.lines().next().unwrap_or_default().to_owned())
        };
        let is_refused = |x: &[(&FeatureMap, usize)], message: &str| {
            run(x).iter().all(|error| error.contains(message))
        };
        assert!(is_refused(&[(&x, 1), (&small, 1)], "[2, 6, 8, 3] and [2, 3, 4, 2]"));
        assert!(is_refused(&[], "at least one map"));
        assert!(is_refused(&[(&x, 0)], "at least once"));
    }
}
