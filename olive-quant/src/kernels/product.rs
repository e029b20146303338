//! Strided single-precision matrix product on one thread; callers split the work, so that a result never depends on
//! how many threads there are.

/// A matrix inside a slice.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// `[rows, cols]` stored row after row, `row_stride` elements apart.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a [f32], [rows, cols]: [usize; 2], row_stride: usize) -> Self {
        let needed = if rows == 0 {
            0
        } else {
            (rows - 1) * row_stride + cols
        };
        assert!(
            cols <= row_stride && needed <= data.len(),
            "invariant: the view lies in its slice"
        );
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// Its transpose.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `out [m, n] = lhs [m, k] · rhs [k, n]`, added to what is there if `add`; rows of `out` are `row_stride` apart.
///
/// # Panics
/// If the shapes do not fit or `out` is too short.
pub fn product(out: &mut [f32], row_stride: usize, add: bool, lhs: View<'_>, rhs: View<'_>) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(k, rhs.rows, "invariant: inner sizes agree");
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        n <= row_stride && (m - 1) * row_stride + n <= out.len(),
        "invariant: the product fits"
    );
    let alpha = if add { 1.0 } else { 0.0 };
    // SAFETY: both views were checked to lie in their slices for their strides, a transpose keeps that, the
    // destination was checked above, and the borrows make source and destination disjoint.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            alpha,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// The dot product of each row of `a` with the same row of `b`, both `[rows, cols]`, in double precision.
pub fn row_dots<'a>(a: &'a [f32], b: &'a [f32], cols: usize) -> impl Iterator<Item = f64> + 'a {
    a.chunks_exact(cols).zip(b.chunks_exact(cols)).map(|(a, b)| {
        // Eight partial sums of a short block in single precision keep the loop vectorised; the blocks are summed
        // in double precision.
        a.chunks(64)
            .zip(b.chunks(64))
            .map(|(a, b)| {
                let mut sums = [0.0f32; 8];
                let (a8, b8) = (a.as_chunks::<8>(), b.as_chunks::<8>());
                for (a, b) in a8.0.iter().zip(b8.0) {
                    for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                        *sum += a * b;
                    }
                }
                let tail: f32 = a8.1.iter().zip(b8.1).map(|(a, b)| a * b).sum();
                f64::from(sums.iter().sum::<f32>() + tail)
            })
            .sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        (0..n as u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0) - 1.0)
            .collect()
    }

    #[test]
    fn products_equal_the_plain_triple_loop() {
        for [m, n, k] in [[1, 1, 1], [3, 5, 7], [16, 33, 64], [65, 17, 129]] {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let mut out = vec![1.0; m * n];
            product(
                &mut out,
                n,
                true,
                View::new(&a, [m, k], k),
                View::new(&b, [k, n], n),
            );
            let mut transposed = vec![0.0; k * k];
            product(
                &mut transposed,
                k,
                false,
                View::new(&a, [m, k], k).transposed(),
                View::new(&a, [m, k], k),
            );
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k)
                        .map(|l| f64::from(a[i * k + l]) * f64::from(b[l * n + j]))
                        .sum();
                    assert!((f64::from(out[i * n + j]) - 1.0 - want).abs() < 1e-4);
                }
            }
            for i in 0..k {
                for j in 0..k {
                    let want: f64 = (0..m)
                        .map(|l| f64::from(a[l * k + i]) * f64::from(a[l * k + j]))
                        .sum();
                    assert!((f64::from(transposed[i * k + j]) - want).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn row_dots_follow_the_definition_at_ragged_widths() {
        for cols in [1, 7, 8, 63, 64, 65, 130] {
            let (a, b) = (values(3 * cols, 3), values(3 * cols, 4));
            for (row, dot) in row_dots(&a, &b, cols).enumerate() {
                let range = row * cols..(row + 1) * cols;
                let want: f64 = a[range.clone()]
                    .iter()
                    .zip(&b[range])
                    .map(|(a, b)| f64::from(*a) * f64::from(*b))
                    .sum();
                assert!((dot - want).abs() < 1e-5 * cols as f64);
            }
        }
    }
}
