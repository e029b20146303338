//! The work folder of an unfinished run, inside the output folder: every finished layer, so that the next run goes on
//! from there.
//!
//! ```text
//! <output>/.olive-quantize/manifest.json                what the run was asked to do
//! <output>/.olive-quantize/layer-017/model.safetensors  its tensors as they will be stored
//! <output>/.olive-quantize/layer-017/report.json        written last: the layer is finished
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use olive_core::{
    Checkpoint, CheckpointPlan, CheckpointWriter, Error, ModelHandle, Result, TensorSource, fsio,
};
use serde::{Deserialize, Serialize};

use crate::calibration::CalibrationSet;
use crate::encode::Encoded;
use crate::options::{Algorithm, QuantizeOptions};
use crate::report::LayerReport;

/// The folder's name.
pub const WORK_FOLDER: &str = ".olive-quantize";
const MANIFEST: &str = "manifest.json";
const REPORT: &str = "report.json";
/// Raised whenever the same input would give other bytes.
const VERSION: u32 = 1;

/// What a run was asked to do; another request starts anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    model: String,
    request: String,
}

impl Manifest {
    /// Hashes model, calibration and options.
    ///
    /// # Errors
    /// [`Error::Io`] if the model cannot be read.
    pub fn new(
        model: &dyn ModelHandle,
        calibration: &CalibrationSet,
        options: &QuantizeOptions,
    ) -> Result<Self> {
        let calibrates = options.algorithm == Algorithm::Awq;
        Self::of(model, options, calibrates.then_some(calibration))
    }

    /// As [`Manifest::new`], for any options.
    ///
    /// # Errors
    /// [`Error::Io`] if the model cannot be read.
    pub fn of(
        model: &dyn ModelHandle,
        options: &impl Serialize,
        calibration: Option<&CalibrationSet>,
    ) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        let options_json = serde_json::to_vec(options).map_err(Error::json("options"))?;
        hasher.update(&options_json);
        for sequence in calibration.iter().flat_map(|own| &own.sequences) {
            hasher.update(&(sequence.len() as u64).to_le_bytes());
            hasher.update(bytemuck::cast_slice(sequence));
        }
        Ok(Self {
            version: VERSION,
            model: model.fingerprint()?.0,
            request: hasher.finalize().to_hex().to_string(),
        })
    }
}

/// An open work folder.
pub struct WorkFolder {
    root: PathBuf,
    created_output: bool,
    output: PathBuf,
}

impl WorkFolder {
    /// Opens the work folder of `output`, creating both; what another request left there is removed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(output: &Path, manifest: &Manifest) -> Result<Self> {
        let folder = Self::at(output);
        let path = folder.root.join(MANIFEST);
        let same = fsio::read_json::<Manifest>(&path).is_ok_and(|found| found == *manifest);
        if !same {
            if path.exists() {
                tracing::warn!(
                    "the unfinished work in `{}` is of another run; starting anew",
                    output.display()
                );
            }
            folder.clear()?;
            folder.describe(manifest)?;
        }
        Ok(folder)
    }

    /// An empty work folder of `output` that does not say yet what the run was asked to do.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn begin(output: &Path) -> Result<Self> {
        let folder = Self::at(output);
        folder.clear()?;
        fsio::create_dir(&folder.root)?;
        Ok(folder)
    }

    /// Writes down what the run was asked to do.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn describe(&self, manifest: &Manifest) -> Result<()> {
        fsio::write_json(self.path(MANIFEST), manifest, 2)
    }

    fn at(output: &Path) -> Self {
        Self {
            created_output: !output.exists(),
            output: output.to_path_buf(),
            root: output.join(WORK_FOLDER),
        }
    }

    /// Whether `output` has a work folder.
    pub fn exists(output: &Path) -> bool {
        output.join(WORK_FOLDER).is_dir()
    }

    /// A path inside the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The report of a layer if it is finished and holds what `plan` says.
    pub fn finished(&self, index: usize, plan: &CheckpointPlan) -> Option<LayerReport> {
        let folder = self.path(&layer_name(index));
        let report: LayerReport = fsio::read_json(folder.join(REPORT)).ok()?;
        let checkpoint = Checkpoint::open(&folder).ok()?;
        let complete = plan
            .tensors
            .iter()
            .all(|(name, info)| checkpoint.info(name) == Some(info));
        (complete && report.layer == index).then_some(report)
    }

    /// Stores a finished layer.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] or [`Error::MissingTensors`] if `tensors` are not those of `plan`.
    pub fn store(&self, plan: &CheckpointPlan, tensors: &[Encoded], report: &LayerReport) -> Result<()> {
        let folder = self.path(&layer_name(report.layer));
        remove_dir(&folder)?;
        let mut writer = CheckpointWriter::create(&folder, plan)?;
        for (name, bytes) in tensors {
            writer.write(name, bytes)?;
        }
        writer.finish()?;
        fsio::write_json(folder.join(REPORT), report, 2)
    }

    /// The tensors of a finished layer.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub fn layer(&self, index: usize) -> Result<Checkpoint> {
        Checkpoint::open(self.path(&layer_name(index)))
    }

    /// Removes the folder and all that is in it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn clear(&self) -> Result<()> {
        remove_dir(&self.root)
    }

    /// Removes what a failed run left, the output folder too if this run created it.
    pub fn abandon(&self) {
        if let Err(error) = self.clear() {
            tracing::warn!("{error}");
        }
        if self.created_output {
            // Only succeeds if nothing else is in it.
            let _ = fs::remove_dir(&self.output);
        }
    }
}

/// The part that layer `index` is.
pub fn layer_name(index: usize) -> String {
    format!("layer-{index:03}")
}

/// Removes a folder if it is there.
///
/// # Errors
/// [`Error::Io`].
pub fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
