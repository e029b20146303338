//! The binary from outside: exit codes, messages, and that a failed command leaves nothing half-written.

#![expect(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn tiny() -> PathBuf {
    repository().join("fixtures/tiny-phi3")
}

fn olive(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_olive"))
        .args(words)
        .output()
        .unwrap()
}

/// Runs a command that must fail with `code` and say all of `parts`, once, on stderr.
fn fails(words: &[&str], code: i32, parts: &[&str]) {
    let output = olive(words);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{words:?}: `{part}` is not in: {stderr}");
    }
    assert_eq!(stderr.matches("error:").count(), 1, "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(
        output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

fn succeeds(words: &[&str]) -> String {
    let output = olive(words);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// All files below a folder that may not be there.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A copy of the tiny model whose weights may be changed.
fn copy_of_tiny(to: &Path) -> PathBuf {
    let folder = to.join("model-copy");
    std::fs::create_dir(&folder).unwrap();
    for file in files(&tiny()) {
        std::fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    }
    folder
}

#[test]
fn wrong_command_lines_exit_with_two_and_name_the_nearest() {
    for (words, parts) in [
        (
            &["quantize", "-m", "m", "--algorithim", "awq"][..],
            &["--algorithim", "--algorithm"][..],
        ),
        (
            &["quantize", "-m", "m", "--algorithm", "gptqq"],
            &["gptqq", "gptq"],
        ),
        (&["quantise"], &["quantize"]),
        (&["generate", "-m", "m"], &["--prompt"]),
        (&["finetune", "-m", "m"], &["--data_name"]),
        (
            &["quantize", "-m", "m", "--algorithm", "quarot"],
            &["--algorithm", "awq, gptq, kquant or rtn"],
        ),
        (&["auto-opt", "-m", "m", "--device", "tpu"], &["--device", "cpu"]),
        (&["auto-opt", "--use_ort_genai"], &["--model_name_or_path"]),
        (
            &["auto-opt", "-m", "m", "--precision", "int16"],
            &["--precision", "int4"],
        ),
        (
            &["quantize", "-m", "m", "--data_files", "f"],
            &["--data_files", "-d json"],
        ),
        (
            &["quantize", "-m", "m", "--model_script", "f.py"],
            &["--model_script"],
        ),
    ] {
        fails(words, 2, parts);
    }
}

#[test]
fn unknown_training_arguments_are_refused_by_name() {
    let data = repository().join("fixtures/data_sample_travel.jsonl");
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("ft");
    let mut words = vec![
        "finetune",
        "-m",
        "m",
        "-d",
        "json",
        "--data_files",
        text(&data),
        "-o",
        text(&output),
    ];
    words.extend(["--text_template", "{prompt}", "--learning_rat", "1e-3"]);
    fails(&words, 2, &["learning_rat", "did you mean `learning_rate`"]);
    *words.last_mut().unwrap() = "fast";
    let place = words.len() - 2;
    words[place] = "--learning_rate";
    fails(&words, 2, &["learning_rate", "fast"]);
    assert!(!output.exists());
}

#[test]
fn missing_models_and_remote_catalogues_are_named() {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("awq");
    let missing = out.path().join("none");
    fails(
        &["quantize", "-m", text(&missing), "-o", text(&output)],
        1,
        &["none", "no such folder"],
    );
    let azure = "azureml://registries/azureml/models/Phi-3.5-mini-instruct/versions/4";
    fails(
        &["quantize", "-m", azure, "-o", text(&output)],
        1,
        &["Azure ML", "az ml model download"],
    );
    fails(&["generate", "-m", text(&missing), "--prompt", "x"], 1, &["none"]);
    let config_only = out.path().join("empty");
    std::fs::create_dir(&config_only).unwrap();
    fails(
        &["auto-opt", "-m", text(&config_only), "-o", text(&output)],
        1,
        &["config.json"],
    );
    assert!(!output.exists());
}

#[test]
fn broken_weights_are_refused_before_anything_is_written() {
    let out = tempfile::tempdir().unwrap();
    let model = copy_of_tiny(out.path());
    let output = out.path().join("awq");
    let weights = model.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();

    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    fails(
        &["quantize", "-m", text(&model), "-o", text(&output)],
        1,
        &["model.safetensors", "complete"],
    );
    fails(
        &["auto-opt", "-m", text(&model), "-o", text(&output)],
        1,
        &["model.safetensors", "complete"],
    );

    // A bfloat16 NaN at the end of the data.
    let mut broken = bytes.clone();
    let end = broken.len();
    broken[end - 2..].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(&weights, &broken).unwrap();
    for algorithm in ["rtn", "kquant", "gptq", "awq"] {
        let words = [
            "quantize",
            "-m",
            text(&model),
            "-o",
            text(&output),
            "--algorithm",
            algorithm,
        ];
        fails(&words, 1, &["non-finite"]);
    }
    assert_eq!(files(&output), Vec::<PathBuf>::new());
}

#[test]
fn a_group_that_does_not_divide_names_the_linear() {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("q");
    let model = repository().join("tests/golden/peft/phi3");
    let code = olive(&["quantize", "-m", text(&model), "-o", text(&output)]);
    let stderr = String::from_utf8_lossy(&code.stderr);
    assert!(matches!(code.status.code(), Some(1 | 2)), "{stderr}");
    assert!(stderr.contains("128") && stderr.contains("proj"), "{stderr}");
    assert_eq!(files(&output), Vec::<PathBuf>::new());
}

#[test]
fn data_that_does_not_fit_the_template_names_column_and_line() {
    let out = tempfile::tempdir().unwrap();
    let data = out.path().join("rows.jsonl");
    std::fs::write(
        &data,
        "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"a\"}\n",
    )
    .unwrap();
    let output = out.path().join("ft");
    let model = tiny();
    let words = [
        "finetune",
        "-m",
        text(&model),
        "-d",
        "json",
        "--data_files",
        text(&data),
        "-o",
        text(&output),
    ];
    let words = [
        &words[..],
        &["--text_template", "{prompt}{response}", "--max_steps", "1"],
    ]
    .concat();
    fails(&words, 1, &["rows.jsonl", "`response` at line 2"]);
    assert_eq!(files(&output), Vec::<PathBuf>::new());
}

#[test]
fn an_adapter_for_another_model_is_refused_by_name() {
    let out = tempfile::tempdir().unwrap();
    let golden = repository().join("tests/golden/peft");
    let (model, runs) = (golden.join("phi3"), golden.join("runs"));
    let (fitting, other) = (
        runs.join("phi3-linear/adapter_final"),
        runs.join("llama-linear/adapter_final"),
    );
    let folder = out.path().join("onnx");
    let words = [
        "capture-onnx-graph",
        "-m",
        text(&model),
        "-a",
        text(&fitting),
        "-o",
        text(&folder),
    ];
    succeeds(&words);

    let file = out.path().join("travel");
    let written = file.with_extension("onnx_adapter");
    fails(
        &[
            "convert-adapters",
            "-a",
            text(&other),
            "-m",
            text(&folder),
            "-o",
            text(&file),
        ],
        1,
        &["model.layers.0.attn.k_proj.lora_B"],
    );
    assert!(!file.exists() && !written.exists());
    succeeds(&[
        "convert-adapters",
        "-a",
        text(&fitting),
        "-m",
        text(&folder),
        "-o",
        text(&file),
    ]);
    assert!(written.is_file());

    let output = out.path().join("other");
    let tiny = tiny();
    fails(
        &[
            "auto-opt",
            "-m",
            text(&tiny),
            "-a",
            text(&other),
            "-o",
            text(&output),
        ],
        1,
        &["layers.0"],
    );
    assert_eq!(files(&output), Vec::<PathBuf>::new());
}

#[test]
fn a_built_folder_answers_as_text_and_as_json() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("onnx");
    let model = tiny();
    let said = succeeds(&[
        "capture-onnx-graph",
        "-m",
        text(&model),
        "--use_model_builder",
        "-o",
        text(&folder),
    ]);
    assert!(said.contains("Model is saved at"), "{said}");
    let onnx = folder.join("model");
    for name in [
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
    ] {
        assert!(onnx.join(name).is_file(), "{name}");
    }

    let prompt = "In the evening";
    let words = [
        "generate",
        "-m",
        text(&onnx),
        "--prompt",
        prompt,
        "--max_new_tokens",
        "5",
        "--json",
    ];
    let report: Value = serde_json::from_str(&succeeds(&words)).unwrap();
    for key in [
        "prompt_ids",
        "output_ids",
        "text",
        "finish_reason",
        "load_s",
        "prefill_tokens_per_s",
    ] {
        assert!(report.get(key).is_some(), "{key} is not in {report}");
    }
    assert_eq!(report["output_ids"].as_array().unwrap().len(), 5);
    assert_eq!(report["finish_reason"], "length");
    let streamed = succeeds(&words[..words.len() - 1]);
    assert_eq!(streamed.trim(), report["text"].as_str().unwrap().trim());

    let ids: Vec<String> = report["prompt_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(Value::to_string)
        .collect();
    let ids = ids.join(",");
    let words = [
        "generate",
        "-m",
        text(&folder),
        "--input_ids",
        &ids,
        "--max_new_tokens",
        "5",
        "--json",
    ];
    let again: Value = serde_json::from_str(&succeeds(&words)).unwrap();
    assert_eq!(again["output_ids"], report["output_ids"]);
}

#[test]
fn a_dry_run_writes_the_workflow_and_nothing_else() {
    let out = tempfile::tempdir().unwrap();
    for (algorithm, pass) in [
        ("awq", "AutoAWQQuantizer"),
        ("gptq", "Gptq"),
        ("kquant", "KQuant"),
        ("rtn", "Rtn"),
    ] {
        let output = out.path().join(algorithm);
        let words = [
            "quantize",
            "-m",
            "org/model",
            "--algorithm",
            algorithm,
            "-o",
            text(&output),
            "--dry_run",
        ];
        succeeds(&words);
        assert_eq!(files(&output), [output.join("config.json")]);
        let config: Value =
            serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["passes"]["quantize"]["type"], pass);
        assert_eq!(config["input_model"]["model_path"], "org/model");
    }
}

#[test]
fn every_algorithm_leaves_a_model_that_evaluates() {
    let out = tempfile::tempdir().unwrap();
    let model = copy_of_tiny(out.path());
    let data = repository().join("fixtures/calibration-public-domain.txt");
    let loss = |model: &Path| -> f64 {
        let words = [
            "evaluate",
            "-m",
            text(model),
            "--data_files",
            text(&data),
            "--block_size",
            "128",
        ];
        let words = [&words[..], &["--max_blocks", "2", "--json"]].concat();
        let report: Value = serde_json::from_str(&succeeds(&words)).unwrap();
        report["perplexity"].as_f64().unwrap().ln()
    };
    let dense = loss(&model);
    for (algorithm, precision) in [
        ("gptq", "int4"),
        ("kquant", "int8"),
        ("rtn", "int8"),
        ("rtn", "int4"),
    ] {
        let output = out.path().join(format!("{algorithm}-{precision}"));
        let words = [
            "quantize",
            "-m",
            text(&model),
            "-o",
            text(&output),
            "--algorithm",
            algorithm,
            "--precision",
            precision,
            "--max_samples",
            "2",
            "--max_seq_len",
            "64",
        ];
        succeeds(&words);
        let found = loss(&output);
        let most = if precision == "int8" { 0.01 } else { 0.2 };
        assert!(
            (found - dense).abs() < most,
            "{algorithm} {precision}: {found} {dense}"
        );
    }
}

#[test]
fn evaluation_agrees_between_a_checkpoint_and_its_graph() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("onnx");
    let model = tiny();
    succeeds(&[
        "capture-onnx-graph",
        "-m",
        text(&model),
        "--use_model_builder",
        "-o",
        text(&folder),
    ]);
    let data = repository().join("fixtures/calibration-public-domain.txt");
    let perplexity = |model: &Path| {
        let words = [
            "evaluate",
            "-m",
            text(model),
            "--data_files",
            text(&data),
            "--block_size",
            "128",
        ];
        let words = [&words[..], &["--max_blocks", "4", "--json"]].concat();
        let report: Value = serde_json::from_str(&succeeds(&words)).unwrap();
        assert_eq!(
            (&report["blocks"], &report["tokens"]),
            (&4.into(), &(4 * 127).into())
        );
        report["perplexity"].as_f64().unwrap()
    };
    let (checkpoint, graph) = (perplexity(&model), perplexity(&folder));
    assert!((checkpoint / graph - 1.0).abs() < 1e-4, "{checkpoint} {graph}");
}

#[test]
fn help_is_there_at_once() {
    let mut fastest = Duration::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        let help = succeeds(&["--help"]);
        fastest = fastest.min(start.elapsed());
        for command in [
            "run", "quantize", "finetune", "auto-opt", "optimize", "generate", "chat", "evaluate", "demo",
        ] {
            assert!(help.contains(command), "{command}");
        }
    }
    assert!(fastest < Duration::from_millis(50), "{fastest:?}");
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_olive"))
        .arg("--help")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// Without a visible GPU: on a machine without a driver, and on one whose GPUs are hidden.
#[cfg(feature = "cuda")]
#[test]
fn a_gpu_that_is_not_there_is_an_error_that_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let model = tiny();
    let common = [
        "-m",
        model.to_str().unwrap(),
        "--device",
        "gpu",
        "-o",
        output.to_str().unwrap(),
    ];
    let data = repository().join("fixtures/data_sample_travel.jsonl");
    let data = [
        "-d",
        "json",
        "--data_files",
        data.to_str().unwrap(),
        "--text_template",
        "{prompt}",
    ];
    let commands = [
        (["quantize", "--algorithm", "awq"].as_slice(), data.as_slice()),
        (&["quantize", "--algorithm", "gptq"], &data),
        (&["finetune", "--max_steps", "1"], &data),
    ];
    for (command, rest) in commands {
        let output = Command::new(env!("CARGO_BIN_EXE_olive"))
            .args(command.iter().chain(&common).chain(rest))
            .env("CUDA_VISIBLE_DEVICES", "")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command:?}: {stderr}");
        assert!(
            stderr.contains("--device gpu is not supported: "),
            "{command:?}: {stderr}"
        );
        let missing = ["no NVIDIA driver was found", "the NVIDIA driver finds no GPU"];
        assert!(
            missing.iter().any(|part| stderr.contains(part)),
            "{command:?}: {stderr}"
        );
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
    assert!(!output.exists(), "a failed command left something behind");
}
