//! [`ModelSpec`]: everything about a decoder-only model that is not a weight.

use std::path::Path;

use super::config::RawConfig;
use super::quantization::QuantizationConfig;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A group of architectures that share a config and tensor names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 1–3.
    Llama,
    /// Mistral 7B and its kin: Llama with a sliding window.
    Mistral,
    /// Phi-3 and Phi-3.5: fused projections, longrope.
    Phi3,
    /// Qwen 2 and 2.5: biased q, k, v.
    Qwen2,
    /// Qwen 3: RMS norm on each head's q and k.
    Qwen3,
}

/// How the query, key and value projections are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionLayout {
    /// `q_proj`, `k_proj`, `v_proj`.
    Split,
    /// One `qkv_proj`, rows q then k then v.
    Fused,
}

/// How the gate and up projections are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpLayout {
    /// `gate_proj`, `up_proj`.
    Split,
    /// One `gate_up_proj`, rows gate then up.
    Fused,
}

/// The gate's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading elements of a head that are rotated, as two halves.
    pub rotary_dim: usize,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, a smooth passage between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above `original / low` are divided fully.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Context length of the first training.
        original_max_position: usize,
    },
    /// LongRoPE: one divisor a frequency, chosen by the length of the whole sequence.
    LongRope {
        /// Divisors up to `original_max_position`, `[rotary_dim / 2]`.
        short_factor: Vec<f64>,
        /// Divisors beyond, `[rotary_dim / 2]`.
        long_factor: Vec<f64>,
        /// The length above which `long_factor` applies.
        original_max_position: usize,
        /// Multiplies cosine and sine.
        attention_factor: f64,
    },
}

impl RopeSpec {
    /// Inverse frequencies `[rotary_dim / 2]` for a sequence of `length` tokens in all.
    pub fn inverse_frequencies(&self, length: usize) -> Vec<f64> {
        let half = self.rotary_dim / 2;
        let plain = |i: usize| self.theta.powf(-2.0 * i as f64 / self.rotary_dim as f64);
        match &self.scaling {
            RopeScaling::None => (0..half).map(plain).collect(),
            RopeScaling::Linear { factor } => (0..half).map(|i| plain(i) / factor).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            } => {
                let original = *original_max_position as f64;
                let rescale = |frequency: f64| {
                    let wavelength = 2.0 * std::f64::consts::PI / frequency;
                    if wavelength < original / high_freq_factor {
                        frequency
                    } else if wavelength > original / low_freq_factor {
                        frequency / factor
                    } else {
                        let smooth =
                            (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                (0..half).map(|i| rescale(plain(i))).collect()
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position,
                ..
            } => {
                let factors = if length > *original_max_position {
                    long_factor
                } else {
                    short_factor
                };
                (0..half).map(|i| plain(i) / factors[i]).collect()
            }
        }
    }

    /// What cosine and sine are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::LongRope { attention_factor, .. } => *attention_factor,
            _ => 1.0,
        }
    }
}

/// What a linear of a decoder layer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearRole {
    /// Query, key and value in one.
    Qkv,
    /// Query.
    Q,
    /// Key.
    K,
    /// Value.
    V,
    /// Output of attention.
    O,
    /// Gate and up in one.
    GateUp,
    /// Gate.
    Gate,
    /// Up.
    Up,
    /// Down.
    Down,
}

/// One linear of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// What it is for.
    pub role: LinearRole,
    /// Module path without `.weight`: `model.layers.0.self_attn.qkv_proj`.
    pub name: String,
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// Whether a `.bias` is stored.
    pub bias: bool,
}

/// Names of a layer's tensors that are not linears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerNames {
    /// RMS norm before attention.
    pub input_norm: String,
    /// RMS norm before the MLP.
    pub post_attention_norm: String,
    /// RMS norm of each query head.
    pub q_norm: Option<String>,
    /// RMS norm of each key head.
    pub k_norm: Option<String>,
}

/// Sizes, positions, norms and layouts of a decoder-only language model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The family.
    pub family: Family,
    /// `architectures[0]`.
    pub architecture: String,
    /// `model_type`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// The gate's activation.
    pub activation: Activation,
    /// Position embedding.
    pub rope: RopeSpec,
    /// Longest sequence.
    pub max_position: usize,
    /// Keys older than this are not seen; `None` where attention is full.
    pub sliding_window: Option<usize>,
    /// Whether the language-model head is the embedding's transpose.
    pub tie_word_embeddings: bool,
    /// How q, k and v are stored.
    pub attention_layout: AttentionLayout,
    /// How gate and up are stored.
    pub mlp_layout: MlpLayout,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub o_bias: bool,
    /// Whether the MLP's linears have a bias.
    pub mlp_bias: bool,
    /// Whether each head's q and k are RMS-normalised.
    pub qk_norm: bool,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Token that fills.
    pub pad_token_id: Option<u32>,
    /// Type of the stored weights.
    pub weight_dtype: DType,
    /// How the linears are quantized, if they are.
    pub quantization: Option<QuantizationConfig>,
}

impl ModelSpec {
    /// The fields that every family reads alike; a family changes what differs.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(super) fn common(family: Family, raw: &RawConfig) -> Result<Self> {
        let hidden_size = raw.size("hidden_size")?;
        let n_heads = raw.size("num_attention_heads")?;
        let head_dim = raw.optional_size("head_dim")?.unwrap_or(hidden_size / n_heads);
        let max_position = raw.size("max_position_embeddings")?;
        let quantization = raw.quantization()?;
        let packed_tie = quantization.as_ref().is_some_and(|own| own.tie_word_embeddings);
        Ok(Self {
            family,
            architecture: raw.architecture()?.to_owned(),
            model_type: raw.text("model_type")?.unwrap_or_default().to_owned(),
            vocab_size: raw.size("vocab_size")?,
            hidden_size,
            intermediate_size: raw.size("intermediate_size")?,
            n_layers: raw.size("num_hidden_layers")?,
            n_heads,
            n_kv_heads: raw.optional_size("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim,
            rms_norm_eps: raw.number("rms_norm_eps")?.unwrap_or(1e-6),
            activation: raw.activation()?,
            rope: raw.rope(head_dim, max_position)?,
            max_position,
            sliding_window: None,
            tie_word_embeddings: raw.flag("tie_word_embeddings", false)? || packed_tie,
            attention_layout: AttentionLayout::Split,
            mlp_layout: MlpLayout::Split,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            bos_token_id: raw.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: raw.token_ids("eos_token_id")?,
            pad_token_id: raw.token_ids("pad_token_id")?.first().copied(),
            weight_dtype: raw.weight_dtype()?,
            quantization,
        })
    }

    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let origin = format!("`{}`", path.display());
        if self.n_kv_heads == 0 || !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let expected = format!("a divisor of num_attention_heads ({})", self.n_heads);
            return Err(Error::config(
                origin,
                "num_key_value_heads",
                expected,
                self.n_kv_heads.to_string(),
            ));
        }
        if self.head_dim == 0 || !self.rope.rotary_dim.is_multiple_of(2) || self.rope.rotary_dim == 0 {
            let found = format!("{} with {} rotated", self.head_dim, self.rope.rotary_dim);
            return Err(Error::config(origin, "head_dim", "an even, positive size", found));
        }
        Ok(())
    }

    /// Width of all query heads.
    pub fn q_size(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads.
    pub fn kv_size(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// What attention scores are multiplied by.
    pub fn attention_scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Name of the token embedding `[vocab, hidden]`.
    pub fn embedding_name(&self) -> &'static str {
        "model.embed_tokens.weight"
    }

    /// Name of the norm before the head.
    pub fn final_norm_name(&self) -> &'static str {
        "model.norm.weight"
    }

    /// Name of the head `[vocab, hidden]`: the embedding's own where they are tied.
    pub fn lm_head_name(&self) -> &'static str {
        if self.tie_word_embeddings {
            self.embedding_name()
        } else {
            "lm_head.weight"
        }
    }

    /// Names of a layer's norms.
    pub fn layer_names(&self, layer: usize) -> LayerNames {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        LayerNames {
            input_norm: name("input_layernorm"),
            post_attention_norm: name("post_attention_layernorm"),
            q_norm: self.qk_norm.then(|| name("self_attn.q_norm")),
            k_norm: self.qk_norm.then(|| name("self_attn.k_norm")),
        }
    }

    /// A layer's linears, in the order of the forward pass.
    pub fn linears(&self, layer: usize) -> Vec<LinearSpec> {
        let linear = |role, part: &str, in_features, out_features, bias| LinearSpec {
            role,
            name: format!("model.layers.{layer}.{part}"),
            in_features,
            out_features,
            bias,
        };
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.q_size(), self.kv_size());
        let mut linears = match self.attention_layout {
            AttentionLayout::Fused => {
                vec![linear(
                    LinearRole::Qkv,
                    "self_attn.qkv_proj",
                    hidden,
                    q + 2 * kv,
                    self.qkv_bias,
                )]
            }
            AttentionLayout::Split => vec![
                linear(LinearRole::Q, "self_attn.q_proj", hidden, q, self.qkv_bias),
                linear(LinearRole::K, "self_attn.k_proj", hidden, kv, self.qkv_bias),
                linear(LinearRole::V, "self_attn.v_proj", hidden, kv, self.qkv_bias),
            ],
        };
        linears.push(linear(LinearRole::O, "self_attn.o_proj", q, hidden, self.o_bias));
        match self.mlp_layout {
            MlpLayout::Fused => {
                linears.push(linear(
                    LinearRole::GateUp,
                    "mlp.gate_up_proj",
                    hidden,
                    2 * mlp,
                    self.mlp_bias,
                ));
            }
            MlpLayout::Split => {
                linears.push(linear(
                    LinearRole::Gate,
                    "mlp.gate_proj",
                    hidden,
                    mlp,
                    self.mlp_bias,
                ));
                linears.push(linear(LinearRole::Up, "mlp.up_proj", hidden, mlp, self.mlp_bias));
            }
        }
        linears.push(linear(
            LinearRole::Down,
            "mlp.down_proj",
            mlp,
            hidden,
            self.mlp_bias,
        ));
        linears
    }

    /// Every tensor of a dense checkpoint with its shape, in the order of the forward pass.
    pub fn dense_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut tensors = vec![(self.embedding_name().to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.n_layers {
            let names = self.layer_names(layer);
            tensors.push((names.input_norm, vec![hidden]));
            for linear in self.linears(layer) {
                tensors.push((
                    format!("{}.weight", linear.name),
                    vec![linear.out_features, linear.in_features],
                ));
                if linear.bias {
                    tensors.push((format!("{}.bias", linear.name), vec![linear.out_features]));
                }
            }
            for norm in [names.q_norm, names.k_norm].into_iter().flatten() {
                tensors.push((norm, vec![self.head_dim]));
            }
            tensors.push((names.post_attention_norm, vec![hidden]));
        }
        tensors.push((self.final_norm_name().to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            tensors.push((self.lm_head_name().to_owned(), vec![self.vocab_size, hidden]));
        }
        tensors
    }

    /// Whether the linears of the decoder layers are stored packed.
    pub fn is_quantized(&self) -> bool {
        self.quantization.is_some()
    }
}
