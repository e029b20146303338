//! Causal attention over a cache of keys and values, heads in groups.
//!
//! Keys lie in *slabs* of sixteen positions, `[head_size, 16]` each, so that sixteen scores are one vector and no sum
//! goes across lanes. Values lie row by row.

use std::cell::RefCell;
use std::ops::Range;

use super::ahead::read_ahead;
use super::exp::exp;
use super::float_blocks::add_product;
use super::isa::{Isa, isa, multiversion, multiversion_fused};
use super::parallel::{self, Parts};
use crate::exec::cache::LayerShape;

/// Positions of a slab of keys.
pub const SLAB: usize = 16;
/// Queries of a piece of work, at most.
const TILE: usize = 32;
/// Slabs that all queries of a piece pass before the next ones: they stay in the first-level cache.
const SLABS: usize = 4;
/// Values that all queries of a piece pass before the next ones.
const VALUES: usize = 64;
/// Vectors of sixteen floats that the sums of a tile may take: with vectors of four floats the registers hold fewer.
const TILE_SUMS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 8 };

/// What does not change from step to step.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_size: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `c · tanh(score / c)` if above zero.
    pub softcap: f32,
    /// A query at position `i` sees keys at `j` with `0 ≤ i − j < window`.
    pub window: Option<usize>,
    /// Whether a query sees later keys of the same step.
    pub causal: bool,
}

/// The new queries and the cache that already holds their keys and values.
pub struct AttentionInput<'a> {
    /// `[batch, heads, steps, head_size]`.
    pub queries: &'a [f32],
    /// `[batch, kv_heads, capacity / 16, head_size, 16]`.
    pub keys: &'a [f32],
    /// `[batch, kv_heads, capacity, head_size]`.
    pub values: &'a [f32],
    /// Positions that the cache has room for, a multiple of 16.
    pub capacity: usize,
    /// Queries of a row, padding included.
    pub steps: usize,
    /// For each row, the positions before this step and the new ones that are not padding.
    pub rows: &'a [(usize, usize)],
}

/// Keys and values of a step, `[batch, kv_heads, steps, head_size]` each.
#[derive(Clone, Copy)]
pub struct NewTokens<'a> {
    /// Keys.
    pub keys: &'a [f32],
    /// Values.
    pub values: &'a [f32],
    /// Steps of a row, padding included.
    pub steps: usize,
}

/// Puts new keys and values behind those of earlier tokens, in the order of [`AttentionInput`].
pub fn store(
    new: NewTokens<'_>,
    LayerShape { heads, head_size }: LayerShape,
    rows: &[(usize, usize)],
    capacity: usize,
    (keys, values): (&mut [f32], &mut [f32]),
) {
    let (keys, values) = (Parts::new(keys), Parts::new(values));
    parallel::for_each(rows.len() * heads, 2 * new.keys.len(), |i| {
        let (past, count) = rows[i / heads];
        let head = i * capacity * head_size..(i + 1) * capacity * head_size;
        // SAFETY: heads do not overlap.
        let (keys, values) = unsafe { (keys.slice(head.clone()), values.slice(head)) };
        let source = i * new.steps * head_size..(i * new.steps + count) * head_size;
        values[past * head_size..(past + count) * head_size].copy_from_slice(&new.values[source.clone()]);
        for (s, key) in new.keys[source].chunks_exact(head_size).enumerate() {
            let at = past + s;
            let slab = &mut keys[at / SLAB * SLAB * head_size..][..SLAB * head_size];
            for (v, place) in key.iter().zip(slab.chunks_exact_mut(SLAB)) {
                place[at % SLAB] = *v;
            }
        }
    });
}

/// Writes `[batch, heads, steps, head_size]`; zeros where a row has padding.
///
/// A piece of work is all query heads of a key head where they are few, else a tile of one head's queries.
pub fn attend(spec: &AttentionSpec, input: &AttentionInput<'_>, out: &mut [f32]) {
    attend_with(isa(), spec, input, out);
}

fn attend_with(isa: Isa, spec: &AttentionSpec, input: &AttentionInput<'_>, out: &mut [f32]) {
    let AttentionSpec {
        heads,
        kv_heads,
        head_size,
        ..
    } = *spec;
    let (group, steps) = (heads / kv_heads, input.steps);
    if out.is_empty() {
        return;
    }
    let total: usize = input.rows.iter().map(|(past, new)| past + new).sum();
    let work = 2 * total * steps * heads * head_size;
    let (together, tile) = if group * steps <= TILE {
        (group, steps)
    } else {
        (1, TILE.min(steps))
    };
    let (units, tiles) = (heads / together, steps.div_ceil(tile));
    let parts = Parts::new(out);
    parallel::for_each(input.rows.len() * units * tiles, work, |i| {
        let (row, unit, tile_start) = (i / tiles / units, i / tiles % units, i % tiles * tile);
        let steps_here = tile_start..(tile_start + tile).min(steps);
        let first = (row * heads + unit * together) * steps + steps_here.start;
        let count = if together > 1 {
            together * steps
        } else {
            steps_here.len()
        };
        let place = first * head_size..(first + count) * head_size;
        // SAFETY: pieces are different queries.
        let out = unsafe { parts.slice(place.clone()) };
        let cache = (row * kv_heads + unit * together / group) * input.capacity * head_size;
        let cache = cache..cache + input.capacity * head_size;
        let piece = Piece {
            spec,
            queries: &input.queries[place],
            keys: &input.keys[cache.clone()],
            values: &input.values[cache],
            row: input.rows[row],
            steps: steps_here,
        };
        SCORES.with_borrow_mut(|scores| piece.attend(isa, scores, out));
    });
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Queries that share keys and values: those of `steps`, for one head after the other.
struct Piece<'a> {
    spec: &'a AttentionSpec,
    queries: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    row: (usize, usize),
    steps: Range<usize>,
}

impl Piece<'_> {
    fn attend(&self, isa: Isa, scores: &mut Vec<f32>, out: &mut [f32]) {
        let width = self.spec.head_size;
        out.fill(0.0);
        let count = self.steps.len();
        let range = |query: usize| visible(self.spec, self.row, self.steps.start + query % count);
        let ranges = || (0..count).filter_map(range);
        let (Some(low), Some(high)) = (ranges().map(|r| r.0).min(), ranges().map(|r| r.1).max()) else {
            return;
        };
        let low = low / SLAB * SLAB;
        let slabs = (high - low).div_ceil(SLAB);
        let length = slabs * SLAB;
        let queries = self.queries.len() / width;
        scores.resize(scores.len().max(queries * length), 0.0);
        let scores = &mut scores[..queries * length];
        let keys = &self.keys[low * width..(low + length) * width];
        score_slabs(isa, self.queries, width, keys, scores);
        for (query, scores) in scores.chunks_exact_mut(length).enumerate() {
            let (start, end) = range(query).unwrap_or((low, low));
            scores[..start - low].fill(0.0);
            scores[end - low..].fill(0.0);
            soften(
                isa,
                self.spec.scale,
                self.spec.softcap,
                &mut scores[start - low..end - low],
            );
        }
        add_values(
            isa,
            scores,
            length,
            &self.values[low * width..high * width],
            width,
            out,
        );
    }
}

/// Keys that query `step` of a row sees; `None` for padding.
fn visible(spec: &AttentionSpec, (past, new): (usize, usize), step: usize) -> Option<(usize, usize)> {
    if step >= new {
        return None;
    }
    let position = past + step;
    let end = if spec.causal { position + 1 } else { past + new };
    let first = spec
        .window
        .map_or(0, |window| (position + 1).saturating_sub(window));
    Some((first, end))
}

multiversion_fused! {
    /// `scores[query, position] = query · key` for all positions of the slabs.
    fn score_slabs(isa; queries: &[f32], width: usize, keys: &[f32], scores: &mut [f32]) = score_slabs_plain::<>
}

#[inline(always)]
fn score_slabs_plain<const FUSED: bool>(queries: &[f32], width: usize, keys: &[f32], scores: &mut [f32]) {
    let slabs = keys.as_chunks::<SLAB>().0;
    let length = slabs.len() / width * SLAB;
    let count = queries.len() / width;
    for (s, slabs) in slabs.chunks(SLABS * width).enumerate() {
        let mut q = 0;
        while q < count {
            let step = match count - q {
                8.. if TILE_SUMS == 8 => 8,
                4.. => 4,
                2.. => 2,
                _ => 1,
            };
            let queries = &queries[q * width..(q + step) * width];
            let scores = &mut scores[q * length + s * SLABS * SLAB..];
            // With many queries, reading is not what takes the time.
            let ahead = q == 0 && count <= 8;
            match step {
                8 => score_some::<8, { TILE_SUMS.div_ceil(8) }, FUSED>(
                    queries, width, slabs, scores, length, ahead,
                ),
                4 => score_some::<4, { TILE_SUMS.div_ceil(4) }, FUSED>(
                    queries, width, slabs, scores, length, ahead,
                ),
                2 => score_some::<2, { TILE_SUMS.div_ceil(2) }, FUSED>(
                    queries, width, slabs, scores, length, ahead,
                ),
                _ => score_some::<1, TILE_SUMS, FUSED>(queries, width, slabs, scores, length, ahead),
            }
            q += step;
        }
    }
}

/// `QUERIES` queries with some slabs, one after the other as they lie in memory. Each score is summed in `SUMS` parts,
/// so that enough sums are going.
#[inline(always)]
fn score_some<const QUERIES: usize, const SUMS: usize, const FUSED: bool>(
    queries: &[f32],
    width: usize,
    slabs: &[[f32; SLAB]],
    scores: &mut [f32],
    length: usize,
    ahead: bool,
) {
    let rows: [&[f32]; QUERIES] = std::array::from_fn(|q| &queries[q * width..(q + 1) * width]);
    for (s, slab) in slabs.chunks_exact(width).enumerate() {
        let mut sums = [[[0.0f32; SLAB]; SUMS]; QUERIES];
        let (parts, rest) = slab.as_chunks::<SUMS>();
        for (i, part) in parts.iter().enumerate() {
            if ahead {
                read_ahead(part);
            }
            for q in 0..QUERIES {
                for p in 0..SUMS {
                    let factor = rows[q][i * SUMS + p];
                    for l in 0..SLAB {
                        sums[q][p][l] = add_product::<FUSED>(factor, part[p][l], sums[q][p][l]);
                    }
                }
            }
        }
        for (i, key) in rest.iter().enumerate() {
            for q in 0..QUERIES {
                let factor = rows[q][parts.len() * SUMS + i];
                for l in 0..SLAB {
                    sums[q][0][l] = add_product::<FUSED>(factor, key[l], sums[q][0][l]);
                }
            }
        }
        for q in 0..QUERIES {
            let out = &mut scores[q * length + s * SLAB..][..SLAB];
            for l in 0..SLAB {
                out[l] = (1..SUMS).fold(sums[q][0][l], |sum, p| sum + sums[q][p][l]);
            }
        }
    }
}

multiversion! {
    /// Softmax, after scale and cap.
    fn soften(isa; scale: f32, softcap: f32, scores: &mut [f32]) = soften_plain
}

#[inline(always)]
fn soften_plain(scale: f32, softcap: f32, scores: &mut [f32]) {
    scores.iter_mut().for_each(|s| *s *= scale);
    if softcap > 0.0 {
        scores
            .iter_mut()
            .for_each(|s| *s = softcap * (*s / softcap).tanh());
    }
    const WIDTH: usize = 16;
    let larger = |m: f32, s: f32| if s > m { s } else { m };
    let (parts, rest) = scores.as_chunks_mut::<WIDTH>();
    let mut most = [f32::NEG_INFINITY; WIDTH];
    for part in parts.iter() {
        for i in 0..WIDTH {
            most[i] = larger(most[i], part[i]);
        }
    }
    let largest = most
        .iter()
        .chain(rest.iter())
        .fold(f32::NEG_INFINITY, |m, s| larger(m, *s));
    let mut sums = [0.0f32; WIDTH];
    for part in parts {
        for i in 0..WIDTH {
            part[i] = exp(part[i] - largest);
            sums[i] += part[i];
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for s in rest {
        *s = exp(*s - largest);
        sum += *s;
    }
    let inverse = 1.0 / sum;
    scores.iter_mut().for_each(|s| *s *= inverse);
}

multiversion_fused! {
    /// Adds `weights[query, position] · values[position]` to the rows of `out`; rows of `weights` are `length` long.
    fn add_values(isa; weights: &[f32], length: usize, values: &[f32], width: usize, out: &mut [f32])
        = add_values_plain::<>
}

#[inline(always)]
fn add_values_plain<const FUSED: bool>(
    weights: &[f32],
    length: usize,
    values: &[f32],
    width: usize,
    out: &mut [f32],
) {
    for (v, values) in values.chunks(VALUES * width).enumerate() {
        let weights = &weights[v * VALUES..];
        let mut q = 0;
        let count = out.len() / width;
        while q < count {
            let step = if count - q >= 4 { 4 } else { 1 };
            let (weights, out) = (&weights[q * length..], &mut out[q * width..(q + step) * width]);
            let ahead = q == 0 && count <= 8;
            let mut column = 0;
            while column < width {
                column += match (step, width - column) {
                    (4, 64..) if TILE_SUMS == 8 => {
                        add_some::<4, 64, FUSED>(weights, length, values, width, column, out, ahead)
                    }
                    (4, 32..) if TILE_SUMS == 8 => {
                        add_some::<4, 32, FUSED>(weights, length, values, width, column, out, ahead)
                    }
                    (4, 16..) => add_some::<4, 16, FUSED>(weights, length, values, width, column, out, ahead),
                    (4, _) => add_some::<4, 1, FUSED>(weights, length, values, width, column, out, ahead),
                    (_, 64..) => add_some::<1, 64, FUSED>(weights, length, values, width, column, out, ahead),
                    (_, 16..) => add_some::<1, 16, FUSED>(weights, length, values, width, column, out, ahead),
                    _ => add_some::<1, 1, FUSED>(weights, length, values, width, column, out, ahead),
                };
            }
            q += step;
        }
    }
}

/// `WIDTH` columns of `QUERIES` queries; gives `WIDTH`.
#[inline(always)]
fn add_some<const QUERIES: usize, const WIDTH: usize, const FUSED: bool>(
    weights: &[f32],
    length: usize,
    values: &[f32],
    width: usize,
    column: usize,
    out: &mut [f32],
    ahead: bool,
) -> usize {
    let mut sums = [[0.0f32; WIDTH]; QUERIES];
    for (q, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&out[q * width + column..][..WIDTH]);
    }
    let positions = values.len() / width;
    let rows: [&[f32]; QUERIES] = std::array::from_fn(|q| &weights[q * length..][..positions]);
    for j in 0..positions {
        let mut row = [0.0f32; WIDTH];
        let of_position = &values[j * width + column..][..WIDTH];
        if ahead && WIDTH >= 16 {
            read_ahead(of_position);
        }
        row.copy_from_slice(of_position);
        for q in 0..QUERIES {
            let factor = rows[q][j];
            for c in 0..WIDTH {
                sums[q][c] = add_product::<FUSED>(factor, row[c], sums[q][c]);
            }
        }
    }
    for (q, sums) in sums.iter().enumerate() {
        out[q * width + column..][..WIDTH].copy_from_slice(sums);
    }
    WIDTH
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, factor: f32) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * i) as f32 * 0.37 + i as f32 * factor).sin())
            .collect()
    }

    fn reference(spec: &AttentionSpec, input: &AttentionInput<'_>) -> Vec<f64> {
        let AttentionSpec {
            heads,
            kv_heads,
            head_size: w,
            ..
        } = *spec;
        let mut out = vec![0.0; input.queries.len()];
        for (b, (past, new)) in input.rows.iter().enumerate() {
            for h in 0..heads {
                let cache = (b * kv_heads + h / (heads / kv_heads)) * input.capacity * w;
                for s in 0..*new {
                    let q = ((b * heads + h) * input.steps + s) * w;
                    let i = past + s;
                    let seen: Vec<usize> = (0..past + new)
                        .filter(|j| if spec.causal { *j <= i } else { true })
                        .filter(|j| spec.window.is_none_or(|n| i < j + n))
                        .collect();
                    let scores = seen.iter().map(|j| {
                        let slab = &input.keys[cache + j / 16 * 16 * w..][..16 * w];
                        let key: Vec<f32> = (0..w).map(|d| slab[d * 16 + j % 16]).collect();
                        let dot: f64 = input.queries[q..q + w]
                            .iter()
                            .zip(&key)
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum();
                        let score = dot * f64::from(spec.scale);
                        let cap = f64::from(spec.softcap);
                        if cap > 0.0 {
                            (cap * (score / cap).tanh()).exp()
                        } else {
                            score.exp()
                        }
                    });
                    let scores: Vec<f64> = scores.collect();
                    let sum: f64 = scores.iter().sum();
                    for (j, score) in seen.iter().zip(&scores) {
                        for d in 0..w {
                            out[q + d] += score / sum * f64::from(input.values[cache + j * w + d]);
                        }
                    }
                }
            }
        }
        out
    }

    #[test]
    fn attention_equals_the_definition() {
        for steps in [1usize, 3, 7, 32, 70] {
            for (heads, kv_heads, head_size) in [(4, 2, 8), (2, 2, 20), (6, 1, 16), (7, 1, 112)] {
                for (softcap, window, causal) in [(0.0, None, true), (5.0, Some(9), true), (0.0, None, false)]
                {
                    let spec = AttentionSpec {
                        heads,
                        kv_heads,
                        head_size,
                        scale: 0.3,
                        softcap,
                        window,
                        causal,
                    };
                    let rows = [(5, steps), (11, steps.div_ceil(2))];
                    let capacity = (11 + steps).next_multiple_of(16);
                    let queries = numbers(2 * heads * steps * head_size, 0.11);
                    let keys = numbers(2 * kv_heads * capacity * head_size, 0.13);
                    let values = numbers(2 * kv_heads * capacity * head_size, 0.17);
                    let input = AttentionInput {
                        queries: &queries,
                        keys: &keys,
                        values: &values,
                        capacity,
                        steps,
                        rows: &rows,
                    };
                    let reference = reference(&spec, &input);
                    for isa in Isa::available() {
                        let mut out = vec![f32::NAN; queries.len()];
                        attend_with(isa, &spec, &input, &mut out);
                        for (found, want) in out.iter().zip(&reference) {
                            assert!(
                                (f64::from(*found) - want).abs() < 1e-5,
                                "{isa:?} {spec:?} {steps}: {found} {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}
