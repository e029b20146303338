//! `olive evaluate`.

use std::path::Path;
use std::time::Instant;

use olive_core::data::{DataFormat, DataSource, token_blocks};
use olive_core::decoder::Cpu;
use olive_core::text::TextTokenizer;
use olive_core::{HfModel, ModelHandle, Result, hub};
use serde_json::{Map, Value, json};

use super::{Context, device};
use crate::args::{EvaluateArgs, Metric};
use crate::output;

/// Runs the command.
///
/// # Errors
/// Those of reading model and data and of the evaluation.
pub fn run(args: &EvaluateArgs, context: &Context<'_>) -> Result<()> {
    let folder = hub::resolve(&args.model, context.progress)?;
    let texts = DataSource::new(DataFormat::Text, args.data_files.iter().cloned()).texts()?;
    let report = if is_onnx(&folder) {
        super::session::evaluate(args, &folder, &texts, context)?
    } else {
        hugging_face(args, &folder, &texts, context)?
    };
    if args.json {
        return output::json(&report);
    }
    for (name, value) in &report {
        output::line(&format!("{name}: {value}"))?;
    }
    Ok(())
}

/// Whether a folder holds an ONNX model, itself or in `model/`.
fn is_onnx(folder: &Path) -> bool {
    let here =
        |folder: &Path| folder.join("genai_config.json").is_file() || folder.join("model.onnx").is_file();
    folder.extension().is_some_and(|e| e == "onnx") || here(folder) || here(&folder.join("model"))
}

fn hugging_face(
    args: &EvaluateArgs,
    folder: &Path,
    texts: &[String],
    context: &Context<'_>,
) -> Result<Map<String, Value>> {
    let model = HfModel::open(folder)?;
    let tokenizer = TextTokenizer::open(model.path())?;
    let blocks = token_blocks(&tokenizer, texts, args.block_size, args.max_blocks)?;
    let adapter = args.adapter_path.as_deref().or(model.adapter());
    let began = Instant::now();
    let evaluate = match device::on_gpu(args.device)? {
        false => olive_lora::evaluate_perplexity::<Cpu>,
        #[cfg(feature = "cuda")]
        true => olive_lora::evaluate_perplexity_on_gpu,
        #[cfg(not(feature = "cuda"))]
        true => unreachable!("invariant: `on_gpu` refuses a device that this build does not have"),
    };
    let result = evaluate(&model, &blocks, adapter, context.progress, context.cancel)?;
    let seconds = began.elapsed().as_secs_f64();
    let mut report = Map::new();
    for metric in &args.metrics {
        match metric {
            Metric::Perplexity => {
                report.insert("perplexity".to_owned(), json!(result.perplexity));
                report.insert("loss".to_owned(), json!(result.loss));
                report.insert("tokens".to_owned(), json!(result.tokens));
                report.insert("blocks".to_owned(), json!(blocks.len()));
            }
            Metric::Latency => {
                let tokens = blocks.iter().map(Vec::len).sum::<usize>() as f64;
                report.insert("seconds".to_owned(), json!(seconds));
                report.insert("prefill_tokens_per_s".to_owned(), json!(tokens / seconds));
            }
        }
    }
    Ok(report)
}
