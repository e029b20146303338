//! Training on a GPU: the frozen model in bfloat16 or packed, the adapter, its gradients and the optimizer's state in
//! single precision, all in device memory. The host sees losses, the gradient's norm, and the state when it is saved.

use std::time::Instant;

use olive_core::cuda::{
    AdamWStep, Batch, DeviceEmbedding, DeviceHead, DeviceLayer, DeviceLowRank, Dropout, Element, Gpu, Matrix,
    Pass, Targets, check_model, grown,
};
use olive_core::decoder::DropoutStream;
use olive_core::{CancelToken, Error, ModelHandle, ModelSpec, Progress, Result};

use crate::adamw::{AdamW, Moments};
use crate::adapter::{Adapter, AdapterModule};
use crate::network::Sequence;

/// Ranks are padded to this many: what is added is zero, and stays zero.
const RANK_STEP: usize = 8;
/// Parts of the flat parameter begin at multiples of this many elements.
const PART_STEP: usize = 64;
/// Bytes of unused device memory that are kept when the shape of the batch changes.
const IDLE_BYTES: u64 = 8 << 30;
/// Tokens that are evaluated together.
const CHUNK_TOKENS: usize = 8192;

/// `A` or `B` of one module inside the flat parameter.
struct Part {
    first: usize,
    /// As stored on the device, rank padded.
    shape: [usize; 2],
    /// As in the adapter.
    own: [usize; 2],
}

impl Part {
    /// Both parts of all modules, and the length of the flat parameter.
    fn all(adapter: &Adapter) -> (Vec<Self>, usize) {
        let mut parts: Vec<Self> = Vec::with_capacity(2 * adapter.modules.len());
        let mut first = 0;
        for module in &adapter.modules {
            let rank = module.place.rank;
            let padded = rank.next_multiple_of(RANK_STEP);
            let (rows, cols) = (module.place.linear.out_features, module.place.linear.in_features);
            for (shape, own) in [([padded, cols], [rank, cols]), ([rows, padded], [rows, rank])] {
                parts.push(Self { first, shape, own });
                first += (shape[0] * shape[1]).next_multiple_of(PART_STEP);
            }
        }
        (parts, first)
    }

    /// Writes the adapter's values to their place in the flat parameter.
    fn store(&self, values: &[f32], flat: &mut [f32]) {
        let [_, width] = self.shape;
        let [_, own] = self.own;
        for (row, values) in values.chunks_exact(own).enumerate() {
            let place = self.first + row * width;
            flat[place..place + own].copy_from_slice(values);
        }
    }

    /// The inverse of [`Part::store`].
    fn load(&self, flat: &[f32]) -> Vec<f32> {
        let [_, width] = self.shape;
        let [rows, own] = self.own;
        let row = |row: usize| &flat[self.first + row * width..][..own];
        (0..rows).flat_map(row).copied().collect()
    }
}

/// A flat parameter from the tensors of its parts.
fn flat<'a>(parts: &[Part], len: usize, tensors: impl Iterator<Item = &'a Vec<f32>>) -> Vec<f32> {
    let mut values = vec![0.0; len];
    for (part, tensor) in parts.iter().zip(tensors) {
        part.store(tensor, &mut values);
    }
    values
}

/// A frozen model with an adapter and an optimizer on the device.
pub(crate) struct DeviceRun {
    gpu: Gpu,
    spec: ModelSpec,
    embedding: DeviceEmbedding,
    layers: Vec<DeviceLayer>,
    head: DeviceHead,
    scratch: Matrix,
    parts: Vec<Part>,
    parameters: Matrix,
    rounded: Matrix,
    gradients: Matrix,
    moments: [Matrix; 2],
    /// Nothing below it is trained.
    lowest: usize,
    /// The last batch's layout, by lengths and total.
    layout: Option<(Vec<usize>, usize, Batch)>,
}

/// How gradients are computed.
pub(crate) struct DeviceMode {
    /// The gradient is that of the loss times this.
    pub scale: f64,
    /// Whether layers are computed again instead of kept.
    pub recompute: bool,
    /// Of the micro-batch.
    pub dropout: DropoutStream,
}

impl DeviceRun {
    /// Reads the model to the device and puts an adapter on it.
    pub fn load(
        model: &dyn ModelHandle,
        adapter: &Adapter,
        moments: &[Moments],
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let gpu = Gpu::open()?;
        let (spec, source) = (model.spec(), model.tensors());
        check_model(spec)?;
        progress.start("loading the model", spec.n_layers as u64);
        let (embedding, head, layers) = gpu.lasting(|| -> Result<_> {
            let embedding = DeviceEmbedding::load(&gpu, source, spec)?;
            let head = DeviceHead::load(&gpu, source, spec, Some(&embedding))?;
            let mut layers = Vec::with_capacity(spec.n_layers);
            for index in 0..spec.n_layers {
                cancel.check()?;
                layers.push(DeviceLayer::load(&gpu, source, spec, index)?);
                progress.update(index as u64 + 1, "");
            }
            Ok((embedding, head, layers))
        })?;
        progress.finish();
        let scratch = layers.iter().map(DeviceLayer::scratch_len).max().unwrap_or(0);
        let scratch = grown(&gpu, &mut None, scratch).clone();
        let (parts, len) = Part::all(adapter);
        let tensors = adapter.modules.iter().flat_map(|module| [&module.a, &module.b]);
        let parameters = flat(&parts, len, tensors);
        let first = flat(&parts, len, moments.iter().map(|moments| &moments.first));
        let second = flat(&parts, len, moments.iter().map(|moments| &moments.second));
        let (parameters, rounded, gradients, moments) = gpu.lasting(|| {
            (
                gpu.upload_f32(&parameters, 1, len),
                gpu.upload_bf16(&parameters, 1, len),
                gpu.zeros(1, len, Element::F32),
                [gpu.upload_f32(&first, 1, len), gpu.upload_f32(&second, 1, len)],
            )
        });
        let mut run = Self {
            spec: spec.clone(),
            embedding,
            head,
            scratch,
            parameters,
            rounded,
            gradients,
            moments,
            lowest: adapter.modules.iter().map(|m| m.place.layer).min().unwrap_or(0),
            layout: None,
            layers,
            parts,
            gpu,
        };
        run.attach(&adapter.modules);
        Ok(run)
    }

    /// Gives the layers their low-rank parts, which are pieces of the flat parameter.
    fn attach(&mut self, modules: &[AdapterModule]) {
        for (module, parts) in modules.iter().zip(self.parts.chunks_exact(2)) {
            let piece = |flat: &Matrix, part: &Part| flat.part(part.first, part.shape[0], part.shape[1]);
            let low_rank = DeviceLowRank {
                a: piece(&self.rounded, &parts[0]),
                b: piece(&self.rounded, &parts[1]),
                scaling: module.place.scaling,
                gradients: Some([
                    piece(&self.gradients, &parts[0]),
                    piece(&self.gradients, &parts[1]),
                ]),
            };
            let layer = self.layers.get_mut(module.place.layer);
            let linear = layer.and_then(|layer| layer.linear_mut(module.place.linear.role));
            if let Some(linear) = linear {
                linear.low_rank = Some(low_rank);
            }
        }
    }

    /// Begins a step.
    pub fn clear_gradients(&self) {
        self.gpu.fill_zeros(&self.gradients);
    }

    fn prepare(&mut self, sequences: &[Sequence<'_>], total: usize) -> Batch {
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.ids.len()).collect();
        if let Some((known, known_total, batch)) = &self.layout
            && *known == lengths
            && *known_total == total
        {
            return batch.clone();
        }
        // What is as large as the last batch was is not asked for again.
        if self.layout.take().is_some()
            && let Some((used, held)) = self.gpu.memory()
            && held > used + IDLE_BYTES
        {
            self.gpu.release_unused();
        }
        let batch = Batch::new(&self.gpu, &self.spec, &lengths, total);
        self.layout = Some((lengths, total, batch.clone()));
        batch
    }

    fn targets(&self, sequences: &[Sequence<'_>], batch: &Batch) -> Result<Targets> {
        let mut targets = Targets::default();
        for (sequence, (first, _)) in sequences.iter().zip(&batch.sequences) {
            targets.add(*first, sequence.labels, self.spec.vocab_size)?;
        }
        Ok(targets)
    }

    fn embed(&self, sequences: &[Sequence<'_>]) -> Result<Matrix> {
        let tokens = sequences.iter().flat_map(|sequence| sequence.ids);
        self.embedding.forward(&self.gpu, tokens)
    }

    /// The sum of the losses of a micro-batch padded to `total`; its gradients are added to those of the step.
    pub fn accumulate(&mut self, sequences: &[Sequence<'_>], total: usize, mode: &DeviceMode) -> Result<f64> {
        let started = Instant::now();
        let batch = self.prepare(sequences, total);
        let targets = self.targets(sequences, &batch)?;
        let gpu = &self.gpu;
        let dropout = Dropout::new(&mode.dropout, &batch.places);
        let pass = |index: usize| Pass {
            batch: &batch,
            dropout: dropout.child(index as u64),
            scratch: &self.scratch,
        };
        let mut x = self.embed(sequences)?;
        let mut inputs = Vec::new();
        let mut tapes = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            if index < self.lowest {
                x = layer.forward(gpu, &x, &pass(index));
            } else if mode.recompute {
                // Kept in bfloat16, the precision of all operands: half the memory.
                inputs.push(gpu.lasting(|| gpu.round(&x)));
                x = layer.forward(gpu, &x, &pass(index));
            } else {
                let (y, tape) = layer.forward_train(gpu, &x, &pass(index));
                tapes.push(tape);
                x = y;
            }
        }
        let mut loss = self.head.cross_entropy(gpu, &x, &targets, Some(mode.scale));
        drop(x);
        let (dy, mut rounded) = loss
            .d_hidden
            .take()
            .ok_or_else(|| Error::tensor("loss", "a gradient", "none"))?;
        for (index, layer) in self.layers.iter().enumerate().skip(self.lowest).rev() {
            let pass = pass(index);
            let tape = match inputs.pop() {
                Some(x) => Some(layer.recompute(gpu, &gpu.widen(&x), &pass)),
                None => tapes.pop(),
            };
            let Some(tape) = tape else { break };
            rounded = layer.backward(gpu, tape, (&dy, rounded), &pass);
        }
        let queued = started.elapsed();
        let sum = loss.sum(gpu)?;
        tracing::debug!(
            "a micro-batch was queued in {queued:?} and done in {:?}",
            started.elapsed()
        );
        Ok(sum)
    }

    /// The sum of the losses of some sequences, each as if it were alone.
    pub fn losses(&mut self, sequences: &[Sequence<'_>]) -> Result<f64> {
        let mut sum = 0.0;
        // Longrope's factors depend on the length, so sequences of one length go together.
        let mut order = sequences.to_vec();
        order.sort_by_key(|sequence| sequence.key());
        for same in order.chunk_by(|a, b| a.key() == b.key()) {
            let (length, total) = same[0].key();
            for part in same.chunks((CHUNK_TOKENS / length.max(1)).max(1)) {
                let batch = self.prepare(part, total);
                let targets = self.targets(part, &batch)?;
                let mut x = self.embed(part)?;
                for layer in &self.layers {
                    let pass = Pass {
                        batch: &batch,
                        dropout: Dropout::new(&DropoutStream::new(0.0, 0, 0), &batch.places),
                        scratch: &self.scratch,
                    };
                    x = layer.forward(&self.gpu, &x, &pass);
                }
                let loss = self.head.cross_entropy(&self.gpu, &x, &targets, None);
                sum += loss.sum(&self.gpu)?;
            }
        }
        Ok(sum)
    }

    /// The L2 norm of the step's gradients.
    pub fn gradient_norm(&self) -> Result<f64> {
        Ok(self.gpu.square_sum(&self.gradients)?.sqrt())
    }

    /// The step's gradients, in the adapter's order.
    pub fn gradients(&self) -> Result<Vec<Vec<f32>>> {
        self.tensors(&self.gradients)
    }

    fn tensors(&self, flat: &Matrix) -> Result<Vec<Vec<f32>>> {
        let values = self.gpu.download_f32(flat)?;
        Ok(self.parts.iter().map(|part| part.load(&values)).collect())
    }

    /// Optimizer step number `step` (from 1) with `rate`; gradients are multiplied by `clip` first.
    pub fn update(&self, adamw: &AdamW, step: usize, rate: f64, clip: f64) {
        let numbers = AdamWStep {
            step_size: (rate / (1.0 - adamw.beta1.powi(step as i32))) as f32,
            keep: (1.0 - rate * adamw.weight_decay) as f32,
            rest1: (1.0 - adamw.beta1) as f32,
            beta2: adamw.beta2 as f32,
            rest2: (1.0 - adamw.beta2) as f32,
            correction2: (1.0 - adamw.beta2.powi(step as i32)).sqrt() as f32,
            epsilon: adamw.epsilon as f32,
            clip: clip as f32,
        };
        let [first, second] = &self.moments;
        self.gpu.adamw(
            numbers,
            &self.parameters,
            &self.rounded,
            &self.gradients,
            [first, second],
        );
    }

    /// Writes the device's state to the host's.
    pub fn save(&self, adapter: &mut Adapter, moments: &mut [Moments]) -> Result<()> {
        let parameters = self.tensors(&self.parameters)?;
        let targets = adapter
            .modules
            .iter_mut()
            .flat_map(|module| [&mut module.a, &mut module.b]);
        for (target, values) in targets.zip(parameters) {
            *target = values;
        }
        let [first, second] = &self.moments;
        let states = self.tensors(first)?.into_iter().zip(self.tensors(second)?);
        for (target, (first, second)) in moments.iter_mut().zip(states) {
            *target = Moments { first, second };
        }
        Ok(())
    }

    /// Bytes of device memory held from the driver.
    pub fn memory(&self) -> Option<u64> {
        self.gpu.memory().map(|(_, reserved)| reserved)
    }
}

/// Gives a layer its low-rank parts, replacing any that it has; nothing is trained.
///
/// # Errors
/// [`Error::Tensor`] if the layer has no linear of that shape.
pub fn attach_to_device(adapter: &Adapter, gpu: &Gpu, layer: &mut DeviceLayer) -> Result<()> {
    let index = layer.index;
    for module in adapter.modules.iter().filter(|m| m.place.layer == index) {
        let name = &module.place.linear.name;
        if module.magnitude.is_some() {
            let what = format!("the DoRA adapter of `{name}` with --device gpu");
            return Err(Error::unsupported(what, "use --device cpu"));
        }
        let shape = [module.place.linear.out_features, module.place.linear.in_features];
        let linear = layer
            .linear_mut(module.place.linear.role)
            .filter(|l| l.shape == shape);
        let Some(linear) = linear else {
            return Err(Error::tensor(name, format!("a linear {shape:?}"), "none"));
        };
        let alone = Adapter {
            options: adapter.options.clone(),
            modules: vec![module.clone()],
        };
        let (parts, len) = Part::all(&alone);
        let values = gpu.upload_bf16(&flat(&parts, len, [&module.a, &module.b].into_iter()), 1, len);
        let piece = |part: &Part| values.part(part.first, part.shape[0], part.shape[1]);
        linear.low_rank = Some(DeviceLowRank {
            a: piece(&parts[0]),
            b: piece(&parts[1]),
            scaling: module.place.scaling,
            gradients: None,
        });
    }
    Ok(())
}
