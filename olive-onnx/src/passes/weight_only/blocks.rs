//! From a weight to the constants of MatMulNBits, made when they are asked for, a weight at a time.

use std::sync::{Arc, Mutex};

use olive_core::{DType, Error, Result};

use crate::ir::Tensor;

/// Bits of an integer, and how many of a row share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    /// 4 or 8.
    pub bits: usize,
    /// A power of two, at least 16.
    pub block_size: usize,
}

impl Layout {
    /// The largest integer.
    pub fn max(self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Checks both, naming the parameters they are from.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(self, origin: &str) -> Result<Self> {
        if !matches!(self.bits, 4 | 8) {
            return Err(Error::config(origin, "bits", "4 or 8", self.bits.to_string()));
        }
        if self.block_size < 16 || !self.block_size.is_power_of_two() {
            let found = self.block_size.to_string();
            return Err(Error::config(
                origin,
                "block_size",
                "a power of two, at least 16",
                found,
            ));
        }
        Ok(self)
    }
}

/// How zero points are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeros {
    /// Not at all: each is `2^(bits - 1)`.
    Middle,
    /// As integers of the same bits.
    Packed,
    /// As floats.
    Float,
}

/// Integers (one a byte), scales and zero points of a matrix.
pub struct Integers {
    /// `[rows, blocks · block_size]`; behind the end of a row anything.
    pub values: Vec<u8>,
    /// `[rows, blocks]`.
    pub scales: Vec<f32>,
    /// `[rows, blocks]`.
    pub zeros: Vec<f32>,
}

/// How weights become integers.
pub trait BlockQuantizer: Send + Sync {
    /// How its zero points are stored.
    fn zeros(&self) -> Zeros;
    /// Quantizes `weight [rows, cols]` along its rows. The same result whatever the number of threads.
    fn quantize(&self, weight: &[f32], shape: [usize; 2], layout: Layout) -> Integers;
}

impl dyn BlockQuantizer {
    /// Whether its zero points are integers.
    pub fn packs_zeros(&self) -> bool {
        self.zeros() != Zeros::Float
    }
}

/// A weight that is quantized when the first of its parts is asked for; the others wait until they are.
pub struct Lazy {
    weight: Tensor,
    transpose: bool,
    layout: Layout,
    quantizer: Arc<dyn BlockQuantizer>,
    parts: Mutex<[Option<Vec<u8>>; 3]>,
}

impl Lazy {
    /// A weight `[K, N]` that is quantized along K with `transpose`, else one `[rows, cols]` along its rows.
    pub fn new(weight: Tensor, transpose: bool, layout: Layout, quantizer: Arc<dyn BlockQuantizer>) -> Self {
        Self {
            weight,
            transpose,
            layout,
            quantizer,
            parts: Mutex::default(),
        }
    }

    /// The bytes of the integers (0), the scales (1) or the zero points (2).
    ///
    /// # Errors
    /// Those of the weight's bytes; [`Error::NotFinite`].
    pub fn part(&self, index: usize) -> Result<Vec<u8>> {
        let mut parts = self
            .parts
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(bytes) = parts[index].take() {
            return Ok(bytes);
        }
        let mut made = self.make()?;
        let bytes = std::mem::take(&mut made[index]);
        *parts = made.map(Some);
        parts[index] = None;
        Ok(bytes)
    }

    fn make(&self) -> Result<[Vec<u8>; 3]> {
        let values = self.weight.to_f32()?;
        let wrong = values.iter().filter(|value| !value.is_finite()).count();
        if wrong > 0 {
            return Err(Error::NotFinite {
                what: format!("tensor `{}`", self.weight.name),
                found: wrong,
            });
        }
        let [first, second] = [self.weight.shape()[0], self.weight.shape()[1]];
        let (values, shape) = match self.transpose {
            true => (transposed(&values, [first, second]), [second, first]),
            false => (values, [first, second]),
        };
        let integers = self.quantizer.quantize(&values, shape, self.layout);
        let Layout { bits, block_size } = self.layout;
        let [rows, cols] = shape;
        let blocks = cols.div_ceil(block_size);
        let mut codes = integers.values;
        for row in codes.chunks_exact_mut(blocks * block_size) {
            row[cols..].fill(0);
        }
        let dtype = self.weight.dtype().to_core().unwrap_or(DType::F32);
        let floats = |values: &[f32]| dtype.from_f32(values).unwrap_or_default();
        let zeros = match self.quantizer.zeros() {
            Zeros::Middle => Vec::new(),
            Zeros::Float => floats(&integers.zeros),
            Zeros::Packed => {
                let codes: Vec<u8> = integers.zeros.iter().map(|zero| *zero as u8).collect();
                codes
                    .chunks_exact(blocks)
                    .flat_map(|row| pack(row, bits))
                    .collect()
            }
        };
        debug_assert_eq!(codes.len(), rows * blocks * block_size);
        Ok([pack(&codes, bits), floats(&integers.scales), zeros])
    }
}

/// `[rows, cols]` to `[cols, rows]`.
pub fn transposed<T: Copy>(values: &[T], shape: [usize; 2]) -> Vec<T> {
    let [rows, cols] = shape;
    (0..cols)
        .flat_map(|col| (0..rows).map(move |row| values[row * cols + col]))
        .collect()
}

/// Integers one a byte to `8 / bits` a byte, the first in the low bits.
pub fn pack(codes: &[u8], bits: usize) -> Vec<u8> {
    let in_byte = |part: &[u8]| {
        part.iter()
            .enumerate()
            .fold(0, |byte, (i, code)| byte | (code << (bits * i)))
    };
    codes.chunks(8 / bits).map(in_byte).collect()
}

/// The inverse of [`pack`]: `count` integers.
pub fn unpack(bytes: &[u8], bits: usize, count: usize) -> Vec<u8> {
    let (in_byte, mask) = (8 / bits, ((1u16 << bits) - 1) as u8);
    (0..count)
        .map(|i| (bytes[i / in_byte] >> (bits * (i % in_byte))) & mask)
        .collect()
}
