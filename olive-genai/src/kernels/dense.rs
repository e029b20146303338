//! Products and sums of float matrices.

use gemm::Parallelism;

use super::isa::{isa, multiversion};
use super::parallel;

/// Columns of a piece of a product with few rows.
const COLUMNS: usize = 512;
/// Columns of a piece of a product with many rows.
const WIDE_COLUMNS: usize = 256;
/// Up to this many rows the weight is streamed once; above, it is packed.
const FEW_ROWS: usize = 4;

/// `out[m, n] = a[m, k] · b[k, n]`, all row-major.
pub fn matmul(a: &[f32], b: &[f32], m: usize, k: usize, n: usize, out: &mut [f32]) {
    debug_assert!(a.len() == m * k && b.len() == k * n && out.len() == m * n);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        out.fill(0.0);
    } else if m <= FEW_ROWS {
        let isa = isa();
        for (a, out) in a.chunks_exact(k).zip(out.chunks_exact_mut(n)) {
            parallel::for_pieces(out, COLUMNS, k * n, |i, out| {
                stream_rows(isa, a, b, n, i * COLUMNS, out)
            });
        }
    } else {
        wide_matmul(a, b, m, k, n, out);
    }
}

fn wide_matmul(a: &[f32], b: &[f32], m: usize, k: usize, n: usize, out: &mut [f32]) {
    // Pieces are columns, so each is multiplied into a block of its own and then put in place.
    let mut blocks = vec![0.0f32; m * n];
    parallel::for_pieces(&mut blocks, m * WIDE_COLUMNS, m * k * n, |i, block| {
        let columns = block.len() / m;
        let first = i * WIDE_COLUMNS;
        let shape = Shape { m, n: columns, k };
        gemm_into(
            shape,
            (block, columns),
            (a, k as isize, 1),
            (&b[first..], n as isize, 1),
        );
    });
    parallel::for_pieces(out, n, m * n, |row, out| {
        for (i, out) in out.chunks_mut(WIDE_COLUMNS).enumerate() {
            let at = m * i * WIDE_COLUMNS + row * out.len();
            out.copy_from_slice(&blocks[at..at + out.len()]);
        }
    });
}

/// Sizes of a product `[m, k] · [k, n]`.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// One single-threaded product; matrices come with the distance of their rows and of their columns, the result with
/// the distance of its rows.
pub fn gemm_into(
    shape: Shape,
    out: (&mut [f32], usize),
    a: (&[f32], isize, isize),
    b: (&[f32], isize, isize),
) {
    let Shape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    let last = |rows: usize, columns: usize, row: isize, column: isize| {
        (rows as isize - 1) * row + (columns as isize - 1) * column
    };
    assert!(k > 0, "invariant: the caller handles empty sums");
    assert!(
        last(m, n, out.1 as isize, 1) < out.0.len() as isize,
        "invariant: the result fits"
    );
    assert!(
        last(m, k, a.1, a.2) < a.0.len() as isize,
        "invariant: the left matrix is complete"
    );
    assert!(
        last(k, n, b.1, b.2) < b.0.len() as isize,
        "invariant: the right matrix is complete"
    );
    // SAFETY: the last element of each matrix lies in its slice, strides are not negative, and `out` is borrowed
    // exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.0.as_mut_ptr(),
            1,
            out.1 as isize,
            false,
            a.0.as_ptr(),
            a.2,
            a.1,
            b.0.as_ptr(),
            b.2,
            b.1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

multiversion! {
    /// `out[j] = Σ_k a[k] · b[k, first + j]` for the rows of `n` columns of `b`.
    fn stream_rows(isa; a: &[f32], b: &[f32], n: usize, first: usize, out: &mut [f32]) = stream_rows_plain
}

#[inline(always)]
fn stream_rows_plain(a: &[f32], b: &[f32], n: usize, first: usize, out: &mut [f32]) {
    const ROWS: usize = 8;
    let len = out.len();
    out.fill(0.0);
    let mut k = 0;
    while k + ROWS <= a.len() {
        let rows: [&[f32]; ROWS] = std::array::from_fn(|i| &b[(k + i) * n + first..][..len]);
        let factors: [f32; ROWS] = std::array::from_fn(|i| a[k + i]);
        for j in 0..len {
            let mut sum = 0.0;
            for i in 0..ROWS {
                sum += factors[i] * rows[i][j];
            }
            out[j] += sum;
        }
        k += ROWS;
    }
    for k in k..a.len() {
        for (out, b) in out.iter_mut().zip(&b[k * n + first..][..len]) {
            *out += a[k] * b;
        }
    }
}

/// `Σ a[i] · b[i]`.
#[inline(always)]
pub(super) fn dot_plain(a: &[f32], b: &[f32]) -> f32 {
    const WIDTH: usize = 16;
    let (a_parts, a_rest) = a.as_chunks::<WIDTH>();
    let (b_parts, b_rest) = b.as_chunks::<WIDTH>();
    let mut sums = [0.0f32; WIDTH];
    for (a, b) in a_parts.iter().zip(b_parts) {
        for i in 0..WIDTH {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .take(n)
        .collect()
    }

    #[test]
    fn every_instruction_set_streams_a_matrix() {
        for (k, n, first, width) in [(1, 5, 0, 5), (19, 70, 3, 61), (64, 33, 1, 32)] {
            let (a, b) = (numbers(k, 3), numbers(k * n, 4));
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; width];
                stream_rows(isa, &a, &b, n, first, &mut out);
                for (j, found) in out.iter().enumerate() {
                    let want: f64 = (0..k)
                        .map(|i| f64::from(a[i]) * f64::from(b[i * n + first + j]))
                        .sum();
                    assert!((f64::from(*found) - want).abs() < 1e-5, "{isa:?} {k} {j}");
                }
            }
        }
    }

    #[test]
    fn matmul_equals_the_plain_sum_at_edges() {
        for (m, k, n) in [
            (1, 1, 1),
            (1, 7, 513),
            (3, 16, 31),
            (4, 9, 1030),
            (5, 33, 257),
            (17, 64, 600),
            (2, 0, 3),
        ] {
            let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
            let mut out = vec![f32::NAN; m * n];
            matmul(&a, &b, m, k, n, &mut out);
            for r in 0..m {
                for c in 0..n {
                    let want: f64 = (0..k)
                        .map(|i| f64::from(a[r * k + i]) * f64::from(b[i * n + c]))
                        .sum();
                    assert!(
                        (f64::from(out[r * n + c]) - want).abs() < 1e-5,
                        "{m}x{k}x{n} at {r},{c}"
                    );
                }
            }
        }
    }
}
