//! `olive quantize`.

use olive_core::data::{DataConfig, DataFormat, DataSource, TextGenConfig, TextSource};
use olive_core::text::TextTokenizer;
use olive_core::{Error, ModelHandle, Result};
use olive_quant::{CalibrationSet, QuantizeOptions, Rounding, Search, UniformOptions};
use serde_json::{Value, json};

use super::{Context, device, notes, open_model};
use crate::args::{AwqSearch, Precision, QuantizeAlgorithm, QuantizeArgs, TextDataArgs};
use crate::output;

/// Sequences of the built-in text, where the user gives no data.
const DEFAULT_SEQUENCES: usize = 32;
/// Tokens of each of them.
const DEFAULT_SEQUENCE_LENGTH: usize = 512;

/// What is asked for: AWQ in AutoAWQ's layout, or anything else in Olive's.
enum Request {
    Awq(QuantizeOptions),
    Uniform(UniformOptions),
}

impl Request {
    fn of(args: &QuantizeArgs) -> Result<Self> {
        let wrong = |key: &str, expected: &str, found: &str| {
            Err(Error::config("command line", key, expected, format!("`{found}`")))
        };
        let bits = match args.precision {
            None | Some(Precision::Int4 | Precision::Uint4) => 4,
            Some(Precision::Int8 | Precision::Uint8) => 8,
            Some(other) => return wrong("--precision", "int4 or int8", &other.name()),
        };
        let rounding = match args.algorithm {
            QuantizeAlgorithm::Awq => {
                let options = QuantizeOptions {
                    bits,
                    search: match args.awq_search {
                        AwqSearch::Exact => Search::Exact,
                        AwqSearch::Hybrid => Search::Hybrid,
                        AwqSearch::Fast => Search::Fast,
                    },
                    ..QuantizeOptions::default()
                };
                options.check()?;
                return Ok(Self::Awq(options));
            }
            QuantizeAlgorithm::Rtn => Rounding::Nearest,
            QuantizeAlgorithm::Kquant => Rounding::KQuant,
            QuantizeAlgorithm::Gptq => Rounding::GPTQ,
            other => {
                let found = format!("{other:?}").to_lowercase();
                return wrong("--algorithm", "awq, gptq, kquant or rtn", &found);
            }
        };
        let mut options = UniformOptions::new(rounding);
        options.settings.bits = bits;
        Ok(Self::Uniform(options))
    }

    fn calibrates(&self) -> bool {
        match self {
            Self::Awq(_) => true,
            Self::Uniform(options) => options.rounding.calibrates(),
        }
    }

    /// The pass of a workflow that does the same.
    fn pass(&self) -> Value {
        match self {
            Self::Awq(options) => json!({"type": "AutoAWQQuantizer", "bits": options.bits,
                "q_group_size": options.group_size, "zero_point": options.zero_point,
                "duo_scaling": options.duo_scaling, "awq_search": options.search}),
            Self::Uniform(options) => {
                let name = match options.rounding {
                    Rounding::Nearest => "Rtn",
                    Rounding::KQuant => "KQuant",
                    Rounding::Gptq { .. } => "Gptq",
                };
                json!({"type": name, "bits": options.settings.bits,
                    "group_size": options.settings.group_size, "sym": options.settings.symmetric})
            }
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Those of [`olive_quant::quantize`] and [`olive_quant::quantize_uniform`], and of reading model and data.
pub fn run(args: &QuantizeArgs, context: &Context<'_>) -> Result<()> {
    let request = Request::of(args)?;
    check_flags(args)?;
    let on_gpu = device::on_gpu(args.device)?;
    if on_gpu && matches!(&request, Request::Uniform(options) if !options.rounding.calibrates()) {
        let expected = "cpu; the GPU calibrates awq and gptq, and nothing else has a calibration";
        return Err(Error::config("command line", "--device", expected, "`gpu`"));
    }
    let data = match &args.data_name {
        Some(name) => Some(data_config(name, args.split.clone(), &args.data)?),
        None => {
            let files = !args.data.data_files.is_empty();
            notes::refuse(&[("--data_files", files, "it needs `-d json`, `-d csv` or `-d text`")])?;
            None
        }
    };
    if notes::save_config(&args.config, &args.output_path, &workflow(args, &request))? {
        return Ok(());
    }
    let model = open_model(&args.model, context)?;
    let calibration = calibration(args, data.as_ref(), &request, &model)?;
    let (output, progress, cancel) = (&args.output_path, context.progress, context.cancel);
    match &request {
        Request::Awq(options) => {
            let quantize = match on_gpu {
                false => olive_quant::quantize,
                #[cfg(feature = "cuda")]
                true => olive_quant::quantize_on_gpu,
                #[cfg(not(feature = "cuda"))]
                true => unreachable!("invariant: `on_gpu` refuses a device that this build does not have"),
            };
            let report = quantize(&model, &calibration, options, output, progress, cancel)?;
            tracing::info!(
                "{} linears in {:.1} s, loss {:.4e} after {:.4e} by rounding alone",
                report.totals.quantized_linears,
                report.totals.seconds,
                report.totals.loss,
                report.totals.loss_rtn,
            );
        }
        Request::Uniform(options) => {
            let quantize = match on_gpu {
                false => olive_quant::quantize_uniform,
                #[cfg(feature = "cuda")]
                true => olive_quant::quantize_uniform_on_gpu,
                #[cfg(not(feature = "cuda"))]
                true => unreachable!("invariant: `on_gpu` refuses a device that this build does not have"),
            };
            let report = quantize(&model, &calibration, options, output, progress, cancel)?;
            tracing::info!(
                "{} modules, {:.1} MiB of weights",
                report.linears.len(),
                report.output_bytes as f64 / f64::from(1 << 20),
            );
        }
    }
    output::saved(&args.output_path)
}

fn check_flags(args: &QuantizeArgs) -> Result<()> {
    notes::refuse(&[
        (
            "--use_qdq_encoding",
            args.use_qdq_encoding,
            "the output is no ONNX model",
        ),
        ("--quarot_rotate", args.quarot_rotate, "weights are not rotated"),
        (
            "--adapter_path",
            args.adapter_path.is_some(),
            "an adapter is trained on the quantized model",
        ),
    ])?;
    notes::warn_no_effect(&[
        (
            "--act_precision",
            args.act_precision.is_some(),
            "weights only are quantized",
        ),
        (
            "--implementation",
            args.implementation.is_some(),
            "each algorithm is implemented once",
        ),
        ("--subset", args.subset.is_some(), "data files have no subsets"),
        (
            "--awq_search",
            args.awq_search != AwqSearch::Exact && args.algorithm != QuantizeAlgorithm::Awq,
            "only AWQ searches scales",
        ),
    ]);
    notes::warn_old(&args.no_effect);
    Ok(())
}

/// A data config from the flags, with the defaults of Olive's command line.
pub(super) fn data_config(name: &str, split: Option<String>, args: &TextDataArgs) -> Result<DataConfig> {
    let format = DataFormat::from_name(name)?;
    if args.data_files.is_empty() {
        return Err(Error::config(
            "command line",
            "--data_files",
            format!("files, for `-d {name}`"),
            "none",
        ));
    }
    let mut source = DataSource::new(format, args.data_files.iter().cloned());
    source.split = split;
    let text = if args.use_chat_template {
        TextSource::Chat {
            column: "messages".to_owned(),
            template: None,
        }
    } else if let Some(template) = &args.text_template {
        TextSource::template(template)?
    } else {
        let column = args.text_field.clone().unwrap_or_else(|| "text".to_owned());
        TextSource::Columns(vec![column])
    };
    let text = TextGenConfig {
        max_seq_len: args.max_seq_len.unwrap_or(1024),
        max_samples: Some(args.max_samples.unwrap_or(256)),
        add_special_tokens: args.add_special_tokens,
        ..TextGenConfig::new(text)
    };
    Ok(DataConfig { source, text })
}

fn calibration(
    args: &QuantizeArgs,
    data: Option<&DataConfig>,
    request: &Request,
    model: &dyn ModelHandle,
) -> Result<CalibrationSet> {
    if !request.calibrates() {
        if data.is_some() {
            tracing::warn!("--data_files has no effect: this algorithm looks at no data");
        }
        return Ok(CalibrationSet::default());
    }
    let tokenizer = TextTokenizer::open(model.path())?;
    let sequences = match data {
        Some(data) => data.calibration(&tokenizer)?,
        None => {
            let limit = model.spec().max_position;
            let length = args
                .data
                .max_seq_len
                .unwrap_or(DEFAULT_SEQUENCE_LENGTH.min(limit));
            let count = args.data.max_samples.unwrap_or(DEFAULT_SEQUENCES);
            DataConfig::default_calibration(&tokenizer, length, count)?
        }
    };
    Ok(CalibrationSet::new(sequences))
}

/// The run as a workflow file of Olive.
fn workflow(args: &QuantizeArgs, request: &Request) -> Value {
    let mut pass = request.pass();
    let mut config = json!({
        "input_model": {"type": "HfModel", "model_path": args.model.model_name_or_path},
        "passes": {},
        "output_dir": args.output_path,
        "log_severity_level": args.common.log_level,
    });
    if let Some(name) = &args.data_name {
        config["data_configs"] = json!([data_workflow(
            "calibration",
            name,
            args.split.as_deref(),
            &args.data
        )]);
        if request.calibrates() {
            pass["data_config"] = json!("calibration");
        }
    }
    config["passes"]["quantize"] = pass;
    config
}

/// A data config of a workflow file.
pub(super) fn data_workflow(name: &str, data_name: &str, split: Option<&str>, args: &TextDataArgs) -> Value {
    let mut text = json!({
        "max_seq_len": args.max_seq_len.unwrap_or(1024),
        "max_samples": args.max_samples.unwrap_or(256),
        "add_special_tokens": args.add_special_tokens,
    });
    if args.use_chat_template {
        text["chat_template"] = json!(true);
    } else if let Some(template) = &args.text_template {
        text["text_template"] = json!(template);
    } else if let Some(column) = &args.text_field {
        text["text_cols"] = json!([column]);
    }
    json!({
        "name": name,
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": data_name, "split": split, "data_files": args.data_files},
        "pre_process_data_config": text,
    })
}
