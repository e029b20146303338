//! The upper triangular `U` with `H⁻¹ = Uᵀ U`, in double precision.
//!
//! With rows and columns in reverse order, `H` becomes `L Lᵀ`; the inverse of `L`, reversed again, is `U`. That takes
//! one factorization and one triangular inverse where the textbook takes two factorizations and a full inverse.
//! Blocks are worked on side by side, each by one thread, so that the result does not depend on their number.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// Columns that are factorized at a time.
const BLOCK: usize = 64;
/// Rows that one task updates.
const ROWS: usize = 128;

/// Replaces the positive definite `h [n, n]` by `U`; `None` if it is not positive definite in double precision, and
/// `h` is spoilt.
pub fn upper_inverse_factor(h: &mut Array2<f64>) -> Option<()> {
    // Reversed in place: a view would be copied by the products below.
    h.as_slice_mut()?.reverse();
    factorize(h)?;
    invert_lower(h);
    h.as_slice_mut()?.reverse();
    Some(())
}

/// Replaces the lower triangle of `a` by `L`.
fn factorize(a: &mut Array2<f64>) -> Option<()> {
    let n = a.nrows();
    for first in (0..n).step_by(BLOCK) {
        let end = (first + BLOCK).min(n);
        factorize_block(a.slice_mut(s![first..end, first..end]))?;
        let block = a.slice(s![first..end, first..end]).to_owned();
        let (_, mut below) = a.view_mut().split_at(Axis(0), end);
        let (left, mut trailing) = below.view_mut().split_at(Axis(1), end);
        let mut panel = left.slice_move(s![.., first..end]);
        let rows: Vec<_> = panel.axis_iter_mut(Axis(0)).collect();
        rows.into_par_iter().for_each(|mut row| {
            for j in 0..end - first {
                let known: f64 = (0..j).map(|k| row[k] * block[[j, k]]).sum();
                row[j] = (row[j] - known) / block[[j, j]];
            }
        });
        let panel = panel.to_owned();
        let chunks: Vec<_> = trailing.axis_chunks_iter_mut(Axis(0), ROWS).enumerate().collect();
        chunks.into_par_iter().for_each(|(index, chunk)| {
            let (start, height) = (index * ROWS, chunk.nrows());
            let mut lower = chunk.slice_move(s![.., ..start + height]);
            let own = panel.slice(s![start..start + height, ..]);
            general_mat_mul(
                -1.0,
                &own,
                &panel.slice(s![..start + height, ..]).t(),
                1.0,
                &mut lower,
            );
        });
    }
    Some(())
}

fn factorize_block(mut a: ArrayViewMut2<'_, f64>) -> Option<()> {
    for j in 0..a.nrows() {
        let known: f64 = (0..j).map(|k| a[[j, k]] * a[[j, k]]).sum();
        let pivot = a[[j, j]] - known;
        // Also refuses a pivot that is not a number.
        if !(pivot.is_finite() && pivot > 0.0) {
            return None;
        }
        let pivot = pivot.sqrt();
        a[[j, j]] = pivot;
        for i in j + 1..a.nrows() {
            let known: f64 = (0..j).map(|k| a[[i, k]] * a[[j, k]]).sum();
            a[[i, j]] = (a[[i, j]] - known) / pivot;
        }
    }
    Some(())
}

/// Replaces the lower triangle of `l` by its inverse, and what is above it by zeros. Rows of blocks are replaced one
/// after the other: those below read only their own part of `l` and the inverse above them.
fn invert_lower(l: &mut Array2<f64>) {
    let n = l.nrows();
    for first in (0..n).step_by(BLOCK) {
        let end = (first + BLOCK).min(n);
        let block = invert_block(&l.slice(s![first..end, first..end]).to_owned());
        let left = l.slice(s![first..end, ..first]).to_owned();
        let (above, mut own) = l.view_mut().split_at(Axis(0), first);
        let above = above.view();
        let (mut row, mut rest) = own.slice_mut(s![..end - first, ..]).split_at(Axis(1), first);
        let chunks: Vec<_> = row.axis_chunks_iter_mut(Axis(1), ROWS).enumerate().collect();
        chunks.into_par_iter().for_each(|(index, mut chunk)| {
            let columns = index * ROWS..index * ROWS + chunk.ncols();
            // Rows above the chunk's first column are zero there.
            let start = columns.start;
            let known = left
                .slice(s![.., start..])
                .dot(&above.slice(s![start.., columns]));
            general_mat_mul(-1.0, &block, &known, 0.0, &mut chunk);
        });
        rest.fill(0.0);
        rest.slice_mut(s![.., ..end - first]).assign(&block);
    }
}

fn invert_block(l: &Array2<f64>) -> Array2<f64> {
    let n = l.nrows();
    let mut inverse = Array2::<f64>::zeros((n, n));
    for column in 0..n {
        for i in column..n {
            let unit = if i == column { 1.0 } else { 0.0 };
            let known: f64 = (column..i).map(|k| l[[i, k]] * inverse[[k, column]]).sum();
            inverse[[i, column]] = (unit - known) / l[[i, i]];
        }
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gram(n: usize, tokens: usize) -> Array2<f64> {
        let noise = |i: usize| f64::from((i as u32).wrapping_mul(2_654_435_761) >> 8) / 8_388_608.0 - 1.0;
        let x = Array2::from_shape_fn((tokens, n), |(t, c)| noise(t * n + c));
        x.t().dot(&x) + Array2::<f64>::eye(n) * 0.01
    }

    #[test]
    fn the_factor_inverts_the_matrix_at_sizes_around_the_blocks() {
        for n in [1, 5, 63, 64, 65, 129, 200, 261] {
            let h = gram(n, 2 * n + 3);
            let mut u = h.clone();
            upper_inverse_factor(&mut u).unwrap();
            let product = u.t().dot(&u).dot(&h);
            let error = (&product - &Array2::<f64>::eye(n))
                .iter()
                .fold(0.0f64, |most, e| most.max(e.abs()));
            assert!(error < 1e-8, "{n}: {error}");
            assert!(u.indexed_iter().all(|((i, j), v)| i <= j || *v == 0.0));
            assert!(u.diag().iter().all(|d| *d > 0.0));
        }
    }

    #[test]
    fn matrices_that_are_not_positive_definite_are_refused() {
        for bad in [-1.0, f64::NAN] {
            let mut h = gram(100, 300);
            h[[70, 70]] = bad;
            assert!(upper_inverse_factor(&mut h).is_none(), "{bad}");
        }
    }
}
