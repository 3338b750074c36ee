//! Whole grids of codes.

use candle_core::{DType, Tensor};
use vq_model::Stream;

use crate::inputs::{check_codes, check_labels};
use crate::{Conditions, Config, Error, Place, Prior, Result, SampleOptions, choose};

/// Images of which a part is given.
#[derive(Clone, Copy, Debug)]
pub struct Completion<'a> {
    /// Codes as [`Prior::logits`] takes them; they only matter where they are given, but must be in range.
    pub codes: &'a Tensor,
    /// Which positions are given: u8 `[h,w]` for all images, or `[B,h,w]`; 0 = to be drawn.
    pub mask: &'a Tensor,
}

impl Prior {
    /// Draws the codes of `count` images, position by position: `[B,h,w]` u32, or `[B,h,w,G]` with several
    /// codes per position.
    ///
    /// A code depends on the options' seed, its image's number and its place; so the same seed draws the
    /// same codes in batches of any size, cached or not. Given positions are taken as they are, and
    /// every code is drawn given those before it in raster order.
    pub fn sample(
        &self,
        count: usize,
        conditions: &Conditions,
        options: &SampleOptions,
        completion: Option<&Completion>,
    ) -> Result<Tensor> {
        options.validate()?;
        let config = self.config();
        let given = completion.map(|given| Given::new(config, given, count)).transpose()?;
        // Differences of exactly 1 turn guidance off, as documented.
        let guided = (options.guidance - 1.0).abs() > 0.0;
        let doubled = if guided { Some(doubled(config, conditions, count)?) } else { None };
        let (conditions, batch) = match &doubled {
            Some((labels, grids)) => {
                (Conditions { labels: Some(labels), conditioning: grids }, 2 * count)
            }
            None => (*conditions, count),
        };
        let mut stepper = if options.recompute {
            self.recomputing_stepper(&conditions, batch)?
        } else {
            self.stepper(&conditions, batch)?
        };
        let per_image = config.codes_per_image();
        let mut drawn = vec![0u32; count * per_image];
        for index in 0..per_image {
            let Some(place) = stepper.next_place() else { break };
            let all_given = given.as_ref().is_some_and(|given| {
                (0..count).all(|image| given.at(image, place, index).is_some())
            });
            let logits = if all_given {
                Vec::new()
            } else {
                mix(&stepper.logits()?.to_vec2::<f32>()?, count, options.guidance)
            };
            let mut codes = Vec::with_capacity(batch);
            for image in 0..count {
                let given = given.as_ref().and_then(|given| given.at(image, place, index));
                codes.push(match (given, logits.get(image)) {
                    (Some(code), _) => code,
                    (None, Some(logits)) => {
                        let number = options.first_image.wrapping_add(image as u64);
                        choose(logits, options, uniform(options.seed, number, index))?
                    }
                    (None, None) => return Err(Error::Input("a row of logits is missing".into())),
                });
            }
            for (image, code) in drawn.chunks_mut(per_image).zip(&codes) {
                if let Some(target) = image.get_mut(index) {
                    *target = *code;
                }
            }
            if guided {
                codes.extend_from_within(..);
            }
            stepper.push(&codes)?;
        }
        let [h, w] = config.grid;
        let codes = match config.codes_per_position() {
            1 => Tensor::from_vec(drawn, (count, h, w), self.device())?,
            several => Tensor::from_vec(drawn, (count, h, w, several), self.device())?,
        };
        Ok(codes)
    }
}

/// Uniform in [0, 1), from a stream of each image's own, of which each code has its own part.
fn uniform(seed: u64, image: u64, index: usize) -> f64 {
    Stream::new(seed, &format!("prior.sample.{index}"), image).unit()
}

/// The conditions twice: as they are, and without a class.
fn doubled(
    config: &Config,
    conditions: &Conditions,
    count: usize,
) -> Result<(Tensor, Vec<Tensor>)> {
    let (Some(labels), true) = (conditions.labels, config.class_count > 0) else {
        return Err(Error::config(
            "guidance",
            "needs a prior with classes, and a label for every image",
        ));
    };
    let none = config.class_count as u32;
    let mut all = check_labels(config, Some(labels), count)?.unwrap_or_default();
    all.resize(2 * count, none);
    let twice = |grid: &Tensor| Ok(Tensor::cat(&[grid, grid], 0)?);
    let grids = conditions.conditioning.iter().map(twice).collect::<Result<_>>()?;
    Ok((Tensor::from_vec(all, 2 * count, labels.device())?, grids))
}

/// Logits of `count` images; behind these, where there are more rows, those without a class.
fn mix(rows: &[Vec<f32>], count: usize, guidance: f64) -> Vec<Vec<f32>> {
    let (conditional, without) = rows.split_at(count.min(rows.len()));
    if without.is_empty() {
        return conditional.to_vec();
    }
    let guide = |(class, none): (&f32, &f32)| {
        let (class, none) = (f64::from(*class), f64::from(*none));
        (none + guidance * (class - none)) as f32
    };
    let rows = conditional.iter().zip(without);
    rows.map(|(class, none)| class.iter().zip(none).map(guide).collect()).collect()
}

/// A [`Completion`], checked.
struct Given {
    codes: Vec<u32>,
    mask: Vec<u8>,
    /// Whether each image has a mask of its own.
    own_mask: bool,
    width: usize,
    positions: usize,
    codes_per_image: usize,
}

impl Given {
    fn new(config: &Config, completion: &Completion, count: usize) -> Result<Self> {
        let [h, w] = config.grid;
        let codes =
            check_codes("the given codes", completion.codes, config.grid, &config.codebook_sizes)?;
        if codes.dim(0)? != count {
            return Err(Error::Input(format!(
                "codes of {} image(s) are given, and {count} are to be completed",
                codes.dim(0)?
            )));
        }
        let mask = completion.mask;
        let own_mask = mask.dims() == [count, h, w];
        if mask.dtype() != DType::U8 || !(own_mask || mask.dims() == [h, w]) {
            return Err(Error::Input(format!(
                "the mask must be u8 [{h}, {w}] or [{count}, {h}, {w}], got {:?} {:?}",
                mask.dtype(),
                mask.dims()
            )));
        }
        Ok(Self {
            codes: codes.flatten_all()?.to_vec1()?,
            mask: mask.flatten_all()?.to_vec1()?,
            own_mask,
            width: w,
            positions: h * w,
            codes_per_image: config.codes_per_image(),
        })
    }

    /// The code at that place, where it is given.
    fn at(&self, image: usize, place: Place, index: usize) -> Option<u32> {
        let position = place.row * self.width + place.column;
        let first = if self.own_mask { image * self.positions } else { 0 };
        let is_given = self.mask.get(first + position).is_some_and(|&given| given != 0);
        let code = self.codes.get(image * self.codes_per_image + index).copied();
        code.filter(|_| is_given)
    }
}
