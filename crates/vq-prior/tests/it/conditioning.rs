//! Points 30 and 31: classes and the levels above.

use candle_core::{DType, Device, Tensor};
use vq_prior::{Conditions, Training};

use crate::common::{Data, all_kinds, pixelcnn, plain, prior, rich, transformer, values};

#[test]
fn the_class_and_the_levels_above_reach_every_layer() {
    for network in [pixelcnn(0), pixelcnn(2), transformer()] {
        let config = rich(network);
        let (prior, data) = (prior(&config), Data::new(&config, 4, 3));
        let training = Training { seed: 0, step: 0 };
        let loss = prior.loss(&data.codes, &data.conditions(), training).unwrap();
        let gradients = loss.backward().unwrap();
        let (mut classes, mut maps) = (0, 0);
        for (name, var) in prior.parameters() {
            let gradient = gradients.get(var);
            assert!(gradient.is_some(), "{name} has no gradient");
            let values = gradient.map(values).unwrap();
            assert!(values.iter().any(|v| v.abs() > 0.0), "the gradient of {name} is zero");
            assert!(values.iter().all(|v| v.is_finite()));
            if name.ends_with("class") {
                classes += 1;
                // No image here is without a class.
                let none = values.rchunks(var.dim(1).unwrap()).next().unwrap();
                assert!(none.iter().all(|v| v.abs() <= 0.0), "{name}");
            }
            maps += usize::from(name.ends_with("map.weight"));
        }
        let layers = match &config.network {
            vq_prior::Network::PixelCnn(network) => network.layers,
            vq_prior::Network::Transformer(network) => network.layers,
        };
        assert!(classes >= layers, "{classes} of {layers}");
        assert_eq!(maps, layers);
    }
}

#[test]
fn each_class_changes_the_logits_of_the_very_first_code_and_missing_labels_are_the_null_class() {
    for network in [pixelcnn(0), transformer()] {
        let config = rich(network);
        let (prior, data) = (prior(&config), Data::new(&config, 1, 3));
        let logits = |label: Option<u32>| {
            let labels = label.map(|label| Tensor::new(&[label], &Device::Cpu).unwrap());
            let conditions = Conditions { labels: labels.as_ref(), conditioning: &data.grids };
            values(&prior.logits(&data.codes, &conditions).unwrap())
        };
        let largest = *config.codebook_sizes.iter().max().unwrap();
        for (a, b) in [(0, 1), (1, 2), (0, 3)] {
            let (a, b) = (logits(Some(a)), logits(Some(b)));
            for (index, (a, b)) in a.chunks(largest).zip(b.chunks(largest)).enumerate() {
                assert_ne!(a, b, "code {index}");
            }
        }
        assert_eq!(logits(None), logits(Some(3)));
    }
}

#[test]
fn every_code_above_changes_the_logits_of_every_code_below() {
    for network in [pixelcnn(0), transformer()] {
        let config = rich(network);
        let (prior, data) = (prior(&config), Data::new(&config, 1, 3));
        let largest = *config.codebook_sizes.iter().max().unwrap();
        let logits = |grids: &[Tensor]| {
            let conditions = Conditions { labels: data.labels.as_ref(), conditioning: grids };
            values(&prior.logits(&data.codes, &conditions).unwrap())
        };
        let before = logits(&data.grids);
        for (level, grid) in config.conditioning.iter().enumerate() {
            let codes: Vec<u32> = data.grids[level].flatten_all().unwrap().to_vec1().unwrap();
            for index in 0..codes.len() {
                let size = grid.codebook_sizes[index % grid.codebook_sizes.len()] as u32;
                let mut codes = codes.clone();
                codes[index] = (codes[index] + 1) % size;
                let mut grids = data.grids.clone();
                let shape = grids[level].shape().clone();
                grids[level] = Tensor::from_vec(codes, shape, &Device::Cpu).unwrap();
                let after = logits(&grids);
                let pairs = before.chunks(largest).zip(after.chunks(largest));
                for (to, (before, after)) in pairs.enumerate() {
                    assert_ne!(before, after, "from {index} of level {level} to {to}");
                }
            }
        }
    }
}

#[test]
fn an_image_is_told_of_its_own_codes_above_only() {
    for (name, config) in all_kinds() {
        let (prior, data) = (prior(&config), Data::new(&config, 3, 6));
        let together = values(&prior.logits(&data.codes, &data.conditions()).unwrap());
        for image in 0..3 {
            let one = |t: &Tensor| t.narrow(0, image, 1).unwrap().contiguous().unwrap();
            let labels = data.labels.as_ref().map(one);
            let grids: Vec<Tensor> = data.grids.iter().map(one).collect();
            let conditions = Conditions { labels: labels.as_ref(), conditioning: &grids };
            let alone = values(&prior.logits(&one(&data.codes), &conditions).unwrap());
            let n = alone.len();
            assert_eq!(alone, together[image * n..(image + 1) * n], "{name}, image {image}");
        }
    }
}

#[test]
fn labels_are_dropped_at_the_given_rate_by_seed_and_step() {
    let mut config = plain(transformer(), [2, 2]);
    config.class_count = 2;
    let images = 400;
    let data = Data::new(&config, images, 1);
    for rate in [0.0, 0.25, 1.0] {
        config.label_dropout = rate;
        let prior = prior(&config);
        let table = &prior.parameters()["norm.class"];
        // Gradients of the rows count the images of each class; that of no class is the last.
        let dropped = |step| {
            let training = Training { seed: 5, step };
            let loss = prior.loss(&data.codes, &data.conditions(), training).unwrap();
            let gradients = loss.backward().unwrap();
            values(&gradients.get(table).unwrap().narrow(0, 2, 1).unwrap())
        };
        let (first, again, other) = (dropped(1), dropped(1), dropped(2));
        assert_eq!(first, again);
        assert_eq!(first.iter().any(|v| v.abs() > 0.0), rate > 0.0);
        assert_eq!(first != other, rate > 0.0 && rate < 1.0);
    }
}

#[test]
fn conditions_that_do_not_fit_are_named() {
    let config = rich(transformer());
    let (prior, data) = (prior(&config), Data::new(&config, 2, 3));
    let error = |codes: &Tensor, labels: Option<&Tensor>, conditioning: &[Tensor]| {
        prior.logits(codes, &Conditions { labels, conditioning }).unwrap_err().to_string()
    };
    let codes = &data.codes;
    let labels = Tensor::new(&[0u32, 4], &Device::Cpu).unwrap();
    assert!(error(codes, Some(&labels), &data.grids).contains("label 4 is out of range"));
    let labels = Tensor::new(&[0u32], &Device::Cpu).unwrap();
    assert!(error(codes, Some(&labels), &data.grids).contains("labels must be u32 [2]"));
    assert!(error(codes, None, &data.grids[..1]).contains("2 grid(s) of codes, got 1"));
    let swapped = [data.grids[1].clone(), data.grids[0].clone()];
    assert!(error(codes, None, &swapped).contains("the codes of conditioning.0 must be"));
    let half = data.grids.iter().map(|grid| grid.narrow(0, 0, 1).unwrap()).collect::<Vec<_>>();
    assert!(error(codes, None, &half).contains("those of 1 image(s), and there are 2"));
    let large = codes.affine(0.0, 6.0).unwrap();
    assert!(error(&large, None, &data.grids).contains("6 is out of range"));
    let float = codes.to_dtype(DType::F32).unwrap();
    assert!(error(&float, None, &data.grids).contains("must be u32"));
    let flat = codes.narrow(3, 0, 1).unwrap().squeeze(3).unwrap();
    assert!(error(&flat, None, &data.grids).contains("[B, 4, 6, 3]"));
}
