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
