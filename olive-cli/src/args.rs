//! The command line. Flags are spelled as Olive spells them and parsed as Python's argparse does: unique prefixes
//! of long flags, `--flag=value`, any order.

mod auto_opt;
mod benchmark;
mod capture;
mod chat;
mod convert_adapters;
mod cost_model;
mod data;
mod demo;
mod evaluate;
mod extract_adapters;
mod finetune;
mod generate;
mod generate_adapter;
mod init;
mod model;
mod model_package;
mod optimize;
mod quantize;
mod run;
mod search;
mod shared_cache;
mod tune_session;

use std::ffi::OsString;

use clap::{CommandFactory, Parser, Subcommand};
use serde_json::{Map, Value};

pub use auto_opt::AutoOptArgs;
pub use benchmark::{Backend, BenchmarkArgs};
pub use capture::CaptureArgs;
pub use chat::ChatArgs;
pub use convert_adapters::{AdapterDtype, AdapterFormat, ConvertAdaptersArgs};
pub use cost_model::CostModelArgs;
pub use data::TextDataArgs;
pub use demo::DemoArgs;
pub use evaluate::{EvaluateArgs, Metric};
pub use extract_adapters::ExtractAdaptersArgs;
pub use finetune::{FinetuneArgs, Method, TorchDtype};
pub use generate::GenerateArgs;
pub use generate_adapter::GenerateAdapterArgs;
pub use init::InitArgs;
pub use model::{
    AcceleratorArgs, AnyModelArgs, CommonArgs, ConfigArgs, Device, ModelArgs, NoEffectArgs, Precision,
};
pub use model_package::ModelPackageArgs;
pub use optimize::{Exporter, OptimizeArgs};
pub use quantize::{Algorithm as QuantizeAlgorithm, AwqSearch, QuantizeArgs};
pub use run::{RunArgs, RunPassArgs};
pub use search::SearchArgs;
pub use shared_cache::SharedCacheArgs;
pub use tune_session::TuneSessionArgs;

/// Quantize, fine-tune, convert and run language models.
#[derive(Debug, Parser)]
#[command(
    name = "olive",
    version,
    about,
    infer_long_args = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// One variant a command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask what is wanted, and write the workflow file that does it.
    Init(InitArgs),
    /// Run a workflow file.
    Run(Box<RunArgs>),
    /// Run one pass.
    RunPass(Box<RunPassArgs>),
    /// Make the weights of a model 4 bits wide.
    Quantize(Box<QuantizeArgs>),
    /// Train a LoRA adapter; every other `--name value` is a field of Hugging Face's TrainingArguments.
    #[command(name = "finetune", alias = "fine-tune")]
    Finetune(Box<FinetuneArgs>),
    /// Turn a model and its adapter into an ONNX model folder.
    AutoOpt(Box<AutoOptArgs>),
    /// Quantize and convert a model for a device.
    Optimize(Box<OptimizeArgs>),
    /// Turn a model into an ONNX model folder.
    CaptureOnnxGraph(Box<CaptureArgs>),
    /// Turn adapter weights inside an ONNX model into inputs and a file.
    GenerateAdapter(Box<GenerateAdapterArgs>),
    /// Take LoRA weights out of a checkpoint that holds them beside its own.
    ExtractAdapters(Box<ExtractAdaptersArgs>),
    /// Turn a PEFT adapter into a file that an ONNX model loads.
    #[command(alias = "export-adapters")]
    ConvertAdapters(ConvertAdaptersArgs),
    /// Find the number of threads with which an ONNX model answers fastest.
    TuneSessionParams(Box<TuneSessionArgs>),
    /// Write what each module of a model weighs and computes.
    GenerateCostModel(Box<CostModelArgs>),
    /// Put ONNX model folders into one package, as variants.
    GenerateModelPackage(ModelPackageArgs),
    /// Score a model on tasks in local files.
    Benchmark(Box<BenchmarkArgs>),
    /// List or clear the cache of workflows.
    SharedCache(SharedCacheArgs),
    /// Generate text with an ONNX model folder.
    Generate(Box<GenerateArgs>),
    /// Talk with an ONNX model folder.
    Chat(Box<ChatArgs>),
    /// Measure perplexity and latency.
    Evaluate(EvaluateArgs),
    /// Run the whole lab on the model and the data that come with olive.
    Demo(DemoArgs),
}

impl Command {
    /// `--log_level` of the command.
    pub fn log_level(&self) -> u8 {
        match self {
            Self::Init(args) => args.common.log_level,
            Self::TuneSessionParams(args) => args.common.log_level,
            Self::GenerateCostModel(args) => args.common.log_level,
            Self::GenerateModelPackage(args) => args.common.log_level,
            Self::Benchmark(args) => args.common.log_level,
            Self::SharedCache(args) => args.common.log_level,
            Self::Run(args) => crate::command::run_log_level(args),
            Self::RunPass(args) => args.common.log_level,
            Self::Quantize(args) => args.common.log_level,
            Self::Finetune(args) => args.common.log_level,
            Self::AutoOpt(args) => args.common.log_level,
            Self::Optimize(args) => args.common.log_level,
            Self::CaptureOnnxGraph(args) => args.common.log_level,
            Self::GenerateAdapter(args) => args.common.log_level,
            Self::ExtractAdapters(args) => args.common.log_level,
            Self::ConvertAdapters(args) => args.common.log_level,
            Self::Generate(args) => args.common.log_level,
            Self::Chat(args) => args.common.log_level,
            Self::Evaluate(args) => args.common.log_level,
            Self::Demo(args) => args.common.log_level,
        }
    }
}

/// Parses a command line, its program name included.
///
/// # Errors
/// What is wrong with it, or the help that was asked for.
pub fn parse(argv: Vec<OsString>) -> Result<Cli, clap::Error> {
    let finetune = argv
        .get(1)
        .is_some_and(|name| name == "finetune" || name == "fine-tune");
    if !finetune {
        return Cli::try_parse_from(argv);
    }
    let (known, training) = split_training_arguments(argv);
    let mut cli = Cli::try_parse_from(known)?;
    if let Command::Finetune(args) = &mut cli.command {
        args.training = training;
    }
    Ok(cli)
}

/// Separates flags that `finetune` does not know, with their values: without a value `true`, with one its text, with
/// several a list.
fn split_training_arguments(argv: Vec<OsString>) -> (Vec<OsString>, Map<String, Value>) {
    let command = Cli::command();
    let flags: Vec<String> = command
        .find_subcommand("finetune")
        .into_iter()
        .flat_map(clap::Command::get_arguments)
        .flat_map(|arg| {
            let names = arg.get_long_and_visible_aliases().unwrap_or_default();
            let hidden = arg.get_all_aliases().unwrap_or_default();
            names
                .into_iter()
                .chain(hidden)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .chain(["help".to_owned()])
        .collect();
    let mut known = Vec::new();
    let mut training: Vec<(String, Vec<Value>)> = Vec::new();
    let mut in_unknown = false;
    for (position, token) in argv.into_iter().enumerate() {
        let text = token.to_string_lossy();
        let flag = text
            .strip_prefix("--")
            .filter(|name| !name.is_empty() && position > 1);
        match flag {
            Some(flag) => {
                let (name, value) = match flag.split_once('=') {
                    Some((name, value)) => (name, Some(value)),
                    None => (flag, None),
                };
                in_unknown = !flags.iter().any(|known| known.starts_with(name));
                if in_unknown {
                    training.push((name.to_owned(), value.into_iter().map(Value::from).collect()));
                } else {
                    known.push(token);
                }
            }
            None => {
                let short = text.starts_with('-') && text.parse::<f64>().is_err() && text.len() > 1;
                in_unknown &= !short;
                match training.last_mut().filter(|_| in_unknown) {
                    Some((_, values)) => values.push(Value::from(text.as_ref())),
                    None => known.push(token),
                }
            }
        }
    }
    let training = training.into_iter().map(|(name, mut values)| {
        let value = match values.len() {
            0 => Value::Bool(true),
            1 => values.remove(0),
            _ => Value::Array(values),
        };
        (name, value)
    });
    (known, training.collect())
}

/// Python's idea of a switch that may have a value: `--flag`, `--flag True`, `--flag=false`.
fn parse_flag(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" | "" => Ok(false),
        _ => Err("expected True or False".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(line: &str) -> Result<Cli, clap::Error> {
        parse(line.split(' ').map(OsString::from).collect())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_labs_lines_are_understood() {
        let quantize = "olive quantize --model_name_or_path m --trust_remote_code --algorithm awq \
                        --output_path models/phi/awq --log_level 1";
        let Command::Quantize(args) = parse_text(quantize).unwrap().command else {
            panic!()
        };
        assert_eq!((args.common.log_level, args.model.trust_remote_code), (1, true));

        let finetune = r"olive finetune --method lora --model_name_or_path models/phi/awq --data_files data.jsonl --data_name json --text_template <|user|>\n{prompt} --max_steps 100 --learning_rate=3e-3 --output_path ./ft --gradient_checkpointing --report_to a b --log_level 1";
        let Command::Finetune(args) = parse_text(finetune).unwrap().command else {
            panic!()
        };
        assert_eq!(args.data.text_template.as_deref(), Some("<|user|>\n{prompt}"));
        let training = serde_json::json!({
            "max_steps": "100", "learning_rate": "3e-3", "gradient_checkpointing": true, "report_to": ["a", "b"]});
        assert_eq!(Value::Object(args.training.clone()), training);
        assert_eq!((args.lora_r, args.lora_alpha, args.common.log_level), (64, 16, 1));

        let auto_opt = "olive auto-opt --model_name_or_path ft/model --adapter_path ft/adapter --device cpu \
                        --provider CPUExecutionProvider --use_ort_genai --output_path onnx --log_level 1";
        let Command::AutoOpt(args) = parse_text(auto_opt).unwrap().command else {
            panic!()
        };
        assert!(args.use_ort_genai);
    }

    #[test]
    fn prefixes_equal_signs_and_old_spellings_work() {
        for line in [
            "olive quantize --model m --algo=awq -o out",
            "olive quantize --output_path out -m m --algorithm awq --is_generative_model True",
            "olive quantize -m m --algorithm awq --aml_compute x --resource_group y --workspace_name z",
            "olive auto-opt -m m --use_ort_genai True --use_model_builder False -o o --num-splits 2",
            "olive fine-tune -m m -d json --train_split train --max_steps 3",
            "olive export-adapters -a a -o o",
            "olive capture-onnx-graph -m m --use_model_builder --precision int4",
            "olive generate -m m --input_ids 1,2,3 --adapter travel=f.onnx_adapter --adapter b=c --top_k 5",
            "olive evaluate -m m --metrics perplexity,latency --data_files f --max_blocks 3 --json",
        ] {
            assert!(
                parse_text(line).is_ok(),
                "{line}: {}",
                parse_text(line).unwrap_err()
            );
        }
    }

    #[test]
    fn wrong_lines_exit_with_two() {
        for line in [
            "olive",
            "olive quantise",
            "olive quantize -m m --algoritm awq",
            "olive quantize -m m --algorithm magic",
            "olive quantize -m m --max 3",
            "olive finetune -m m",
            "olive finetune -m m -d json --text_field a --text_template b",
            "olive generate -m m",
            "olive generate -m m --prompt a --input_ids 1",
            "olive auto-opt -m m --num-splits 2 --cost-model f",
            "olive quantize -m m stray",
        ] {
            assert_eq!(parse_text(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
