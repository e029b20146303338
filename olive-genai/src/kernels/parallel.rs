//! Splitting of work into pieces of fixed size.

use std::marker::PhantomData;
use std::ops::Range;

use super::pool;

/// Below this many elementary operations a second thread costs more than it gives.
const WORTH_A_THREAD: usize = 1 << 14;

/// Calls `f` with every number below `pieces`. `work` is the number of elementary operations for all of them; it
/// decides whether other threads help, never what is computed.
pub fn for_each(pieces: usize, work: usize, f: impl Fn(usize) + Sync) {
    if work < WORTH_A_THREAD {
        (0..pieces).for_each(f);
    } else {
        pool::for_each(pieces, f);
    }
}

/// Calls `f(i, piece)` for the pieces of `piece` elements that `out` is cut into; `work` is as for [`for_each`].
pub fn for_pieces<T: Send>(out: &mut [T], piece: usize, work: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let (piece, len) = (piece.max(1), out.len());
    let parts = Parts::new(out);
    for_each(len.div_ceil(piece), work, |i| {
        // SAFETY: pieces do not overlap, and each is taken once.
        let part = unsafe { parts.slice(i * piece..(i * piece + piece).min(len)) };
        f(i, part);
    });
}

/// Calls `f(i, columns)` for pieces of `width` columns of the row-major matrix `out`; `work` is as for [`for_each`].
pub fn for_columns(
    out: &mut [f32],
    columns: usize,
    width: usize,
    work: usize,
    f: impl Fn(usize, Columns<'_>) + Sync,
) {
    let rows = out.len().checked_div(columns).unwrap_or(0);
    assert!(
        rows * columns == out.len() && width > 0,
        "invariant: the matrix has whole rows"
    );
    if rows == 0 {
        return;
    }
    let parts = Parts::new(out);
    for_each(columns.div_ceil(width), work, |i| {
        let first = i * width;
        f(
            i,
            Columns {
                parts: &parts,
                stride: columns,
                first,
                width: width.min(columns - first),
            },
        );
    });
}

/// Some columns of a matrix, for one thread.
pub struct Columns<'a> {
    parts: &'a Parts<'a, f32>,
    stride: usize,
    first: usize,
    width: usize,
}

impl Columns<'_> {
    /// How many there are.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Columns `columns` of row `row`, counted from the first of these.
    #[inline(always)]
    pub fn row(&mut self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(
            columns.start <= columns.end && columns.end <= self.width,
            "invariant: the columns are these"
        );
        let start = row * self.stride + self.first;
        // SAFETY: no other piece has these columns, and `self` is borrowed exclusively.
        unsafe { self.parts.slice(start + columns.start..start + columns.end) }
    }
}

/// A slice that several threads write to, each to parts of its own.
pub struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: the only use of the pointer is `slice`, whose callers keep to parts of their own.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    /// The parts of `data`.
    pub fn new(data: &'a mut [T]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
            owner: PhantomData,
        }
    }

    /// One part.
    ///
    /// # Safety
    /// No other part in use overlaps it.
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller promises that parts do not overlap"
    )]
    #[inline(always)]
    pub unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "invariant: the part is in the slice"
        );
        // SAFETY: the range is in the slice, which is borrowed exclusively; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_columns_land_in_their_places() {
        for (rows, columns, width) in [(1, 5, 2), (2, 64, 64), (17, 130, 64), (33, 16, 7), (300, 200, 64)] {
            let mut out = vec![f32::NAN; rows * columns];
            for_columns(&mut out, columns, width, 1 << 20, |i, mut block| {
                for r in 0..rows {
                    let all = 0..block.width();
                    for (c, v) in block.row(r, all).iter_mut().enumerate() {
                        *v = (r * columns + i * width + c) as f32;
                    }
                }
            });
            assert!(
                out.iter().enumerate().all(|(at, v)| *v == at as f32),
                "{rows} {columns} {width}"
            );
        }
        for_columns(&mut [], 3, 2, 0, |_, mut block| {
            assert!(block.row(0, 0..0).is_empty())
        });
    }

    #[test]
    fn pieces_cover_everything_once() {
        for len in [0, 1, 7, 8, 9, 100] {
            let mut out = vec![0usize; len];
            for_pieces(&mut out, 8, 1 << 20, |i, part| {
                part.iter_mut().enumerate().for_each(|(j, v)| *v += i * 8 + j + 1)
            });
            assert!(out.iter().enumerate().all(|(i, v)| *v == i + 1));
        }
    }
}
