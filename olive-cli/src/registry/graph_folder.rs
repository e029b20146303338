//! ONNX files without a `config.json`: their sizes are those that `genai_config.json` tells, and unknown otherwise.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use olive_core::arch::{self, ModelSpec};
use olive_core::model::fingerprint_files;
use olive_core::{Error, Fingerprint, ModelHandle, ModelKind, Result, TensorInfo, TensorSource, fsio};
use serde_json::{Value, json};

/// A folder with ONNX files, or a part of one that was split. Passes read the graph from its path.
pub struct GraphFolder {
    folder: PathBuf,
    spec: ModelSpec,
    none: NoTensors,
}

impl GraphFolder {
    /// The folder of an ONNX file, or a folder with some.
    ///
    /// # Errors
    /// Those of reading `genai_config.json`.
    pub fn open(path: &Path) -> Result<Self> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let folder = match path.is_file() {
            true => parent.unwrap_or(Path::new(".")).to_path_buf(),
            false => path.to_path_buf(),
        };
        let config = folder.join("genai_config.json");
        let about: Value = match config.is_file() {
            true => fsio::read_json(&config)?,
            false => Value::Null,
        };
        Ok(Self {
            spec: arch::spec_from(&config, described(&about))?,
            none: NoTensors(folder.clone()),
            folder,
        })
    }
}

/// What a runtime's config tells, in the keys of a Llama's `config.json`.
fn described(about: &Value) -> Value {
    let size = |place: &str, default: u64| {
        about
            .pointer(place)
            .and_then(Value::as_u64)
            .filter(|n| *n > 0)
            .unwrap_or(default)
    };
    let heads = size("/model/decoder/num_attention_heads", 1);
    let head_dim = size("/model/decoder/head_size", 2);
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": about.pointer("/model/type").and_then(Value::as_str).unwrap_or("onnx"),
        "vocab_size": size("/model/vocab_size", 1),
        "hidden_size": size("/model/decoder/hidden_size", heads * head_dim),
        "intermediate_size": 1,
        "num_hidden_layers": size("/model/decoder/num_hidden_layers", 1),
        "num_attention_heads": heads,
        "num_key_value_heads": size("/model/decoder/num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position_embeddings": size("/model/context_length", 1),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
    })
}

impl ModelHandle for GraphFolder {
    fn kind(&self) -> ModelKind {
        ModelKind::Onnx
    }

    fn path(&self) -> &Path {
        &self.folder
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensors(&self) -> &dyn TensorSource {
        &self.none
    }

    fn adapter(&self) -> Option<&Path> {
        None
    }

    fn fingerprint(&self) -> Result<Fingerprint> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(Error::io("list", &self.folder))? {
            let path = entry.map_err(Error::io("list", &self.folder))?.path();
            if path.is_file() {
                files.push(path);
            }
        }
        files.sort();
        fingerprint_files(&files)
    }
}

/// Passes on graphs read constants from the graph.
struct NoTensors(PathBuf);

impl TensorSource for NoTensors {
    fn origin(&self) -> &Path {
        &self.0
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }

    fn info(&self, _name: &str) -> Option<&TensorInfo> {
        None
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        Err(Error::MissingTensors {
            path: self.0.clone(),
            names: vec![name.to_owned()],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_from_the_runtimes_config_where_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let bare = GraphFolder::open(folder.path()).unwrap();
        assert_eq!(bare.spec().n_layers, 1);
        let about = json!({"model": {"type": "phi3", "vocab_size": 32, "context_length": 64, "decoder":
            {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 8, "hidden_size": 32}}});
        std::fs::write(folder.path().join("genai_config.json"), about.to_string()).unwrap();
        let model = GraphFolder::open(folder.path()).unwrap();
        let spec = model.spec();
        assert_eq!(
            (spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.head_dim),
            (3, 4, 2, 8)
        );
        assert!(model.tensors().bytes("x").is_err());
    }
}
