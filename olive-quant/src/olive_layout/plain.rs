//! What needs no calibration: tensors that are copied, and weights that are rounded by themselves, some rows at a time,
//! read from the checkpoint's map and written where they belong.

use olive_core::packed::pack_rows;
use olive_core::{Error, Result};
use rayon::prelude::*;

use super::layout::{Entry, Layout, Target};
use super::options::Rounding;
use super::run::{Run, UniformLinear};
use crate::quantizer::kquant;
use crate::quantizer::minmax::{self, ChooseGrid, MinMax, RoundedRows};

impl Run<'_> {
    /// Copies what is not rounded.
    pub fn copy(&self, layout: &Layout) -> Result<()> {
        /// Bytes that one task copies; a whole number of elements of every type.
        const TASK: usize = 1 << 20;
        let source = self.model.tensors();
        for entry in &layout.entries {
            let Entry::Copied { from, to, info } = entry else {
                continue;
            };
            self.cancel.check()?;
            let stored = source.bytes(from)?;
            let pieces = stored.par_chunks(TASK).enumerate();
            let copied = pieces.map(|(index, bytes)| {
                let offset = index * TASK;
                self.draft.writer().write_at(to, offset, bytes)?;
                let bad = info.dtype.count_not_finite(bytes);
                source.release(from, offset..offset + bytes.len());
                Ok(bad)
            });
            refuse_not_finite(from, copied.collect::<Result<Vec<_>>>()?.into_iter().sum())?;
        }
        Ok(())
    }

    /// Rounds a weight by itself, some rows at a time, and writes it.
    pub fn round(&self, target: &Target) -> Result<UniformLinear> {
        /// Weights that one task rounds: with what becomes of them, they stay in the cache of a core.
        const TASK: usize = 1 << 16;
        let (source, writer) = (self.model.tensors(), self.draft.writer());
        let settings = target.settings;
        let ([rows, cols], info) = (target.shape, source.require(&target.weight)?);
        if info.shape != target.shape || !info.dtype.is_float() {
            let expected = format!("floating-point elements of shape {:?}", target.shape);
            return Err(Error::tensor(&target.weight, expected, info.to_string()));
        }
        let group_size = settings.checked_group(&target.module, target.shape)?;
        let grids = MinMax::of_weight(settings.bits, settings.symmetric, target.dtype);
        let search = |group: &[f32]| kquant::grid(group, &grids);
        let choose: Option<&ChooseGrid<'_>> = match self.rounding {
            Rounding::KQuant => Some(&search),
            _ => None,
        };
        let stored = source.bytes(&target.weight)?;
        let names: Vec<String> = target.plan().into_iter().map(|(name, _, _)| name).collect();
        let (row_bytes, block) = (cols * info.dtype.size(), (TASK / cols).max(1));
        let packed_bytes = (cols * settings.bits).div_ceil(8);
        let pieces = (0..rows.div_ceil(block)).into_par_iter();
        let pieces = pieces.map_init(Scratch::default, |scratch, index| {
            self.cancel.check()?;
            let own = index * block..rows.min((index + 1) * block);
            let bytes = own.start * row_bytes..own.end * row_bytes;
            let bad = info.dtype.count_not_finite(&stored[bytes.clone()]);
            if bad > 0 {
                return Ok((bad, Vec::new(), [0.0; 2]));
            }
            let Scratch { weight, rounded } = scratch;
            weight.resize(own.len() * cols, 0.0);
            info.dtype.fill_f32(&stored[bytes.clone()], weight);
            source.release(&target.weight, bytes);
            grids.round_rows(weight, group_size, choose, rounded);
            let packed = pack_rows(&rounded.levels, cols, settings.bits);
            writer.write_at(&names[0], own.start * packed_bytes, &packed)?;
            Ok((0, std::mem::take(&mut rounded.grids), rounded.squares))
        });
        let (mut own, mut squares, mut bad) = (Vec::new(), [0.0; 2], 0);
        for (found, grids, sums) in pieces.collect::<Result<Vec<_>>>()? {
            own.extend(grids);
            // In order, whoever computed them.
            squares = [squares[0] + sums[0], squares[1] + sums[1]];
            bad += found;
        }
        refuse_not_finite(&target.weight, bad)?;
        minmax::check_scales(&target.weight, &grids, &own)?;
        let scales: Vec<f32> = own.iter().map(|grid| grid.scale).collect();
        let scales = target.dtype.from_f32(&scales);
        writer.write_at(&names[1], 0, &scales.expect("invariant: a weight is of floats"))?;
        if let Some(name) = names.get(2) {
            let zeros: Vec<u8> = own.iter().map(|grid| grid.zero as u8).collect();
            writer.write_at(name, 0, &pack_rows(&zeros, cols / group_size, settings.bits))?;
        }
        let [error, whole] = squares;
        Ok(UniformLinear {
            weight_error: if error == 0.0 { 0.0 } else { (error / whole).sqrt() },
            ..UniformLinear::new(target, group_size)
        })
    }
}

/// What a task works with.
#[derive(Default)]
struct Scratch {
    weight: Vec<f32>,
    rounded: RoundedRows,
}

fn refuse_not_finite(name: &str, found: usize) -> Result<()> {
    match found {
        0 => Ok(()),
        _ => Err(Error::NotFinite {
            what: format!("tensor `{name}`"),
            found,
        }),
    }
}
