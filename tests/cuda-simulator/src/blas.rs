//! Products of matrices ("libcublas"), columns first.

use std::ffi::{c_int, c_longlong, c_uint, c_void};

use crate::driver::{call, create, destroy, later};
use crate::numbers::{Format, Real, load, multiply, store, to_tf32};
use crate::queue::{Code, Failure};

/// A handle is the address of its queue.
#[unsafe(no_mangle)]
unsafe extern "C" fn cublasCreate_v2(handle: *mut *mut u64) -> u32 {
    unsafe { create(handle, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasDestroy_v2(handle: *mut u64) -> u32 {
    unsafe { destroy(handle) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cublasSetStream_v2(handle: *mut u64, stream: u64) -> u32 {
    // SAFETY: made by cublasCreate.
    unsafe { handle.write(stream) };
    0
}

/// One operand: its elements' format, where it is, the distance of its columns and of its matrices.
#[derive(Clone, Copy)]
struct Matrix {
    format: Format,
    address: u64,
    line: usize,
    stride: i64,
}

#[derive(Clone, Copy)]
struct Product {
    is_transposed: [bool; 2],
    rows: usize,
    columns: usize,
    depth: usize,
    alpha: f64,
    beta: f64,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    batch: usize,
    rounds: bool,
}

impl Product {
    fn run<T: Real>(&self) -> Result<(), Failure> {
        let &Self { rows, columns, depth, alpha, beta, rounds, .. } = self;
        let [a_turned, b_turned] = self.is_transposed;
        for i in 0..self.batch {
            // [depth][rows] and [depth][columns].
            let mut a = self.a.lines::<T>(i, depth, rows, !a_turned, "a product's first factor")?;
            let mut b =
                self.b.lines::<T>(i, depth, columns, b_turned, "a product's second factor")?;
            if rounds {
                for x in a.iter_mut().chain(&mut b) {
                    *x = T::from_f64(f64::from(to_tf32(x.to_f64() as f32)));
                }
            }
            let mut product = vec![T::default(); rows * columns];
            multiply(&a, &b, &mut product, rows, columns);
            let place = |i: usize| i / rows * self.c.line + i % rows;
            let values = product.into_iter().enumerate().map(|(i, value)| (place(i), value));
            let len = self.c.line * (columns - 1) + rows;
            let (format, address) = (self.c.format, self.c.first(i));
            store(format, address, len, [alpha, beta], values, "a product")?;
        }
        Ok(())
    }
}

impl Matrix {
    fn first(&self, matrix: usize) -> u64 {
        self.address.wrapping_add_signed(matrix as i64 * self.stride * self.format.bytes() as i64)
    }

    /// `outer` lines of `inner` elements: the columns, or the rows where `columns` is false.
    fn lines<T: Real>(
        &self,
        matrix: usize,
        outer: usize,
        inner: usize,
        columns: bool,
        what: &str,
    ) -> Result<Vec<T>, Failure> {
        let (lines, of) = if columns { (outer, inner) } else { (inner, outer) };
        let len = self.line * (lines - 1) + of;
        let all = load::<T>(self.format, self.first(matrix), len, what)?;
        let mut to = Vec::with_capacity(outer * inner);
        for o in 0..outer {
            for i in 0..inner {
                to.push(all[if columns { o * self.line + i } else { i * self.line + o }]);
            }
        }
        Ok(to)
    }
}

fn format(of: c_uint) -> Result<Format, Failure> {
    let none = || Failure::new(Code(15), format!("there are no products of type {of}"));
    Format::of(of, 14).ok_or_else(none)
}

fn size(n: c_int) -> Result<usize, Failure> {
    usize::try_from(n).map_err(|_| Failure::new(Code(7), format!("a size of {n}")))
}

/// Checks what cuBLAS does, and has it done.
fn queue<T: Real>(handle: *const u64, product: Result<Product, Failure>) -> u32 {
    call("cublasGemm", |world| {
        let product = product?;
        let Product { rows, columns, depth, batch, is_transposed: [a_turned, b_turned], .. } =
            product;
        let is_short = |matrix: Matrix, line: usize| matrix.line < line.max(1);
        if is_short(product.a, if a_turned { depth } else { rows })
            || is_short(product.b, if b_turned { columns } else { depth })
            || is_short(product.c, rows)
        {
            return Err(Failure::new(Code(7), "columns that run into each other"));
        }
        if rows == 0 || columns == 0 || depth == 0 || batch == 0 {
            return Ok(());
        }
        // SAFETY: made by cublasCreate.
        later(world, unsafe { *handle }, move || product.run::<T>())
    })
}

/// What the calls have in common.
struct Arguments {
    operations: [c_uint; 2],
    sizes: [c_int; 3],
    factors: [f64; 2],
    /// Address, type, distance of columns, distance of matrices.
    matrices: [(u64, c_uint, c_int, c_longlong); 3],
    batch: c_int,
    rounds: bool,
}

impl Arguments {
    fn product(self) -> Result<Product, Failure> {
        let matrix = |(address, of, line, stride)| {
            Ok(Matrix { format: format(of)?, address, line: size(line)?, stride })
        };
        let [a, b, c] = self.matrices;
        let [rows, columns, depth] = self.sizes;
        let [alpha, beta] = self.factors;
        Ok(Product {
            is_transposed: self.operations.map(|operation| operation != 0),
            rows: size(rows)?,
            columns: size(columns)?,
            depth: size(depth)?,
            alpha,
            beta,
            a: matrix(a)?,
            b: matrix(b)?,
            c: matrix(c)?,
            batch: size(self.batch)?,
            rounds: self.rounds,
        })
    }
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cublasGemmStridedBatchedEx(
    handle: *const u64,
    a_operation: c_uint,
    b_operation: c_uint,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const c_void,
    a: u64,
    a_type: c_uint,
    a_line: c_int,
    a_stride: c_longlong,
    b: u64,
    b_type: c_uint,
    b_line: c_int,
    b_stride: c_longlong,
    beta: *const c_void,
    c: u64,
    c_type: c_uint,
    c_line: c_int,
    c_stride: c_longlong,
    batch: c_int,
    compute: c_uint,
    _algorithm: c_int,
) -> u32 {
    // In f32 with factors as they are, or as TF32.
    if !matches!(compute, 68 | 69 | 77) {
        let none = Failure::new(Code(15), format!("nothing is computed in type {compute}"));
        return queue::<f32>(handle, Err(none));
    }
    // SAFETY: numbers of the type that is computed in.
    let factors = unsafe { [*alpha.cast::<f32>(), *beta.cast::<f32>()] };
    let arguments = Arguments {
        operations: [a_operation, b_operation],
        sizes: [m, n, k],
        factors: factors.map(f64::from),
        matrices: [
            (a, a_type, a_line, a_stride),
            (b, b_type, b_line, b_stride),
            (c, c_type, c_line, c_stride),
        ],
        batch,
        rounds: compute == 77 && a_type == 0,
    };
    queue::<f32>(handle, arguments.product())
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cublasDgemmStridedBatched(
    handle: *const u64,
    a_operation: c_uint,
    b_operation: c_uint,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const f64,
    a: u64,
    a_line: c_int,
    a_stride: c_longlong,
    b: u64,
    b_line: c_int,
    b_stride: c_longlong,
    beta: *const f64,
    c: u64,
    c_line: c_int,
    c_stride: c_longlong,
    batch: c_int,
) -> u32 {
    let arguments = Arguments {
        operations: [a_operation, b_operation],
        sizes: [m, n, k],
        // SAFETY: the caller's numbers.
        factors: unsafe { [*alpha, *beta] },
        matrices: [(a, 1, a_line, a_stride), (b, 1, b_line, b_stride), (c, 1, c_line, c_stride)],
        batch,
        rounds: false,
    };
    queue::<f64>(handle, arguments.product())
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::driver::tests::{download, upload};

    /// C = 2·op(A)·op(B) + C of 2 × 3 and 3 × 2 numbers in matrices with room between their columns, twice.
    fn product(operations: [c_uint; 2]) -> Vec<f32> {
        let numbers: Vec<f32> = (0..40).map(|i| i as f32).collect();
        let (a, b, c) = (upload(&numbers), upload(&numbers), upload(&[1f32; 20]));
        let (alpha, beta, mut handle) = (2f32, 1f32, std::ptr::null_mut());
        unsafe {
            assert_eq!(cublasCreate_v2(&raw mut handle), 0);
            assert_eq!(cublasSetStream_v2(handle, 2), 0);
            let [alpha, beta] = [&raw const alpha, &raw const beta].map(<*const f32>::cast);
            let [at, bt] = operations;
            let code = cublasGemmStridedBatchedEx(
                handle, at, bt, 2, 2, 3, alpha, a, 0, 4, 20, b, 0, 4, 20, beta, c, 0, 3, 10, 2, 68,
                -1,
            );
            assert_eq!(code, 0);
            let to = download(c, 20);
            assert_eq!(cublasDestroy_v2(handle), 0);
            to
        }
    }

    #[test]
    fn products_of_matrices_as_they_are_and_transposed() {
        for at in [0, 1] {
            for bt in [0, 1] {
                let to = product([at, bt]);
                for i in 0..2 {
                    for (row, column) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                        let a = |k| 20 * i + if at == 0 { k * 4 + row } else { row * 4 + k };
                        let b = |k| 20 * i + if bt == 0 { column * 4 + k } else { k * 4 + column };
                        let sum: usize = (0..3).map(|k| a(k) * b(k)).sum();
                        assert_eq!(to[10 * i + column * 3 + row], (2 * sum + 1) as f32);
                    }
                    // Between columns nothing is written.
                    assert_eq!((to[10 * i + 2], to[10 * i + 5]), (1., 1.));
                }
            }
        }
    }
}
