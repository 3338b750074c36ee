//! Point 32: the incremental computation equals the whole one.

use candle_core::{Device, IndexOp, Tensor};
use vq_prior::{Place, Prior, Stepper};

use crate::common::{Data, Optimizer, all_kinds, prior, values};

/// Rounding: what each of at most some fifty operations in a row adds, half a unit in the last place each
/// of numbers up to a few times the largest logit.
fn bound(logits: &[f32]) -> f32 {
    let largest = logits.iter().filter(|v| v.is_finite()).fold(1f32, |m, v| m.max(v.abs()));
    100.0 * f32::EPSILON * largest
}

#[test]
fn cached_logits_equal_the_uncached_ones_at_every_position() {
    let mut worst = 0f32;
    for (name, config) in all_kinds() {
        let (prior, data) = (trained(&config), Data::new(&config, 3, 9));
        let whole = prior.logits(&data.codes, &data.conditions()).unwrap();
        let bound = bound(&values(&whole));
        for mut stepper in [
            prior.stepper(&data.conditions(), 3).unwrap(),
            prior.recomputing_stepper(&data.conditions(), 3).unwrap(),
        ] {
            while let Some(place) = stepper.next_place() {
                let Place { row, column, code } = place;
                let expected =
                    values(&whole.i((.., row, column, code)).unwrap().contiguous().unwrap());
                let logits = stepper.logits().unwrap();
                assert_eq!(logits.dims(), [3, config.codebook_sizes[code]]);
                let logits = logits.to_vec2::<f32>().unwrap();
                for (ours, expected) in logits.iter().zip(expected.chunks(expected.len() / 3)) {
                    for (ours, expected) in ours.iter().zip(expected) {
                        worst = worst.max((ours - expected).abs() / bound);
                        assert!((ours - expected).abs() <= bound, "{name} {place:?}");
                    }
                }
                push(&mut stepper, &data.codes, place);
            }
            assert!(stepper.logits().is_err() && stepper.push(&[0, 0, 0]).is_err());
        }
    }
    println!("worst difference: {worst:.3} of the bound");
}

#[test]
fn cached_logits_are_the_same_to_the_bit_alone_and_in_a_batch_and_asked_for_or_not() {
    for (name, config) in all_kinds() {
        let (prior, data) = (trained(&config), Data::new(&config, 3, 4));
        let mut together = prior.stepper(&data.conditions(), 3).unwrap();
        let labels = data.labels.as_ref().map(|labels| labels.i(1..2).unwrap());
        let grids: Vec<Tensor> = data.grids.iter().map(|grid| grid.i(1..2).unwrap()).collect();
        let conditions = vq_prior::Conditions { labels: labels.as_ref(), conditioning: &grids };
        let mut alone = prior.stepper(&conditions, 1).unwrap();
        let own = data.codes.i(1..2).unwrap();
        for index in 0..config.codes_per_image() {
            let place = together.next_place().unwrap();
            // The second stepper is not asked every time.
            if index % 3 != 1 {
                let ours = together.logits().unwrap().to_vec2::<f32>().unwrap();
                assert_eq!(ours[1], values(&alone.logits().unwrap()), "{name} {place:?}");
            }
            push(&mut together, &data.codes, place);
            push(&mut alone, &own, place);
        }
        assert_eq!((together.next_place(), alone.next_place()), (None, None));
    }
}

#[test]
fn codes_that_do_not_fit_are_refused_and_change_nothing() {
    let (_, config) = all_kinds().remove(0);
    let (prior, data) = (prior(&config), Data::new(&config, 2, 4));
    let mut stepper = prior.stepper(&data.conditions(), 2).unwrap();
    let before = values(&stepper.logits().unwrap());
    assert!(stepper.push(&[0]).unwrap_err().to_string().contains("2 image(s)"));
    assert!(stepper.push(&[0, 7]).unwrap_err().to_string().contains("7 is out of range"));
    assert_eq!(values(&stepper.logits().unwrap()), before);
    assert!(prior.stepper(&data.conditions(), 0).is_err());
}

fn push(stepper: &mut Stepper, codes: &Tensor, place: Place) {
    let codes = codes.i((.., place.row, place.column, place.code)).unwrap();
    stepper.push(&codes.to_vec1::<u32>().unwrap()).unwrap();
}

/// Weights that are no longer those of the start.
fn trained(config: &vq_prior::Config) -> Prior {
    let prior = Prior::new(config, 2, &Device::Cpu).unwrap();
    let (mut optimizer, data) = (Optimizer::new(prior.parameters()), Data::new(config, 4, 8));
    for _ in 0..3 {
        optimizer.step(&prior, &data, 0.03);
    }
    prior
}
