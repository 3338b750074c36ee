//! The networks as one operation against the same of an operation for every part.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use vq_ops::{DropSeed, GatedLayers, Gradients};

use crate::layers::{Builder, Context, Mode};
use crate::pixelcnn::PixelCnn;
use crate::transformer::Transformer;
use crate::{ConditionerConfig, Config, GridConfig, PixelCnnConfig, Result, TransformerConfig};

/// Few positions, of which several images are taken together, and many.
const GRIDS: [[usize; 2]; 2] = [[5, 7], [22, 23]];
const TRAINING: Mode =
    Mode { tracked: true, training: true, dropout: 0.3, seed: DropSeed::Known(11) };

fn random(shape: &[usize], below: u32, start: u32) -> Tensor {
    let count: usize = shape.iter().product();
    let mut state = start;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    Tensor::from_vec((0..count).map(|_| next()).collect(), shape, &Device::Cpu).unwrap()
}

/// A variable with values from -1 to 1.
fn noise(shape: &[usize], start: u32) -> Var {
    let values = random(shape, 2001, start).to_dtype(DType::F32).unwrap();
    Var::from_tensor(&((values / 1000.).unwrap() - 1.).unwrap()).unwrap()
}

fn config(grid: [usize; 2], conditioned: bool) -> Config {
    let above = GridConfig { grid: [2, 3], codebook_sizes: vec![4] };
    Config {
        grid,
        codebook_sizes: vec![6, 3],
        class_count: if conditioned { 0 } else { 4 },
        conditioning: if conditioned { vec![above] } else { Vec::new() },
        conditioner: ConditionerConfig { channels: 9, ..ConditionerConfig::default() },
        ..Config::default()
    }
}

/// What a network is told about that many images; the map is a variable.
fn context(grid: [usize; 2], images: usize, conditioned: bool) -> Context {
    let map = noise(&[images, grid[0], grid[1], 9], 3);
    Context {
        labels: (!conditioned).then(|| random(&[images], 5, 2)),
        map: conditioned.then(|| map.as_tensor().clone()),
    }
}

fn pixelcnn(config: &Config) -> (PixelCnn, BTreeMap<String, Var>) {
    let network =
        PixelCnnConfig { channels: 20, layers: 3, skip_channels: 24, ..PixelCnnConfig::default() };
    let mut builder = Builder::new(5, &Device::Cpu);
    let net = PixelCnn::new(config, &network, &mut builder).unwrap();
    (net, builder.parameters)
}

fn transformer(config: &Config) -> (Transformer, BTreeMap<String, Var>) {
    let network = TransformerConfig { channels: 24, layers: 3, heads: 3, mlp_hidden: 40 };
    let mut builder = Builder::new(5, &Device::Cpu);
    let net = Transformer::new(config, &network, &mut builder).unwrap();
    (net, builder.parameters)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Values, and gradients of all that the parts have gradients of, by the graph and beside it.
fn compare(
    at_once: impl Fn() -> Result<Tensor>,
    parts: impl Fn() -> Result<Tensor>,
    variables: &BTreeMap<String, &Tensor>,
    at_least: usize,
) {
    let weights = noise(parts().unwrap().dims(), 9).as_detached_tensor();
    let loss = |out: &Tensor| (out * &weights).unwrap().sum_all().unwrap();
    let of_parts = loss(&parts().unwrap()).backward().unwrap();
    let by_graph = loss(&at_once().unwrap()).backward().unwrap();
    let beside = Gradients::new();
    let beside = beside.backward(&loss(&at_once().unwrap())).unwrap();
    let mut pairs = vec![("output", at_once().unwrap(), parts().unwrap())];
    for (name, variable) in variables {
        let Some(theirs) = of_parts.get(variable) else { continue };
        for store in [&by_graph, &beside] {
            let ours = store.get(variable).unwrap_or_else(|| panic!("{name} has no gradient"));
            pairs.push((name, ours.clone(), theirs.clone()));
        }
    }
    assert!(pairs.len() > 2 * at_least, "{}", pairs.len());
    for (name, ours, theirs) in pairs {
        assert_eq!(ours.dims(), theirs.dims());
        let (ours, theirs) = (values(&ours), values(&theirs));
        let scale = theirs.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(scale > 0. || name.ends_with("key.bias"), "{name}");
        for (a, b) in ours.iter().zip(&theirs) {
            // The gradient of a key's bias is nothing but rounding.
            let bound = if name.ends_with("key.bias") { 1e-4 } else { 2e-5 * scale };
            assert!((a - b).abs() <= bound, "{name}: {a} {b} of {scale}");
        }
    }
}

#[test]
fn a_pixelcnn_at_once_gives_the_values_and_gradients_of_its_parts() {
    let [small, large] = GRIDS;
    for (grid, images, conditioned) in
        [(small, 1, false), (small, 8, false), (small, 7, true), (large, 2, true)]
    {
        let (config, context) = (config(grid, conditioned), context(grid, images, conditioned));
        let (net, parameters) = pixelcnn(&config);
        let embedded = noise(&[images, grid[0], grid[1], 20], 1);
        let fused: &GatedLayers = net.fused.as_ref().unwrap();
        let mut variables: BTreeMap<String, &Tensor> =
            parameters.iter().map(|(name, var)| (name.clone(), var.as_tensor())).collect();
        variables.insert("embedded".to_owned(), embedded.as_tensor());
        variables.extend(context.map.iter().map(|map| ("map".to_owned(), map)));
        compare(
            || net.at_once(fused, &embedded, &context, TRAINING),
            || net.layer_by_layer(&embedded, &context, TRAINING),
            &variables,
            3 * 10,
        );
    }
}

#[test]
fn a_transformer_at_once_gives_the_values_and_gradients_of_its_parts() {
    let [small, large] = GRIDS;
    for (grid, images, conditioned) in
        [(small, 1, false), (small, 8, false), (small, 7, true), (large, 2, true)]
    {
        let (config, context) = (config(grid, conditioned), context(grid, images, conditioned));
        let (net, parameters) = transformer(&config);
        let x = noise(&[images, grid[0], grid[1], 24], 1);
        let mut variables: BTreeMap<String, &Tensor> =
            parameters.iter().map(|(name, var)| (name.clone(), var.as_tensor())).collect();
        variables.insert("x".to_owned(), x.as_tensor());
        variables.extend(context.map.iter().map(|map| ("map".to_owned(), map)));
        for mode in [TRAINING, Mode { dropout: 0., ..TRAINING }] {
            compare(
                || net.at_once(&x, &context, mode),
                || net.layer_by_layer(&x, &context, mode),
                &variables,
                3 * 14,
            );
        }
    }
}

#[test]
fn an_images_features_do_not_depend_on_the_others_of_its_batch() {
    let grid = GRIDS[0];
    let (config, context) = (config(grid, false), context(grid, 8, false));
    let (net, _) = pixelcnn(&config);
    let (transformer, _) = transformer(&config);
    let codes = random(&[8, grid[0], grid[1], 2], 3, 1);
    let run = |codes: &Tensor, context: &Context| {
        let both = [
            net.forward(codes, context, Mode::EVALUATE).unwrap(),
            transformer.forward(codes, context, Mode::EVALUATE).unwrap(),
        ];
        both.map(|t| t.unsqueeze(0).unwrap())
    };
    let all = run(&codes, &context);
    for image in [0, 3, 7] {
        let codes = codes.narrow(0, image, 1).unwrap().contiguous().unwrap();
        let labels = context.labels.as_ref().map(|labels| labels.narrow(0, image, 1).unwrap());
        let one = run(&codes, &Context { labels, map: None });
        let bits = |t: &Tensor| values(t).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for (one, all) in one.iter().zip(&all) {
            assert_eq!(bits(one), bits(&all.narrow(1, image, 1).unwrap()));
        }
    }
}
