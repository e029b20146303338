//! A frozen model with an adapter, in memory: losses and gradients of sequences.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use olive_core::decoder::{DecoderLayer, DropoutStream, Embedding, Head, LayerTape, SequenceTables};
use olive_core::{CancelToken, Error, LinearRole, ModelHandle, ModelSpec, Progress, Result, Sample};

use crate::adapter::Adapter;

/// Tables by the length of a sequence and that of its batch, which picks the rotation factors.
pub(crate) type Tables<B> = BTreeMap<(usize, usize), SequenceTables<B>>;

/// One sequence to train or evaluate on, cut to what is counted.
#[derive(Clone, Copy)]
pub(crate) struct Sequence<'a> {
    pub ids: &'a [u32],
    pub labels: &'a [i64],
    /// The longest sequence of its micro-batch.
    pub batch_length: usize,
}

impl<'a> Sequence<'a> {
    /// The part of a sample that is counted: up to its last label. Padding on the right is not seen by what is
    /// before it, so leaving it out changes nothing.
    pub fn new(sample: &'a Sample, batch_length: usize) -> Self {
        let last = sample
            .labels
            .iter()
            .rposition(|label| *label != olive_core::data::IGNORED_LABEL);
        let end = last.map_or(1, |last| last + 1).min(sample.input_ids.len());
        Self {
            ids: &sample.input_ids[..end],
            labels: &sample.labels[..end],
            batch_length,
        }
    }

    /// Its length and that of its micro-batch.
    pub fn key(&self) -> (usize, usize) {
        (self.ids.len(), self.batch_length)
    }
}

/// Labels of a sample that are counted.
pub(crate) fn trained_tokens(sample: &Sample) -> usize {
    let counted = |label: &&i64| **label != olive_core::data::IGNORED_LABEL;
    sample.labels.iter().skip(1).filter(counted).count()
}

/// Losses and gradients of some sequences.
pub(crate) struct GroupResult {
    /// Sum of the losses of each sequence.
    pub sums: Vec<f64>,
    /// Of each part of each module, in the adapter's order.
    pub gradients: Vec<Vec<f32>>,
}

/// A sequence to train on.
pub(crate) struct Trained<'a> {
    pub sequence: Sequence<'a>,
    /// Its stream.
    pub dropout: DropoutStream,
    /// The gradient is that of its loss times this.
    pub scale: f64,
}

/// What is kept of a layer's forward.
enum Kept<B: Backend> {
    Input(Tensor<B, 2>),
    Tape(LayerTape<B>),
}

/// A frozen model with an adapter.
pub(crate) struct Network<B: Backend> {
    spec: ModelSpec,
    embedding: Embedding<B>,
    layers: Vec<DecoderLayer<B>>,
    head: Head<B>,
    /// Layer and role of each module of the adapter, in its order.
    places: Vec<(usize, LinearRole)>,
    device: B::Device,
}

impl<B: Backend> Network<B> {
    /// Reads the model; packed linears stay packed.
    pub fn load(model: &dyn ModelHandle, progress: &dyn Progress, cancel: &CancelToken) -> Result<Self> {
        let (spec, source) = (model.spec(), model.tensors());
        let device = B::Device::default();
        progress.start("loading the model", spec.n_layers as u64);
        let embedding = Embedding::load(source, spec, &device)?;
        let head = Head::load(source, spec, Some(&embedding), &device)?;
        let mut layers = Vec::with_capacity(spec.n_layers);
        for index in 0..spec.n_layers {
            cancel.check()?;
            layers.push(DecoderLayer::load(source, spec, index, &device)?);
            progress.update(index as u64 + 1, "");
        }
        progress.finish();
        Ok(Self {
            spec: spec.clone(),
            embedding,
            layers,
            head,
            places: Vec::new(),
            device,
        })
    }

    /// Puts the adapter's present values on the layers.
    pub fn attach(&mut self, adapter: &Adapter) -> Result<()> {
        for layer in &mut self.layers {
            adapter.attach(layer)?;
        }
        let places = adapter
            .modules
            .iter()
            .map(|m| (m.place.layer, m.place.linear.role));
        self.places = places.collect();
        Ok(())
    }

    /// Makes the tables that these sequences need, and drops those that they do not.
    pub fn prepare<'a>(&self, tables: &mut Tables<B>, sequences: impl Iterator<Item = &'a Sequence<'a>>) {
        let mut needed: Vec<_> = sequences.map(Sequence::key).collect();
        needed.sort_unstable();
        needed.dedup();
        tables.retain(|key, _| needed.binary_search(key).is_ok());
        for (length, batch) in needed {
            tables
                .entry((length, batch))
                .or_insert_with(|| SequenceTables::for_part(&self.spec, length, batch, &self.device));
        }
    }

    /// The sum of the losses of each sequence.
    pub fn losses(&self, sequences: &[Sequence<'_>], tables: &Tables<B>) -> Result<Vec<f64>> {
        let tables = tables_of(tables, sequences.iter())?;
        let mut x = self.embed(sequences.iter())?;
        for layer in &self.layers {
            (x, _) = layer.forward_train(x, &tables, &DropoutStream::none());
        }
        let labels: Vec<&[i64]> = sequences.iter().map(|sequence| sequence.labels).collect();
        Ok(self.head.cross_entropy(x, &labels, None)?.sums)
    }

    /// Rows `[n, hidden]` of sequences, one after another.
    fn embed<'a>(&self, sequences: impl Iterator<Item = &'a Sequence<'a>>) -> Result<Tensor<B, 2>> {
        let ids: Vec<u32> = sequences.flat_map(|sequence| sequence.ids).copied().collect();
        let x = self.embedding.forward(&[&ids])?;
        let [_, n, hidden] = x.dims();
        Ok(x.reshape([n, hidden]))
    }

    /// The losses of sequences and the sum of the adapter's gradients. The sequences are computed together, as rows
    /// that follow one another: nothing is padded. With `recompute`, layers are computed again instead of kept.
    pub fn gradients(
        &self,
        group: &[Trained<'_>],
        tables: &Tables<B>,
        recompute: bool,
    ) -> Result<GroupResult> {
        let sequences = || group.iter().map(|own| &own.sequence);
        let tables = tables_of(tables, sequences())?;
        let streams = group
            .iter()
            .map(|own| (own.dropout.clone(), own.sequence.ids.len()));
        let dropout = DropoutStream::join(streams);
        let stream = |index: usize| dropout.child(index as u64);
        // Nothing below the lowest adapted layer is trained.
        let lowest = self.places.iter().map(|(layer, _)| *layer).min().unwrap_or(0);
        let mut kept = Vec::with_capacity(self.layers.len());
        let mut x = self.embed(sequences())?;
        for (index, layer) in self.layers.iter().enumerate() {
            let input = recompute.then(|| x.clone());
            let (y, tape) = layer.forward_train(x, &tables, &stream(index));
            if index >= lowest {
                kept.push(input.map_or(Kept::Tape(tape), Kept::Input));
            }
            x = y;
        }
        let labels: Vec<&[i64]> = sequences().map(|sequence| sequence.labels).collect();
        let scales: Vec<f64> = group.iter().map(|own| own.scale).collect();
        let result = self.head.cross_entropy(x, &labels, Some(&scales))?;
        let mut gradients: BTreeMap<(usize, LinearRole), Vec<Vec<f32>>> = BTreeMap::new();
        let mut dy = result
            .d_hidden
            .ok_or_else(|| Error::tensor("loss", "a gradient", "none"))?;
        for (index, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            let Some(kept) = kept.pop() else { break };
            let tape = match kept {
                Kept::Tape(tape) => tape,
                Kept::Input(x) => layer.forward_train(x, &tables, &stream(index)).1,
            };
            let mut own = Vec::new();
            dy = layer.backward(tape, dy, &tables, &stream(index), &mut own);
            for (role, gradient) in own {
                let mut parts = vec![host(gradient.a)?, host(gradient.b)?];
                if let Some(magnitude) = gradient.magnitude {
                    parts.push(host(magnitude)?);
                }
                gradients.insert((index, role), parts);
            }
        }
        let in_order = self.places.iter().map(|place| {
            let pair = gradients.remove(place);
            pair.ok_or_else(|| Error::tensor(format!("{place:?}"), "a gradient", "none"))
        });
        let in_order: Vec<Vec<Vec<f32>>> = in_order.collect::<Result<_>>()?;
        Ok(GroupResult {
            sums: result.sums,
            gradients: in_order.into_iter().flatten().collect(),
        })
    }
}

fn tables_of<'a, 'b, B: Backend>(
    tables: &'a Tables<B>,
    sequences: impl Iterator<Item = &'b Sequence<'b>>,
) -> Result<Vec<&'a SequenceTables<B>>> {
    let of = |sequence: &Sequence<'_>| {
        let found = tables.get(&sequence.key());
        found.ok_or_else(|| Error::tensor("input_ids", "a prepared length", format!("{:?}", sequence.key())))
    };
    sequences.map(of).collect()
}

fn host<B: Backend, const D: usize>(x: Tensor<B, D>) -> Result<Vec<f32>> {
    x.into_data()
        .convert::<f32>()
        .into_vec()
        .map_err(|error| Error::tensor("gradient", "single precision", format!("{error:?}")))
}
