//! Running a plan.

use olive_core::{Error, Result};

use super::super::cache::KvCache;
use super::super::context::{OpContext, RunState, Source};
use super::super::value::{Tensor, Value};
use super::{LogitRows, Plan, Step, Work, Workspace};

/// The tokens of a run.
#[derive(Debug, Clone, Copy)]
pub struct RunInput<'a> {
    /// `[batch, steps]` ids; shorter rows are padded on the right.
    pub tokens: &'a [i64],
    /// Tokens of a row with its padding.
    pub steps: usize,
    /// For each row, the length of its sequence after the run.
    pub totals: &'a [usize],
    /// The length of the longest sequence that the caller is about to reach; graphs choose rotary tables by it.
    pub planned: usize,
}

impl Plan {
    /// Runs the graph: appends keys and values to the cache and gives the logits, `[batch, steps or 1, vocabulary]`,
    /// with the size of the vocabulary. The cache's lengths are moved on if all went well.
    ///
    /// # Errors
    /// The first step that fails, by the name of its node.
    pub fn run(
        &self,
        workspace: &mut Workspace,
        cache: &mut KvCache,
        overrides: &[Option<Value>],
        input: RunInput<'_>,
        rows: LogitRows,
    ) -> Result<(Vec<f32>, usize)> {
        let batch = input.totals.len();
        let past = cache.lengths().to_vec();
        if input.steps == 0 || input.tokens.len() != batch * input.steps || past.len() != batch {
            let found = format!(
                "{} tokens for {batch} row(s) of {}",
                input.tokens.len(),
                input.steps
            );
            return Err(Error::tensor(
                "input_ids",
                "a token for every row and step",
                found,
            ));
        }
        workspace.rounded.forget();
        workspace.slots.clear();
        workspace.slots.resize(self.slots, None);
        self.feed(&mut workspace.slots, &past, input);
        let new: Vec<usize> = input
            .totals
            .iter()
            .zip(&past)
            .map(|(total, past)| total - past.min(total))
            .collect();
        {
            let mut state = RunState {
                slots: &mut workspace.slots,
                constants: &self.constants,
                overrides,
                cache,
                pool: &mut workspace.pool,
                rounded: &mut workspace.rounded,
            };
            for (i, step) in self.steps.iter().enumerate() {
                if rows == LogitRows::Last && self.head.is_some_and(|(head, _)| head == i) {
                    self.keep_last(&mut state, &new, input.steps);
                }
                run_step(step, &mut state)?;
            }
        }
        let logits = match workspace.slots[self.logits].take() {
            Some(Value::F32(tensor)) => tensor,
            other => {
                let found = other.map_or("nothing", |value| value.type_name());
                return Err(Error::tensor("logits", "FLOAT", found));
            }
        };
        let vocabulary = logits.shape().last().copied().unwrap_or(0);
        let shape = logits.shape().to_vec();
        let given = shape
            .iter()
            .product::<usize>()
            .checked_div(batch * vocabulary)
            .unwrap_or(0);
        if shape.len() != 3 || shape[0] != batch || (given != input.steps && given != 1) {
            return Err(Error::tensor(
                "logits",
                format!("[{batch}, {}, n]", input.steps),
                format!("{shape:?}"),
            ));
        }
        cache.set_lengths(input.totals);
        let logits = logits.into_vec();
        if rows == LogitRows::Last && given > 1 {
            return Ok((last_rows(&logits, &new, given, vocabulary), vocabulary));
        }
        Ok((logits, vocabulary))
    }

    /// Gives a spent buffer of logits back.
    pub fn recycle(workspace: &mut Workspace, logits: Vec<f32>) {
        workspace
            .pool
            .give(Value::F32(Tensor::new([logits.len()], logits)));
    }

    fn feed(&self, slots: &mut [Option<Value>], past: &[usize], input: RunInput<'_>) {
        let integers = |shape: [usize; 2], values: Vec<i64>, narrow: bool| {
            if narrow {
                Value::I32(Tensor::new(shape, values.into_iter().map(|v| v as i32).collect()))
            } else {
                Value::I64(Tensor::new(shape, values))
            }
        };
        let batch = input.totals.len();
        if let Some((slot, narrow)) = self.inputs.ids {
            slots[slot] = Some(integers([batch, input.steps], input.tokens.to_vec(), narrow));
        }
        if let Some((slot, narrow)) = self.inputs.mask {
            let width = input.totals.iter().copied().max().unwrap_or(0).max(input.planned);
            let row = |total: &usize| (0..width).map(|j| i64::from(j < *total)).collect::<Vec<_>>();
            let mask = input.totals.iter().flat_map(row).collect();
            slots[slot] = Some(integers([batch, width], mask, narrow));
        }
        if let Some((slot, narrow)) = self.inputs.positions {
            let row = |past: &usize| (*past as i64..(*past + input.steps) as i64).collect::<Vec<_>>();
            let positions = past.iter().flat_map(row).collect();
            slots[slot] = Some(integers([batch, input.steps], positions, narrow));
        }
    }

    /// Leaves only the last row of each sequence for the head.
    fn keep_last(&self, state: &mut RunState<'_>, new: &[usize], steps: usize) {
        let Some((_, slot)) = self.head else { return };
        if let Some(Value::F32(hidden)) = &state.slots[slot]
            && let [batch, rows, width] = *hidden.shape()
            && rows == steps
            && rows > 1
        {
            let last = last_rows(hidden.data(), new, rows, width);
            state.rounded.forget();
            let kept = Value::F32(Tensor::new([batch, 1, width], last));
            if let Some(old) = state.slots[slot].replace(kept) {
                state.pool.give(old);
            }
        }
    }
}

fn last_rows(data: &[f32], new: &[usize], rows: usize, width: usize) -> Vec<f32> {
    let row = |(b, new): (usize, &usize)| {
        let at = (b * rows + new.saturating_sub(1)) * width;
        &data[at..at + width]
    };
    new.iter()
        .enumerate()
        .flat_map(|row_of| row(row_of).iter().copied())
        .collect()
}

fn run_step(step: &Step, state: &mut RunState<'_>) -> Result<()> {
    match &step.work {
        Work::Op(op) => op.run(&mut OpContext {
            state,
            node: &step.name,
            inputs: &step.inputs,
            dying: &step.dying,
            outputs: &step.outputs,
        })?,
        Work::If(branches) => {
            let ctx = OpContext {
                state,
                node: &step.name,
                inputs: &step.inputs,
                dying: &step.dying,
                outputs: &step.outputs,
            };
            let condition = ctx.ints(0)?;
            let branch = &branches[usize::from(condition.first() == Some(&0))];
            for step in &branch.steps {
                run_step(step, ctx.state)?;
            }
            for (source, output) in branch.outputs.iter().zip(&step.outputs) {
                let Some(output) = *output else { continue };
                ctx.state.slots[output] = match source {
                    Source::Slot(slot) => ctx.state.slots[*slot].clone(),
                    Source::Constant(c) => ctx.state.overrides[*c]
                        .clone()
                        .or_else(|| Some(ctx.state.constants[*c].clone())),
                    Source::Absent | Source::Cache(_) => None,
                };
            }
        }
    }
    for slot in &step.free {
        if let Some(value) = state.slots[*slot].take() {
            state.pool.give(value);
        }
    }
    Ok(())
}
