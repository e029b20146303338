//! Weight quantization of Hugging Face checkpoints, streamed a layer at a time, resumable: activation-aware (AWQ) to 4
//! bits in AutoAWQ's `gemm` layout; round to nearest, k-quant and GPTQ to 4 or 8 bits in Olive's layout
//! ([`olive_layout`]).
//!
//! ```no_run
//! use olive_core::{CancelToken, HfModel, NoProgress};
//! use olive_quant::{CalibrationSet, QuantizeOptions, quantize};
//!
//! let model = HfModel::open("models/tiny-phi3")?;
//! let calibration = CalibrationSet::new(vec![vec![1, 2, 3, 4]]);
//! let options = QuantizeOptions::default();
//! let output = std::path::Path::new("models/awq");
//! let report = quantize(&model, &calibration, &options, output, &NoProgress, &CancelToken::default())?;
//! println!("loss {} of {}", report.totals.loss, report.totals.loss_rtn);
//! # Ok::<(), olive_core::Error>(())
//! ```

pub mod calibrate;
pub mod calibration;
#[cfg(feature = "cuda")]
mod cuda;
pub mod encode;
pub mod layer;
pub mod olive_layout;
pub mod options;
pub mod output;
pub mod pass;
pub mod preflight;
pub mod quantizer;
pub mod report;
mod run;
pub mod work;

pub use calibration::CalibrationSet;
#[cfg(feature = "cuda")]
pub use cuda::{quantize_on_gpu, quantize_uniform_on_gpu};
pub use olive_layout::{
    Gptq, KQuant, Rounding, Rtn, SelectiveMixedPrecision, UniformOptions, UniformReport, quantize_uniform,
};
pub use options::{Algorithm, QuantizeOptions, Search};
pub use pass::{AutoAwqQuantizer, CalibrationProvider, register_passes};
pub use preflight::{Preflight, preflight};
pub use report::{LayerReport, LinearReport, MappingReport, QuantizeReport, Totals};
pub use run::{quantize, quantize_on};

#[cfg(test)]
mod tests;
