//! Gradients against finite differences.

use candle_core::{Device, Tensor};
use vq_prior::{Prior, Training};

use crate::common::{Data, pixelcnn, rich, transformer};

/// Along its own gradient g, each parameter must move the loss by |g|² per unit.
#[test]
fn the_gradient_of_every_parameter_agrees_with_finite_differences() {
    for network in [pixelcnn(2), transformer()] {
        let mut config = rich(network);
        // The same dropout on both sides of the difference.
        (config.dropout, config.label_dropout) = (0.2, 0.3);
        let (prior, data) =
            (Prior::new(&config, 4, &Device::Cpu).unwrap(), Data::new(&config, 3, 1));
        let training = Training { seed: 2, step: 7 };
        let loss = || prior.loss(&data.codes, &data.conditions(), training).unwrap();
        let gradients = loss().backward().unwrap();
        let mut worst = 0f64;
        for (name, var) in prior.parameters() {
            let gradient = gradients.get(var).unwrap().contiguous().unwrap();
            let norm: f64 =
                gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().into();
            let norm = norm.sqrt();
            let before: Tensor = var.as_tensor().force_contiguous().unwrap();
            // Steps of this length change the loss by far more than it is rounded by, and curve it little.
            let step = 0.005;
            let at = |signed: f64| {
                let moved = &before + gradient.affine(signed / norm.max(1e-12), 0.0).unwrap();
                var.set(&moved.unwrap()).unwrap();
                f64::from(loss().to_scalar::<f32>().unwrap())
            };
            // The slope here lies between those on either side, but for what the loss is rounded by and
            // for third derivatives of the order of one.
            let (below, here, above) = (at(-step), at(0.0), at(step));
            let (left, right) = ((here - below) / step, (above - here) / step);
            var.set(&before).unwrap();
            let bound =
                2.0 * f64::from(f32::EPSILON) * here / step + 0.01 * norm + step * step / 6.0;
            let outside = (left.min(right) - norm).max(norm - left.max(right)).max(0.0);
            worst = worst.max(outside / bound);
            assert!(outside <= bound, "{name}: {left}, {right} and {norm}");
            let mean = f64::midpoint(left, right);
            assert!((mean - norm).abs() < 0.2 * norm + 1e-3, "{name}: {mean} and {norm}");
        }
        println!("worst difference: {worst:.2} of the bound");
    }
}
