//! The training loop, with the semantics of Hugging Face's Trainer as Olive sets it up.
//!
//! An optimizer step: micro-batches in the order of [`crate::order`]; the loss of a micro-batch is the mean over its
//! labels, that of a step the mean over its micro-batches (whatever their sizes); gradients are clipped by their
//! global norm; AdamW; then the schedule moves on.
//!
//! Sequences of a step are computed together, as rows that follow one another, as many as fit a fixed number of rows;
//! their gradients are added in the order of the samples. The result does not depend on the number of threads, nor on
//! where a run was interrupted.

use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use olive_core::decoder::DropoutStream;
use olive_core::{Error, ModelHandle, PassContext, Result, Sample};
use rayon::prelude::*;

use crate::adamw::{self, Moments};
use crate::adapter::{Adapter, AdapterModule};
use crate::arguments::TrainingArguments;
use crate::checkpoint::{self, INTERRUPTED_FOLDER, Snapshot, TrainerState};
#[cfg(feature = "cuda")]
use crate::cuda::{DeviceMode, DeviceRun};
use crate::network::{GroupResult, Network, Sequence, Tables, Trained, trained_tokens};
use crate::order::{BatchPlan, StepSamples};
use crate::schedule::LearningRate;
use crate::train_log::{self, LogEntry};

/// A run that takes longer keeps a checkpoint of its own, in case it is interrupted.
const KEEP_EVERY: Duration = Duration::from_secs(120);

/// Rows that are computed together, unless a single sequence is longer.
const GROUP_ROWS: usize = 1024;

/// Samples to train on, and to evaluate on.
#[derive(Debug, Clone, Copy)]
pub struct TrainingData<'a> {
    /// To train on.
    pub train: &'a [Sample],
    /// To evaluate on.
    pub eval: Option<&'a [Sample]>,
}

/// What identifies a run; see [`crate::finetune`].
pub(crate) struct RunIdentity {
    /// Digest of everything that decides the result.
    pub digest: String,
    /// The base's name in the files of the adapter.
    pub base_model: String,
}

/// One step as it was computed.
struct StepOutcome {
    loss: f64,
    gradients: Vec<Vec<f32>>,
    tokens: u64,
    longest: usize,
}

/// What computes gradients and steps: this process, or a GPU that keeps adapter and optimizer until they are saved.
enum Compute<B: Backend> {
    Host(Box<Network<B>>),
    #[cfg(feature = "cuda")]
    Gpu(Box<DeviceRun>),
}

impl<B: Backend> Compute<B> {
    /// Reads the model and puts the adapter on it.
    fn load(
        model: &dyn ModelHandle,
        snapshot: &Snapshot,
        gpu: bool,
        context: &PassContext<'_>,
    ) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if gpu {
            let (adapter, moments) = (&snapshot.adapter, &snapshot.moments);
            let run = DeviceRun::load(model, adapter, moments, context.progress, context.cancel)?;
            return Ok(Self::Gpu(Box::new(run)));
        }
        if gpu {
            return Err(Error::unsupported(
                "training on the GPU",
                "this olive was built without the feature `cuda`",
            ));
        }
        let mut network = Network::load(model, context.progress, context.cancel)?;
        network.attach(&snapshot.adapter)?;
        Ok(Self::Host(Box::new(network)))
    }

    fn host(&self) -> Result<&Network<B>> {
        match self {
            Self::Host(network) => Ok(network),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => Err(Error::unsupported(
                "a step in host memory",
                "the run is on the GPU",
            )),
        }
    }
}

/// A run in progress.
pub(crate) struct Trainer<'a, B: Backend> {
    compute: Compute<B>,
    data: TrainingData<'a>,
    lengths: Vec<usize>,
    arguments: &'a TrainingArguments,
    plan: BatchPlan,
    rate: LearningRate,
    total_steps: usize,
    context: &'a PassContext<'a>,
    identity: RunIdentity,
    tables: Tables<B>,
    snapshot: Snapshot,
    kept_at: Instant,
    /// Lines of the log's file, once this process has written it.
    written_lines: Option<usize>,
    logged_at: (Instant, u64),
}

impl<'a, B: Backend> Trainer<'a, B> {
    /// A run from the adapter's present values.
    pub fn new(
        model: &dyn ModelHandle,
        data: TrainingData<'a>,
        arguments: &'a TrainingArguments,
        start: Start,
        identity: RunIdentity,
        context: &'a PassContext<'a>,
        gpu: bool,
    ) -> Result<Self> {
        let plan = BatchPlan {
            samples: data.train.len(),
            batch_size: arguments.per_device_train_batch_size,
            accumulation: arguments.gradient_accumulation_steps,
            drop_last: arguments.dataloader_drop_last,
            seed: arguments.data_seed.unwrap_or(arguments.seed),
            by_length: arguments.group_by_length,
        };
        check_samples(&data, &plan)?;
        let total_steps = arguments.total_steps(plan.steps_per_epoch());
        let snapshot = match start {
            Start::Fresh(adapter) => fresh(*adapter, total_steps, &identity),
            Start::From(snapshot) => *snapshot,
        };
        let compute = Compute::load(model, &snapshot, gpu, context)?;
        let seen = snapshot.state.num_input_tokens_seen;
        Ok(Self {
            compute,
            lengths: data.train.iter().map(|s| s.length.max(1)).collect(),
            data,
            arguments,
            plan,
            rate: arguments.learning_rates(total_steps),
            total_steps,
            context,
            identity,
            tables: Tables::new(),
            snapshot,
            kept_at: Instant::now(),
            written_lines: None,
            logged_at: (Instant::now(), seen),
        })
    }

    /// Trains to the end and gives the last state. A run that is asked to stop keeps where it is.
    pub fn run(mut self) -> Result<Snapshot> {
        let result = self.run_steps();
        if matches!(result, Err(Error::Cancelled)) {
            self.keep()?;
        }
        self.refresh()?;
        self.context.progress.finish();
        result.map(|()| self.snapshot)
    }

    fn run_steps(&mut self) -> Result<()> {
        let steps_per_epoch = self.plan.steps_per_epoch();
        self.context.progress.start("training", self.total_steps as u64);
        let untouched = self.snapshot.state.global_step == 0 && self.snapshot.state.log_history.is_empty();
        if untouched && self.arguments.eval_on_start {
            self.evaluate()?;
        }
        if self.snapshot.state.step_is_open {
            self.close_step()?;
        }
        let mut epoch = usize::MAX;
        let mut steps: Vec<StepSamples> = Vec::new();
        while self.snapshot.state.global_step < self.total_steps {
            self.context.cancel.check()?;
            let done = self.snapshot.state.global_step;
            if epoch != done / steps_per_epoch {
                epoch = done / steps_per_epoch;
                steps = self.plan.epoch(epoch, &self.lengths);
            }
            let in_epoch = done % steps_per_epoch;
            let batches: usize = steps[..=in_epoch].iter().map(Vec::len).sum();
            let position = epoch as f64 + batches as f64 / self.plan.batches_per_epoch() as f64;
            self.step(&steps[in_epoch], position)?;
            self.close_step()?;
        }
        Ok(())
    }

    /// Brings adapter and optimizer state back from where they are computed.
    fn refresh(&mut self) -> Result<()> {
        match &self.compute {
            Compute::Host(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Compute::Gpu(run) => {
                if let Some(bytes) = run.memory() {
                    tracing::debug!("{:.2} GB of GPU memory", bytes as f64 / 1e9);
                }
                run.save(&mut self.snapshot.adapter, &mut self.snapshot.moments)
            }
        }
    }

    /// One optimizer step on the GPU.
    #[cfg(feature = "cuda")]
    fn device_step(&mut self, samples: &StepSamples, epoch: f64) -> Result<()> {
        let step = self.snapshot.state.global_step + 1;
        let Compute::Gpu(run) = &mut self.compute else {
            return Err(Error::unsupported(
                "a step on the GPU",
                "the run is in host memory",
            ));
        };
        run.clear_gradients();
        let micro_batches = samples.len() as f64;
        let dropout = self.snapshot.adapter.options.dropout;
        let mut outcome = StepOutcome {
            loss: 0.0,
            gradients: Vec::new(),
            tokens: 0,
            longest: 0,
        };
        for (micro, rows) in samples.iter().enumerate() {
            self.context.cancel.check()?;
            let batch: Vec<&Sample> = rows.iter().map(|i| &self.data.train[*i]).collect();
            let longest = batch.iter().map(|s| s.input_ids.len()).max().unwrap_or(0);
            let tokens = batch.iter().map(|sample| trained_tokens(sample)).sum::<usize>() as f64;
            let sequences: Vec<Sequence<'_>> = batch
                .iter()
                .map(|sample| Sequence::new(sample, longest))
                .collect();
            let mode = DeviceMode {
                scale: 1.0 / (tokens * micro_batches),
                recompute: self.arguments.gradient_checkpointing,
                dropout: DropoutStream::new(dropout, self.arguments.seed, 0)
                    .child(step as u64)
                    .child(micro as u64),
            };
            let sum = run.accumulate(&sequences, longest, &mode)?;
            if !sum.is_finite() {
                let what = format!("loss of optimizer step {step}, micro-batch {micro} (samples {rows:?})");
                return Err(Error::NotFinite { what, found: 1 });
            }
            outcome.loss += sum / tokens / micro_batches;
            outcome.tokens += sequences.iter().map(|s| s.ids.len() as u64).sum::<u64>();
            outcome.longest = sequences
                .iter()
                .map(|s| s.ids.len())
                .max()
                .unwrap_or(0)
                .max(outcome.longest);
        }
        let norm = run.gradient_norm()?;
        if step == 1 || !norm.is_finite() {
            outcome.gradients = run.gradients()?;
        }
        self.check_gradients(&outcome, norm, step)?;
        let limit = self.arguments.max_grad_norm;
        let clip = if limit > 0.0 {
            (limit / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        let rate = self.rate.at(step - 1);
        if let Compute::Gpu(run) = &self.compute {
            run.update(&self.arguments.adamw, step, rate, clip);
        }
        self.finish_step(&outcome, (step, epoch), (norm, rate));
        Ok(())
    }

    /// One optimizer step.
    fn step(&mut self, samples: &StepSamples, epoch: f64) -> Result<()> {
        #[cfg(feature = "cuda")]
        if matches!(self.compute, Compute::Gpu(_)) {
            return self.device_step(samples, epoch);
        }
        let step = self.snapshot.state.global_step + 1;
        let mut outcome = self.gradients(samples, step)?;
        let norm = adamw::global_norm(&outcome.gradients);
        self.check_gradients(&outcome, norm, step)?;
        if self.arguments.max_grad_norm > 0.0 {
            adamw::clip(&mut outcome.gradients, norm, self.arguments.max_grad_norm);
        }
        let rate = self.rate.at(step - 1);
        let Snapshot { adapter, moments, .. } = &mut self.snapshot;
        let mut parameters: Vec<&mut Vec<f32>> = adapter
            .modules
            .iter_mut()
            .flat_map(AdapterModule::parts_mut)
            .collect();
        self.arguments
            .adamw
            .step(step, rate, &mut parameters, &outcome.gradients, moments);
        match &mut self.compute {
            Compute::Host(network) => network.attach(adapter)?,
            #[cfg(feature = "cuda")]
            Compute::Gpu(_) => {}
        }
        self.finish_step(&outcome, (step, epoch), (norm, rate));
        Ok(())
    }

    /// Counts a step that was made and reports it.
    fn finish_step(&mut self, outcome: &StepOutcome, (step, epoch): (usize, f64), (norm, rate): (f64, f64)) {
        let state = &mut self.snapshot.state;
        state.global_step = step;
        state.epoch = epoch;
        state.num_input_tokens_seen += outcome.tokens;
        let (sum, count) = state.pending_loss;
        state.pending_loss = (sum + outcome.loss, count + 1);
        state.step_is_open = true;
        self.report(outcome, norm, rate);
    }

    /// Loss and gradients of a step, from its sequences side by side.
    fn gradients(&mut self, samples: &StepSamples, step: usize) -> Result<StepOutcome> {
        let mut sequences = Vec::new();
        let mut tokens_of = Vec::with_capacity(samples.len());
        let dropout = self.snapshot.adapter.options.dropout;
        for (micro, rows) in samples.iter().enumerate() {
            let batch = rows.iter().map(|i| &self.data.train[*i]);
            let longest = batch.clone().map(|s| s.input_ids.len()).max().unwrap_or(0);
            tokens_of.push(batch.clone().map(trained_tokens).sum::<usize>());
            for (row, sample) in batch.enumerate() {
                let stream = DropoutStream::new(dropout, self.arguments.seed, row * longest)
                    .child(step as u64)
                    .child(micro as u64);
                let own = Trained {
                    sequence: Sequence::new(sample, longest),
                    dropout: stream,
                    scale: 1.0 / (tokens_of[micro] as f64 * samples.len() as f64),
                };
                sequences.push((micro, own));
            }
        }
        let (micro_of, sequences): (Vec<usize>, Vec<Trained<'_>>) = sequences.into_iter().unzip();
        let network = self.compute.host()?;
        network.prepare(&mut self.tables, sequences.iter().map(|own| &own.sequence));
        let recompute = self.arguments.gradient_checkpointing;
        let lengths: Vec<usize> = sequences.iter().map(|own| own.sequence.ids.len()).collect();
        let mut outcome = StepOutcome {
            loss: 0.0,
            gradients: Vec::new(),
            tokens: lengths.iter().sum::<usize>() as u64,
            longest: lengths.iter().copied().max().unwrap_or(0),
        };
        for range in groups(&lengths) {
            self.context.cancel.check()?;
            let group = &sequences[range.clone()];
            let GroupResult { sums, gradients } = network.gradients(group, &self.tables, recompute)?;
            for ((micro, own), sum) in micro_of[range].iter().zip(group).zip(sums) {
                if !sum.is_finite() {
                    let samples = &samples[*micro];
                    let what =
                        format!("loss of optimizer step {step}, micro-batch {micro} (samples {samples:?})");
                    return Err(Error::NotFinite { what, found: 1 });
                }
                outcome.loss += sum * own.scale;
            }
            add(&mut outcome.gradients, gradients);
        }
        Ok(outcome)
    }

    /// Stops at the first gradient that is not finite, and at a module that is never trained.
    fn check_gradients(&self, outcome: &StepOutcome, norm: f64, step: usize) -> Result<()> {
        let names = self.snapshot.adapter.part_names();
        let name = |index: usize| names.get(index).cloned().unwrap_or_default();
        if !norm.is_finite() {
            let bad = |gradient: &Vec<f32>| gradient.iter().filter(|g| !g.is_finite()).count();
            let first = outcome
                .gradients
                .iter()
                .enumerate()
                .find(|(_, gradient)| bad(gradient) > 0);
            let (index, found) = first.map_or((0, 0), |(index, gradient)| (index, bad(gradient)));
            let what = format!("gradient of `{}` in optimizer step {step}", name(index));
            return Err(Error::NotFinite { what, found });
        }
        // In very short sequences attention may have nothing to choose from, and its gradient is 0 rightly.
        if step == 1 && outcome.longest >= 4 {
            let idle = outcome
                .gradients
                .iter()
                .enumerate()
                .filter(|(index, _)| name(*index).ends_with("lora_B"))
                .find(|(_, gradient)| gradient.iter().all(|g| *g == 0.0));
            if let Some((index, _)) = idle {
                return Err(Error::tensor(
                    name(index),
                    "a gradient after the first step",
                    "zeros only",
                ));
            }
        }
        Ok(())
    }

    /// Says how far the run is, and adds a line to the log if one is due.
    fn report(&mut self, outcome: &StepOutcome, norm: f64, rate: f64) {
        let state = &mut self.snapshot.state;
        let (since, tokens) = self.logged_at;
        let speed = (state.num_input_tokens_seen - tokens) as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let note = format!("loss {:.4}, {speed:.0} tokens/s", outcome.loss);
        self.context.progress.update(state.global_step as u64, &note);
        let epoch_ends = state.global_step.is_multiple_of(self.plan.steps_per_epoch());
        let first = self.arguments.logging_first_step && state.global_step == 1;
        let due = self
            .arguments
            .logging
            .is_due(state.global_step, self.total_steps, epoch_ends);
        if due || first {
            let (sum, count) = std::mem::take(&mut state.pending_loss);
            state.log_history.push(LogEntry {
                step: state.global_step,
                epoch: state.epoch,
                loss: Some(sum / count as f64),
                grad_norm: Some(norm),
                learning_rate: Some(rate),
                eval_loss: None,
                tokens: state.num_input_tokens_seen,
                tokens_per_s: Some(speed),
            });
            self.logged_at = (Instant::now(), state.num_input_tokens_seen);
        }
    }

    /// Evaluates, saves and keeps what is due after a step.
    fn close_step(&mut self) -> Result<()> {
        let step = self.snapshot.state.global_step;
        let epoch_ends = step.is_multiple_of(self.plan.steps_per_epoch());
        if self.data.eval.is_some() && self.arguments.eval.is_due(step, self.total_steps, epoch_ends) {
            self.evaluate()?;
        }
        self.snapshot.state.step_is_open = false;
        let lines = self.snapshot.state.log_history.len();
        if self.written_lines != Some(lines) {
            train_log::write(self.context.output, &self.snapshot.state.log_history)?;
            self.written_lines = Some(lines);
        }
        let at_end = step == self.total_steps && self.arguments.save_at_end;
        if at_end || self.arguments.save.is_due(step, self.total_steps, epoch_ends) {
            self.refresh()?;
            let folder = checkpoint::folder_of(self.context.output, step);
            self.untimed().write(&folder, &self.identity.base_model)?;
            checkpoint::rotate(self.context.output, self.arguments.save_total_limit)?;
            self.kept_at = Instant::now();
        } else if self.kept_at.elapsed() > KEEP_EVERY && step < self.total_steps {
            self.keep()?;
        }
        Ok(())
    }

    /// Adds the mean loss of a token of the evaluation data to the log.
    fn evaluate(&mut self) -> Result<()> {
        let Some(samples) = self.data.eval else {
            return Ok(());
        };
        let sequences: Vec<Sequence<'_>> = samples
            .iter()
            .map(|sample| Sequence::new(sample, sample.input_ids.len()))
            .collect();
        let mut tables = Tables::new();
        let (mut sum, mut tokens) = (0.0, 0);
        for (group, own) in sequences.chunks(64).zip(samples.chunks(64)) {
            self.context.cancel.check()?;
            match &mut self.compute {
                Compute::Host(network) => {
                    network.prepare(&mut tables, group.iter());
                    let lengths: Vec<usize> = group.iter().map(|sequence| sequence.ids.len()).collect();
                    for range in groups(&lengths) {
                        self.context.cancel.check()?;
                        sum += network.losses(&group[range], &tables)?.iter().sum::<f64>();
                    }
                }
                #[cfg(feature = "cuda")]
                Compute::Gpu(run) => sum += run.losses(group)?,
            }
            tokens += own.iter().map(trained_tokens).sum::<usize>();
        }
        let state = &mut self.snapshot.state;
        let loss = sum / tokens as f64;
        if !loss.is_finite() {
            let what = format!("evaluation loss after optimizer step {}", state.global_step);
            return Err(Error::NotFinite { what, found: 1 });
        }
        state.log_history.push(LogEntry {
            step: state.global_step,
            epoch: state.epoch,
            loss: None,
            grad_norm: None,
            learning_rate: None,
            eval_loss: Some(loss),
            tokens: state.num_input_tokens_seen,
            tokens_per_s: None,
        });
        self.context
            .progress
            .update(state.global_step as u64, &format!("evaluation loss {loss:.4}"));
        Ok(())
    }

    /// The state without timings, so that two runs write the same bytes.
    fn untimed(&self) -> Snapshot {
        let mut snapshot = self.snapshot.clone();
        for entry in &mut snapshot.state.log_history {
            entry.tokens_per_s = None;
        }
        snapshot
    }

    /// Keeps the present state for a run that continues this one.
    fn keep(&mut self) -> Result<()> {
        self.refresh()?;
        let parent = self.context.output.join(INTERRUPTED_FOLDER);
        let folder = checkpoint::folder_of(&parent, self.snapshot.state.global_step);
        self.untimed().write(&folder, &self.identity.base_model)?;
        checkpoint::rotate(&parent, Some(1))?;
        self.kept_at = Instant::now();
        Ok(())
    }
}

/// Where a run begins.
pub(crate) enum Start {
    /// At step 0, from these values.
    Fresh(Box<Adapter>),
    /// Where an earlier run was.
    From(Box<Snapshot>),
}

fn fresh(adapter: Adapter, max_steps: usize, identity: &RunIdentity) -> Snapshot {
    let moments = adapter
        .modules
        .iter()
        .flat_map(AdapterModule::parts)
        .map(|values| Moments::zeros(values.len()))
        .collect();
    let state = TrainerState {
        global_step: 0,
        max_steps,
        epoch: 0.0,
        num_input_tokens_seen: 0,
        pending_loss: (0.0, 0),
        step_is_open: false,
        log_history: Vec::new(),
        run_digest: identity.digest.clone(),
    };
    Snapshot {
        adapter,
        moments,
        state,
    }
}

/// Refuses data on which a step would be undefined.
fn check_samples(data: &TrainingData<'_>, plan: &BatchPlan) -> Result<()> {
    if plan.steps_per_epoch() == 0 {
        let expected = format!("at least one micro-batch of {}", plan.batch_size);
        return Err(Error::tensor(
            "training data",
            expected,
            format!("{} samples", plan.samples),
        ));
    }
    for (what, samples) in [("training", Some(data.train)), ("evaluation", data.eval)] {
        let Some(samples) = samples else { continue };
        for (index, sample) in samples.iter().enumerate() {
            let name = format!("{what} sample {index}");
            if sample.labels.len() != sample.input_ids.len() {
                let found = format!("{} for {}", sample.labels.len(), sample.input_ids.len());
                return Err(Error::tensor(name, "a label for each token", found));
            }
            if trained_tokens(sample) == 0 {
                return Err(Error::tensor(name, "a token that is trained on", "none"));
            }
        }
    }
    Ok(())
}

/// Sequences that are computed together: as many as fit [`GROUP_ROWS`], one at least.
fn groups(lengths: &[usize]) -> Vec<std::ops::Range<usize>> {
    let mut groups = Vec::new();
    let (mut first, mut rows) = (0, 0);
    for (index, length) in lengths.iter().enumerate() {
        if rows + length > GROUP_ROWS && index > first {
            groups.push(first..index);
            (first, rows) = (index, 0);
        }
        rows += length;
    }
    groups.push(first..lengths.len());
    groups
}

/// Adds gradients, element by element.
fn add(sums: &mut Vec<Vec<f32>>, gradients: Vec<Vec<f32>>) {
    if sums.is_empty() {
        *sums = gradients;
        return;
    }
    sums.par_iter_mut().zip(gradients).for_each(|(sum, gradient)| {
        for (s, g) in sum.iter_mut().zip(gradient) {
            *s += g;
        }
    });
}
