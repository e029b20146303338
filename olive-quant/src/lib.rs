//! Weight quantization of Hugging Face checkpoints to 4 bits: activation-aware (AWQ) and round to nearest, streamed a
//! layer at a time, resumable, written as an AutoAWQ `gemm` checkpoint.
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
pub mod encode;
pub mod kernels;
pub mod layer;
pub mod options;
pub mod output;
pub mod pass;
pub mod preflight;
pub mod quantizer;
pub mod report;
mod run;
pub mod work;

pub use calibration::CalibrationSet;
pub use options::{Algorithm, QuantizeOptions, Search};
pub use pass::{AutoAwqQuantizer, CalibrationProvider, Rtn};
pub use preflight::{Preflight, preflight};
pub use report::{LayerReport, LinearReport, MappingReport, QuantizeReport, Totals};
pub use run::{quantize, quantize_on};

#[cfg(test)]
mod tests;
