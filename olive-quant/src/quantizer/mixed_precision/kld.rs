//! How much the output of a rounded model would come back to that of the model itself if a module had more bits: the
//! score `kld_gradient` of Olive's `SelectiveMixedPrecision`, after `dynamic_quant` of mlx-lm.
//!
//! ```text
//! L         = mean over the tokens of a sequence of KL(softmax(teacher) || softmax(student)), the student being the
//!             model with every linear and the head at low bits
//! alignment = mean over the sequences of <dL/dW, W_low - W_high>
//! ```
//!
//! The gradient of a weight is never made: `<dYᵀ X, D> = <dY, X Dᵀ>`, a product of the size of the module's own. Layers are
//! read, rounded and left one at a time, forward for teacher and student together and then backward, for as many sequences
//! at a time as their hidden states may take memory.

use std::collections::BTreeMap;

use burn::tensor::activation::softmax;
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use olive_core::arch::ModuleQuantization;
use olive_core::decoder::{BaseWeight, DecoderLayer, Embedding, Head, SequenceTables};
use olive_core::{
    CancelToken, DType, Error, LinearRole, LinearWeight, ModelHandle, Progress, Result, WeightKind,
};
use rayon::prelude::*;

use super::{HEAD, Precisions, module_name};
use crate::calibration::CalibrationSet;
use crate::layer::replace_weight;
use crate::quantizer::minmax::{MinMax, RoundedRows};

/// Bytes of hidden states that are held at a time.
const HIDDEN_BYTES: usize = 1 << 30;
/// Elements of the logits that a thread holds at a time.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// Alignments by module, those of the layers' linears and of `lm_head`.
pub type Alignments = BTreeMap<String, f64>;

/// Computes the alignments of all linears and of the head on `calibration`.
///
/// # Errors
/// Those of reading the model; [`Error::Unsupported`] for packed weights; [`Error::Tensor`] for groups that do not divide
/// a module's inputs or tokens that are none; [`Error::NotFinite`]; [`Error::Cancelled`].
pub fn alignments<B: Backend>(
    model: &dyn ModelHandle,
    calibration: &CalibrationSet,
    precisions: &Precisions,
    progress: &dyn Progress,
    cancel: &CancelToken,
) -> Result<Alignments> {
    let spec = model.spec();
    calibration.check(spec)?;
    let token_bytes = size_of::<f32>() * spec.hidden_size * (spec.n_layers + 4);
    let parts = parts(&calibration.sequences, (HIDDEN_BYTES / token_bytes).max(1));
    let steps = 2 * spec.n_layers + 1;
    progress.start("sensitivity", (parts.len() * steps) as u64);
    let mut sums = Alignments::new();
    for (index, sequences) in parts.iter().enumerate() {
        let done = &mut |step: usize| progress.update((index * steps + step) as u64, "");
        let part = Part::<B>::new(model, precisions, sequences, cancel);
        for (module, values) in part.run(done)? {
            // In order, whoever computed them.
            *sums.entry(module).or_default() += values.iter().sum::<f64>();
        }
    }
    progress.finish();
    for (module, sum) in &mut sums {
        *sum /= calibration.sequences.len() as f64;
        if !sum.is_finite() {
            let what = format!("the sensitivity of `{module}`");
            return Err(Error::NotFinite { what, found: 1 });
        }
    }
    Ok(sums)
}

/// Consecutive sequences of `most` tokens together, or single longer ones.
fn parts(sequences: &[Vec<u32>], most: usize) -> Vec<&[Vec<u32>]> {
    let (mut parts, mut rest) = (Vec::new(), sequences);
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = rest.iter().take_while(|sequence| {
            tokens += sequence.len();
            tokens <= most
        });
        let (part, later) = rest.split_at(fits.count().max(1));
        parts.push(part);
        rest = later;
    }
    parts
}

/// Values of every sequence, by module.
type Values = Vec<(String, Vec<f64>)>;
/// Hidden states of every sequence, `[1, length, hidden]`.
type States<B> = Vec<Tensor<B, 3>>;

struct Part<'a, B: Backend> {
    model: &'a dyn ModelHandle,
    precisions: &'a Precisions,
    sequences: &'a [Vec<u32>],
    cancel: &'a CancelToken,
    device: B::Device,
    tables: Vec<SequenceTables<B>>,
}

/// A layer at low bits, and the differences of its linears.
struct RoundedLayer<B: Backend> {
    layer: DecoderLayer<B>,
    deltas: Vec<(LinearRole, BaseWeight<B>)>,
}

/// A weight at low bits, and what it differs by from that at high bits.
struct Rounded {
    low: Vec<f32>,
    delta: Vec<f32>,
}

impl<'a, B: Backend> Part<'a, B> {
    fn new(
        model: &'a dyn ModelHandle,
        precisions: &'a Precisions,
        sequences: &'a [Vec<u32>],
        cancel: &'a CancelToken,
    ) -> Self {
        let device = B::Device::default();
        let mut lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let tables = lengths
            .into_iter()
            .map(|length| SequenceTables::new(model.spec(), length, &device));
        Self {
            model,
            precisions,
            sequences,
            cancel,
            tables: tables.collect(),
            device,
        }
    }

    fn run(&self, done: &mut dyn FnMut(usize)) -> Result<Values> {
        let (spec, source) = (self.model.spec(), self.model.tensors());
        let shape = [spec.vocab_size, spec.hidden_size];
        let head_module = module_name(spec.lm_head_name());
        let stored = WeightKind::read(source, spec.quantization.as_ref(), &head_module, shape)?;
        let head = self.round(HEAD, stored, shape)?;
        let [low, delta] = [head.low, head.delta].map(|values| self.matrix(values, shape));

        let mut embedding = Embedding::<B>::load(source, spec, &self.device)?;
        let teacher = self.embed(&embedding)?;
        if spec.tie_word_embeddings {
            embedding.weight = low.clone();
        }
        let student = self.embed(&embedding)?;
        drop(embedding);
        let (teacher, inputs) = self.forward(teacher, student, done)?;
        let (last, inputs) = inputs
            .split_last()
            .expect("invariant: the states before the first layer");
        let (mut values, mut dy) = self.head(teacher, last, (&low, &delta))?;
        done(spec.n_layers + 1);
        let mut found = Vec::new();
        for (index, inputs) in inputs.iter().enumerate().rev() {
            let (own, dx) = self.layer_backward(index, inputs, dy)?;
            found.extend(own);
            dy = dx;
            done(2 * spec.n_layers + 1 - index);
        }
        if spec.tie_word_embeddings {
            let table = Embedding { weight: delta };
            for ((value, dx), tokens) in values.iter_mut().zip(dy).zip(self.sequences) {
                let [n, width] = dx.dims();
                let rows = table.forward(std::slice::from_ref(tokens))?.reshape([n, width]);
                *value += dot(&dx, &rows);
            }
        }
        found.push((HEAD.to_owned(), values));
        Ok(found)
    }

    fn table(&self, length: usize) -> &SequenceTables<B> {
        let found = self.tables.iter().find(|tables| tables.length == length);
        found.expect("invariant: tables were made for the length of every sequence")
    }

    fn matrix(&self, values: Vec<f32>, shape: [usize; 2]) -> Tensor<B, 2> {
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// `[1, length, hidden]` a sequence.
    fn embed(&self, embedding: &Embedding<B>) -> Result<States<B>> {
        let sequences = self.sequences.iter();
        sequences
            .map(|own| embedding.forward(std::slice::from_ref(own)))
            .collect()
    }

    fn round(&self, module: &str, stored: WeightKind, shape: [usize; 2]) -> Result<Rounded> {
        let WeightKind::Dense(weight, dtype) = stored else {
            let reason = "scores need dense weights";
            return Err(Error::unsupported(format!("packed linear `{module}`"), reason));
        };
        let at = |settings| fake_quantize(module, &weight, shape, dtype, settings);
        let (low, mut delta) = (at(self.precisions.low)?, at(self.precisions.high)?);
        for (delta, low) in delta.iter_mut().zip(&low) {
            *delta = low - *delta;
        }
        Ok(Rounded { low, delta })
    }

    fn rounded_layer(&self, dense: &DecoderLayer<B>) -> Result<RoundedLayer<B>> {
        let (spec, source) = (self.model.spec(), self.model.tensors());
        let (mut layer, mut deltas) = (dense.clone(), Vec::new());
        for linear in spec.linears(dense.index) {
            let shape = [linear.out_features, linear.in_features];
            let stored = LinearWeight::read(source, spec, &linear)?.weight;
            let Rounded { low, delta } = self.round(&linear.name, stored, shape)?;
            replace_weight(&mut layer, linear.role, low, &self.device);
            deltas.push((linear.role, BaseWeight::Dense(self.matrix(delta, shape))));
        }
        Ok(RoundedLayer { layer, deltas })
    }

    fn load(&self, index: usize) -> Result<DecoderLayer<B>> {
        self.cancel.check()?;
        DecoderLayer::load(self.model.tensors(), self.model.spec(), index, &self.device)
    }

    /// What the last layer of the teacher gives, and the student's states before every layer and after the last.
    fn forward(
        &self,
        mut teacher: States<B>,
        student: States<B>,
        done: &mut dyn FnMut(usize),
    ) -> Result<(States<B>, Vec<States<B>>)> {
        let mut inputs = vec![student];
        for index in 0..self.model.spec().n_layers {
            let dense = self.load(index)?;
            let low = self.rounded_layer(&dense)?.layer;
            let before = inputs.last().expect("invariant: it begins with one");
            let both: Vec<_> = teacher
                .into_par_iter()
                .zip(before)
                .map(|(x, own)| {
                    let tables = self.table(x.dims()[1]);
                    (dense.forward(x, tables), low.forward(own.clone(), tables))
                })
                .collect();
            let after;
            (teacher, after) = both.into_iter().unzip();
            inputs.push(after);
            done(index + 1);
        }
        Ok((teacher, inputs))
    }

    /// The alignment of the head on each sequence, and the gradients of the student's last states, `[length, hidden]`.
    fn head(
        &self,
        teacher: States<B>,
        student: &[Tensor<B, 3>],
        (low, delta): (&Tensor<B, 2>, &Tensor<B, 2>),
    ) -> Result<(Vec<f64>, Vec<Tensor<B, 2>>)> {
        self.cancel.check()?;
        let spec = self.model.spec();
        let Head { norm, weight } = Head::<B>::load(self.model.tensors(), spec, None, &self.device)?;
        let [dense, low, delta] = [&weight, low, delta].map(|own| BaseWeight::Dense(own.clone()));
        let step = (CHUNK_ELEMENTS / spec.vocab_size.max(1)).max(1);
        let found = teacher.into_par_iter().zip(student).map(|(teacher, student)| {
            let [_, length, width] = student.dims();
            let student = student.clone().reshape([length, width]);
            let teacher = norm.forward(teacher.reshape([length, width]));
            let normed = norm.forward(student.clone());
            let (mut alignment, mut d_normed) = (0.0, Vec::new());
            for first in (0..length).step_by(step) {
                let rows = [first..length.min(first + step), 0..width];
                let wanted = softmax(dense.forward(teacher.clone().slice(rows.clone())), 1);
                let x = normed.clone().slice(rows);
                let given = softmax(low.forward(x.clone()), 1);
                let d_logits = (given - wanted).div_scalar(length as f64);
                alignment += dot(&d_logits, &delta.forward(x));
                d_normed.push(low.backward(d_logits));
            }
            (alignment, norm.backward(&student, Tensor::cat(d_normed, 0)))
        });
        Ok(found.collect::<Vec<_>>().into_iter().unzip())
    }

    /// The alignments of the linears of a layer, and the gradients of its inputs.
    fn layer_backward(
        &self,
        index: usize,
        inputs: &[Tensor<B, 3>],
        dy: Vec<Tensor<B, 2>>,
    ) -> Result<(Values, Vec<Tensor<B, 2>>)> {
        let RoundedLayer { layer, deltas } = self.rounded_layer(&self.load(index)?)?;
        let found: Vec<(Vec<f64>, Tensor<B, 2>)> = inputs
            .par_iter()
            .zip(dy)
            .map(|(x, dy)| {
                let [_, length, width] = x.dims();
                let mut own = vec![0.0; deltas.len()];
                let dx = layer.observe_gradients(
                    x.clone().reshape([length, width]),
                    dy,
                    &[self.table(length)],
                    &mut |role, x, dy| {
                        let place = deltas.iter().position(|(own, _)| *own == role);
                        let place = place.expect("invariant: every linear of the layer was rounded");
                        own[place] = dot(dy, &deltas[place].1.forward(x.clone()));
                    },
                );
                (own, dx)
            })
            .collect();
        let linears = self.model.spec().linears(index).into_iter().enumerate();
        let values = linears.map(|(place, linear)| {
            let own = found.iter().map(|(own, _)| own[place]);
            (linear.name, own.collect())
        });
        let values = values.collect();
        Ok((values, found.into_iter().map(|(_, dx)| dx).collect()))
    }
}

/// `weight` after rounding, in its own type; as it is for 16 bits.
fn fake_quantize(
    module: &str,
    weight: &[f32],
    shape: [usize; 2],
    dtype: DType,
    settings: ModuleQuantization,
) -> Result<Vec<f32>> {
    if settings.bits == 16 {
        return Ok(weight.to_vec());
    }
    let group_size = settings.checked_group(module, shape)?;
    let grids = MinMax::of_weight(settings.bits, settings.symmetric, dtype);
    let block = (1usize << 16).next_multiple_of(group_size);
    let mut rounded = vec![0.0; weight.len()];
    let pieces = rounded.par_chunks_mut(block).zip(weight.par_chunks(block));
    pieces.for_each_init(RoundedRows::default, |rows, (rounded, weight)| {
        grids.round_rows(weight, group_size, None, rows);
        let groups = rounded.chunks_mut(group_size).zip(rows.levels.chunks(group_size));
        for ((rounded, levels), grid) in groups.zip(&rows.grids) {
            for (value, level) in rounded.iter_mut().zip(levels) {
                *value = dtype.round((f32::from(*level) - grid.zero) * grid.scale);
            }
        }
    });
    Ok(rounded)
}

/// The sum of the products of the elements, in double precision.
fn dot<B: Backend>(a: &Tensor<B, 2>, b: &Tensor<B, 2>) -> f64 {
    let values = |x: &Tensor<B, 2>| -> Vec<f32> {
        let values = x.clone().into_data().convert::<f32>().into_vec();
        values.expect("invariant: converted to f32")
    };
    let (a, b) = (values(a), values(b));
    a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
