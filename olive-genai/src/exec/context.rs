//! What a step sees while it runs, and what an operator sees while it is built.

use std::collections::HashMap;

use olive_core::{Error, Result};
use olive_onnx::ir;

use super::cache::KvCache;
use super::value::{Tensor, Value};
use crate::kernels::activation::QuantActivations;

/// Where a step finds an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Left out.
    Absent,
    /// A value of this run.
    Slot(usize),
    /// A constant, or what an adapter puts in its place.
    Constant(usize),
    /// The cache of a layer; only attention reads it.
    Cache(usize),
}

/// Buffers of dead values, kept for new ones.
#[derive(Debug, Default)]
pub struct Pool {
    free: Vec<Vec<f32>>,
}

impl Pool {
    /// A buffer of `len` values; what they are is not defined.
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        let fits = self.free.iter().enumerate().filter(|(_, b)| b.capacity() >= len);
        let best = fits.min_by_key(|(_, b)| b.capacity()).map(|(i, _)| i);
        let mut buffer = best.map(|i| self.free.swap_remove(i)).unwrap_or_default();
        buffer.resize(len, 0.0);
        buffer
    }

    /// Keeps the buffer of a dead value.
    pub fn give(&mut self, value: Value) {
        const KEPT: usize = 32;
        if let Value::F32(tensor) = value
            && tensor.is_owned()
            && self.free.len() < KEPT
        {
            self.free.push(tensor.into_vec());
        }
    }
}

/// Activations that were rounded last, kept for the next product with the same ones.
#[derive(Debug, Default)]
pub struct Rounded {
    /// The slot that they are of, if any.
    slot: Option<usize>,
    /// The values.
    pub values: QuantActivations,
}

impl Rounded {
    /// Says that slots hold other values now.
    pub fn forget(&mut self) {
        self.slot = None;
    }
}

/// The state of a run.
pub struct RunState<'a> {
    /// Values, by slot.
    pub slots: &'a mut [Option<Value>],
    /// Constants.
    pub constants: &'a [Value],
    /// What adapters put in the place of constants.
    pub overrides: &'a [Option<Value>],
    /// Keys and values of earlier tokens.
    pub cache: &'a mut KvCache,
    /// Buffers to use again.
    pub pool: &'a mut Pool,
    /// Rounded activations; a slot is written once a run, so its number says whose they are.
    pub rounded: &'a mut Rounded,
}

/// One step's view of the run.
pub struct OpContext<'r, 'a> {
    /// The run.
    pub state: &'r mut RunState<'a>,
    /// The node's name, for messages.
    pub node: &'r str,
    /// Where the inputs are.
    pub inputs: &'r [Source],
    /// For each input, whether this is the last step that reads it.
    pub dying: &'r [bool],
    /// Slots of the outputs; `None` where nobody reads one.
    pub outputs: &'r [Option<usize>],
}

impl OpContext<'_, '_> {
    /// Whether input `i` is given.
    pub fn has(&self, i: usize) -> bool {
        self.inputs.get(i).is_some_and(|source| *source != Source::Absent)
    }

    /// Input `i`.
    pub fn value(&self, i: usize) -> Result<&Value> {
        let found = match self.inputs.get(i).copied().unwrap_or(Source::Absent) {
            Source::Slot(slot) => self.state.slots[slot].as_ref(),
            Source::Constant(c) => self.state.overrides[c]
                .as_ref()
                .or(Some(&self.state.constants[c])),
            Source::Absent | Source::Cache(_) => None,
        };
        found.ok_or_else(|| self.wrong(i, "a value", "none"))
    }

    /// Input `i`, which must be floats.
    pub fn f32(&self, i: usize) -> Result<&Tensor<f32>> {
        match self.value(i)? {
            Value::F32(tensor) => Ok(tensor),
            other => Err(self.wrong(i, "FLOAT", other.type_name())),
        }
    }

    /// Input `i`, which must be integers.
    pub fn ints(&self, i: usize) -> Result<Vec<i64>> {
        let value = self.value(i)?;
        value
            .to_i64()
            .ok_or_else(|| self.wrong(i, "integers", value.type_name()))
    }

    /// The buffer of input `i` if nothing reads it after this step and it may be written to.
    pub fn take_f32(&mut self, i: usize) -> Option<Tensor<f32>> {
        let Some(Source::Slot(slot)) = self.inputs.get(i).copied() else {
            return None;
        };
        let again = self
            .inputs
            .iter()
            .filter(|source| **source == Source::Slot(slot))
            .count()
            > 1;
        let usable = matches!(&self.state.slots[slot], Some(Value::F32(tensor)) if tensor.is_owned());
        if again || !self.dying[i] || !usable {
            return None;
        }
        match self.state.slots[slot].take() {
            Some(Value::F32(tensor)) => Some(tensor),
            _ => None,
        }
    }

    /// Input `i`: moved if this is its last use, else cloned.
    pub fn take(&mut self, i: usize) -> Result<Value> {
        if let Some(Source::Slot(slot)) = self.inputs.get(i).copied() {
            let again = self
                .inputs
                .iter()
                .filter(|source| **source == Source::Slot(slot))
                .count()
                > 1;
            if self.dying[i]
                && !again
                && let Some(value) = self.state.slots[slot].take()
            {
                return Ok(value);
            }
        }
        self.value(i).cloned()
    }

    /// Rounds input 0 to 8 bits for weights of `bits` bits in blocks of `block`, into the state's `rounded`; does nothing
    /// if that holds it already.
    pub fn round_input(&mut self, bits: usize, block: usize) -> Result<()> {
        let mut rounded = std::mem::take(self.state.rounded);
        let slot = match self.inputs.first() {
            Some(Source::Slot(slot)) => Some(*slot),
            _ => None,
        };
        let same = (rounded.values.bits, rounded.values.block) == (bits, block);
        let result = self.f32(0).map(|x| {
            if slot.is_none() || rounded.slot != slot || !same {
                let k = x.shape().last().copied().unwrap_or(0);
                rounded.values.fill(x.data(), k, bits, block);
                rounded.slot = slot;
            }
        });
        *self.state.rounded = rounded;
        result
    }

    /// A buffer of `len` floats; what they are is not defined.
    pub fn buffer(&mut self, len: usize) -> Vec<f32> {
        self.state.pool.take(len)
    }

    /// Sets output `o`.
    pub fn set(&mut self, o: usize, value: Value) {
        match self.outputs.get(o).copied().flatten() {
            Some(slot) => self.state.slots[slot] = Some(value),
            None => self.state.pool.give(value),
        }
    }

    /// Sets output `o` to floats.
    pub fn set_f32(&mut self, o: usize, shape: impl Into<Vec<usize>>, data: Vec<f32>) {
        self.set(o, Value::F32(Tensor::new(shape, data)));
    }

    /// An error about input `i`.
    pub fn wrong(&self, i: usize, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::tensor(format!("{}:{i}", self.node), expected, found)
    }
}

/// What an operator sees while it is built.
pub struct BuildContext<'a> {
    /// The node.
    pub node: &'a ir::Node,
    /// Initializers that nothing overrides, by name.
    pub initializers: &'a HashMap<&'a str, &'a ir::Tensor>,
    /// Where the inputs are.
    pub inputs: &'a [Source],
    /// Constants.
    pub constants: &'a [Value],
    /// Which constants an adapter may replace.
    pub optional: &'a [bool],
}

impl<'a> BuildContext<'a> {
    /// Input `i` as a constant that nothing overrides.
    pub fn constant(&self, i: usize) -> Option<&'a Value> {
        match self.inputs.get(i) {
            Some(Source::Constant(c)) if !self.optional[*c] => self.constants.get(*c),
            _ => None,
        }
    }

    /// Input `i` as an initializer of the file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it is computed or may be overridden.
    pub fn initializer(&self, i: usize) -> Result<&'a ir::Tensor> {
        let name = self.node.input(i).unwrap_or_default();
        self.initializers
            .get(name)
            .copied()
            .ok_or_else(|| self.unsupported(format!("input {i} (`{name}`) is not a constant of the file")))
    }

    /// Whether input `i` is given.
    pub fn has(&self, i: usize) -> bool {
        self.node.input(i).is_some()
    }

    /// An error that says why the node cannot be run.
    pub fn unsupported(&self, reason: impl Into<String>) -> Error {
        let node = self.node;
        Error::unsupported(format!("node `{}` ({})", node.name, node.op_type), reason)
    }

    /// Refuses inputs that are given though the operator does not read them.
    pub fn refuse_inputs(&self, indices: impl IntoIterator<Item = usize>) -> Result<()> {
        match indices.into_iter().find(|i| self.has(*i)) {
            None => Ok(()),
            Some(i) => {
                let name = self.node.input(i).unwrap_or_default();
                Err(self.unsupported(format!("input {i} (`{name}`) is given")))
            }
        }
    }
}
