//! From continuous vectors to discrete codes and back.

mod estimator;
mod kmeans;
mod update;
mod vector;

use candle_core::Tensor;

pub use estimator::{rotation, straight_through};
pub use update::{CodebookReport, CodebookUpdate};
pub use vector::VectorQuantizer;

use crate::Result;

/// A map between vectors and codes. Everything but [`initialize`](Self::initialize) and
/// [`update`](Self::update) is pure: evaluation cannot change a quantizer.
pub trait Quantizer: std::fmt::Debug + Send + Sync {
    /// K: codes are in 0..K.
    fn codebook_size(&self) -> usize;

    /// D, the length of the vectors.
    fn dim(&self) -> usize;

    /// `z_e` `[B,h,w,D]` f32 to its codes, their vectors, and the losses. Differentiable.
    fn quantize(&self, z_e: &Tensor) -> Result<Quantized>;

    /// `z_e` `[B,h,w,D]` f32 to codes `[B,h,w]` u32.
    fn encode(&self, z_e: &Tensor) -> Result<Tensor>;

    /// Codes `[…]` u32 to their vectors `[…,D]`: exactly the values of [`quantize`](Self::quantize)'s
    /// `z_q`. No gradient.
    fn decode(&self, codes: &Tensor) -> Result<Tensor>;

    /// All code vectors `[K,D]`, detached.
    fn codebook(&self) -> Result<Tensor>;

    /// Multiply-adds that finding the codes of `positions` vectors takes.
    fn multiply_adds(&self, positions: usize) -> u64;

    /// Places the code vectors among a pool of encoder outputs `[…,D]`, by `rounds` of k-means.
    fn initialize(&self, z_e: &Tensor, rounds: usize, seed: u64) -> Result<()>;

    /// Whether [`initialize`](Self::initialize) was ever called, in this run or one before it.
    fn is_initialized(&self) -> Result<bool>;

    /// Moves code vectors after an optimizer's step: `z_e` `[…,D]` and `codes` `[…]` are what was
    /// quantized in that step.
    fn update(
        &self,
        z_e: &Tensor,
        codes: &Tensor,
        options: &CodebookUpdate,
        step: u64,
    ) -> Result<CodebookReport>;
}

/// What a [`Quantizer`] makes of `z_e` `[B,h,w,D]`.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The code vectors `[B,h,w,D]`, exact; its gradient reaches `z_e` as the
    /// [`GradientEstimator`](crate::GradientEstimator) says.
    pub z_q: Tensor,
    /// `[B,h,w]` u32.
    pub codes: Tensor,
    /// ‖sg\[`z_e`\] − e‖², a mean over B·h·w·D (van den Oord et al. 2017, eq. 3, second term). Exactly 0
    /// with the rule `ema`, where the codebook is not trained by gradients.
    pub codebook_loss: Tensor,
    /// ‖`z_e` − sg\[e\]‖², a mean over B·h·w·D, without β (van den Oord et al. 2017, eq. 3, third term).
    pub commitment_loss: Tensor,
}
