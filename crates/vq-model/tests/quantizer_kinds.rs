//! What each kind of quantizer promises beside what all of them do.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may panic; many values must be exact"
)]

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use common::{codes, every_quantizer, images, model, scalar, small_of, uniform, values};
use proptest::prelude::*;
use vq_model::{
    CodebookRule, CodebookUpdate, Codes, QuantizerConfig, QuantizerKind, TrainingStep, VqVae,
};
use vq_ops::StepNumber;

const NAME: &str = "levels.0.quantizer";
const RULES: [CodebookRule; 2] = [CodebookRule::Gradient, CodebookRule::Ema];

fn of(kind: QuantizerKind, codebook_size: usize, dim: usize) -> QuantizerConfig {
    QuantizerConfig { codebook_size, dim, ..QuantizerConfig::of(kind) }
}

fn fresh(config: &QuantizerConfig) -> VqVae {
    VqVae::new(&small_of(config), 0, &vq_ops::test_device()).unwrap()
}

#[test]
fn product_is_one_vector_quantizer_for_each_part() {
    for rule in RULES {
        let config = QuantizerConfig { groups: 3, rule, ..of(QuantizerKind::Product, 8, 12) };
        let product = fresh(&config);
        let z = uniform(0, &[2, 3, 4, 12], 0.5);
        product.initialize_codebooks(std::slice::from_ref(&z), 3, 1).unwrap();
        let whole = product.quantizer(0).unwrap().quantize(&z).unwrap();
        let mut sums = (0.0, 0.0);
        for group in 0..3 {
            let part = fresh(&QuantizerConfig { rule, ..of(QuantizerKind::Vector, 8, 4) });
            let mut tensors: BTreeMap<String, Tensor> = part
                .tensors()
                .into_iter()
                .map(|(name, t)| (name, t.force_contiguous().unwrap()))
                .collect();
            for (name, tensor) in product.tensors() {
                if let Some(name) = name.strip_prefix(&format!("{NAME}.groups.{group}.")) {
                    tensors.insert(format!("{NAME}.{name}"), tensor);
                }
            }
            part.set_tensors(&tensors).unwrap();
            let z = z.narrow(3, 4 * group, 4).unwrap();
            let alone = part.quantizer(0).unwrap().quantize(&z).unwrap();
            assert_eq!(values(&whole.z_q.narrow(3, 4 * group, 4).unwrap()), values(&alone.z_q));
            assert_eq!(codes(&whole.codes.narrow(3, group, 1).unwrap()), codes(&alone.codes));
            sums.0 += scalar(&alone.codebook_loss) / 3.0;
            sums.1 += scalar(&alone.commitment_loss) / 3.0;
        }
        for (loss, sum) in [(whole.codebook_loss, sums.0), (whole.commitment_loss, sums.1)] {
            assert!((scalar(&loss) - sum).abs() <= 4.0 * f32::EPSILON * sum);
        }
    }
}

#[test]
fn each_further_stage_of_a_residual_quantizer_brings_the_vectors_nearer() {
    for rule in RULES {
        let config = QuantizerConfig { stages: 4, rule, ..of(QuantizerKind::Residual, 16, 6) };
        let model = fresh(&config);
        let z = uniform(0, &[4, 4, 8, 6], 0.5);
        model.initialize_codebooks(std::slice::from_ref(&z), 5, 1).unwrap();
        let quantizer = model.quantizer(0).unwrap();
        let all = quantizer.encode(&z).unwrap();
        // What the codes of the first stages alone decode to.
        let error = |stages: usize| {
            let decoded = quantizer.decode(&all.narrow(3, 0, stages).unwrap()).unwrap();
            scalar(&(decoded - &z).unwrap().sqr().unwrap().mean_all().unwrap())
        };
        let errors = [1, 2, 3, 4].map(error);
        assert!(errors.is_sorted_by(|a, b| *b < 0.8 * a), "{errors:?}");
        // The model decodes them as well, and nothing else.
        let decode = |level: Tensor| model.decode(&Codes { levels: vec![level] });
        assert_eq!(decode(all.narrow(3, 0, 2).unwrap()).unwrap().dims(), [4, 3, 8, 16]);
        assert!(decode(all.narrow(3, 0, 0).unwrap()).is_err());
        // Each stage's commitment is its own residual's.
        let quantized = quantizer.quantize(&z).unwrap();
        let sum: f32 = errors.iter().sum();
        assert!((scalar(&quantized.commitment_loss) / sum - 1.0).abs() < 1e-5);
    }
}

#[test]
fn a_residual_quantizer_passes_the_gradient_once_and_not_once_per_stage() {
    let model =
        model(&small_of(&QuantizerConfig { stages: 3, ..of(QuantizerKind::Residual, 8, 6) }), 0);
    let z = Var::from_tensor(&uniform(0, &[2, 3, 4, 6], 0.5)).unwrap();
    let weights = uniform(1, &[2, 3, 4, 6], 1.0);
    let z_q = model.quantizer(0).unwrap().quantize(&z).unwrap().z_q;
    let gradients = (z_q * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(values(gradients.get(&z).unwrap()), values(&weights));
}

#[test]
fn each_stage_averages_the_residuals_that_it_was_given() {
    let rule = CodebookRule::Ema;
    let config =
        QuantizerConfig { stages: 3, rule, decay: 0.5, ..of(QuantizerKind::Residual, 8, 6) };
    let model = model(&small_of(&config), 0);
    let z = uniform(0, &[1, 4, 8, 6], 0.5);
    let quantizer = model.quantizer(0).unwrap();
    let assigned = quantizer.encode(&z).unwrap();
    let buffer = |name: &str| values(&model.buffers()[&format!("{NAME}.{name}")]);
    let mut expected = Vec::new();
    for stage in 0..3 {
        let before = match stage {
            0 => z.zeros_like().unwrap(),
            _ => quantizer.decode(&assigned.narrow(3, 0, stage).unwrap()).unwrap(),
        };
        let residual = values(&(&z - before).unwrap());
        let mut sums: Vec<f32> =
            buffer(&format!("stages.{stage}.sums")).iter().map(|m| 0.5 * m).collect();
        let chosen = codes(&assigned.narrow(3, stage, 1).unwrap());
        for (row, code) in residual.chunks(6).zip(chosen) {
            sums.iter_mut().skip(code as usize * 6).zip(row).for_each(|(sum, r)| *sum += 0.5 * r);
        }
        expected.push(sums);
    }
    let levels = vec![assigned];
    let options = CodebookUpdate::default();
    let reports =
        model.update_codebooks(std::slice::from_ref(&z), &Codes { levels }, &options, 1).unwrap();
    assert_eq!(reports.len(), 3);
    for (stage, expected) in expected.iter().enumerate() {
        let sums = buffer(&format!("stages.{stage}.sums"));
        assert!(sums.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{stage}");
        assert_eq!(reports[stage].codebook, format!("{NAME}.stages.{stage}"));
    }
}

#[test]
fn quantizer_dropout_uses_the_first_stages_of_some_images_in_training_alone() {
    let config =
        QuantizerConfig { stages: 4, quantizer_dropout: 0.5, ..of(QuantizerKind::Residual, 8, 6) };
    let model = model(&small_of(&config), 0);
    let quantizer = model.quantizer(0).unwrap();
    let z = uniform(0, &[600, 1, 2, 6], 0.5);
    let whole = quantizer.quantize(&z).unwrap();
    let train = |seed, step| {
        quantizer.quantize_training(&z, TrainingStep { seed, step, first_image: 0 }).unwrap()
    };
    let trained = train(3, 9);
    assert_eq!(codes(&trained.codes), codes(&whole.codes), "the codes stay those of all stages");
    assert_eq!(values(&trained.z_q), values(&train(3, 9).z_q), "seed and step decide");
    assert_ne!(values(&trained.z_q), values(&train(4, 9).z_q));
    assert_ne!(values(&trained.z_q), values(&train(3, 10).z_q));
    // Every image is what some number of its first stages decodes to.
    let prefixes: Vec<Vec<f32>> = (1..=4)
        .map(|stages| {
            values(&quantizer.decode(&whole.codes.narrow(3, 0, stages).unwrap()).unwrap())
        })
        .collect();
    let mut counts = [0usize; 4];
    let mut losses = 0.0;
    for (index, image) in values(&trained.z_q).chunks(12).enumerate() {
        let part = |all: &Vec<f32>| all[12 * index..12 * index + 12].to_vec();
        let stages = prefixes.iter().position(|prefix| part(prefix) == image);
        let stages = stages.expect("the first stages of the image");
        counts[stages] += 1;
        for prefix in &prefixes[..=stages] {
            let z = values(&z)[12 * index..12 * index + 12].to_vec();
            let squares = z.iter().zip(part(prefix)).map(|(z, e)| f64::from(z - e).powi(2));
            losses += squares.sum::<f64>() / (600.0 * 12.0);
        }
    }
    // Half of the images keep all four, an eighth each has one to four: five standard deviations.
    for (count, share) in counts.into_iter().zip([0.125f64, 0.125, 0.125, 0.625]) {
        let deviation = (600.0 * share * (1.0 - share)).sqrt();
        assert!((count as f64 - 600.0 * share).abs() < 5.0 * deviation, "{counts:?}");
    }
    for loss in [&trained.commitment_loss, &trained.codebook_loss] {
        assert!((f64::from(scalar(loss)) / losses - 1.0).abs() < 1e-4, "{losses}");
    }
    // An image's draw does not depend on how many others there are.
    let half = quantizer
        .quantize_training(
            &z.narrow(0, 0, 300).unwrap(),
            TrainingStep { seed: 3, step: 9, first_image: 0 },
        )
        .unwrap();
    assert_eq!(values(&half.z_q), values(&trained.z_q)[..3600]);
}

#[test]
fn what_is_random_in_training_does_not_reach_forward_and_evaluation() {
    for config in every_quantizer() {
        let (model, images) = (model(&small_of(&config), 0), images(&small_of(&config), 8, 1));
        let trained = model
            .forward_training(&images, TrainingStep { seed: 1, step: 1, first_image: 0 })
            .unwrap();
        let (plain, evaluated) =
            (model.forward(&images).unwrap(), model.evaluate(&images).unwrap());
        assert_eq!(
            values(&plain.reconstruction().unwrap()),
            values(&evaluated.reconstruction().unwrap())
        );
        let is_dropped = config.quantizer_dropout > 0.0;
        let differs =
            values(&trained.reconstruction().unwrap()) != values(&plain.reconstruction().unwrap());
        assert_eq!(differs, is_dropped, "{config:?}");
    }
}

#[test]
fn finite_scalars_have_the_gradient_of_the_papers_bound() {
    for levels in [&[8usize, 5, 4][..], &[3, 2, 1000], &[2]] {
        let config = QuantizerConfig::finite_scalar(levels);
        let dim = levels.len();
        let z = Var::from_tensor(&uniform(0, &[1, 5, 5, dim], 2.0)).unwrap();
        let quantized = fresh(&config).quantizer(0).unwrap().quantize(&z).unwrap();
        assert_eq!(
            (scalar(&quantized.codebook_loss), scalar(&quantized.commitment_loss)),
            (0.0, 0.0)
        );
        let gradients = quantized.z_q.sum_all().unwrap().backward().unwrap();
        let gradient = values(gradients.get(&z).unwrap());
        for (index, (z, gradient)) in values(&z).into_iter().zip(gradient).enumerate() {
            let count = levels[index % dim] as f64;
            let half = (count - 1.0) * (1.0 - 1e-3) / 2.0;
            let offset = if count % 2.0 == 0.0 { 0.5 } else { 0.0 };
            let shift = if count == 2.0 { 0.0 } else { (offset / half).tan() };
            let width = (count / 2.0).floor();
            let bound = |z: f64| ((z + shift).tanh() * half - offset) / width;
            let z = f64::from(z);
            let expected = (bound(z + 1e-5) - bound(z - 1e-5)) / 2e-5;
            // tanh² is off by an ε or two, which counts where 1 − tanh² is small.
            let rounding = 8.0 * f64::from(f32::EPSILON) * half / width;
            assert!(
                (f64::from(gradient) - expected).abs() < rounding + 1e-6 * expected,
                "{levels:?}"
            );
            let value = values(&quantized.z_q)[index];
            assert_eq!(f64::from(value), f64::from(((bound(z) * width).round() / width) as f32));
        }
    }
}

#[test]
fn finite_scalars_fill_their_range_and_never_leave_it() {
    for levels in [2usize, 3, 4, 5, 8, 16, 255, 1000] {
        let model = fresh(&QuantizerConfig::finite_scalar(&[levels]));
        let quantizer = model.quantizer(0).unwrap();
        let ramp: Vec<f32> = (-20_000..=20_000).map(|i| i as f32 * 1e-3).collect();
        let count = ramp.len();
        let far = [f32::MAX, -f32::MAX, 1e20, -1e20];
        let ramp: Vec<f32> = ramp.into_iter().chain(far).collect();
        let z = Tensor::from_vec(ramp, (1, 1, count + 4, 1), &vq_ops::test_device()).unwrap();
        let found = codes(&quantizer.encode(&z).unwrap());
        assert!(found[..count].is_sorted(), "{levels}");
        assert_eq!((found[0], found[count - 1]), (0, levels as u32 - 1), "{levels}");
        let last = levels as u32 - 1;
        assert_eq!(found[count..], [last, 0, last, 0], "{levels}");
        let mut distinct = found.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), levels);
        // 0 lies in the cell of the vector 0, but for two levels, of which either has half of the line.
        if levels > 2 {
            assert_eq!(found[20_000], levels as u32 / 2);
        } else {
            assert_eq!((found[19_999], found[20_001]), (0, 1));
        }
    }
}

#[test]
fn signs_are_the_nearest_codes_and_spherical_ones_have_length_1() {
    for (config, is_spherical) in
        [(QuantizerConfig::lookup_free(5), false), (QuantizerConfig::binary_spherical(5), true)]
    {
        let model = fresh(&config);
        let quantizer = model.quantizer(0).unwrap();
        let all = Tensor::arange(0u32, 32, &vq_ops::test_device()).unwrap();
        let book = values(&quantizer.decode(&all).unwrap());
        for e in book.chunks(5) {
            let length = e.iter().map(|v| v * v).sum::<f32>().sqrt();
            let expected = if is_spherical { 1.0 } else { 5f32.sqrt() };
            assert!((length - expected).abs() < 1e-6 * expected);
        }
        let z = uniform(0, &[1, 10, 10, 5], 2.0);
        for (z, code) in values(&z).chunks(5).zip(codes(&quantizer.encode(&z).unwrap())) {
            let product = |e: &[f32]| z.iter().zip(e).map(|(z, e)| z * e).sum::<f32>();
            let best = (0..32).max_by(|&a, &b| {
                product(&book[5 * a..5 * a + 5]).total_cmp(&product(&book[5 * b..5 * b + 5]))
            });
            assert_eq!(best, Some(code as usize));
        }
        // Zero is not above zero.
        let zeros = Tensor::zeros((1, 1, 1, 5), DType::F32, &vq_ops::test_device()).unwrap();
        assert_eq!(codes(&quantizer.encode(&zeros).unwrap()), [0]);
        // The commitment is taken in the space of the codes.
        let quantized = quantizer.quantize(&z).unwrap();
        let mut sum = 0.0;
        for (z, e) in values(&z).chunks(5).zip(values(&quantized.z_q).chunks(5)) {
            let norm = if is_spherical { z.iter().map(|v| v * v).sum::<f32>().sqrt() } else { 1.0 };
            sum += z.iter().zip(e).map(|(z, e)| f64::from(z / norm - e).powi(2)).sum::<f64>();
        }
        assert!((f64::from(scalar(&quantized.commitment_loss)) / (sum / 500.0) - 1.0).abs() < 1e-5);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Against the definition: the softmax of 2·z·e/τ over a table of all codes, in f64.
    #[test]
    fn the_entropy_loss_of_signs_is_that_of_a_table_of_all_codes(
        bits in 1..8usize, seed in 0..1000u64, temperature in 0.2f64..4.0, diversity in 0.0f64..2.0,
        group in 1..9usize, is_spherical: bool,
    ) {
        let kind = if is_spherical { QuantizerConfig::binary_spherical(bits) }
            else { QuantizerConfig::lookup_free(bits) };
        let config = QuantizerConfig {
            entropy_temperature: temperature, diversity, entropy_group: group, entropy_weight: 0.5, ..kind
        };
        let model = fresh(&config);
        let quantizer = model.quantizer(0).unwrap();
        let z = uniform(seed, &[2, 3, 4, bits], 1.0);
        let found = scalar(&quantizer.quantize(&z).unwrap().entropy_loss.unwrap());
        let rows: Vec<Vec<f64>> = values(&z).chunks(bits).map(|row| {
            let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            row.iter().map(|v| f64::from(*v) / if is_spherical { norm } else { 1.0 }).collect()
        }).collect();
        let scale = if is_spherical { 1.0 / (bits as f64).sqrt() } else { 1.0 };
        // The probabilities of all codes of the bits first..first + width, for one vector.
        let table = |row: &[f64]| -> Vec<f64> {
            let width = row.len();
            let logit = |code: usize| -> f64 {
                let sign = |bit: usize| if (code >> (width - 1 - bit)) & 1 == 1 { 1.0 } else { -1.0 };
                row.iter().enumerate().map(|(bit, z)| 2.0 * z * sign(bit) * scale / temperature).sum()
            };
            let exp: Vec<f64> = (0..1 << width).map(|code| logit(code).exp()).collect();
            let sum: f64 = exp.iter().sum();
            exp.into_iter().map(|e| e / sum).collect()
        };
        let entropy = |p: &[f64]| -p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        let count = rows.len() as f64;
        let certainty = rows.iter().map(|row| entropy(&table(row))).sum::<f64>() / count;
        let mut evenness = 0.0;
        for first in (0..bits).step_by(group) {
            let width = group.min(bits - first);
            let mut mean = vec![0.0; 1 << width];
            for row in &rows {
                let p = table(&row[first..first + width]);
                mean.iter_mut().zip(p).for_each(|(mean, p)| *mean += p / count);
            }
            evenness += entropy(&mean);
        }
        let expected = 0.5 * (certainty - diversity * evenness);
        // Each of the two is a sum of some 2·bits terms below ln 2, each off by a few ε.
        let rounding = 16.0 * f64::from(f32::EPSILON) * bits as f64 * (1.0 + diversity);
        prop_assert!((f64::from(found) - expected).abs() < rounding, "{found} {expected}");
    }

    /// The code is that of the largest inner product, up to what f32 can tell.
    #[test]
    fn index_backprop_takes_the_largest_inner_product(
        size in 1..40usize, dim in 1..9usize, seed in 0..1000u64, spread in 1e-3f32..1e3,
        code_spread in 1e-3f32..1e3,
    ) {
        let model = fresh(&of(QuantizerKind::IndexBackprop, size, dim));
        let book = uniform(seed + 1, &[size, dim], code_spread);
        model.parameters()[&format!("{NAME}.codebook")].set(&book).unwrap();
        let z = uniform(seed, &[1, 5, 5, dim], spread);
        let found = codes(&model.quantizer(0).unwrap().encode(&z).unwrap());
        let book = values(&book);
        let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let longest = book.chunks(dim).map(norm).fold(0.0, f64::max);
        for (z, code) in values(&z).chunks(dim).zip(found) {
            let product = |e: &[f32]| z.iter().zip(e).map(|(z, e)| f64::from(*z) * f64::from(*e)).sum::<f64>();
            let products: Vec<f64> = book.chunks(dim).map(product).collect();
            let best = products.iter().copied().fold(f64::MIN, f64::max);
            // ‖e‖² of each code is off by some dim·ε of the longest one's, z·e is worth half of that.
            let rounding = 2.0 * (dim + 4) as f64 * f64::from(f32::EPSILON) * norm(z) * longest;
            prop_assert!(best - products[code as usize] <= rounding, "{products:?} {code}");
        }
    }
}

#[test]
fn entropy_gradients_agree_with_finite_differences() {
    let cases = [
        QuantizerConfig { entropy_temperature: 1.0, ..QuantizerConfig::lookup_free(6) },
        QuantizerConfig { entropy_group: 2, ..QuantizerConfig::binary_spherical(6) },
        QuantizerConfig { entropy_temperature: 0.7, ..of(QuantizerKind::IndexBackprop, 9, 6) },
    ];
    for config in cases {
        let config = QuantizerConfig { entropy_weight: 10.0, ..config };
        let model = fresh(&config);
        if let Some(book) = model.parameters().get(&format!("{NAME}.codebook")) {
            book.set(&uniform(5, &[9, 6], 1.0)).unwrap();
        }
        let quantizer = model.quantizer(0).unwrap();
        let start = uniform(0, &[2, 3, 4, 6], 0.8);
        let loss = |z: &Tensor| quantizer.quantize(z).unwrap().entropy_loss.unwrap();
        let z = Var::from_tensor(&start).unwrap();
        let gradients = loss(&z).backward().unwrap();
        let gradient = gradients.get(&z).unwrap();
        let size = scalar(&gradient.sqr().unwrap().sum_all().unwrap().sqrt().unwrap());
        let direction = (gradient / f64::from(size)).unwrap();
        let at =
            |step: f64| f64::from(scalar(&loss(&(&start + (&direction * step).unwrap()).unwrap())));
        let error =
            |step: f64| ((at(step) - at(-step)) / (2.0 * step) / f64::from(size) - 1.0).abs();
        // Too long a step meets the curvature, too short a one the rounding.
        let best = [3e-1, 1e-1, 3e-2, 1e-2].map(error).into_iter().fold(f64::MAX, f64::min);
        assert!(best < 1e-3, "{config:?}: off by {best} of {size}");
    }
}

#[test]
fn sim_moves_all_codes_through_its_matrix_and_decodes_to_the_turned_ones() {
    let model = fresh(&of(QuantizerKind::Sim, 32, 6));
    let (fixed, transform) = (format!("{NAME}.fixed"), format!("{NAME}.transform"));
    assert!(model.buffers().contains_key(&fixed) && !model.parameters().contains_key(&fixed));
    let quantizer = model.quantizer(0).unwrap();
    let z = uniform(0, &[2, 3, 4, 6], 0.5);
    let loss = |_: &Tensor| quantizer.quantize(&z).unwrap().codebook_loss;
    let var = &model.parameters()[&transform];
    let start = var.as_detached_tensor().force_contiguous().unwrap();
    let gradients = loss(&start).backward().unwrap();
    let gradient = gradients.get(var).unwrap();
    let size = scalar(&gradient.sqr().unwrap().sum_all().unwrap().sqrt().unwrap());
    let direction = (gradient / f64::from(size)).unwrap();
    // The codes stay while the matrix moves so little.
    let chosen = codes(&quantizer.encode(&z).unwrap());
    let at = |step: f64| {
        var.set(&(&start + (&direction * step).unwrap()).unwrap()).unwrap();
        assert_eq!(codes(&quantizer.encode(&z).unwrap()), chosen);
        f64::from(scalar(&loss(&start)))
    };
    let slope = (at(1e-3) - at(-1e-3)) / 2e-3;
    assert!((slope / f64::from(size) - 1.0).abs() < 1e-3, "{slope} {size}");
    var.set(&start).unwrap();

    let before = values(&model.codebook(0).unwrap());
    var.set(&(&start * 2.0).unwrap()).unwrap();
    let after = values(&model.codebook(0).unwrap());
    assert!(before.iter().zip(&after).all(|(a, b)| 2.0 * a == *b), "every code has moved");
    let c = values(&model.buffers()[&fixed]);
    assert!(c.iter().zip(&after).any(|(c, e)| (c - e).abs() > 0.1), "not the fixed ones");
    // Normal with variance 1/D: the mean square is within five standard errors.
    let mean = c.iter().map(|c| f64::from(*c).powi(2)).sum::<f64>() / c.len() as f64;
    assert!((6.0 * mean - 1.0).abs() < 5.0 * (2.0 / c.len() as f64).sqrt(), "{mean}");
}

/// Point 1: β weighs the encoder's term, and moves no codebook.
#[test]
fn the_commitment_loss_reaches_the_encoder_alone_and_the_codebooks_loss_the_codebook() {
    for config in every_quantizer() {
        let model = model(&small_of(&config), 0);
        let z = Var::from_tensor(&uniform(0, &[2, 3, 4, config.dim], 0.5)).unwrap();
        let quantized = model.quantizer(0).unwrap().quantize(&z).unwrap();
        let gradients = quantized.commitment_loss.backward().unwrap();
        assert!(model.parameters().values().all(|var| gradients.get(var).is_none()), "{config:?}");
        let has_term = !config.kind.has_key("levels");
        assert_eq!(gradients.get(&z).is_some(), has_term, "{config:?}");
        let gradients = quantized.codebook_loss.backward().unwrap();
        let moved = model.parameters().values().any(|var| gradients.get(var).is_some());
        let by_gradient = model.parameters().keys().any(|name| name.contains("quantizer"));
        assert_eq!(moved, by_gradient, "{config:?}");
        // Index backpropagation's goes through the probabilities to both.
        let is_double = config.kind == QuantizerKind::IndexBackprop;
        assert_eq!(gradients.get(&z).is_some(), is_double, "{config:?}");
    }
}

/// What a recorded step does in two parts.
#[test]
fn following_and_reviving_codes_is_updating_them() {
    let options = CodebookUpdate { revive_threshold: 0.5, seed: 3 };
    let vector = |rule| QuantizerConfig { rule, ..of(QuantizerKind::Vector, 16, 6) };
    for config in every_quantizer().into_iter().chain(RULES.map(vector)) {
        let [at_once, in_parts] = [(); 2].map(|()| fresh(&config));
        if !at_once.repeats() {
            continue;
        }
        let z = uniform(0, &[2, 3, 4, config.dim], 0.5);
        let z_e = std::slice::from_ref(&z);
        for step in 1..4 {
            let codes = |model: &VqVae| Codes {
                levels: vec![model.quantizer(0).unwrap().encode(&z).unwrap()],
            };
            let reports = at_once.update_codebooks(z_e, &codes(&at_once), &options, step).unwrap();
            let known = StepNumber::Known(step);
            in_parts.follow_codes(z_e, &codes(&in_parts), known).unwrap();
            let revived = in_parts.revive_codes(z_e, &options, step).unwrap();
            let reported: Vec<_> =
                reports.into_iter().map(|report| (report.parameter, report.revived)).collect();
            assert_eq!(revived, reported, "{config:?}");
        }
        let (ours, theirs) = (in_parts.tensors(), at_once.tensors());
        for (name, tensor) in &ours {
            assert_eq!(values(tensor), values(&theirs[name]), "{name} of {config:?}");
        }
    }
}
