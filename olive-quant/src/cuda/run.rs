//! The run on the device: layers in turn, the next one read while this one is searched, finished ones fetched and stored beside.

use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use olive_core::cuda::{
    Batch, DeviceEmbedding, DeviceLayer, Dropout, Element, Gpu, Matrix, Pass, check_model,
};
use olive_core::decoder::DropoutStream;
use olive_core::{CancelToken, Error, LinearRole, ModelHandle, Progress, Result};

use super::clip::{Clip, clip};
use super::layer::{DeviceLayerWeights, PackedLayer};
use super::search::DeviceSearch;
use super::statistics::DeviceStatistics;
use crate::calibrate::Half;
use crate::calibration::CalibrationSet;
use crate::encode;
use crate::options::{Algorithm, QuantizeOptions};
use crate::quantizer::awq::mapping::{LinearInput, Mapping, mappings};
use crate::quantizer::awq::search::Choice;
use crate::quantizer::awq::{AwqLayer, mapping_report_of};
use crate::report::{LayerReport, LinearReport, MappingReport, QuantizeReport};
use crate::run::{Run, quantize, quantize_with, summary};

/// Tokens that go through a layer together.
const CHUNK_TOKENS: usize = 8192;
/// Threads that fetch and store finished layers.
const PACKERS: usize = 3;
/// The largest relative change of a layer's halves that moving scales may cause: rounding of bfloat16.
const PRESERVATION_TOLERANCE: f64 = 2e-2;
/// Tokens on which that is verified.
const PRESERVATION_TOKENS: usize = 32;

/// As [`quantize()`], with AWQ's calibration and search on the GPU; weights are read as bfloat16. Rounding to nearest is
/// done on the CPU.
///
/// # Errors
/// As [`quantize()`]; [`Error::Unsupported`] where there is no GPU, driver or CUDA toolkit, or for a model that the GPU
/// path does not run.
pub fn quantize_on_gpu(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    options: &QuantizeOptions,
    output: &Path,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<QuantizeReport> {
    if options.algorithm != Algorithm::Awq {
        return quantize(model, calibration, options, output, progress, cancel);
    }
    let gpu = &Gpu::open()?;
    check_model(model.spec())?;
    quantize_with(model, calibration, options, output, progress, cancel, |run| {
        layers(gpu, run, calibration)
    })
}

/// Some sequences of one length and their residual stream.
pub(super) struct Chunk {
    pub batch: Batch,
    pub hidden: Matrix,
}

/// A half of a layer on some sequences.
struct HalfChunk<'a> {
    batch: &'a Batch,
    normed: Matrix,
    output: Matrix,
}

/// Finishes every layer that is not finished yet.
fn layers(gpu: &Gpu, run: &Run<'_>, calibration: &CalibrationSet) -> Result<Vec<LayerReport>> {
    let (spec, source) = (run.model.spec(), run.model.tensors());
    let mut reports: Vec<Option<LayerReport>> = (0..spec.n_layers)
        .map(|index| {
            run.work
                .finished(index, &encode::layer_plan(spec, run.options, index))
        })
        .collect();
    run.progress.start("quantize", spec.n_layers as u64);
    let Some(last_open) = reports.iter().rposition(Option::is_none) else {
        run.progress.finish();
        return Ok(reports.into_iter().flatten().collect());
    };
    let mappings = mappings(spec);
    let (chunks, first) = rayon::join(
        || embed(gpu, run.model, calibration),
        || DeviceLayer::load(gpu, source, spec, 0),
    );
    let (mut chunks, first) = (chunks?, first?);
    let (sender, receiver) = sync_channel::<Finished>(1);
    let receiver = Mutex::new(receiver);
    let packed: Mutex<Vec<LayerReport>> = Mutex::new(Vec::new());
    let result = std::thread::scope(|scope| -> Result<()> {
        let packers: Vec<_> = (0..PACKERS)
            .map(|_| scope.spawn(|| pack(gpu, run, &receiver, &packed)))
            .collect();
        // Embedding and head are written while the first layers are searched.
        let ends = scope.spawn(|| {
            let mut assembly = run
                .assembly
                .lock()
                .map_err(|_| stopped("writing the checkpoint"))?;
            assembly.add_ends(run.model, run.options)
        });
        let searched = (|| -> Result<()> {
            let mut next = Some(first);
            for (index, report) in reports.iter().enumerate().take(last_open + 1) {
                run.cancel.check()?;
                let Some(layer) = next.take() else { break };
                // The next layer's weights travel while this one is searched.
                let ahead = (index < last_open)
                    .then(|| scope.spawn(move || DeviceLayer::load(gpu, source, spec, index + 1)));
                let started = Instant::now();
                if report.is_some() {
                    pass_through(gpu, &layer, &mut chunks);
                } else {
                    let finished = search(gpu, run, &mappings, &layer, &chunks, started)?;
                    // A packer that failed no longer listens; what failed is said below.
                    if sender.send(finished).is_err() {
                        break;
                    }
                }
                run.progress.update(index as u64 + 1, "");
                if let Some(ahead) = ahead {
                    let waited = Instant::now();
                    let loaded = ahead.join().map_err(|_| stopped("reading a layer"))?;
                    next = Some(loaded?);
                    tracing::debug!("layer {index}: waited {:?} for the next one", waited.elapsed());
                }
            }
            Ok(())
        })();
        drop(sender);
        let outcomes: Vec<Result<()>> = packers
            .into_iter()
            .map(|packer| packer.join().map_err(|_| stopped("packing a layer"))?)
            .collect();
        outcomes.into_iter().collect::<Result<()>>()?;
        ends.join().map_err(|_| stopped("writing the checkpoint"))??;
        searched
    });
    result?;
    for report in packed.into_inner().unwrap_or_default() {
        let index = report.layer;
        reports[index] = Some(report);
    }
    run.progress.finish();
    Ok(reports.into_iter().flatten().collect())
}

fn stopped(what: &str) -> Error {
    Error::unsupported(what.to_owned(), "its thread stopped without a result")
}

/// A searched layer on its way to the packers, still on the device.
struct Finished {
    layer: PackedLayer,
    preservation_error: f64,
    mappings: Vec<MappingReport>,
    clips: Vec<(LinearRole, Clip)>,
    started: Instant,
}

impl Finished {
    /// Fetches it from the device and stores it.
    fn store(self, gpu: &Gpu, run: &Run<'_>) -> Result<LayerReport> {
        let (weights, tensors, errors) = self.layer.unload(gpu)?;
        let clips = self
            .clips
            .iter()
            .map(|(role, clip)| Ok((*role, clip.report(gpu)?)));
        let clips = clips.collect::<Result<Vec<_>>>()?;
        let linears = weights.linears.iter().zip(errors).map(|(linear, weight_error)| {
            let clip = clips.iter().find(|(role, _)| *role == linear.spec.role);
            LinearReport {
                name: linear.spec.name.clone(),
                quantized: linear.converts,
                weight_error,
                clip: clip.map(|(_, clip)| *clip),
            }
        });
        let linears = linears.collect();
        let index = weights.index;
        let awq = AwqLayer {
            weights,
            preservation_error: self.preservation_error,
            mappings: self.mappings,
            clips,
        };
        run.store_layer(index, awq, (tensors, linears), self.started)
    }
}

/// Fetches and stores what arrives, until nothing more does.
fn pack(
    gpu: &Gpu,
    run: &Run<'_>,
    receiver: &Mutex<Receiver<Finished>>,
    packed: &Mutex<Vec<LayerReport>>,
) -> Result<()> {
    loop {
        let next = receiver.lock().map_err(|_| stopped("packing a layer"))?.recv();
        let Ok(finished) = next else {
            return Ok(());
        };
        let report = finished.store(gpu, run)?;
        tracing::debug!("layer {}: {}", report.layer, summary(&report));
        if let Ok(mut packed) = packed.lock() {
            packed.push(report);
        }
    }
}

/// How long the parts of a layer take, for debug logs; only then does it wait for the device in between.
struct Stages<'a> {
    gpu: &'a Gpu,
    layer: usize,
    enabled: bool,
    since: Instant,
}

impl<'a> Stages<'a> {
    fn new(gpu: &'a Gpu, layer: usize) -> Self {
        Self {
            gpu,
            layer,
            enabled: tracing::enabled!(tracing::Level::DEBUG),
            since: Instant::now(),
        }
    }

    /// What was done since the last call.
    fn done(&mut self, what: &str) -> Result<()> {
        if self.enabled {
            self.gpu.sync()?;
            let seconds = self.since.elapsed().as_secs_f64();
            tracing::debug!("layer {}: {what} took {seconds:.4} s", self.layer);
            self.since = Instant::now();
        }
        Ok(())
    }
}

/// The embeddings of the calibration's sequences.
pub(super) fn embed(gpu: &Gpu, model: &dyn ModelHandle, calibration: &CalibrationSet) -> Result<Vec<Chunk>> {
    let (spec, source) = (model.spec(), model.tensors());
    let embedding = DeviceEmbedding::load(gpu, source, spec)?;
    let mut order: Vec<&Vec<u32>> = calibration.sequences.iter().filter(|s| !s.is_empty()).collect();
    order.sort_by_key(|sequence| sequence.len());
    let mut chunks = Vec::new();
    for same in order.chunk_by(|a, b| a.len() == b.len()) {
        let length = same[0].len();
        for part in same.chunks((CHUNK_TOKENS / length).max(1)) {
            let tokens = part.iter().flat_map(|sequence| sequence.iter());
            chunks.push(Chunk {
                batch: Batch::new(gpu, spec, &vec![length; part.len()], length),
                hidden: embedding.forward(gpu, tokens)?,
            });
        }
    }
    match chunks.is_empty() {
        false => Ok(chunks),
        true => Err(Error::tensor(
            "calibration",
            "at least one sequence of tokens",
            "none",
        )),
    }
}

/// A pass over `batch` without dropout or packed weights.
pub(super) fn plain<'a>(batch: &'a Batch, scratch: &'a Matrix) -> Pass<'a> {
    Pass {
        batch,
        dropout: Dropout::new(&DropoutStream::new(0.0, 0, 0), &batch.places),
        scratch,
    }
}

fn pass_through(gpu: &Gpu, layer: &DeviceLayer, chunks: &mut [Chunk]) {
    let scratch = gpu.empty(1, 8, Element::Bf16);
    for chunk in chunks {
        chunk.hidden = layer.forward(gpu, &chunk.hidden, &plain(&chunk.batch, &scratch));
    }
}

/// The input of the last linear of a half, and its output, residual not included.
pub(super) fn half_output(
    gpu: &Gpu,
    half: Half,
    layer: &DeviceLayer,
    normed: &Matrix,
    pass: &Pass<'_>,
) -> (Matrix, Matrix) {
    let (last_input, role) = match half {
        Half::Attention => (layer.attend(gpu, normed, pass), LinearRole::O),
        Half::Mlp => (layer.gate(gpu, normed, pass), LinearRole::Down),
    };
    let output = layer.close(gpu, role, &last_input, None, pass);
    (last_input, output)
}

/// The normalised input of a half.
pub(super) fn norm(gpu: &Gpu, half: Half, layer: &DeviceLayer, x: &Matrix) -> Matrix {
    match half {
        Half::Attention => layer.norm_input(gpu, x),
        Half::Mlp => layer.norm_middle(gpu, x),
    }
}

/// Searches scales and clips of a layer, and adds the outputs of the unquantized one to the chunks' states in place.
fn search(
    gpu: &Gpu,
    run: &Run<'_>,
    mappings: &[Mapping],
    layer: &DeviceLayer,
    chunks: &[Chunk],
    started: Instant,
) -> Result<Finished> {
    let (spec, source) = (run.model.spec(), run.model.tensors());
    let mut stages = Stages::new(gpu, layer.index);
    let scratch = &gpu.empty(1, 8, Element::Bf16);
    let mut weights = DeviceLayerWeights::new(gpu, source, spec, layer, run.options)?;
    let first = chunks
        .first()
        .ok_or_else(|| Error::tensor("calibration", "tokens", "none"))?;
    let sample = first
        .hidden
        .rows(0, first.batch.sequences[0].1.min(PRESERVATION_TOKENS));
    let sample = gpu.gather(
        &sample,
        &gpu.upload_u32(&(0..sample.rows as u32).collect::<Vec<_>>()),
    );
    let mut choices: Vec<(&Mapping, Choice, MappingReport)> = Vec::new();
    let mut inputs: Vec<(LinearInput, Matrix)> = Vec::new();
    for half in [Half::Attention, Half::Mlp] {
        let mut statistics: Option<[DeviceStatistics; 2]> = None;
        let mut halves = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            run.cancel.check()?;
            let normed = norm(gpu, half, layer, &chunk.hidden);
            let (last_input, output) = half_output(gpu, half, layer, &normed, &plain(&chunk.batch, scratch));
            let [first, last] = statistics.get_or_insert_with(|| {
                [normed.cols, last_input.cols].map(|channels| DeviceStatistics::new(gpu, channels))
            });
            first.add(gpu, &normed);
            last.add(gpu, &last_input);
            halves.push(HalfChunk {
                batch: &chunk.batch,
                normed,
                output,
            });
        }
        stages.done("forward and statistics")?;
        let elements: usize = halves.iter().map(|half| half.output.len()).sum();
        let judge = |other: &DeviceLayer, limit: f64| -> Result<Option<f64>> {
            let mut sum = 0.0;
            // The next chunk is queued before the last one's sum is asked for: the device never waits.
            let mut last: Option<Matrix> = None;
            for chunk in &halves {
                run.cancel.check()?;
                let (_, output) = half_output(gpu, half, other, &chunk.normed, &plain(chunk.batch, scratch));
                let shares = gpu.square_difference_shares(&output, &chunk.output);
                if let Some(last) = last.replace(shares) {
                    sum += gpu.total(&last)?;
                }
                if sum > limit * elements as f64 {
                    return Ok(None);
                }
            }
            sum += last.map_or(Ok(0.0), |last| gpu.total(&last))?;
            Ok((sum <= limit * elements as f64).then_some(sum / elements as f64))
        };
        for (input, statistics) in half.inputs().into_iter().zip(statistics.into_iter().flatten()) {
            for mapping in mappings.iter().filter(|mapping| mapping.input == input) {
                let started = Instant::now();
                let search = DeviceSearch::new(gpu, mapping, &weights, &statistics, run.options);
                let choice = search.run(layer, &judge)?;
                let names = search
                    .linears
                    .iter()
                    .map(|linear| linear.spec.name.clone())
                    .collect();
                let report = mapping_report_of(mapping, names, &choice, run.options, started);
                choices.push((mapping, choice, report));
            }
            inputs.push((input, statistics.gram));
        }
        stages.done("search")?;
        let outputs: Vec<Matrix> = halves.into_iter().map(|half| half.output).collect();
        for (chunk, output) in chunks.iter().zip(outputs) {
            gpu.add(&chunk.hidden, &output);
        }
    }
    for (mapping, choice, _) in &choices {
        weights.apply(gpu, mapping, &choice.scales)?;
    }
    let preservation_error = verify(gpu, run, layer, &weights.placed_in(gpu, layer), &sample)?;
    stages.done("scaling and its check")?;
    let clips = clips(gpu, run.options, &weights, inputs, &choices);
    stages.done("clips")?;
    let layer = weights.pack(gpu, run.options)?;
    stages.done("packing")?;
    Ok(Finished {
        layer,
        preservation_error,
        mappings: choices.into_iter().map(|(_, _, report)| report).collect(),
        clips,
        started,
    })
}

/// Clips the linears whose errors do not meet in a product.
fn clips(
    gpu: &Gpu,
    options: &QuantizeOptions,
    weights: &DeviceLayerWeights,
    inputs: Vec<(LinearInput, Matrix)>,
    choices: &[(&Mapping, Choice, MappingReport)],
) -> Vec<(LinearRole, Clip)> {
    let mut clips = Vec::new();
    if !options.clip {
        return clips;
    }
    let levels = ((1u32 << options.bits) - 1) as f32;
    for (input, gram) in inputs {
        if let Some((_, choice, _)) = choices.iter().find(|(mapping, _, _)| mapping.input == input) {
            let scales = gpu.upload_f32(&choice.scales, 1, choice.scales.len());
            gpu.divide_rows(&gram, &scales, true);
        }
        for linear in &weights.linears {
            let role = linear.spec.role;
            let skipped = matches!(role, LinearRole::Q | LinearRole::K) || !linear.converts;
            if skipped || LinearInput::of(role) != input {
                continue;
            }
            let group_size = options.group_for(linear.spec.in_features);
            clips.push((role, clip(gpu, &linear.weight, &gram, group_size, levels)));
        }
    }
    clips
}

/// Relative change of the layer's two halves on the first tokens.
fn verify(
    gpu: &Gpu,
    run: &Run<'_>,
    layer: &DeviceLayer,
    scaled: &DeviceLayer,
    sample: &Matrix,
) -> Result<f64> {
    let batch = Batch::new(gpu, run.model.spec(), &[sample.rows], sample.rows);
    let scratch = gpu.empty(1, 8, Element::Bf16);
    let pass = plain(&batch, &scratch);
    let mut worst = 0.0f64;
    for half in [Half::Attention, Half::Mlp] {
        let output =
            |layer: &DeviceLayer| half_output(gpu, half, layer, &norm(gpu, half, layer, sample), &pass).1;
        let (before, after) = (output(layer), output(scaled));
        let change = gpu.square_difference(&after, &before)?;
        let size = gpu.square_sum(&before)?;
        let error = if change == 0.0 {
            0.0
        } else {
            (change / size).sqrt()
        };
        if error.is_nan() || error > PRESERVATION_TOLERANCE {
            return Err(Error::tensor(
                format!("{half:?} of layer {}", layer.index),
                format!("the same output after scaling, within {PRESERVATION_TOLERANCE:e}"),
                format!("a relative change of {error:e}"),
            ));
        }
        worst = worst.max(error);
    }
    Ok(worst)
}
