//! `olive demo`: the four commands of the lab, one after another, on the model and the data that come with olive.

use std::path::Path;

use olive_core::{Error, Result, fsio};

use crate::args::{self, DemoArgs};
use crate::command::{self, Context};
use crate::output;

/// The files of the demo: a Phi-3-architecture model of 5.5 million parameters, and questions about travel.
const FILES: &[(&str, &[u8])] = &[
    (
        "tiny-phi3/config.json",
        include_bytes!("../../fixtures/tiny-phi3/config.json"),
    ),
    (
        "tiny-phi3/generation_config.json",
        include_bytes!("../../fixtures/tiny-phi3/generation_config.json"),
    ),
    (
        "tiny-phi3/model.safetensors",
        include_bytes!("../../fixtures/tiny-phi3/model.safetensors"),
    ),
    (
        "tiny-phi3/special_tokens_map.json",
        include_bytes!("../../fixtures/tiny-phi3/special_tokens_map.json"),
    ),
    (
        "tiny-phi3/tokenizer.json",
        include_bytes!("../../fixtures/tiny-phi3/tokenizer.json"),
    ),
    (
        "tiny-phi3/tokenizer_config.json",
        include_bytes!("../../fixtures/tiny-phi3/tokenizer_config.json"),
    ),
    (
        "data/data_sample_travel.jsonl",
        include_bytes!("../../fixtures/data_sample_travel.jsonl"),
    ),
];

const TEMPLATE: &str = r"<|user|>\n{prompt}<|end|>\n<|assistant|>\n{response}<|end|>";

/// Runs the command.
///
/// # Errors
/// Those of the commands.
pub fn run(demo: &DemoArgs, context: &Context<'_>) -> Result<()> {
    let folder = &demo.output_path;
    for (name, bytes) in FILES {
        let path = folder.join(name);
        if !std::fs::read(&path).is_ok_and(|there| there == *bytes) {
            fsio::write(&path, bytes)?;
        }
    }
    let place = |name: &str| folder.join(name).display().to_string();
    let level = demo.common.log_level.to_string();
    let steps = demo.max_steps.to_string();
    let (base, data) = (place("tiny-phi3"), place("data/data_sample_travel.jsonl"));
    let (awq, ft, onnx) = (place("awq"), place("ft"), place("onnx-ao"));
    let (ft_model, ft_adapter, model) = (place("ft/model"), place("ft/adapter"), place("onnx-ao/model"));
    let lab: &[&[&str]] = &[
        &[
            "quantize",
            "--model_name_or_path",
            &base,
            "--algorithm",
            "awq",
            "--output_path",
            &awq,
        ],
        &[
            "finetune",
            "--method",
            "lora",
            "--model_name_or_path",
            &awq,
            "--data_files",
            &data,
            "--data_name",
            "json",
            "--text_template",
            TEMPLATE,
            "--max_steps",
            &steps,
            "--learning_rate",
            &demo.learning_rate,
            "--output_path",
            &ft,
        ],
        &[
            "auto-opt",
            "--model_name_or_path",
            &ft_model,
            "--adapter_path",
            &ft_adapter,
            "--device",
            "cpu",
            "--provider",
            "CPUExecutionProvider",
            "--use_ort_genai",
            "--output_path",
            &onnx,
        ],
    ];
    for words in lab {
        let mut words = words.to_vec();
        words.extend(["--log_level", &level]);
        step(&words, context)?;
    }
    let adapter = format!(
        "travel={}",
        Path::new(&model).join("adapter_weights.onnx_adapter").display()
    );
    let ask = [
        "generate",
        "-m",
        &model,
        "--prompt",
        &demo.question,
        "--chat",
        "--max_new_tokens",
        "48",
    ];
    output::line("\n# before fine-tuning")?;
    step(&ask, context)?;
    output::line("\n# after fine-tuning")?;
    step(&[&ask[..], &["--adapter", &adapter]].concat(), context)
}

/// Shows a command line and runs it.
fn step(words: &[&str], context: &Context<'_>) -> Result<()> {
    let shown: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    output::line(&format!("$ olive {}", shown.join(" ")))?;
    let argv = std::iter::once("olive")
        .chain(words.iter().copied())
        .map(Into::into);
    let cli = args::parse(argv.collect()).map_err(|error| {
        Error::config(
            "demo",
            "command line",
            "one that olive understands",
            error.to_string(),
        )
    })?;
    command::run(&cli.command, context)
}

/// A word as a shell wants it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
