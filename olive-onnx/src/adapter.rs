//! LoRA adapters: PEFT folders in, `.onnx_adapter` files in and out.

mod convert;
mod flat;
mod format;
mod peft;

pub use convert::{ConvertOptions, adapter_parameters, convert_adapter, lora_targets};
pub use format::{AdapterFile, read_adapter, write_adapter};
pub use peft::{LoraPair, PeftAdapter};

/// The usual name of an adapter file in a model folder.
pub const ADAPTER_FILE: &str = "adapter_weights.onnx_adapter";
