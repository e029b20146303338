//! Quantization to Olive's own checkpoint layout (`quant_method: olive`): round to nearest, k-quant and GPTQ with 4 or
//! 8 bits, symmetric or not, settings by module, head and embedding if asked for.
//!
//! Tensors that stay dense are copied as they are stored, and scales take the type of their weight. Layers are read,
//! rounded and written one at a time; GPTQ holds the hidden states of the calibration besides. An interrupted run
//! starts anew and gives the same bytes.

mod calibrated;
pub mod options;
pub mod pass;
mod run;

pub use options::{Rounding, UniformOptions};
pub use pass::{Gptq, KQuant, OliveRtn, SelectiveMixedPrecision};
pub use run::{UniformLinear, UniformReport, quantize_uniform, quantize_uniform_on};
