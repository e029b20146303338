//! The parts of a block-quantized weight, made together when the first is asked for.

use std::sync::{Arc, Mutex, PoisonError};

use olive_core::Result;

use super::floats;
use super::quantize::BlockQuantized;
use crate::ir::{OnnxType, Tensor};

type Make = Box<dyn Fn() -> Result<BlockQuantized> + Send + Sync>;

/// A weight `[rows, cols]` in blocks.
#[derive(Clone)]
pub struct Blocks {
    pub rows: usize,
    /// Blocks of a row.
    pub blocks: usize,
    pub bits: usize,
    pub block_size: usize,
    /// Whether zero points are stored.
    pub has_zeros: bool,
    io: OnnxType,
    making: Arc<Making>,
}

/// Integers, scales and zero points.
const PARTS: usize = 3;

struct Making {
    make: Make,
    /// Those that were made and not taken yet.
    made: Mutex<[Option<Vec<u8>>; PARTS]>,
}

impl Blocks {
    /// A weight that `make` makes.
    pub fn new(
        [rows, cols]: [usize; 2],
        bits: usize,
        block_size: usize,
        has_zeros: bool,
        io: OnnxType,
        make: impl Fn() -> Result<BlockQuantized> + Send + Sync + 'static,
    ) -> Self {
        Self {
            rows,
            blocks: cols.div_ceil(block_size),
            bits,
            block_size,
            has_zeros,
            io,
            making: Arc::new(Making {
                make: Box::new(make),
                made: Mutex::default(),
            }),
        }
    }

    /// The type of the scales.
    pub fn io(&self) -> OnnxType {
        self.io
    }

    /// Bytes of a row of integers.
    pub fn row_bytes(&self) -> usize {
        self.blocks * self.block_size * self.bits / 8
    }

    /// Bytes of a row of zero points.
    pub fn zero_bytes(&self) -> usize {
        (self.blocks * self.bits).div_ceil(8)
    }

    /// The integers, of a shape with `rows · row_bytes` elements: `[rows, blocks, block_size · bits / 8]` for
    /// MatMulNBits.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.part(0, name, OnnxType::Uint8, shape)
    }

    /// The scales, of a shape with `rows · blocks` elements.
    pub fn scales(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.part(1, name, self.io, shape)
    }

    /// The zero points, of a shape with `rows · zero_bytes` elements.
    pub fn zeros(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.part(2, name, OnnxType::Uint8, shape)
    }

    fn part(&self, index: usize, name: &str, dtype: OnnxType, shape: &[usize]) -> Result<Tensor> {
        let (making, io) = (self.making.clone(), self.io);
        let produce = move || making.take(index, io);
        Tensor::produced(name, dtype, shape, Arc::new(produce))
    }

    /// All parts at once, for another order than that of MatMulNBits.
    pub fn made(&self) -> Result<BlockQuantized> {
        (self.making.make)()
    }
}

impl Making {
    /// Hands out a part. It is kept no longer; one that is asked for again is made again.
    fn take(&self, index: usize, io: OnnxType) -> Result<Vec<u8>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = made[index].take() {
            return Ok(bytes);
        }
        let blocks = (self.make)()?;
        *made = [
            Some(blocks.values),
            Some(floats::encode(&blocks.scales, io)),
            Some(blocks.zeros).filter(|zeros| !zeros.is_empty()),
        ];
        Ok(made[index].take().unwrap_or_default())
    }
}
