//! Causal attention over a cache of keys and values, heads in groups.

use super::dense::{self, Shape, dot_plain};
use super::exp::exp;
use super::isa::{Isa, isa, multiversion};
use super::parallel;

/// Queries of a piece when there are many.
const TILE: usize = 32;

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
    /// `[batch, kv_heads, capacity, head_size]`.
    pub keys: &'a [f32],
    /// `[batch, kv_heads, capacity, head_size]`.
    pub values: &'a [f32],
    /// Positions that the cache has room for.
    pub capacity: usize,
    /// Queries of a row, padding included.
    pub steps: usize,
    /// For each row, the positions before this step and the new ones that are not padding.
    pub rows: &'a [(usize, usize)],
}

/// Writes `[batch, heads, steps, head_size]`; zeros where a row has padding.
pub fn attend(spec: &AttentionSpec, input: &AttentionInput<'_>, out: &mut [f32]) {
    let isa = isa();
    let AttentionSpec {
        heads,
        kv_heads,
        head_size,
        ..
    } = *spec;
    let group = heads / kv_heads;
    let total: usize = input.rows.iter().map(|(past, new)| past + new).sum();
    let work = 2 * total * input.steps * heads * head_size;
    let cache_of = |row: usize, head: usize| {
        let start = (row * kv_heads + head / group) * input.capacity * head_size;
        let length = (input.rows[row].0 + input.rows[row].1) * head_size;
        (
            &input.keys[start..start + length],
            &input.values[start..start + length],
        )
    };
    let tiles = input.steps.div_ceil(TILE).max(1);
    let padded = tiles * TILE;
    if input.steps <= 4 {
        parallel::for_pieces(out, input.steps * head_size, work, |i, out| {
            let (row, head) = (i / heads, i % heads);
            let (keys, values) = cache_of(row, head);
            let queries = &input.queries[i * input.steps * head_size..][..out.len()];
            for (s, (query, out)) in queries
                .chunks_exact(head_size)
                .zip(out.chunks_exact_mut(head_size))
                .enumerate()
            {
                match visible(spec, input.rows[row], s) {
                    Some((first, end)) => one_query(isa, spec, query, (keys, values), first, end, out),
                    None => out.fill(0.0),
                }
            }
        });
        return;
    }
    // Heads are padded to whole tiles so that every piece is one tile of one head.
    let mut tiled = vec![0.0f32; input.rows.len() * heads * padded * head_size];
    parallel::for_pieces(&mut tiled, TILE * head_size, work, |i, out| {
        let (row, head, tile) = (i / tiles / heads, i / tiles % heads, i % tiles);
        let first = tile * TILE;
        let count = TILE.min(input.rows[row].1.saturating_sub(first));
        if count > 0 {
            let at = ((row * heads + head) * input.steps + first) * head_size;
            let queries = &input.queries[at..at + count * head_size];
            query_tile(
                isa,
                spec,
                queries,
                cache_of(row, head),
                (input.rows[row], first),
                out,
            );
        }
    });
    for (out, tiled) in out
        .chunks_exact_mut(input.steps * head_size)
        .zip(tiled.chunks_exact(padded * head_size))
    {
        out.copy_from_slice(&tiled[..out.len()]);
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

fn one_query(
    isa: Isa,
    spec: &AttentionSpec,
    query: &[f32],
    (keys, values): (&[f32], &[f32]),
    first: usize,
    end: usize,
    out: &mut [f32],
) {
    let width = spec.head_size;
    let mut scores = vec![0.0; end - first];
    let (keys, values) = (
        &keys[first * width..end * width],
        &values[first * width..end * width],
    );
    score_keys(isa, query, keys, spec.scale, &mut scores);
    soften(isa, spec.softcap, &mut scores);
    add_values(isa, &scores, values, out);
}

fn query_tile(
    isa: Isa,
    spec: &AttentionSpec,
    queries: &[f32],
    (keys, values): (&[f32], &[f32]),
    (row, first): ((usize, usize), usize),
    out: &mut [f32],
) {
    let width = spec.head_size;
    let count = queries.len() / width;
    let ranges: Vec<(usize, usize)> = (first..first + count)
        .filter_map(|s| visible(spec, row, s))
        .collect();
    let low = ranges.iter().map(|r| r.0).min().unwrap_or(0);
    let high = ranges.iter().map(|r| r.1).max().unwrap_or(0);
    let length = high - low;
    let mut scores = vec![0.0f32; count * length];
    let w = width as isize;
    let (keys, values) = (
        &keys[low * width..high * width],
        &values[low * width..high * width],
    );
    let shape = Shape {
        m: count,
        n: length,
        k: width,
    };
    dense::gemm_into(shape, (&mut scores, length), (queries, w, 1), (keys, 1, w));
    for ((start, end), scores) in ranges.iter().zip(scores.chunks_exact_mut(length)) {
        scores[..start - low].fill(0.0);
        scores[end - low..].fill(0.0);
        let seen = &mut scores[start - low..end - low];
        seen.iter_mut().for_each(|s| *s *= spec.scale);
        soften(isa, spec.softcap, seen);
    }
    let shape = Shape {
        m: count,
        n: width,
        k: length,
    };
    dense::gemm_into(shape, (out, width), (&scores, length as isize, 1), (values, w, 1));
}

multiversion! {
    fn score_keys(isa; query: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) = score_keys_plain
}

#[inline(always)]
fn score_keys_plain(query: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(query.len())) {
        *score = dot_plain(query, key) * scale;
    }
}

multiversion! {
    /// Softmax, after the cap.
    fn soften(isa; softcap: f32, scores: &mut [f32]) = soften_plain
}

#[inline(always)]
fn soften_plain(softcap: f32, scores: &mut [f32]) {
    if softcap > 0.0 {
        scores
            .iter_mut()
            .for_each(|s| *s = softcap * (*s / softcap).tanh());
    }
    const WIDTH: usize = 16;
    let largest = scores
        .iter()
        .fold(f32::NEG_INFINITY, |m, s| if *s > m { *s } else { m });
    let mut sums = [0.0f32; WIDTH];
    let (parts, rest) = scores.as_chunks_mut::<WIDTH>();
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

multiversion! {
    fn add_values(isa; weights: &[f32], values: &[f32], out: &mut [f32]) = add_values_plain
}

#[inline(always)]
fn add_values_plain(weights: &[f32], values: &[f32], out: &mut [f32]) {
    let width = out.len();
    out.fill(0.0);
    let mut rows = values.chunks_exact(4 * width);
    let mut fours = weights.chunks_exact(4);
    for (row, w) in (&mut rows).zip(&mut fours) {
        let (a, rest) = row.split_at(width);
        let (b, rest) = rest.split_at(width);
        let (c, d) = rest.split_at(width);
        for i in 0..width {
            out[i] += (w[0] * a[i] + w[1] * b[i]) + (w[2] * c[i] + w[3] * d[i]);
        }
    }
    for (row, w) in rows.remainder().chunks_exact(width).zip(fours.remainder()) {
        for i in 0..width {
            out[i] += w * row[i];
        }
    }
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
                        let key = &input.keys[cache + j * w..][..w];
                        let dot: f64 = input.queries[q..q + w]
                            .iter()
                            .zip(key)
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
            for (heads, kv_heads, head_size) in [(4, 2, 8), (2, 2, 20), (6, 1, 16)] {
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
                    let capacity = 11 + steps;
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
                    let mut out = vec![f32::NAN; queries.len()];
                    attend(&spec, &input, &mut out);
                    for (found, want) in out.iter().zip(reference(&spec, &input)) {
                        assert!(
                            (f64::from(*found) - want).abs() < 1e-5,
                            "{spec:?} {steps}: {found} {want}"
                        );
                    }
                }
            }
        }
    }
}
