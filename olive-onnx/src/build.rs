//! From a checkpoint to a graph: one file a block, the same blocks for every family. What differs between families is
//! what their [`ModelSpec`] says; what differs between weights is their kind.
//!
//! Names of nodes, values and initializers, their order, and the operators used are those of onnxruntime-genai's own
//! builder (0.18), so that adapters and tools made for its graphs fit ours. Deviations:
//! - attention is GroupQueryAttention whatever the provider and the type, where that builder falls back to a
//!   MultiHeadAttention graph that fails at its second step (fp16 and bf16 on the CPU) or to an invalid one (fp32 on CUDA
//!   and DirectML);
//! - a sliding window is put on every attention node (`local_window_size`), where that builder forgets it;
//! - adapter weights are float optional inputs, never baked in and never quantized;
//! - a tied head with zero points is shared with the embedding like any other, where that builder writes an invalid graph;
//!   it is stored twice where its rows of zero points do not end with a byte;
//! - a tied 8-bit or excluded head is shared with the embedding, where that builder stores the embedding beside it;
//! - declared shapes pass ONNX's strict shape inference.

mod attention;
mod blocks;
mod embedding;
mod extra_options;
mod floats;
mod graph;
mod head;
mod linear;
mod lora;
mod mask;
mod mlp;
mod norm;
mod options;
mod qdq;
mod quantize;
mod rope;
mod rows;
mod weights;

pub use lora::{LORA_RANK, LoraInput, LoraTargets};
pub use options::{Algorithm, BuilderOptions, Precision, Provider};
pub use quantize::{BlockQuantized, quantize_blocks};

use olive_core::{Error, HfModel, ModelSpec, Result};
use std::sync::Arc;

use crate::ir::{Dim, Graph, MICROSOFT, Model, OnnxType, Opset, ValueInfo};
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
    options.check()?;
    source.check_tensors()?;
    let spec = &cut(source.spec(), options)?;
    check_sizes(spec, options)?;
    lora.check(spec)?;
    let weights = Weights::new(source.clone(), options.io_type());
    let mut builder = Builder::new(spec, options, weights, lora);
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
    if !options.exclude_lm_head {
        builder.head(&normed)?;
    }
    declare_outputs(&mut builder);
    warn_of_unused(options, &builder.graph);
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

/// The model with the layers that are kept.
fn cut(spec: &ModelSpec, options: &BuilderOptions) -> Result<ModelSpec> {
    let mut spec = spec.clone();
    if let Some(n_layers) = options.n_layers {
        if n_layers > spec.n_layers {
            let expected = format!("at most {}, the layers of the model", spec.n_layers);
            let found = n_layers.to_string();
            return Err(Error::config(
                options::ORIGIN,
                "num_hidden_layers",
                expected,
                found,
            ));
        }
        spec.n_layers = n_layers;
    }
    Ok(spec)
}

/// Names of nodes that the user wants float and that no node has.
fn warn_of_unused(options: &BuilderOptions, graph: &Graph) {
    if options.precision.bits().is_none() {
        return;
    }
    let parts = ["/q_proj/", "/k_proj/", "/v_proj/", "/gate_proj/", "/up_proj/"];
    for name in &options.nodes_to_exclude {
        let exists = graph.nodes.iter().any(|node| &node.name == name);
        if !exists && !parts.iter().any(|part| name.contains(part)) {
            tracing::warn!("nodes_to_exclude: there is no node `{name}`");
        }
    }
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
    if options.precision.bits().is_some() && spec.hidden_size < options.block_size {
        let what = format!(
            "a block of {} for {} inputs",
            options.block_size, spec.hidden_size
        );
        return Err(Error::unsupported(what, "a block has to fit into a row"));
    }
    Ok(())
}

fn declare_inputs(builder: &mut Builder<'_>) {
    let (spec, io) = (builder.spec, builder.io);
    let ids: [Dim; 2] = ["batch_size".into(), "sequence_length".into()];
    let mask = ["batch_size".into(), "total_sequence_length".into()];
    let inputs = &mut builder.graph.inputs;
    if !builder.options.exclude_embeds {
        inputs.push(ValueInfo::new("input_ids", OnnxType::Int64, ids.clone()));
    }
    inputs.push(ValueInfo::new("attention_mask", OnnxType::Int64, mask));
    if builder.options.exclude_embeds {
        inputs.push(ValueInfo::new("inputs_embeds", io, io_shape(spec.hidden_size)));
    }
    if builder.options.provider == Provider::Dml {
        inputs.push(ValueInfo::new("position_ids", OnnxType::Int64, ids));
    }
    for part in ["key", "value"] {
        for layer in 0..spec.n_layers {
            let name = format!("past_key_values.{layer}.{part}");
            let shape = cache_shape(spec, "past_sequence_length");
            inputs.push(ValueInfo::new(name, io, shape));
        }
    }
}

fn declare_outputs(builder: &mut Builder<'_>) {
    let (spec, io, options) = (builder.spec, builder.io, builder.options);
    let outputs = &mut builder.graph.outputs;
    if options.include_hidden_states || options.exclude_lm_head {
        outputs.push(ValueInfo::new(
            norm::HIDDEN_STATES,
            io,
            io_shape(spec.hidden_size),
        ));
    }
    if !options.exclude_lm_head {
        let mut shape = io_shape(spec.vocab_size);
        if options.prune_lm_head {
            shape[1] = 1.into();
        }
        let dtype = match io {
            OnnxType::Bfloat16 => OnnxType::Float,
            other => other,
        };
        outputs.push(ValueInfo::new("logits", dtype, shape));
    }
    for part in ["key", "value"] {
        for layer in 0..spec.n_layers {
            let name = format!("present.{layer}.{part}");
            let shape = cache_shape(spec, "total_sequence_length");
            outputs.push(ValueInfo::new(name, io, shape));
        }
    }
}

fn cache_shape(spec: &ModelSpec, length: &str) -> [Dim; 4] {
    [
        "batch_size".into(),
        spec.n_kv_heads.into(),
        length.into(),
        "kv_cache_dim".into(),
    ]
}
