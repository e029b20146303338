//! Options by name and value, as `--extra_options` of onnxruntime-genai's builder and Olive's `ModelBuilder` have them.

use olive_core::{Error, Result};
use serde_json::Value;

use super::options::{Algorithm, BuilderOptions, ORIGIN, Provider};

/// Names that [`BuilderOptions::set`] takes, without the prefix `int4_` that older ones have.
const NAMES: &[&str] = &[
    "accuracy_level",
    "algo_config",
    "block_size",
    "config_only",
    "disable_qkv_fusion",
    "enable_cuda_graph",
    "enable_dml_graph",
    "enable_webgpu_graph",
    "exclude_embeds",
    "exclude_lm_head",
    "filename",
    "fuse_mlp_gate_up",
    "fuse_qk_norm_gqa",
    "fuse_qkv",
    "include_hidden_states",
    "is_symmetric",
    "matmul_mixed_precision",
    "nodes_to_exclude",
    "num_hidden_layers",
    "op_types_to_quantize",
    "prune_lm_head",
    "shared_embeddings",
    "use_8bits_moe",
    "use_cuda_bf16",
    "use_qdq",
    "use_webgpu_fp32",
];

/// Names that the real builder knows and this one cannot follow, with the reason.
const REFUSED: &[(&str, &str)] = &[
    ("adapter_path", "give the adapter beside the model"),
    ("use_paged_attention", "paged graphs run on a serving engine only"),
    ("paged_block_size", "paged graphs run on a serving engine only"),
    ("paged_chunk_size", "paged graphs run on a serving engine only"),
    (
        "gpu_utilization_factor",
        "paged graphs run on a serving engine only",
    ),
    ("max_batch_size", "paged graphs run on a serving engine only"),
    (
        "max_scheduled_tokens",
        "paged graphs run on a serving engine only",
    ),
    ("num_blocks", "paged graphs run on a serving engine only"),
    (
        "kv_cache_quant_scheme",
        "the cache is kept in the graph's own type",
    ),
    ("kv_cache_scale_file", "the cache is kept in the graph's own type"),
    ("kv_cache_rotation", "the cache is kept in the graph's own type"),
    (
        "matmulnbits_weights_prepacked",
        "weights are stored in the order that every provider reads",
    ),
    ("aux_hidden_state_layers", "there is no drafter to feed"),
    ("max_draft_tokens", "there is no drafter to feed"),
    (
        "customized_weight_config",
        "use matmul_mixed_precision or nodes_to_exclude",
    ),
];

/// Names without a meaning for the models that are built here: they are heard and warned about.
const IDLE: &[(&str, &str)] = &[
    ("hf_token", "nothing is downloaded"),
    ("hf_remote", "no code of a checkpoint is run"),
    ("enable_dml_graph", "the runtime decides"),
    ("use_8bits_moe", "the model has no experts"),
    ("moe_quant_type", "the model has no experts"),
    ("qmoe_block_size", "the model has no experts"),
    ("qmoe_weights_prepacked", "the model has no experts"),
    ("enable_cuda_fpa_intb_gemm", "the runtime decides"),
    ("use_device_allocator_for_initializers", "the runtime decides"),
    ("windowed_kv_cache", "attention windows are on the nodes"),
    ("exclude_mtp", "the model has no such head"),
    (
        "include_prompt_templates",
        "the chat template goes along with the tokenizer",
    ),
];

impl BuilderOptions {
    /// Sets the option `key`: a number, truth value or text, or the text of one (`"1"`, `"true"`, `"0"`, `"False"`).
    /// Names may have the prefix `int4_` or `int8_` of older releases.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] for an unknown name; [`Error::Config`] for a value that does not fit; [`Error::Unsupported`]
    /// for an option that only the real builder has.
    pub fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        let name = key.trim_start_matches("int4_").trim_start_matches("int8_");
        if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            if is_off(value) {
                return Ok(());
            }
            return Err(Error::unsupported(
                format!("the builder option `{key}` = {value}"),
                *why,
            ));
        }
        if let Some((_, why)) = IDLE.iter().find(|(idle, _)| *idle == name) {
            if !is_off(value) {
                tracing::warn!("the builder option `{key}` has no effect: {why}");
            }
            return Ok(());
        }
        if value.is_null() {
            return Ok(());
        }
        let given = Given { key, value };
        match name {
            "accuracy_level" => self.accuracy_level = Some(given.whole()?),
            "block_size" => self.block_size = given.size()?,
            "is_symmetric" => self.is_symmetric = given.flag()?,
            "algo_config" => self.set_algorithm(&given)?,
            "matmul_mixed_precision" => self.set_mixed_precision(&given)?,
            "op_types_to_quantize" => self.set_op_types(&given)?,
            "nodes_to_exclude" => self.nodes_to_exclude = given.list(',')?.into_iter().collect(),
            "use_qdq" => self.use_qdq = given.flag()?,
            "exclude_embeds" => self.exclude_embeds = given.flag()?,
            "exclude_lm_head" => self.exclude_lm_head = given.flag()?,
            "include_hidden_states" => self.include_hidden_states = given.flag()?,
            "prune_lm_head" => self.prune_lm_head = given.flag()?,
            "shared_embeddings" => self.shared_embeddings = Some(given.flag()?),
            "fuse_qkv" => self.fuse_qkv = given.flag()?,
            "disable_qkv_fusion" => self.fuse_qkv = !given.flag()?,
            "fuse_mlp_gate_up" => self.fuse_gate_up = given.flag()?,
            "fuse_qk_norm_gqa" => self.fuse_qk_norm = given.flag()?,
            "use_cuda_bf16" => self.use_cuda_bf16 = given.flag()?,
            "use_webgpu_fp32" => self.use_webgpu_fp32 = given.flag()?,
            "enable_cuda_graph" => self.enable_cuda_graph = given.flag()?,
            "enable_webgpu_graph" => self.enable_webgpu_graph = given.flag()?,
            "num_hidden_layers" => self.n_layers = Some(given.size()?),
            "filename" => self.filename = given.text()?.to_owned(),
            "config_only" => self.config_only = given.flag()?,
            _ => return Err(Error::unknown_key(ORIGIN, key, NAMES.iter().copied())),
        }
        Ok(())
    }

    /// Sets the provider by name.
    ///
    /// # Errors
    /// [`Error::Config`] naming the known ones.
    pub fn set_provider(&mut self, name: &str) -> Result<()> {
        self.provider = Provider::from_name(name).ok_or_else(|| {
            let expected = "one of cpu, cuda, dml, webgpu";
            Error::config(ORIGIN, "execution_provider", expected, format!("`{name}`"))
        })?;
        Ok(())
    }

    /// `default`, `rtn`, `k_quant`, and names of older releases for one of them with bits for some linears.
    fn set_algorithm(&mut self, given: &Given<'_>) -> Result<()> {
        let (algorithm, last, layers) = match given.text()?.to_ascii_lowercase().as_str() {
            "default" => (Algorithm::Default, None, None),
            "rtn" => (Algorithm::Rtn, None, None),
            "rtn_last" => (Algorithm::Rtn, Some(8), None),
            "k_quant" => (Algorithm::KQuant, None, None),
            "k_quant_last" => (Algorithm::KQuant, Some(8), None),
            "k_quant_mixed" => (Algorithm::KQuant, Some(8), Some(8)),
            // Only layers of linear attention differ, which no model here has.
            "k_quant_linear" => (Algorithm::KQuant, Some(8), None),
            _ => {
                return Err(given.wrong(
                    "default, rtn, rtn_last, k_quant, k_quant_last, k_quant_mixed or k_quant_linear",
                ));
            }
        };
        self.algorithm = algorithm;
        self.last_matmul_bits = last.or(self.last_matmul_bits);
        self.mixed_layer_bits = layers.or(self.mixed_layer_bits);
        Ok(())
    }

    /// `last_matmul:int8,mixed_layers:int8`.
    fn set_mixed_precision(&mut self, given: &Given<'_>) -> Result<()> {
        for pair in given.list(',')? {
            let (selector, kind) = pair
                .split_once(':')
                .ok_or_else(|| given.wrong("pairs like last_matmul:int8"))?;
            let bits = match kind.trim() {
                "int4" => 4,
                "int8" => 8,
                _ => return Err(given.wrong("int4 or int8 behind the selector")),
            };
            match selector.trim() {
                "last_matmul" => self.last_matmul_bits = Some(bits),
                "mixed_layers" => self.mixed_layer_bits = Some(bits),
                "linear_attn" => {}
                _ => return Err(given.wrong("the selectors last_matmul, mixed_layers and linear_attn")),
            }
        }
        Ok(())
    }

    fn set_op_types(&mut self, given: &Given<'_>) -> Result<()> {
        let kinds = given.list('/')?;
        if let Some(other) = kinds
            .iter()
            .find(|kind| !matches!(kind.as_str(), "MatMul" | "Gather"))
        {
            return Err(given.wrong(&format!("MatMul and Gather, not `{other}`")));
        }
        self.quantize_linears = kinds.iter().any(|kind| kind == "MatMul");
        self.quantize_embedding = kinds.iter().any(|kind| kind == "Gather");
        Ok(())
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => {
            text.is_empty() || ["false", "0", "none"].contains(&text.to_ascii_lowercase().as_str())
        }
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    }
}

/// A value under its name.
struct Given<'a> {
    key: &'a str,
    value: &'a Value,
}

impl Given<'_> {
    fn wrong(&self, expected: &str) -> Error {
        Error::config(ORIGIN, self.key, expected, self.value.to_string())
    }

    fn flag(&self) -> Result<bool> {
        let text = match self.value {
            Value::Bool(flag) => return Ok(*flag),
            Value::String(text) => text.to_ascii_lowercase(),
            other => other.to_string(),
        };
        match text.as_str() {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(self.wrong("true or false")),
        }
    }

    fn whole(&self) -> Result<i64> {
        let number = match self.value {
            Value::String(text) => text.trim().parse().ok(),
            other => other.as_i64(),
        };
        number.ok_or_else(|| self.wrong("a whole number"))
    }

    fn size(&self) -> Result<usize> {
        usize::try_from(self.whole()?).map_err(|_| self.wrong("a positive number"))
    }

    fn text(&self) -> Result<&str> {
        self.value.as_str().ok_or_else(|| self.wrong("a text"))
    }

    /// A list, or a text of parts between `separator`s.
    fn list(&self, separator: char) -> Result<Vec<String>> {
        let parts: Option<Vec<String>> = match self.value {
            Value::Array(list) => list.iter().map(|part| part.as_str().map(str::to_owned)).collect(),
            Value::String(text) => {
                let parts = text.split(separator).map(str::trim);
                Some(parts.filter(|part| !part.is_empty()).map(str::to_owned).collect())
            }
            _ => None,
        };
        parts.ok_or_else(|| self.wrong("a list of texts"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(key: &str, value: Value) -> Result<BuilderOptions> {
        let mut options = BuilderOptions::default();
        options.set(key, &value).map(|()| options)
    }

    #[test]
    fn every_name_is_known_with_and_without_its_prefix() {
        for name in NAMES {
            let value = match *name {
                "accuracy_level" => json!("1"),
                "block_size" | "num_hidden_layers" => json!(2),
                "algo_config" => json!("k_quant"),
                "matmul_mixed_precision" => json!("last_matmul:int8"),
                "op_types_to_quantize" => json!("MatMul/Gather"),
                "nodes_to_exclude" => json!("a,b"),
                "filename" => json!("m.onnx"),
                _ => json!("1"),
            };
            let plain = set(name, value.clone()).unwrap();
            assert_eq!(set(&format!("int4_{name}"), value).unwrap(), plain);
        }
    }

    #[test]
    fn names_of_older_releases_mean_an_algorithm_and_bits() {
        for (name, algorithm, last, layers) in [
            ("default", Algorithm::Default, None, None),
            ("rtn", Algorithm::Rtn, None, None),
            ("rtn_last", Algorithm::Rtn, Some(8), None),
            ("k_quant", Algorithm::KQuant, None, None),
            ("k_quant_last", Algorithm::KQuant, Some(8), None),
            ("k_quant_mixed", Algorithm::KQuant, Some(8), Some(8)),
        ] {
            let options = set("int4_algo_config", json!(name)).unwrap();
            assert_eq!(options.algorithm, algorithm);
            assert_eq!(
                (options.last_matmul_bits, options.mixed_layer_bits),
                (last, layers)
            );
        }
        let options = set(
            "matmul_mixed_precision",
            json!("mixed_layers:int8, last_matmul:int4"),
        )
        .unwrap();
        assert_eq!(
            (options.last_matmul_bits, options.mixed_layer_bits),
            (Some(4), Some(8))
        );
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name_and_what_is_idle_is_heard() {
        for (key, value) in [
            ("use_paged_attention", json!("true")),
            ("kv_cache_quant_scheme", json!("int8_per_tensor")),
            ("int4_algo_config", json!("awq")),
            ("int4_op_types_to_quantize", json!(["Gemm"])),
            ("int4_block_size", json!("big")),
            ("use_qdq", json!("maybe")),
            ("fuse_qvk", json!(true)),
        ] {
            let error = set(key, value).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
        for (key, value) in [
            ("use_paged_attention", json!("false")),
            ("hf_token", json!(true)),
            ("use_8bits_moe", json!(true)),
            ("kv_cache_quant_scheme", json!("none")),
        ] {
            assert_eq!(set(key, value).unwrap(), BuilderOptions::default());
        }
    }
}
