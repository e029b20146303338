//! LoRA fine-tuning of frozen models, dense or packed, with PEFT's files and the semantics of Hugging Face's Trainer.
//!
//! ```no_run
//! use olive_core::decoder::Cpu;
//! use olive_core::{CancelToken, HfModel, NoProgress, PassContext, Sample};
//! use olive_lora::{LoraOptions, TrainingArguments, TrainingData, finetune};
//!
//! let model = HfModel::open("models/tiny-phi3")?;
//! let train = vec![Sample::from_ids((5..69).collect())];
//! let (arguments, warnings) = TrainingArguments::from_pairs([("max_steps", 10.into())])?;
//! let context = PassContext {
//!     output: "out".as_ref(),
//!     progress: &NoProgress,
//!     cancel: &CancelToken::default(),
//! };
//! let data = TrainingData { train: &train, eval: None };
//! let report = finetune::<Cpu>(&model, data, &LoraOptions::default(), &arguments, &context)?;
//! println!("loss {:?}, {warnings:?}", report.final_loss);
//! # Ok::<(), olive_core::Error>(())
//! ```

pub mod adamw;
mod adapter;
mod arguments;
mod baked;
mod checkpoint;
#[cfg(feature = "cuda")]
mod cuda;
mod evaluate;
mod finetune;
pub mod loss_svg;
mod matching;
mod merge;
mod network;
mod options;
pub mod order;
mod output;
mod passes;
pub mod peft_config;
mod qlora;
pub mod schedule;
pub mod train_log;
mod trainer;

pub use adapter::{Adapter, AdapterModule, WEIGHTS_FILE};
pub use arguments::{Interval, Resume, TrainingArguments};
pub use baked::{BakedAdapter, extract_baked};
pub use evaluate::evaluate_perplexity;
#[cfg(feature = "cuda")]
pub use evaluate::evaluate_perplexity_on_gpu;
#[cfg(feature = "cuda")]
pub use finetune::finetune_on_gpu;
pub use finetune::{TrainReport, finetune, is_adapter};
pub use matching::{Targets, matched_linears};
pub use merge::{MERGE_REPORT_FILE, MergeLayout, MergeReport, MergedModule, merge};
pub use options::{AdaptedLinear, LoraOptions, default_targets};
pub use passes::{DoraPass, LoraPass, MergeAdapterWeightsPass, QloraPass, SampleSource, register_passes};
pub use qlora::{QloraOptions, finetune_qlora, quantize_base};
pub use trainer::TrainingData;
