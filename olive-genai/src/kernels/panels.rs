//! Products with small float matrices, an adapter's factors: beside packed weights they must be read as fast as those.
//!
//! Thirty-two columns are a *panel* and lie together, row after row, so that a product reads one sequence of memory.
//! Values take 16 bits where that loses nothing.

use half::f16;

use super::ahead::read_ahead;
use super::aligned::Aligned;
use super::float_blocks::add_product;
use super::isa::{isa, multiversion_fused};
use super::parallel::{self, Parts};

/// Columns of a panel.
const WIDTH: usize = 32;
/// Rows that a panel is read for at once.
const ROWS: usize = 4;

/// A matrix `[k, n]`.
#[derive(Debug)]
pub struct Panels {
    k: usize,
    n: usize,
    values: Values,
}

/// `[ceil(n / 32), k, 32]`, zero behind the last column.
#[derive(Debug)]
enum Values {
    F32(Aligned<f32>),
    F16(Aligned<u16>),
    Bf16(Aligned<u16>),
}

impl Panels {
    /// Takes over a row-major matrix; `None` if `data` does not have `k · n` values.
    pub fn new(data: &[f32], k: usize, n: usize) -> Option<Self> {
        if k.checked_mul(n) != Some(data.len()) || n == 0 {
            return None;
        }
        let upper = data.iter().fold(0, |bits, v| bits | v.to_bits()) & 0xffff == 0;
        let half = |v: &f32| widen_half(f16::from_f32(*v).to_bits()).to_bits() == v.to_bits();
        let values = if upper {
            Values::Bf16(panels(data, k, n, |v| (v.to_bits() >> 16) as u16))
        } else if data.iter().all(half) {
            Values::F16(panels(data, k, n, |v| f16::from_f32(v).to_bits()))
        } else {
            Values::F32(panels(data, k, n, |v| v))
        };
        Some(Self { k, n, values })
    }

    /// Adds `x[m, k] · self` to `out[m, n]`. Each element is summed in the order of its row, alone.
    pub fn add_product(&self, x: &[f32], out: &mut [f32]) {
        let (isa, k, n) = (isa(), self.k, self.n);
        let rows = out.len() / n;
        assert!(
            x.len() == rows * k && out.len() == rows * n,
            "invariant: the matrices fit"
        );
        let parts = Parts::new(out);
        parallel::for_each(n.div_ceil(WIDTH), rows * k * n, |p| {
            let columns = p * WIDTH..(p * WIDTH + WIDTH).min(n);
            let panel = p * k * WIDTH..(p + 1) * k * WIDTH;
            for row in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - row);
                let x = &x[row * k..(row + count) * k];
                let mut sums = [[0.0; WIDTH]; ROWS];
                match &self.values {
                    Values::F32(values) => multiply_f32(isa, x, k, &values[panel.clone()], &mut sums),
                    Values::F16(values) => multiply_f16(isa, x, k, &values[panel.clone()], &mut sums),
                    Values::Bf16(values) => multiply_bf16(isa, x, k, &values[panel.clone()], &mut sums),
                }
                for (r, sums) in sums.iter().enumerate().take(count) {
                    let at = (row + r) * n;
                    // SAFETY: panels are of different columns, and rows are done one after the other.
                    let out = unsafe { parts.slice(at + columns.start..at + columns.end) };
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                }
            }
        });
    }
}

fn panels<T: bytemuck::Pod + Send + Sync>(
    data: &[f32],
    k: usize,
    n: usize,
    narrow: impl Fn(f32) -> T + Sync,
) -> Aligned<T> {
    let mut out = Aligned::<T>::lasting(n.div_ceil(WIDTH) * k * WIDTH);
    parallel::for_pieces(&mut out, (k * WIDTH).max(1), data.len(), |p, panel| {
        let first = p * WIDTH;
        let width = WIDTH.min(n - first);
        for (row, out) in data.chunks_exact(n).zip(panel.chunks_exact_mut(WIDTH)) {
            for (out, v) in out.iter_mut().zip(&row[first..first + width]) {
                *out = narrow(*v);
            }
        }
    });
    out
}

/// A half as a float. Written so that the compiler makes vectors of it; halves of the matrix are finite.
#[inline(always)]
fn widen_half(bits: u16) -> f32 {
    // 2^112: the difference of the two exponents' biases.
    const SCALE: f32 = 5.192_297e33;
    let size = f32::from_bits(u32::from(bits & 0x7fff) << 13) * SCALE;
    f32::from_bits(size.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[inline(always)]
fn widen_upper(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[inline(always)]
fn same(v: f32) -> f32 {
    v
}

type Sums = [[f32; WIDTH]; ROWS];

multiversion_fused! {
    fn multiply_f32(isa; x: &[f32], k: usize, panel: &[f32], sums: &mut Sums) = f32_plain::<>
}
multiversion_fused! {
    fn multiply_f16(isa; x: &[f32], k: usize, panel: &[u16], sums: &mut Sums) = f16_plain::<>
}
multiversion_fused! {
    fn multiply_bf16(isa; x: &[f32], k: usize, panel: &[u16], sums: &mut Sums) = bf16_plain::<>
}

#[inline(always)]
fn f32_plain<const FUSED: bool>(x: &[f32], k: usize, panel: &[f32], sums: &mut Sums) {
    multiply::<f32, FUSED>(x, k, panel, same, sums);
}

#[inline(always)]
fn f16_plain<const FUSED: bool>(x: &[f32], k: usize, panel: &[u16], sums: &mut Sums) {
    multiply::<u16, FUSED>(x, k, panel, widen_half, sums);
}

#[inline(always)]
fn bf16_plain<const FUSED: bool>(x: &[f32], k: usize, panel: &[u16], sums: &mut Sums) {
    multiply::<u16, FUSED>(x, k, panel, widen_upper, sums);
}

#[inline(always)]
fn multiply<T: Copy, const FUSED: bool>(
    x: &[f32],
    k: usize,
    panel: &[T],
    widen: impl Fn(T) -> f32,
    sums: &mut Sums,
) {
    if x.len() == ROWS * k {
        return multiply_rows::<T, ROWS, 1, FUSED>(x, k, panel, widen, sums);
    }
    for (row, sums) in x.chunks_exact(k.max(1)).zip(sums) {
        let mut one = [[0.0; WIDTH]; ROWS];
        multiply_rows::<T, 1, 4, FUSED>(row, k, panel, &widen, &mut one);
        *sums = one[0];
    }
}

/// `COUNT` rows. Each sum is made of `PARTS` parts, so that enough sums are going.
#[inline(always)]
fn multiply_rows<T: Copy, const COUNT: usize, const PARTS: usize, const FUSED: bool>(
    x: &[f32],
    k: usize,
    panel: &[T],
    widen: impl Fn(T) -> f32,
    out: &mut Sums,
) {
    let rows: [&[f32]; COUNT] = std::array::from_fn(|r| &x[r * k..(r + 1) * k]);
    let (panel, _) = panel.as_chunks::<WIDTH>();
    let mut sums = [[[0.0f32; WIDTH]; PARTS]; COUNT];
    let (parts, rest) = panel.as_chunks::<PARTS>();
    for (i, part) in parts.iter().enumerate() {
        if COUNT == 1 {
            read_ahead(part);
        }
        for p in 0..PARTS {
            let mut values = [0.0f32; WIDTH];
            for c in 0..WIDTH {
                values[c] = widen(part[p][c]);
            }
            for r in 0..COUNT {
                let factor = rows[r][i * PARTS + p];
                for c in 0..WIDTH {
                    sums[r][p][c] = add_product::<FUSED>(factor, values[c], sums[r][p][c]);
                }
            }
        }
    }
    for (i, values) in rest.iter().enumerate() {
        for r in 0..COUNT {
            let factor = rows[r][parts.len() * PARTS + i];
            for c in 0..WIDTH {
                sums[r][0][c] = add_product::<FUSED>(factor, widen(values[c]), sums[r][0][c]);
            }
        }
    }
    for r in 0..COUNT {
        for c in 0..WIDTH {
            out[r][c] = (1..PARTS).fold(sums[r][0][c], |sum, p| sum + sums[r][p][c]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_equal_the_definition_however_values_are_stored() {
        let number = |i: usize| ((i * i) as f32 * 0.37 + i as f32 * 0.11).sin();
        for (m, k, n) in [
            (1, 1, 1),
            (1, 64, 31),
            (3, 7, 32),
            (4, 33, 100),
            (9, 130, 64),
            (2, 0, 5),
        ] {
            for kind in 0..3 {
                let narrow = |v: f32| match kind {
                    0 => v,
                    1 => f16::from_f32(v * 1e-3).to_f32(),
                    _ => half::bf16::from_f32(v).to_f32(),
                };
                let x: Vec<f32> = (0..m * k).map(number).collect();
                let weight: Vec<f32> = (0..k * n).map(|i| narrow(number(i + 77))).collect();
                let panels = Panels::new(&weight, k, n).unwrap();
                let small = matches!(panels.values, Values::F16(_) | Values::Bf16(_));
                assert!(small == (kind > 0) || k * n < 64, "{m} {k} {n} {kind}");
                let mut out: Vec<f32> = (0..m * n).map(|i| i as f32).collect();
                panels.add_product(&x, &mut out);
                for (i, found) in out.iter().enumerate() {
                    let (r, c) = (i / n, i % n);
                    let products = (0..k).map(|j| f64::from(x[r * k + j]) * f64::from(weight[j * n + c]));
                    let want = i as f64 + products.sum::<f64>();
                    assert!(
                        (f64::from(*found) - want).abs() < 1e-5 * (1.0 + want.abs()),
                        "{m} {k} {n} {kind} at {i}: {found} {want}"
                    );
                }
            }
        }
        assert!(Panels::new(&[0.0; 3], 2, 2).is_none());
    }

    #[test]
    fn every_finite_half_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            if half.is_finite() {
                assert_eq!(widen_half(bits).to_bits(), half.to_f32().to_bits(), "{bits}");
            }
        }
    }
}
