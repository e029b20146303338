//! The vocabulary that olive's crates share: dtypes, packed weights, lazy checkpoints, [`ModelSpec`], the
//! [`ModelHandle`] that every stage takes and gives, the pass contract, data configs and tokenised batches.
//!
//! ```no_run
//! use olive_core::{HfModel, ModelHandle};
//!
//! let model = HfModel::open("models/tiny-phi3")?;
//! println!("{} layers of {}", model.spec().n_layers, model.spec().hidden_size);
//! let weight = model.tensors().read_f32("model.norm.weight")?;
//! assert_eq!(weight.len(), model.spec().hidden_size);
//! # Ok::<(), olive_core::Error>(())
//! ```

pub mod arch;
pub mod checkpoint;
pub mod cost_model;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
#[cfg(feature = "burn")]
pub mod decoder;
pub mod dtype;
pub mod error;
pub mod fsio;
pub mod hub;
pub mod kernels;
pub mod model;
pub mod packed;
pub mod pass;
pub mod progress;
pub mod rng;
pub mod text;
pub mod weight;
pub mod workflow;

pub use arch::{Family, LayerNames, LinearRole, LinearSpec, ModelSpec, RopeScaling, RopeSpec};
pub use checkpoint::{Checkpoint, CheckpointPlan, CheckpointWriter, TensorInfo, TensorSource};
pub use data::Sample;
pub use dtype::DType;
pub use error::{Error, Result};
pub use model::{Fingerprint, HfModel, ModelConfigFile, ModelHandle, ModelKind};
pub use packed::QuantMatrix;
pub use pass::{ParamKind, ParamSpec, Pass, PassConfig, PassContext};
pub use progress::{CancelToken, LogProgress, NoProgress, Progress};
pub use weight::{LinearWeight, WeightKind};
