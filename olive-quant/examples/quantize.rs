//! Quantizes a model on a text and says what it took and what it did to the perplexity of another.
//!
//! ```text
//! quantize <model> <output> <awq|rtn> <calibration.txt> <evaluation.txt> [options.json text]
//! ```

use std::path::Path;
use std::process::ExitCode;

use olive_core::decoder::{Cpu, evaluate_perplexity};
use olive_core::text::TextTokenizer;
use olive_core::{CancelToken, HfModel, LogProgress, NoProgress};
use olive_quant::{Algorithm, CalibrationSet, QuantizeOptions, quantize};

const BLOCK: usize = 512;
const CALIBRATION_BLOCKS: usize = 16;
const EVALUATION_BLOCKS: usize = 60;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model_path, output, algorithm, calibration, evaluation, rest @ ..] = arguments.as_slice() else {
        return Err(
            "usage: quantize <model> <output> <awq|rtn> <calibration.txt> <evaluation.txt> [options]".into(),
        );
    };
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let model = HfModel::open(model_path)?;
    let tokenizer = TextTokenizer::open(model_path)?;
    let blocks = |path: &str, count| -> Result<CalibrationSet, Box<dyn std::error::Error>> {
        let ids = tokenizer.encode(&std::fs::read_to_string(path)?, false)?;
        Ok(CalibrationSet::from_blocks(&ids, BLOCK, count))
    };
    let options = QuantizeOptions {
        algorithm: if algorithm == "rtn" {
            Algorithm::Rtn
        } else {
            Algorithm::Awq
        },
        ..serde_json::from_str(rest.first().map_or("{}", String::as_str))?
    };
    let calibration = blocks(calibration, CALIBRATION_BLOCKS)?;
    let cancel = CancelToken::default();
    let before = cpu_seconds();
    let report = quantize(
        &model,
        &calibration,
        &options,
        Path::new(output),
        &LogProgress::default(),
        &cancel,
    )?;
    println!("cpu_seconds {:.2}", cpu_seconds() - before);
    println!("peak_memory {}", peak_memory());
    println!("expected {}", report.expected);
    for layer in &report.layers {
        for mapping in &layer.mappings {
            let ratio = mapping
                .ratio
                .map_or_else(|| "identity".to_owned(), |r| format!("{r:.2}"));
            println!(
                "layer {} {:<40} rtn {:.4e} awq {:.4e} = {:.3} ratio {ratio} {:.1} s",
                layer.layer,
                mapping.name,
                mapping.loss_rtn,
                mapping.loss,
                mapping.loss / mapping.loss_rtn,
                mapping.seconds
            );
        }
    }
    let quantized = HfModel::open(output)?;
    let blocks = blocks(evaluation, EVALUATION_BLOCKS)?.sequences;
    let perplexity = evaluate_perplexity::<Cpu>(&quantized, &blocks, None, &NoProgress, &cancel)?;
    println!("perplexity {:.4}", perplexity.perplexity);
    Ok(())
}

/// User and system time of this process, in seconds; Linux only, 0 elsewhere.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |i: usize| fields.get(i).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// The line of the largest resident set.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    line.unwrap_or("unknown").to_owned()
}
