//! Gradients past the argmin.

use candle_core::{D, DType, Tensor};

use vq_ops::replace_value;

use crate::{GradientEstimator, Result};

impl GradientEstimator {
    /// `z_e` and `e`, both `[N,D]`, to `e` exactly, with this gradient for `z_e`.
    pub(super) fn apply(self, z_e: &Tensor, e: &Tensor) -> Result<Tensor> {
        match self {
            Self::StraightThrough => straight_through(z_e, e),
            Self::Rotation => rotation(z_e, e),
        }
    }
}

/// The straight-through estimator (van den Oord et al. 2017, section 3.2): `z_e` and `e`, both
/// `[…,D]`, to `e` exactly, with ∂L/∂`z_e` = ∂L/∂`z_q` exactly. `e` receives no gradient.
pub fn straight_through(z_e: &Tensor, e: &Tensor) -> Result<Tensor> {
    Ok(replace_value(z_e, e)?)
}

/// The rotation trick (Fifty et al. 2024, section 4.2): `z_e` and `e`, both `[N,D]`, to `e` exactly,
/// with ∂L/∂`z_e` = λRᵀ ∂L/∂`z_q`. λ = ‖e‖/‖`z_e`‖ and the rotation R that takes `z_e`'s direction to `e`'s
/// are constants; `e` receives no gradient.
///
/// R = I − 2rrᵀ + 2êẑᵀ with r = (ê + ẑ)/‖ê + ẑ‖. Where R or λ is not defined (`z_e` = 0, or `e` opposite to
/// `z_e`) the row falls back to [`straight_through`].
pub fn rotation(z_e: &Tensor, e: &Tensor) -> Result<Tensor> {
    let (z, e) = (z_e.detach(), e.detach());
    let norm = |x: &Tensor| -> Result<Tensor> { Ok(x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?) };
    let (z_norm, e_norm) = (norm(&z)?, norm(&e)?);
    let z_hat = z.broadcast_div(&z_norm.maximum(SMALL_NORM)?)?;
    let e_hat = e.broadcast_div(&e_norm.maximum(SMALL_NORM)?)?;
    let sum = (&z_hat + &e_hat)?;
    let sum_norm = norm(&sum)?;
    let r = sum.broadcast_div(&sum_norm.maximum(SMALL_ANGLE)?)?;
    let scale = e_norm.div(&z_norm.maximum(SMALL_NORM)?)?;

    let dot = |a: &Tensor, b: &Tensor| -> Result<Tensor> { Ok((a * b)?.sum_keepdim(D::Minus1)?) };
    let reflected = r.broadcast_mul(&dot(&r, z_e)?)?;
    let turned = e_hat.broadcast_mul(&dot(&z_hat, z_e)?)?;
    let rotated = ((z_e - (reflected * 2.0)?)? + (turned * 2.0)?)?.broadcast_mul(&scale)?;

    // A blend by 0 and 1 rather than a `where`: both sides are finite, and so are their gradients.
    let defined = (z_norm.gt(SMALL_NORM)?.to_dtype(DType::F32)?
        * sum_norm.gt(SMALL_ANGLE)?.to_dtype(DType::F32)?)?;
    let undefined = defined.affine(-1.0, 1.0)?;
    let path = (rotated.broadcast_mul(&defined)? + z_e.broadcast_mul(&undefined)?)?;
    straight_through(&path, &e)
}

/// Below this a vector has no direction.
const SMALL_NORM: f64 = 1e-6;
/// ‖ê + ẑ‖ below which the plane of the rotation is lost in rounding.
const SMALL_ANGLE: f64 = 1e-4;
