//! A LoRA adapter as PEFT stores it: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! ```text
//! base_model.model.<module>.lora_A.weight  [r, in]
//! base_model.model.<module>.lora_B.weight  [out, r]
//! scale = alpha / r, or alpha / sqrt(r) with use_rslora; alpha and r by module where the patterns say so
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use olive_core::{Checkpoint, Error, Result, TensorSource, fsio};
use regex::Regex;
use serde_json::{Map, Value};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Keys that change nothing about the stored weights' meaning: training, loading and bookkeeping.
const IGNORED: &[&str] = &[
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "kasa_config",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
];

/// Ways to begin that change the base, so that the adapter alone is not what was trained.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// The two matrices of one adapted linear.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// The linear as the checkpoint names it: `model.layers.0.self_attn.qkv_proj`.
    pub module: String,
    /// Rank.
    pub rank: usize,
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// What `B·A` is multiplied by.
    pub scale: f64,
}

/// An opened adapter; its weights are read when asked for.
#[derive(Clone)]
pub struct PeftAdapter {
    folder: PathBuf,
    weights: Arc<Checkpoint>,
    pairs: Vec<LoraPair>,
    base: Option<String>,
}

impl PeftAdapter {
    /// Opens a PEFT folder.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`] or [`Error::File`] for the files; [`Error::Unsupported`] for an adapter that is
    /// not plain LoRA, naming the key; [`Error::Tensor`] or [`Error::MissingTensors`] for its tensors.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config = Config::read(&folder.join(CONFIG_FILE))?;
        let weights = Checkpoint::open_files(folder, vec![folder.join(WEIGHTS_FILE)])?;
        let pairs = read_pairs(folder, &weights, &config)?;
        Ok(Self {
            folder: folder.to_path_buf(),
            weights: Arc::new(weights),
            pairs,
            base: config.base,
        })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The adapted linears, sorted by name.
    pub fn pairs(&self) -> &[LoraPair] {
        &self.pairs
    }

    /// `base_model_name_or_path`.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// The highest rank of all modules.
    pub fn rank(&self) -> usize {
        self.pairs.iter().map(|pair| pair.rank).max().unwrap_or(0)
    }

    /// A of a linear, `[rank, in]`.
    ///
    /// # Errors
    /// [`Error::NotFinite`], or as [`Checkpoint`] reads.
    pub fn read_a(&self, pair: &LoraPair) -> Result<Vec<f32>> {
        self.read(&pair.module, "lora_A", [pair.rank, pair.in_features])
    }

    /// B of a linear, `[out, rank]`, not scaled.
    ///
    /// # Errors
    /// [`Error::NotFinite`], or as [`Checkpoint`] reads.
    pub fn read_b(&self, pair: &LoraPair) -> Result<Vec<f32>> {
        self.read(&pair.module, "lora_B", [pair.out_features, pair.rank])
    }

    fn read(&self, module: &str, part: &str, shape: [usize; 2]) -> Result<Vec<f32>> {
        let source: &dyn TensorSource = self.weights.as_ref();
        source.read_f32_checked(&format!("{PREFIX}{module}.{part}.weight"), &shape)
    }
}

/// What `adapter_config.json` says that matters here.
struct Config {
    path: PathBuf,
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
    base: Option<String>,
}

impl Config {
    fn read(path: &Path) -> Result<Self> {
        let fields: Map<String, Value> = fsio::read_json(path)?;
        let origin = format!("`{}`", path.display());
        let wrong = |key: &str, expected: &str| {
            let found = fields
                .get(key)
                .map_or_else(|| "nothing".to_owned(), Value::to_string);
            Error::config(&origin, key, expected, found)
        };
        refuse_other_kinds(&origin, &fields)?;
        let rank = fields
            .get("r")
            .map_or(Some(8), Value::as_u64)
            .and_then(|n| usize::try_from(n).ok());
        let rank = rank
            .filter(|rank| *rank > 0)
            .ok_or_else(|| wrong("r", "a positive integer"))?;
        let alpha = fields.get("lora_alpha").map_or(Some(8.0), Value::as_f64);
        let alpha = alpha.ok_or_else(|| wrong("lora_alpha", "a number"))?;
        let ranks = patterns(&origin, &fields, "rank_pattern")?
            .into_iter()
            .map(|(regex, value)| {
                let rank = value
                    .as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| *n > 0);
                rank.map(|rank| (regex, rank))
                    .ok_or_else(|| wrong("rank_pattern", "positive integers"))
            });
        let ranks = ranks.collect::<Result<_>>()?;
        let alphas = patterns(&origin, &fields, "alpha_pattern")?
            .into_iter()
            .map(|(regex, value)| {
                let alpha = value.as_f64();
                alpha
                    .map(|alpha| (regex, alpha))
                    .ok_or_else(|| wrong("alpha_pattern", "numbers"))
            });
        let alphas = alphas.collect::<Result<_>>()?;
        Ok(Self {
            path: path.to_path_buf(),
            rank,
            alpha,
            use_rslora: fields.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            ranks,
            alphas,
            base: fields
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(str::to_owned),
        })
    }

    fn rank_of(&self, module: &str) -> usize {
        let found = self.ranks.iter().find(|(regex, _)| regex.is_match(module));
        found.map_or(self.rank, |(_, rank)| *rank)
    }

    fn scale_of(&self, module: &str, rank: usize) -> f64 {
        let found = self.alphas.iter().find(|(regex, _)| regex.is_match(module));
        let alpha = found.map_or(self.alpha, |(_, alpha)| *alpha);
        match self.use_rslora {
            true => alpha / (rank as f64).sqrt(),
            false => alpha / rank as f64,
        }
    }
}

/// Refuses, by key, everything that is not plain LoRA on linears.
fn refuse_other_kinds(origin: &str, fields: &Map<String, Value>) -> Result<()> {
    let refuse = |key: &str, value: &Value, reason: &str| {
        Err(Error::unsupported(
            format!("`{key}` = {value} in {origin}"),
            reason,
        ))
    };
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    for (key, value) in fields {
        match key.as_str() {
            "peft_type" if value.as_str() != Some("LORA") => {
                return refuse(key, value, "adapters have to be of type `LORA`");
            }
            "bias" if value.as_str().is_some_and(|bias| bias != "none") => {
                return refuse(key, value, "an adapter file holds no biases");
            }
            "init_lora_weights"
                if value
                    .as_str()
                    .is_some_and(|way| CHANGES_BASE.iter().any(|known| way.starts_with(known))) =>
            {
                let reason = "it belongs to a changed base; have PEFT convert it to a plain adapter first";
                return refuse(key, value, reason);
            }
            "peft_type" | "bias" | "r" | "lora_alpha" | "use_rslora" | "rank_pattern" | "alpha_pattern" => {}
            known if IGNORED.contains(&known) => {}
            "use_dora" if !off(value) => {
                let reason = "DoRA has no form with optional inputs; MergeAdapterWeights merges it";
                return refuse(key, value, reason);
            }
            _ if !off(value) => return refuse(key, value, "olive reads plain LoRA adapters"),
            _ => {}
        }
    }
    match fields.contains_key("peft_type") {
        true => Ok(()),
        false => Err(Error::config(origin, "peft_type", "`LORA`", "nothing")),
    }
}

/// The entries of a pattern table. A key matches a module if it matches the end of its path, from a dot on.
fn patterns<'a>(origin: &str, fields: &'a Map<String, Value>, key: &str) -> Result<Vec<(Regex, &'a Value)>> {
    let Some(table) = fields.get(key).filter(|value| !value.is_null()) else {
        return Ok(Vec::new());
    };
    let table = table
        .as_object()
        .ok_or_else(|| Error::config(origin, key, "a table of module patterns", table.to_string()))?;
    let compile = |pattern: &String| {
        Regex::new(&format!(r"^(.*\.)?({pattern})$"))
            .map_err(|e| Error::config(origin, key, "regular expressions", format!("`{pattern}`: {e}")))
    };
    table
        .iter()
        .map(|(pattern, value)| Ok((compile(pattern)?, value)))
        .collect()
}

fn read_pairs(folder: &Path, weights: &Checkpoint, config: &Config) -> Result<Vec<LoraPair>> {
    let mut modules: BTreeMap<&str, [bool; 2]> = BTreeMap::new();
    let mut other = Vec::new();
    for name in weights.names() {
        let inner = name.strip_prefix(PREFIX).unwrap_or_default();
        if let Some(module) = inner.strip_suffix(".lora_A.weight") {
            modules.entry(module).or_default()[0] = true;
        } else if let Some(module) = inner.strip_suffix(".lora_B.weight") {
            modules.entry(module).or_default()[1] = true;
        } else {
            other.push(name.to_owned());
        }
    }
    if !other.is_empty() {
        return Err(Error::UnknownTensors {
            path: folder.join(WEIGHTS_FILE),
            names: other,
        });
    }
    if modules.is_empty() {
        return Err(Error::file(
            folder.join(WEIGHTS_FILE),
            "at least one adapted linear",
            "none",
        ));
    }
    let halves: Vec<String> = modules
        .iter()
        .filter(|(_, parts)| **parts != [true, true])
        .map(|(module, parts)| {
            format!(
                "{PREFIX}{module}.lora_{}.weight",
                if parts[0] { 'B' } else { 'A' }
            )
        })
        .collect();
    if !halves.is_empty() {
        return Err(Error::MissingTensors {
            path: folder.join(WEIGHTS_FILE),
            names: halves,
        });
    }
    modules
        .into_keys()
        .map(|module| read_pair(weights, config, module))
        .collect()
}

fn read_pair(weights: &Checkpoint, config: &Config, module: &str) -> Result<LoraPair> {
    let source: &dyn TensorSource = weights;
    let shape = |part: &str| -> Result<[usize; 2]> {
        let name = format!("{PREFIX}{module}.{part}.weight");
        let info = source.require(&name)?;
        match (info.shape.as_slice(), info.dtype.is_float()) {
            ([rows, cols], true) => Ok([*rows, *cols]),
            _ => Err(Error::tensor(name, "a float matrix", info.to_string())),
        }
    };
    let ([rank, in_features], [out_features, b_rank]) = (shape("lora_A")?, shape("lora_B")?);
    let wanted = config.rank_of(module);
    if rank != wanted || b_rank != wanted {
        let expected = format!("rank {wanted} as `{}` says", config.path.display());
        return Err(Error::tensor(
            module,
            expected,
            format!("{rank} in A, {b_rank} in B"),
        ));
    }
    Ok(LoraPair {
        module: module.to_owned(),
        rank,
        in_features,
        out_features,
        scale: config.scale_of(module, rank),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use olive_core::checkpoint::write_file;
    use olive_core::{DType, TensorInfo};
    use serde_json::json;

    fn folder(config: &Value, tensors: &[(&str, [usize; 2])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG_FILE), config.to_string()).unwrap();
        let tensors: Vec<_> = tensors
            .iter()
            .map(|(name, shape)| {
                let info = TensorInfo {
                    dtype: DType::F32,
                    shape: shape.to_vec(),
                };
                let bytes = vec![0; info.byte_len()];
                (format!("{PREFIX}{name}.weight"), info, bytes)
            })
            .collect();
        write_file(folder.path().join(WEIGHTS_FILE), &tensors).unwrap();
        folder
    }

    const PAIR: &[(&str, [usize; 2])] = &[("m.q_proj.lora_A", [4, 8]), ("m.q_proj.lora_B", [6, 4])];

    #[test]
    fn patterns_and_rank_stabilisation_change_the_scale() {
        let scale = |config: Value| {
            let folder = folder(&config, PAIR);
            PeftAdapter::open(folder.path()).unwrap().pairs()[0].scale
        };
        assert_eq!(scale(json!({"peft_type": "LORA", "r": 4, "lora_alpha": 16})), 4.0);
        assert_eq!(
            scale(json!({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": true})),
            8.0
        );
        let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 16,
            "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 1, "m.q_proj": 2}});
        assert_eq!(scale(config), 0.5);
    }

    #[test]
    fn what_is_not_plain_lora_is_refused_by_name() {
        let refuse = |key: &str, value: Value| {
            let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 16});
            config[key] = value;
            let folder = folder(&config, PAIR);
            let error = PeftAdapter::open(folder.path()).err().unwrap().to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        };
        refuse("peft_type", json!("LOHA"));
        refuse("use_dora", json!(true));
        refuse("bias", json!("all"));
        refuse("modules_to_save", json!(["lm_head"]));
        refuse("lora_bias", json!(true));
        refuse("init_lora_weights", json!("pissa_niter_4"));
        refuse("trainable_token_indices", json!([1, 2]));
        refuse("something_new", json!(3));
        refuse("r", json!(0));
    }

    #[test]
    fn halves_ranks_and_other_tensors_are_refused() {
        let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 16});
        let refuse = |tensors: &[(&str, [usize; 2])]| {
            let folder = folder(&config, tensors);
            PeftAdapter::open(folder.path()).err().unwrap().to_string()
        };
        assert!(refuse(&PAIR[..1]).contains("m.q_proj.lora_B.weight"));
        assert!(
            refuse(&[PAIR[0], PAIR[1], ("m.q_proj.lora_magnitude_vector", [1, 6])]).contains("magnitude")
        );
        assert!(
            refuse(&[("m.q_proj.lora_A", [3, 8]), ("m.q_proj.lora_B", [6, 3])]).contains("expected rank 4")
        );
        assert!(refuse(&[]).contains("at least one"));
    }
}
