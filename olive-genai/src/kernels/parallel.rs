//! Splitting of work into pieces of fixed size.

use rayon::prelude::*;

/// Below this many elementary operations a second thread costs more than it gives.
const WORTH_A_THREAD: usize = 1 << 15;

/// Calls `f(i, piece)` for the pieces of `piece` elements that `out` is cut into. `work` is the number of elementary
/// operations for all of them; it decides whether other threads help, never what is computed.
pub fn for_pieces<T: Send>(
    out: &mut [T],
    piece: usize,
    work: usize,
    f: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    let piece = piece.max(1);
    if work < WORTH_A_THREAD || out.len() <= piece {
        out.chunks_mut(piece).enumerate().for_each(|(i, part)| f(i, part));
    } else {
        out.par_chunks_mut(piece)
            .enumerate()
            .for_each(|(i, part)| f(i, part));
    }
}

/// Calls `f(i, block)` for blocks of `width` columns of the row-major matrix `out` and puts each block in its place;
/// `block` is `[columns of the block, rows]`, and `f` writes all of it. `work` is as for [`for_pieces`].
pub fn for_columns(
    out: &mut [f32],
    columns: usize,
    width: usize,
    work: usize,
    f: impl Fn(usize, &mut [f32]) + Sync + Send,
) {
    let rows = out.len().checked_div(columns).unwrap_or(0);
    assert!(
        rows * columns == out.len() && width > 0,
        "invariant: the matrix has whole rows"
    );
    if rows == 1 {
        return for_pieces(out, width, work, f);
    }
    let matrix = SharedMatrix(out.as_mut_ptr());
    let place = |i: usize| {
        let first = i * width;
        let count = width.min(columns - first);
        let mut block = vec![0.0f32; count * rows];
        f(i, &mut block);
        // A cache line of four columns at a time.
        for r0 in (0..rows).step_by(LINE) {
            for c0 in (0..count).step_by(4) {
                for r in (r0..rows.min(r0 + LINE)).step_by(4) {
                    let (quads, length) = (quads(&block[c0 * rows + r..], rows), 4.min(count - c0));
                    for (i, quad) in quads.iter().enumerate().take(rows - r) {
                        // SAFETY: the row and the columns lie in the matrix, which is borrowed exclusively until
                        // every piece is done, and no other piece touches these columns.
                        unsafe { matrix.write((r + i) * columns + first + c0, &quad[..length]) };
                    }
                }
            }
        }
    };
    let pieces = columns.div_ceil(width);
    if work < WORTH_A_THREAD || pieces < 2 {
        (0..pieces).for_each(place);
    } else {
        (0..pieces).into_par_iter().for_each(place);
    }
}

/// Floats of a cache line.
const LINE: usize = 16;

/// Four values of four rows with `stride` values, transposed; zero where the matrix ends.
#[inline(always)]
fn quads(block: &[f32], stride: usize) -> [[f32; 4]; 4] {
    let row = |c: usize| {
        let row = block.get(c * stride..).unwrap_or_default();
        row.first_chunk::<4>().copied().unwrap_or_else(|| {
            let mut padded = [0.0; 4];
            padded[..row.len()].copy_from_slice(row);
            padded
        })
    };
    let [a, b, c, d] = [row(0), row(1), row(2), row(3)];
    [0, 1, 2, 3].map(|i| [a[i], b[i], c[i], d[i]])
}

/// A matrix that several threads write to, each its own columns.
struct SharedMatrix(*mut f32);

// SAFETY: the only use of the pointer is `write`, whose callers keep to places of their own.
unsafe impl Sync for SharedMatrix {}

impl SharedMatrix {
    /// Writes `values` from place `at` on.
    ///
    /// # Safety
    /// The places are in the matrix and no other thread uses them.
    #[inline(always)]
    unsafe fn write(&self, at: usize, values: &[f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            match values.first_chunk::<4>() {
                Some(four) if values.len() == 4 => self.0.add(at).cast::<[f32; 4]>().write(*four),
                _ => std::ptr::copy_nonoverlapping(values.as_ptr(), self.0.add(at), values.len()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_columns_land_in_their_places() {
        for (rows, columns, width) in [(1, 5, 2), (2, 64, 64), (17, 130, 64), (33, 16, 7), (300, 200, 64)] {
            let mut out = vec![f32::NAN; rows * columns];
            for_columns(&mut out, columns, width, 1 << 20, |i, block| {
                for (c, column) in block.chunks_exact_mut(rows).enumerate() {
                    for (r, v) in column.iter_mut().enumerate() {
                        *v = (r * columns + i * width + c) as f32;
                    }
                }
            });
            assert!(
                out.iter().enumerate().all(|(at, v)| *v == at as f32),
                "{rows} {columns} {width}"
            );
        }
        for_columns(&mut [], 3, 2, 0, |_, block| assert!(block.is_empty()));
    }
}
