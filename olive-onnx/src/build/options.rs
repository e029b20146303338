//! What a graph is built with.

use std::collections::BTreeSet;

use olive_core::{Error, Result};
use serde_json::{Map, Value};

use crate::ir::OnnxType;

/// How the linears of a dense checkpoint are stored, and the type of the values between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floats. The linears of a packed checkpoint stay packed as they are, in every float precision.
    Fp32,
    /// 16-bit floats.
    Fp16,
    /// 16-bit floats with the range of 32-bit ones; logits are `FLOAT`.
    Bf16,
    /// 8-bit blocks, for whatever the checkpoint does not hold packed already.
    Int8,
    /// 4-bit blocks, likewise.
    Int4,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fp32, Self::Fp16, Self::Bf16, Self::Int8, Self::Int4];
    /// Their names.
    pub const NAMES: [&'static str; 5] = ["fp32", "fp16", "bf16", "int8", "int4"];

    /// Its name on a command line: `fp32`, `int4`, …
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The precision of this name, compared without case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|precision| precision.name().eq_ignore_ascii_case(name))
    }

    /// Bits of the blocks of dense linears; `None` where they stay floats.
    pub fn bits(self) -> Option<usize> {
        match self {
            Self::Fp32 | Self::Fp16 | Self::Bf16 => None,
            Self::Int8 => Some(8),
            Self::Int4 => Some(4),
        }
    }
}

/// What the graph is meant to run on: its nodes and types are those that this execution provider has kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// The CPU.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// DirectML.
    Dml,
    /// WebGPU.
    WebGpu,
}

impl Provider {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Cuda, Self::Dml, Self::WebGpu];

    /// Its name in the runtime's config.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Dml => "dml",
            Self::WebGpu => "webgpu",
        }
    }

    /// The provider of this name, compared without case: `cuda`, or ONNX Runtime's `CUDAExecutionProvider`.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let short = name.trim_end_matches("executionprovider");
        Self::ALL.into_iter().find(|provider| match provider {
            Self::WebGpu => matches!(short, "webgpu" | "js"),
            other => other.name() == short,
        })
    }
}

/// How blocks of dense linears are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// ONNX Runtime's own: the element of largest magnitude is the lowest integer.
    Default,
    /// Round to nearest on a grid that is symmetrical around 0.
    Rtn,
    /// Scale and zero point found by weighted least squares.
    KQuant,
}

/// Options of the builder; the defaults are those of onnxruntime-genai's builder on the CPU.
#[derive(Debug, Clone, PartialEq)]
pub struct BuilderOptions {
    /// How dense linears are stored.
    pub precision: Precision,
    /// What the graph will run on.
    pub provider: Provider,
    /// Inputs that share a scale: 16, 32, 64, 128 or 256.
    pub block_size: usize,
    /// Whether every zero point is the middle.
    pub is_symmetric: bool,
    /// What MatMulNBits may compute in: 0 as it likes, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations. `None`
    /// is 4 for a quantized graph on the CPU or WebGPU, as onnxruntime-genai's builder has it, and 0 elsewhere: the packed
    /// linears of a float graph then see the activations that they were calibrated and trained with.
    pub accuracy_level: Option<i64>,
    /// How blocks are rounded.
    pub algorithm: Algorithm,
    /// Bits of the head, where they differ from those of the other linears.
    pub last_matmul_bits: Option<usize>,
    /// Bits of the linears that quantization harms most, v_proj (or qkv_proj) and down_proj of every third layer and of
    /// the first and last eighth, where they differ.
    pub mixed_layer_bits: Option<usize>,
    /// Whether linears are quantized.
    pub quantize_linears: bool,
    /// Whether the embedding of an untied model is quantized too.
    pub quantize_embedding: bool,
    /// Nodes that stay float, by the names that they have in a float graph: `/lm_head/MatMul`.
    pub nodes_to_exclude: BTreeSet<String>,
    /// Whether weights are `DequantizeLinear` before `MatMul` rather than `MatMulNBits`.
    pub use_qdq: bool,
    /// Whether the graph takes `inputs_embeds` in place of `input_ids`.
    pub exclude_embeds: bool,
    /// Whether the graph ends at `hidden_states`.
    pub exclude_lm_head: bool,
    /// Whether the graph gives `hidden_states` beside `logits`.
    pub include_hidden_states: bool,
    /// Whether only the last position gets logits.
    pub prune_lm_head: bool,
    /// Whether embedding and head are stored once; `None` if the model ties them.
    pub shared_embeddings: Option<bool>,
    /// Whether q, k and v are one product where they can be.
    pub fuse_qkv: bool,
    /// Whether gate and up are one product.
    pub fuse_gate_up: bool,
    /// Whether the norms of q and k are part of attention where the provider can.
    pub fuse_qk_norm: bool,
    /// Whether a quantized CUDA graph works in bf16.
    pub use_cuda_bf16: bool,
    /// Whether a WebGPU graph works in fp32.
    pub use_webgpu_fp32: bool,
    /// Whether the runtime captures CUDA graphs.
    pub enable_cuda_graph: bool,
    /// Whether the runtime captures WebGPU graphs.
    pub enable_webgpu_graph: bool,
    /// Layers to keep, from the first.
    pub n_layers: Option<usize>,
    /// Name of the graph file.
    pub filename: String,
    /// Whether the runtime's config and the tokenizer are all that is written.
    pub config_only: bool,
    /// Values for the `search` part of the runtime's config, over those that come from the checkpoint.
    pub search: Map<String, Value>,
}

impl Default for BuilderOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Fp32,
            provider: Provider::Cpu,
            block_size: 32,
            is_symmetric: true,
            accuracy_level: None,
            algorithm: Algorithm::Default,
            last_matmul_bits: None,
            mixed_layer_bits: None,
            quantize_linears: true,
            quantize_embedding: false,
            nodes_to_exclude: BTreeSet::new(),
            use_qdq: false,
            exclude_embeds: false,
            exclude_lm_head: false,
            include_hidden_states: false,
            prune_lm_head: false,
            shared_embeddings: None,
            fuse_qkv: true,
            fuse_gate_up: false,
            fuse_qk_norm: true,
            use_cuda_bf16: false,
            use_webgpu_fp32: false,
            enable_cuda_graph: false,
            enable_webgpu_graph: false,
            n_layers: None,
            filename: crate::model::GRAPH_FILE.to_owned(),
            config_only: false,
            search: Map::new(),
        }
    }
}

/// Where an option is from, in errors.
pub(super) const ORIGIN: &str = "model builder";

impl BuilderOptions {
    /// The defaults with another precision.
    pub fn with_precision(precision: Precision) -> Self {
        Self {
            precision,
            ..Self::default()
        }
    }

    /// The level that is put on the nodes; 0 is left out.
    pub fn effective_accuracy_level(&self) -> i64 {
        let rounds = matches!(self.provider, Provider::Cpu | Provider::WebGpu);
        let quantized = self.precision.bits().is_some();
        self.accuracy_level
            .unwrap_or(if rounds && quantized { 4 } else { 0 })
    }

    /// The type of inputs, outputs and everything between: `FLOAT` for fp32 and for quantized graphs on the CPU,
    /// `BFLOAT16` for bf16, else `FLOAT16`.
    pub fn io_type(&self) -> OnnxType {
        match (self.precision, self.provider) {
            (_, Provider::WebGpu) if self.use_webgpu_fp32 => OnnxType::Float,
            (Precision::Fp32, _) | (Precision::Int4 | Precision::Int8, Provider::Cpu) => OnnxType::Float,
            (Precision::Bf16, _) => OnnxType::Bfloat16,
            (Precision::Int4 | Precision::Int8, Provider::Cuda) if self.use_cuda_bf16 => OnnxType::Bfloat16,
            _ => OnnxType::Float16,
        }
    }

    /// Checks the values, alone and together.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn check(&self) -> Result<()> {
        let wrong = |key: &str, expected: &str, found: String| Error::config(ORIGIN, key, expected, found);
        if ![16, 32, 64, 128, 256].contains(&self.block_size) {
            let found = self.block_size.to_string();
            return Err(wrong("block_size", "16, 32, 64, 128 or 256", found));
        }
        if let Some(level) = self.accuracy_level.filter(|level| !(0..=4).contains(level)) {
            return Err(wrong("accuracy_level", "0 to 4", level.to_string()));
        }
        for (key, bits) in [
            ("last_matmul", self.last_matmul_bits),
            ("mixed_layers", self.mixed_layer_bits),
        ] {
            match bits {
                Some(4 | 8) | None => {}
                Some(other) => return Err(wrong(key, "4 or 8 bits", other.to_string())),
            }
            if bits.is_some() && self.precision.bits().is_none() {
                let expected = "nothing in a float precision";
                return Err(wrong(key, expected, self.precision.name().to_owned()));
            }
        }
        let eight = [
            self.precision.bits(),
            self.last_matmul_bits,
            self.mixed_layer_bits,
        ]
        .contains(&Some(8));
        if self.use_qdq && eight {
            return Err(wrong("use_qdq", "4-bit weights only", "8 bits".to_owned()));
        }
        if self.exclude_lm_head && self.include_hidden_states {
            let expected = "one of include_hidden_states and exclude_lm_head";
            return Err(wrong("include_hidden_states", expected, "both".to_owned()));
        }
        if self.n_layers == Some(0) {
            return Err(wrong("num_hidden_layers", "a positive number", "0".to_owned()));
        }
        let plain =
            !self.filename.is_empty() && !self.filename.contains(['/', '\\']) && self.filename != "..";
        if !plain {
            return Err(wrong("filename", "a file name", format!("`{}`", self.filename)));
        }
        for (key, set, provider) in [
            ("use_cuda_bf16", self.use_cuda_bf16, Provider::Cuda),
            ("enable_cuda_graph", self.enable_cuda_graph, Provider::Cuda),
            ("use_webgpu_fp32", self.use_webgpu_fp32, Provider::WebGpu),
            ("enable_webgpu_graph", self.enable_webgpu_graph, Provider::WebGpu),
        ] {
            if set && provider != self.provider {
                tracing::warn!(
                    "`{key}` has no effect on a graph for {}: it is for {}",
                    self.provider.name(),
                    provider.name()
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_follow_precision_and_provider() {
        let of = |precision, provider| {
            BuilderOptions {
                provider,
                ..BuilderOptions::with_precision(precision)
            }
            .io_type()
        };
        for provider in Provider::ALL {
            assert_eq!(of(Precision::Fp32, provider), OnnxType::Float);
            assert_eq!(of(Precision::Fp16, provider), OnnxType::Float16);
            assert_eq!(of(Precision::Bf16, provider), OnnxType::Bfloat16);
            let quantized = match provider {
                Provider::Cpu => OnnxType::Float,
                _ => OnnxType::Float16,
            };
            assert_eq!(of(Precision::Int4, provider), quantized);
            assert_eq!(of(Precision::Int8, provider), quantized);
            assert_eq!(Provider::from_name(provider.name()), Some(provider));
        }
        assert_eq!(Provider::from_name("CUDAExecutionProvider"), Some(Provider::Cuda));
        assert_eq!(Provider::from_name("QNNExecutionProvider"), None);
        let bf16 = BuilderOptions {
            provider: Provider::Cuda,
            use_cuda_bf16: true,
            ..BuilderOptions::with_precision(Precision::Int4)
        };
        assert_eq!(bf16.io_type(), OnnxType::Bfloat16);
        assert_eq!(bf16.effective_accuracy_level(), 0);
    }

    #[test]
    fn values_that_do_not_go_together_are_refused_by_name() {
        let refuse = |key: &str, change: fn(&mut BuilderOptions)| {
            let mut options = BuilderOptions::with_precision(Precision::Int8);
            change(&mut options);
            let error = options.check().unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        };
        refuse("block_size", |options| options.block_size = 48);
        refuse("accuracy_level", |options| options.accuracy_level = Some(5));
        refuse("use_qdq", |options| options.use_qdq = true);
        refuse("last_matmul", |options| options.last_matmul_bits = Some(3));
        refuse("filename", |options| {
            options.filename = "../model.onnx".to_owned()
        });
        refuse("num_hidden_layers", |options| options.n_layers = Some(0));
        refuse("include_hidden_states", |options| {
            options.include_hidden_states = true;
            options.exclude_lm_head = true;
        });
    }
}
