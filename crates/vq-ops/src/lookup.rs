//! The vectors of codes.

use candle_core::{D, DType, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::dispatch::on_cuda;

/// The rows of `table` `[K, D]` f32 whose numbers `codes` `[…]` u32 gives: `[…, D]`. Differentiable in the table,
/// whose gradient is added up in a fixed order.
///
/// A code that is not below K is an error on the CPU. Elsewhere nobody looks, for that is to wait for the device; on
/// CUDA its vector is NaN.
pub fn lookup(table: &Tensor, codes: &Tensor) -> Result<Tensor> {
    let (size, dim) = table.dims2()?;
    if codes.dtype() != DType::U32 || table.dtype() != DType::F32 {
        bail!(
            "a lookup needs a table of f32 and codes of u32, got {:?} and {:?}",
            table.dtype(),
            codes.dtype()
        );
    }
    let mut dims = codes.dims().to_vec();
    dims.push(dim);
    let codes = codes.flatten_all()?.contiguous()?;
    #[cfg(feature = "cuda")]
    if on_cuda(table.device()) {
        let rows = table.contiguous()?.apply_op2(&codes, crate::cuda::codebook::Lookup)?;
        return rows.reshape(dims);
    }
    // candle has zeros for `u32::MAX`, and says nothing.
    if codes.device().is_cpu()
        && let Some(code) = codes.to_vec1::<u32>()?.iter().find(|&&code| code as usize >= size)
    {
        bail!("code {code} is out of range: there are {size} (0 to {})", size.saturating_sub(1));
    }
    table.index_select(&codes, D::Minus2)?.reshape(dims)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::testing::values;

    #[test]
    fn rows_come_as_they_are_and_their_gradients_are_added_up() {
        let device = crate::test_device();
        for dim in [1, 4, 6] {
            let table = Tensor::arange(0f32, 5. * dim as f32, &device).unwrap();
            let table = Var::from_tensor(&table.reshape((5, dim)).unwrap()).unwrap();
            let numbers = [3u32, 0, 3, 4, 3, 0];
            let codes = Tensor::new(&numbers, &device).unwrap().reshape((2, 3)).unwrap();
            let rows = lookup(&table, &codes).unwrap();
            assert_eq!(rows.dims(), [2, 3, dim]);
            let expected =
                numbers.iter().flat_map(|&code| (0..dim).map(move |d| code as usize * dim + d));
            let expected: Vec<f32> = expected.map(|value| value as f32).collect();
            assert_eq!(values(&rows), expected);
            let weights = Tensor::arange(1f32, 7., &device).unwrap().reshape((2, 3, 1)).unwrap();
            let loss = rows.broadcast_mul(&weights).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            let sums = [8f32, 0., 0., 9., 4.];
            let expected: Vec<f32> = sums.iter().flat_map(|sum| vec![*sum; dim]).collect();
            let found = values(gradients.get(&table).unwrap());
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?}");
        }
    }

    #[test]
    fn codes_that_are_not_there_are_not_passed_over() {
        let device = crate::test_device();
        if device.is_metal() {
            return;
        }
        let table = Tensor::ones((5, 4), DType::F32, &device).unwrap();
        for code in [5, u32::MAX] {
            let codes = Tensor::new(&[0u32, code], &device).unwrap();
            match lookup(&table, &codes) {
                Err(_) => {}
                Ok(rows) => {
                    let found = values(&rows);
                    assert!(found[..4].iter().all(|v| (v - 1.).abs() < f32::EPSILON));
                    assert!(found[4..].iter().all(|v| v.is_nan()));
                }
            }
        }
        assert!(lookup(&table, &Tensor::zeros(2, DType::F32, &device).unwrap()).is_err());
    }
}
