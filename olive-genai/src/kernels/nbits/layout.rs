//! From rows to tiles.

use bytemuck::{Pod, bytes_of_mut, cast_slice, cast_slice_mut};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::super::aligned::Aligned;
use super::super::parallel::{self, Parts};
use super::{GROUP, Layout, Scales, TILE, ZeroPoints};

/// The narrowest way to store the scales as they are.
pub fn narrowest(scales: &[f32]) -> Scales {
    const PART: usize = 256;
    let upper = |part: &[f32]| part.iter().fold(0, |bits, v| bits | v.to_bits()) & 0xffff == 0;
    if scales.chunks(PART).all(upper) {
        return Scales::Bf16;
    }
    let half = |part: &[f32]| {
        let (mut halves, mut back) = ([f16::ZERO; PART], [0.0; PART]);
        halves[..part.len()].convert_from_f32_slice(part);
        halves[..part.len()].convert_to_f32_slice(&mut back[..part.len()]);
        part.iter()
            .zip(back)
            .all(|(v, back)| v.to_bits() == back.to_bits())
    };
    match scales.chunks(PART).all(half) {
        true => Scales::F16,
        false => Scales::F32,
    }
}

/// `n` rows of `blocks` blocks each, as tiles.
pub fn fill(
    layout: &Layout,
    n: usize,
    blocks: usize,
    packed: &[u8],
    scales: &[f32],
    points: &ZeroPoints,
) -> Aligned<u8> {
    let tiles = n.div_ceil(TILE * GROUP);
    let mut out = Aligned::<u8>::lasting(tiles * blocks * layout.size);
    let parts = Parts::new(&mut out);
    parallel::for_each(tiles, packed.len(), |t| {
        // SAFETY: tiles do not overlap.
        let tile = unsafe { parts.slice(t * blocks * layout.size..(t + 1) * blocks * layout.size) };
        for g in 0..TILE.min(n.div_ceil(GROUP) - t * TILE) {
            let first = (t * TILE + g) * GROUP;
            let rows = first..(first + GROUP).min(n);
            let of_rows = rows.start * blocks..rows.end * blocks;
            let width = layout.steps / GROUP;
            let bytes = &packed[of_rows.start * width..of_rows.end * width];
            let scales = &scales[of_rows.clone()];
            for (b, unit) in tile.chunks_exact_mut(layout.size).enumerate() {
                let (steps, rest) = unit.split_at_mut(layout.scales_at);
                let (of_scales, of_points) = rest.split_at_mut(layout.points_at - layout.scales_at);
                let steps = &mut steps[g * layout.steps..(g + 1) * layout.steps];
                let four = bytes.as_chunks::<4>().0;
                interleave(four, rows.len(), blocks, b, steps.as_chunks_mut::<4>().0);
                let place = g * GROUP * layout.scales.bytes();
                let of_scales = &mut of_scales[place..place + GROUP * layout.scales.bytes()];
                put_scales(layout.scales, scales, blocks, b, of_scales);
                match points {
                    ZeroPoints::Constant(_) => {}
                    ZeroPoints::Bytes(points) => {
                        put(&points[of_rows.clone()], blocks, b, &mut of_points[g * GROUP..]);
                    }
                    ZeroPoints::Floats(points) => put(
                        &points[of_rows.clone()],
                        blocks,
                        b,
                        cast_slice_mut(&mut of_points[g * GROUP * 4..]),
                    ),
                }
            }
        }
    });
    out
}

/// Block `b` of some rows of `blocks` blocks, side by side.
fn interleave(rows: &[[u8; 4]], count: usize, blocks: usize, b: usize, out: &mut [[u8; 4]]) {
    let steps = out.len() / GROUP;
    let width = rows.len() / count;
    debug_assert_eq!(width, blocks * steps);
    for r in 0..count {
        let row = &rows[r * width + b * steps..][..steps];
        for (s, four) in row.iter().enumerate() {
            out[s * GROUP + r] = *four;
        }
    }
}

/// The values of block `b`, one of each row of `blocks`.
fn put<T: Pod>(rows: &[T], blocks: usize, b: usize, out: &mut [T]) {
    for (out, row) in out.iter_mut().zip(rows.chunks_exact(blocks)) {
        *out = row[b];
    }
}

fn put_scales(kind: Scales, rows: &[f32], blocks: usize, b: usize, out: &mut [u8]) {
    let mut scales = [0.0f32; GROUP];
    put(rows, blocks, b, &mut scales);
    match kind {
        Scales::F32 => out.copy_from_slice(cast_slice(&scales)),
        Scales::F16 => {
            let mut halves = [f16::ZERO; GROUP];
            halves.convert_from_f32_slice(&scales);
            out.copy_from_slice(bytes_of_mut(&mut halves));
        }
        Scales::Bf16 => {
            let mut halves = scales.map(|v| (v.to_bits() >> 16) as u16);
            out.copy_from_slice(bytes_of_mut(&mut halves));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Points;
    use super::*;

    #[test]
    fn scales_take_as_few_bits_as_they_need() {
        assert_eq!(narrowest(&[1.0, -0.375, 0.0, 2.0f32.powi(100)]), Scales::Bf16);
        assert_eq!(narrowest(&[1.0, 1.0 + 1.0 / 1024.0]), Scales::F16);
        assert_eq!(narrowest(&[1.0, 1.0 + 1.0 / 2048.0]), Scales::F32);
        let mut many = vec![1.0 + 1.0 / 1024.0; 1000];
        many[999] = 1e-9;
        assert_eq!(narrowest(&many), Scales::F32);
        assert_eq!(narrowest(&[]), Scales::Bf16);
    }

    #[test]
    fn every_byte_is_in_its_place() {
        let (steps, blocks) = (2, 3);
        for n in [1usize, 16, 37, 64, 129] {
            let bytes: Vec<u8> = (0..n * blocks * steps * 4)
                .map(|i| (i * 7 + i / 256) as u8)
                .collect();
            let scales: Vec<f32> = (0..n * blocks).map(|i| i as f32 + 0.1).collect();
            let points: Vec<u8> = (0..n * blocks).map(|i| (i * 3) as u8).collect();
            let layout = Layout::new(steps * 64, Scales::F32, Points::Bytes);
            let out = fill(
                &layout,
                n,
                blocks,
                &bytes,
                &scales,
                &ZeroPoints::Bytes(points.clone()),
            );
            assert_eq!(out.len(), n.div_ceil(64) * blocks * (4 * 128 + 256 + 64));
            for row in 0..n.next_multiple_of(64) {
                for b in 0..blocks {
                    let unit = &out[(row / 64 * blocks + b) * layout.size..][..layout.size];
                    let (g, lane) = (row % 64 / 16, row % 16);
                    let scale: [u8; 4] = unit[512 + row % 64 * 4..][..4].try_into().unwrap();
                    let point = unit[512 + 256 + row % 64];
                    let want = if row < n {
                        (scales[row * 3 + b], points[row * 3 + b])
                    } else {
                        (0.0, 0)
                    };
                    assert_eq!((f32::from_le_bytes(scale), point), want);
                    for s in 0..steps {
                        let found = &unit[g * 128 + s * 64 + lane * 4..][..4];
                        let at = ((row * blocks + b) * steps + s) * 4;
                        let want = if row < n { &bytes[at..at + 4] } else { &[0; 4] };
                        assert_eq!(found, want, "{n} {row} {b} {s}");
                    }
                }
            }
        }
    }
}
