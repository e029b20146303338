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
        for r0 in (0..rows).step_by(TILE) {
            for c0 in (0..count).step_by(TILE) {
                let tile = read_transposed(&block[c0 * rows + r0..], rows, [count - c0, rows - r0]);
                let length = TILE.min(count - c0);
                for (r, values) in tile.iter().enumerate().take(rows - r0) {
                    // SAFETY: the row and the columns lie in the matrix, which is borrowed exclusively until every
                    // piece is done, and no other piece touches these columns.
                    unsafe { matrix.write((r0 + r) * columns + first + c0, &values[..length]) };
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

/// Rows and columns that are transposed at once: a cache line of floats.
const TILE: usize = 16;

/// The upper left `[columns, rows]` of a matrix with rows of `stride` values, transposed; at most a tile of it.
fn read_transposed(block: &[f32], stride: usize, [columns, rows]: [usize; 2]) -> [[f32; TILE]; TILE] {
    let mut tile = [[0.0f32; TILE]; TILE];
    for c in 0..columns.min(TILE) {
        let column = &block[c * stride..];
        match column.first_chunk::<TILE>() {
            Some(column) if rows >= TILE => (0..TILE).for_each(|r| tile[r][c] = column[r]),
            _ => (0..rows.min(TILE)).for_each(|r| tile[r][c] = column[r]),
        }
    }
    tile
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
    unsafe fn write(&self, at: usize, values: &[f32]) {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.0.add(at), values.len()) }
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
