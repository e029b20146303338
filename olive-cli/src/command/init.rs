//! `olive init`: asks what is wanted and writes the workflow that does it.

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use olive_core::workflow::plan::Plan;
use olive_core::workflow::registry::PassRegistry;
use olive_core::workflow::schema::RunConfig;
use olive_core::workflow::schema::document::Document;
use olive_core::{Error, Result, fsio};
use serde_json::{Map, Value, json};

use crate::args::InitArgs;
use crate::output;

/// Runs the command.
///
/// # Errors
/// [`Error::Config`] if the answers end too early or make no workflow; [`Error::Io`].
pub fn run(args: &InitArgs, passes: &PassRegistry) -> Result<()> {
    let stdin = std::io::stdin();
    let mut dialog = Dialog {
        answers: stdin.lock(),
        questions: std::io::stderr(),
    };
    let (folder, workflow) = workflow(&mut dialog, &args.output_path)?;
    let path = folder.join("config.json");
    // What is written can be run: the same reader and planner that `olive run` has.
    let document = Document::from_value(path.display().to_string(), &folder, workflow.clone());
    Plan::new(&RunConfig::from_document(&document)?, passes)?;
    fsio::create_dir(&folder)?;
    fsio::write_json(&path, &workflow, 4)?;
    output::line(&format!("Config file saved at {}", path.display()))?;
    output::line(&format!("Run it with: olive run --config {}", path.display()))
}

/// Questions on one side, answers line by line on the other.
struct Dialog<A, Q> {
    answers: A,
    questions: Q,
}

impl<A: BufRead, Q: Write> Dialog<A, Q> {
    /// Asks for a text; an empty answer is the default.
    fn ask(&mut self, question: &str, default: Option<&str>) -> Result<String> {
        loop {
            match default {
                Some(default) => write!(self.questions, "{question} [{default}]: "),
                None => write!(self.questions, "{question}: "),
            }
            .and_then(|()| self.questions.flush())
            .map_err(Error::io("write", "stderr"))?;
            let mut line = String::new();
            let read = self
                .answers
                .read_line(&mut line)
                .map_err(Error::io("read", "stdin"))?;
            let answer = match (line.trim(), default) {
                ("", Some(default)) => default,
                (answer, _) => answer,
            };
            if !answer.is_empty() {
                return Ok(answer.to_owned());
            }
            if read == 0 {
                return Err(Error::config(
                    "olive init",
                    question,
                    "an answer",
                    "the end of the input",
                ));
            }
        }
    }

    /// Asks for one of several by number or by its text; the first is the default.
    fn choose<'c>(&mut self, question: &str, choices: &[(&'c str, &str)]) -> Result<&'c str> {
        let mut text = String::new();
        for (index, (name, meaning)) in choices.iter().enumerate() {
            text.push_str(&format!("  {}) {name}: {meaning}\n", index + 1));
        }
        loop {
            write!(self.questions, "{question}\n{text}").map_err(Error::io("write", "stderr"))?;
            let answer = self.ask("Number or name", Some("1"))?;
            let number = answer
                .parse::<usize>()
                .ok()
                .and_then(|number| choices.get(number.wrapping_sub(1)));
            let named = choices
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(&answer));
            if let Some((name, _)) = number.or(named) {
                return Ok(name);
            }
        }
    }
}

/// Asks, and gives the output folder with its workflow.
fn workflow<A: BufRead, Q: Write>(dialog: &mut Dialog<A, Q>, output: &Path) -> Result<(PathBuf, Value)> {
    let model = dialog.ask("Model (a folder, or a name of the Hugging Face hub)", None)?;
    let wish = dialog.choose(
        "What do you want to do?",
        &[
            ("optimize", "quantize the weights and build an ONNX model folder"),
            ("export", "build an ONNX model folder"),
            (
                "quantize",
                "quantize the weights, and keep a Hugging Face checkpoint",
            ),
            ("finetune", "train a LoRA adapter"),
        ],
    )?;
    let mut passes = Map::new();
    let mut data = Vec::new();
    match wish {
        "optimize" => {
            quantization(dialog, &mut passes, &mut data)?;
            passes.insert(
                "build".to_owned(),
                json!({"type": "ModelBuilder", "precision": "int4"}),
            );
        }
        "export" => {
            let precision = dialog.choose(
                "Precision of the weights",
                &[
                    ("int4", "smallest, rounded to the nearest value"),
                    ("int8", "8 bits"),
                    ("fp16", "half precision"),
                    ("fp32", "as exact as the arithmetic"),
                ],
            )?;
            passes.insert(
                "build".to_owned(),
                json!({"type": "ModelBuilder", "precision": precision}),
            );
        }
        "quantize" => quantization(dialog, &mut passes, &mut data)?,
        _ => finetuning(dialog, &mut passes, &mut data)?,
    }
    let proposed = output.display().to_string();
    let folder = PathBuf::from(dialog.ask("Output folder", Some(&proposed))?);
    let mut workflow = json!({
        "input_model": {"type": "HfModel", "model_path": absolute(&model)},
        "systems": {"local_system": {"type": "LocalSystem", "accelerators": [
            {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}},
        "passes": passes,
        "host": "local_system",
        "target": "local_system",
        "output_dir": absolute(&folder.display().to_string()),
    });
    if !data.is_empty() {
        workflow["data_configs"] = data.into();
    }
    Ok((folder, workflow))
}

fn quantization<A: BufRead, Q: Write>(
    dialog: &mut Dialog<A, Q>,
    passes: &mut Map<String, Value>,
    data: &mut Vec<Value>,
) -> Result<()> {
    let algorithm = dialog.choose(
        "Algorithm",
        &[
            ("awq", "keeps what matters to the activations; needs text"),
            ("gptq", "corrects each rounding by the next; needs text"),
            ("rtn", "rounds to the nearest value; fast, no text"),
        ],
    )?;
    let kind = match algorithm {
        "awq" => "AutoAWQQuantizer",
        "gptq" => "Gptq",
        _ => "Rtn",
    };
    let mut pass = json!({"type": kind});
    if algorithm != "rtn" {
        let text = dialog.ask(
            "Calibration text (a file; `default` for the built-in prose)",
            Some("default"),
        )?;
        if text != "default" {
            let name = "calibration";
            data.push(json!({
                "name": name,
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "text", "data_files": absolute(&text), "split": "train"},
                "pre_process_data_config": {"type": "text_generation", "strategy": "join", "text_cols": "text",
                    "max_seq_len": 512, "max_samples": 128},
            }));
            pass["data_config"] = name.into();
        }
    }
    passes.insert("quantize".to_owned(), pass);
    Ok(())
}

fn finetuning<A: BufRead, Q: Write>(
    dialog: &mut Dialog<A, Q>,
    passes: &mut Map<String, Value>,
    data: &mut Vec<Value>,
) -> Result<()> {
    let file = dialog.ask("Training data (JSON lines)", None)?;
    let template = dialog.ask("Text of a sample, with {columns} in braces", Some("{text}"))?;
    let whole = |text: &str| text.parse::<u64>().ok().filter(|number| *number > 0);
    let mut number = |question: &str, default: &str| loop {
        let answer = dialog.ask(question, Some(default))?;
        if let Some(number) = whole(&answer) {
            return Ok::<u64, Error>(number);
        }
    };
    let rank = number("Rank of the adapter", "16")?;
    let steps = number("Training steps", "100")?;
    data.push(json!({
        "name": "training",
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "json", "data_files": absolute(&file), "split": "train"},
        "pre_process_data_config": {"type": "text_generation", "corpus_strategy": "line-by-line",
            "text_template": template.replace("\\n", "\n"), "max_seq_len": 1024},
    }));
    passes.insert(
        "finetune".to_owned(),
        json!({"type": "LoRA", "r": rank, "alpha": rank, "train_data_config": "training",
            "training_args": {"max_steps": steps}}),
    );
    Ok(())
}

/// A path that exists here as an absolute one, so that the workflow runs from wherever its file is; else (a name of the
/// hub, an output folder that is yet to be) the text, made absolute if it is plainly a path.
fn absolute(text: &str) -> String {
    let path = Path::new(text);
    let is_path = path.exists() || path.is_absolute() || text.starts_with('.');
    match std::path::absolute(path) {
        Ok(whole) if is_path => whole.display().to_string(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(lines: &str) -> Result<(PathBuf, Value)> {
        let mut dialog = Dialog {
            answers: lines.as_bytes(),
            questions: Vec::new(),
        };
        workflow(&mut dialog, Path::new("./out"))
    }

    #[test]
    fn answers_become_workflows_that_plan() {
        let registry = crate::registry::passes(None);
        for (lines, wanted) in [
            ("org/model\n\n\n\n\n", vec!["AutoAWQQuantizer", "ModelBuilder"]),
            ("org/model\nexport\n4\n\n", vec!["ModelBuilder"]),
            ("org/model\n3\nrtn\nelsewhere\n", vec!["Rtn"]),
            (
                "org/model\n9\nfinetune\nd.jsonl\n{a}\\n{b}\nx\n8\n10\n\n",
                vec!["LoRA"],
            ),
        ] {
            let (folder, workflow) = answer(lines).unwrap();
            let types: Vec<&str> = workflow["passes"]
                .as_object()
                .unwrap()
                .values()
                .map(|p| p["type"].as_str().unwrap())
                .collect();
            assert_eq!(types, wanted, "{lines:?}");
            let document = Document::from_value("config.json", folder, workflow);
            Plan::new(&RunConfig::from_document(&document).unwrap(), &registry).unwrap();
        }
    }

    #[test]
    fn answers_that_end_are_an_error() {
        assert!(answer("").unwrap_err().to_string().contains("end of the input"));
        assert!(answer("org/model\nfinetune\n").is_err());
    }
}
