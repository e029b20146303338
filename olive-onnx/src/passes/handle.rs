//! [`ModelHandle`] of an ONNX folder that a pass has just written: its sizes are those of the model that it was made
//! from, so it needs no `config.json`, and it may be split.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use olive_core::arch::ModelSpec;
use olive_core::model::fingerprint_files;
use olive_core::{Error, Fingerprint, ModelHandle, ModelKind, Result, TensorInfo, TensorSource};

use crate::ir::{Model, Tensor};

/// What a pass gives.
pub struct WrittenModel {
    path: PathBuf,
    spec: ModelSpec,
    constants: Constants,
}

impl WrittenModel {
    /// The folder `path`, which holds `models`.
    pub fn new(path: &Path, spec: ModelSpec, models: &[Model]) -> Self {
        let constants = models.iter().flat_map(|model| &model.graph.initializers);
        let entries = constants.filter_map(|tensor| {
            let dtype = tensor.dtype().to_core()?;
            let info = TensorInfo {
                dtype,
                shape: tensor.shape().to_vec(),
            };
            Some((tensor.name.clone(), (info, tensor.clone())))
        });
        let constants = Constants {
            origin: path.to_path_buf(),
            entries: entries.collect(),
        };
        Self {
            path: path.to_path_buf(),
            spec,
            constants,
        }
    }
}

/// The constants of the graph, by name; those of types that only ONNX has are left out.
struct Constants {
    origin: PathBuf,
    entries: BTreeMap<String, (TensorInfo, Tensor)>,
}

impl TensorSource for Constants {
    fn origin(&self) -> &Path {
        &self.origin
    }

    fn names(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|(info, _)| info)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        match self.entries.get(name) {
            Some((_, tensor)) => tensor.bytes(),
            None => Err(Error::MissingTensors {
                path: self.origin.clone(),
                names: vec![name.to_owned()],
            }),
        }
    }
}

impl ModelHandle for WrittenModel {
    fn kind(&self) -> ModelKind {
        ModelKind::Onnx
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn tensors(&self) -> &dyn TensorSource {
        &self.constants
    }

    fn adapter(&self) -> Option<&Path> {
        None
    }

    /// Every file of the folder, by name.
    fn fingerprint(&self) -> Result<Fingerprint> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(Error::io("read folder", &self.path))? {
            let path = entry.map_err(Error::io("read folder", &self.path))?.path();
            if path.is_file() {
                files.push(path);
            }
        }
        files.sort();
        fingerprint_files(&files)
    }
}
