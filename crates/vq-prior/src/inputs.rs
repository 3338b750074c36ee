//! What a prior is given, checked.

use candle_core::{DType, Device, Tensor};

use crate::{Config, Error, Result};

/// What the codes are conditioned on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions<'a> {
    /// Labels `[B]` u32 below [`Config::class_count`], which itself stands for no class. Without labels no
    /// image has a class.
    pub labels: Option<&'a Tensor>,
    /// The codes of the levels above, of the same images in the same order: one `[B,h',w']` or
    /// `[B,h',w',G']` u32 for each entry of [`Config::conditioning`].
    pub conditioning: &'a [Tensor],
}

/// Conditions, checked and on the prior's device.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    /// `[B]` u32; the number of classes stands for none. Nothing for a prior without classes.
    pub(crate) labels: Option<Tensor>,
    /// The codes of the levels above, `[B,h',w',G']` u32 each.
    pub(crate) grids: Vec<Tensor>,
}

impl Told {
    /// Conditions for `batch` images. Each label becomes what `change` makes of it.
    pub(crate) fn new(
        config: &Config,
        conditions: &Conditions,
        batch: usize,
        change: impl FnMut(u32) -> u32,
        device: &Device,
    ) -> Result<Self> {
        let labels = match check_labels(config, conditions.labels, batch)? {
            Some(labels) => {
                let labels: Vec<u32> = labels.into_iter().map(change).collect();
                Some(Tensor::from_vec(labels, batch, device)?)
            }
            None => None,
        };
        let grids = check_conditioning(config, conditions.conditioning, batch)?;
        let grids = grids.iter().map(|grid| grid.to_device(device));
        Ok(Self { labels, grids: grids.collect::<candle_core::Result<_>>()? })
    }
}

/// Codes as `[B,h,w,G]`, contiguous; an error where they are not of that grid or out of range.
pub(crate) fn check_codes(
    what: &str,
    codes: &Tensor,
    grid: [usize; 2],
    sizes: &[usize],
) -> Result<Tensor> {
    let count = sizes.len();
    let fits = match *codes.dims() {
        [b, h, w] => b > 0 && [h, w] == grid && count == 1,
        [b, h, w, g] => b > 0 && [h, w] == grid && count == g,
        _ => false,
    };
    if !fits || codes.dtype() != DType::U32 {
        let [h, w] = grid;
        let one = if count == 1 { format!("[B, {h}, {w}] or ") } else { String::new() };
        return Err(Error::Input(format!(
            "{what} must be u32 {one}[B, {h}, {w}, {count}], got {:?} {:?}",
            codes.dtype(),
            codes.dims()
        )));
    }
    let values = codes.flatten_all()?.to_vec1::<u32>()?;
    for (position, values) in values.chunks(count).enumerate() {
        for (index, (&value, &size)) in values.iter().zip(sizes).enumerate() {
            let what = || format!("{what}, position {position} of the batch");
            check_code(what, value, size, index)?;
        }
    }
    Ok(codes.contiguous()?.reshape((codes.dim(0)?, grid[0], grid[1], count))?)
}

/// An error where the code number `index` of a position is not below its K.
pub(crate) fn check_code(
    what: impl Fn() -> String,
    value: u32,
    size: usize,
    index: usize,
) -> Result<()> {
    if (value as usize) < size {
        return Ok(());
    }
    Err(Error::Input(format!(
        "{}: {value} is out of range: the codebook of code {index} has {size} (0 to {})",
        what(),
        size.saturating_sub(1)
    )))
}

/// Labels `[B]` with every missing one set to no class; nothing for a prior without classes.
pub(crate) fn check_labels(
    config: &Config,
    labels: Option<&Tensor>,
    batch: usize,
) -> Result<Option<Vec<u32>>> {
    let none = config.class_count;
    let Some(labels) = labels else {
        return Ok((none > 0).then(|| vec![none as u32; batch]));
    };
    if none == 0 {
        let problem = "labels were given, but the prior has no classes (class_count = 0)";
        return Err(Error::Input(problem.to_owned()));
    }
    if labels.dims() != [batch] || labels.dtype() != DType::U32 {
        return Err(Error::Input(format!(
            "labels must be u32 [{batch}], got {:?} {:?}",
            labels.dtype(),
            labels.dims()
        )));
    }
    let labels = labels.to_vec1::<u32>()?;
    match labels.iter().find(|&&label| label as usize > none) {
        Some(label) => Err(Error::Input(format!(
            "label {label} is out of range: the prior has {none} classes, and {none} stands for none"
        ))),
        None => Ok(Some(labels)),
    }
}

/// Every level above as `[B,h',w',G']`.
fn check_conditioning(config: &Config, grids: &[Tensor], batch: usize) -> Result<Vec<Tensor>> {
    if grids.len() != config.conditioning.len() {
        return Err(Error::Input(format!(
            "the prior is conditioned on {} grid(s) of codes, got {}",
            config.conditioning.len(),
            grids.len()
        )));
    }
    let check = |(index, (codes, level)): (usize, (&Tensor, &crate::GridConfig))| {
        let what = format!("the codes of conditioning.{index}");
        let codes = check_codes(&what, codes, level.grid, &level.codebook_sizes)?;
        match codes.dim(0)? {
            images if images == batch => Ok(codes),
            images => Err(Error::Input(format!(
                "{what} are those of {images} image(s), and there are {batch}"
            ))),
        }
    };
    grids.iter().zip(&config.conditioning).enumerate().map(check).collect()
}
