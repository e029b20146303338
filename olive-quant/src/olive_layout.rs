//! Quantization to Olive's own checkpoint layout (`quant_method: olive`): round to nearest, k-quant and GPTQ with 4 or
//! 8 bits, symmetric or not, settings by module, head and embedding if asked for.
//!
//! Tensors that stay dense are copied as they are stored, and scales take the type of their weight. A model that is in
//! this layout already may be gone over again: its packed modules stay, the others are rounded. Layers are read,
//! rounded and written in place one after the other; GPTQ holds the hidden states of the calibration besides. An interrupted run goes
//! on from its finished layers and gives the same bytes.

pub(crate) mod calibrated;
mod draft;
pub mod layout;
pub mod options;
pub mod passes;
mod plain;
pub(crate) mod run;

pub use layout::{Layout, Target};
pub use options::{Rounding, UniformOptions};
pub use passes::{Gptq, KQuant, Rtn, SelectiveMixedPrecision};
pub use run::{UniformLinear, UniformReport, quantize_uniform, quantize_uniform_on};
