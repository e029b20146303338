//! From a checkpoint to a graph: one file a block, the same blocks for every family. What differs between families is
//! what their [`ModelSpec`] says; what differs between weights is their kind.
//!
//! Names of nodes, values and initializers, their order, and the operators used are those of onnxruntime-genai's own
//! builder (0.18, CPU), so that adapters and tools made for its graphs fit ours. Deviations:
//! - a sliding window is put on every attention node (`local_window_size`), where that builder forgets it;
//! - adapter weights are float optional inputs, never baked in and never quantized;
//! - a tied, asymmetrically quantized head stays a pair of float embedding and packed head, where that builder writes
//!   an invalid graph;
//! - declared shapes pass ONNX's strict shape inference.

mod attention;
mod embedding;
mod extra_options;
mod graph;
mod head;
mod linear;
mod lora;
mod mask;
mod mlp;
mod norm;
mod options;
mod quantize;
mod rope;
mod weights;

pub use lora::{LORA_RANK, LoraInput, LoraTargets};
pub use options::{Algorithm, BuilderOptions, Precision, Provider};
pub use quantize::{BlockQuantized, quantize_blocks};

use olive_core::{Error, HfModel, ModelSpec, Result};
use std::sync::Arc;

use crate::ir::{MICROSOFT, Model, OnnxType, Opset, ValueInfo};
use graph::{Builder, io_shape};
use weights::Weights;

/// Version of the IR that graphs are written in.
const IR_VERSION: i64 = 10;
/// Version of ONNX's own operators.
const OPSET: i64 = 22;

/// Builds the graph of a checkpoint. Reads shapes and small vectors; the weights are read when the graph is written.
///
/// # Errors
/// [`Error::MissingTensors`], [`Error::UnknownTensors`] or [`Error::Tensor`] for a checkpoint that is not what its
/// config says; [`Error::Unsupported`] for sizes that the operators do not take; [`Error::Config`] for an option.
pub fn build_graph(source: &Arc<HfModel>, options: &BuilderOptions, lora: &LoraTargets) -> Result<Model> {
    use olive_core::ModelHandle;
    let spec = source.spec();
    options.check()?;
    check_built(options)?;
    source.check_tensors()?;
    check_sizes(spec, options)?;
    lora.check(spec)?;
    let mut builder = Builder::new(spec, options, Weights::new(source.clone()), lora);
    declare_inputs(&mut builder);
    builder.rope_tables()?;
    builder.mask()?;
    let mut residual = builder.embedding()?;
    let mut delta = None;
    for layer in 0..spec.n_layers {
        let norms = spec.layer_names(layer);
        let name = format!("/model/layers.{layer}/input_layernorm");
        let (normed, root) = builder.norm(&name, &norms.input_norm, &residual, delta.as_deref())?;
        residual = root;
        let attention = builder.attention(layer, &normed)?;
        let name = format!("/model/layers.{layer}/post_attention_layernorm");
        let (normed, root) = builder.norm(&name, &norms.post_attention_norm, &residual, Some(&attention))?;
        residual = root;
        delta = Some(builder.mlp(layer, &normed)?);
    }
    let last =
        delta.ok_or_else(|| Error::unsupported("a model without layers", "there is nothing to build"))?;
    let normed = builder.final_norm(&residual, &last)?;
    builder.head(&normed)?;
    declare_outputs(&mut builder);
    let model = Model {
        ir_version: IR_VERSION,
        opsets: vec![opset("", OPSET), opset(MICROSOFT, 1)],
        producer_name: "olive".to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        metadata: Vec::new(),
        graph: builder.finish(),
    };
    model.graph.check()?;
    Ok(model)
}

/// Options whose graphs are not built yet are refused.
fn check_built(options: &BuilderOptions) -> Result<()> {
    let plain = BuilderOptions {
        block_size: options.block_size,
        is_symmetric: options.is_symmetric,
        accuracy_level: options.accuracy_level,
        search: options.search.clone(),
        ..BuilderOptions::with_precision(options.precision)
    };
    if &plain != options || !matches!(options.precision, Precision::Fp32 | Precision::Int4) {
        return Err(Error::unsupported(
            format!("a graph with {options:?}"),
            "fp32 and int4 graphs for the CPU are built",
        ));
    }
    Ok(())
}

fn opset(domain: &str, version: i64) -> Opset {
    Opset {
        domain: domain.to_owned(),
        version,
    }
}

/// What the operators do not take, refused before anything is read.
fn check_sizes(spec: &ModelSpec, options: &BuilderOptions) -> Result<()> {
    let table_width = spec.rope.rotary_dim / 2;
    if table_width > spec.head_dim / 2 {
        let what = format!(
            "a rotary embedding of {} of {} elements",
            spec.rope.rotary_dim, spec.head_dim
        );
        return Err(Error::unsupported(what, "it can rotate a head at most"));
    }
    if !table_width.is_multiple_of(8) {
        tracing::warn!(
            "onnxruntime takes rotary embeddings of multiples of 16 elements only, this model has {}",
            spec.rope.rotary_dim
        );
    }
    if let Some(quantization) = &spec.quantization {
        if quantization.bits != 4 {
            let what = format!("a checkpoint packed in {} bits", quantization.bits);
            return Err(Error::unsupported(
                what,
                "packed linears go into the graph in 4 bits",
            ));
        }
        let group = usize::try_from(quantization.group_size).unwrap_or(0);
        if group < 16 || !group.is_power_of_two() {
            let what = format!("a packed checkpoint with groups of {}", quantization.group_size);
            return Err(Error::unsupported(
                what,
                "MatMulNBits takes powers of two from 16 on",
            ));
        }
    }
    if options.precision == Precision::Int4 && spec.hidden_size < options.block_size {
        let what = format!(
            "a block of {} for {} inputs",
            options.block_size, spec.hidden_size
        );
        return Err(Error::unsupported(what, "a block has to fit into a row"));
    }
    Ok(())
}

fn declare_inputs(builder: &mut Builder<'_>) {
    let spec = builder.spec;
    let ids = ["batch_size".into(), "sequence_length".into()];
    let mask = ["batch_size".into(), "total_sequence_length".into()];
    builder
        .graph
        .inputs
        .push(ValueInfo::new("input_ids", OnnxType::Int64, ids));
    builder
        .graph
        .inputs
        .push(ValueInfo::new("attention_mask", OnnxType::Int64, mask));
    for part in ["key", "value"] {
        for layer in 0..spec.n_layers {
            let name = format!("past_key_values.{layer}.{part}");
            let shape = cache_shape(spec, "past_sequence_length");
            builder
                .graph
                .inputs
                .push(ValueInfo::new(name, OnnxType::Float, shape));
        }
    }
}

fn declare_outputs(builder: &mut Builder<'_>) {
    let spec = builder.spec;
    let logits = ValueInfo::new("logits", OnnxType::Float, io_shape(spec.vocab_size));
    builder.graph.outputs.push(logits);
    for part in ["key", "value"] {
        for layer in 0..spec.n_layers {
            let name = format!("present.{layer}.{part}");
            let shape = cache_shape(spec, "total_sequence_length");
            builder
                .graph
                .outputs
                .push(ValueInfo::new(name, OnnxType::Float, shape));
        }
    }
}

fn cache_shape(spec: &ModelSpec, length: &str) -> [crate::ir::Dim; 4] {
    [
        "batch_size".into(),
        spec.n_kv_heads.into(),
        length.into(),
        "kv_cache_dim".into(),
    ]
}
