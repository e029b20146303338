//! `olive run` from outside: plans, the cache between processes, killed and parallel runs.

#![expect(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn command(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_olive"));
    command
        .current_dir(folder)
        .env_remove("OLIVE_CACHE_DIR")
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn olive(folder: &Path, words: &[&str]) -> Output {
    command(folder, words).output().unwrap()
}

fn succeeds(folder: &Path, words: &[&str]) -> (String, String) {
    let output = olive(folder, words);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?}: {stderr}");
    (String::from_utf8(output.stdout).unwrap(), stderr)
}

fn fails(folder: &Path, words: &[&str], code: i32) -> String {
    let output = olive(folder, words);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

/// All files below a folder, by relative path.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_path_buf();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// A workflow of three passes: calibrated on data, changed in its graph, measured.
fn workflow() -> Value {
    json!({
        "input_model": {"type": "HfModel", "model_path": "phi"},
        "data_configs": [
            {"name": "calibration", "type": "HuggingfaceContainer",
             "load_dataset_config": {"data_name": "json", "data_files": "travel.jsonl"},
             "pre_process_data_config": {"text_template": "{prompt} {response}", "max_seq_len": 64, "max_samples": 4}},
            {"name": "text", "type": "HuggingfaceContainer",
             "load_dataset_config": {"data_name": "text", "data_files": "text.txt"},
             "pre_process_data_config": {"max_seq_len": 64, "max_samples": 2, "add_special_tokens": false}}
        ],
        "evaluators": {"e": {"metrics": [
            {"name": "text", "type": "accuracy", "data_config": "text", "sub_types": [{"name": "perplexity", "priority": 1}]},
            {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 2}]}
        ]}},
        "passes": {
            "awq": {"type": "AutoAWQQuantizer", "data_config": "calibration"},
            "build": {"type": "ModelBuilder", "precision": "int4"},
            "tidy": {"type": "OnnxPeepholeOptimizer"}
        },
        "evaluator": "e", "cache_dir": "cache", "output_dir": "out", "log_severity_level": 1
    })
}

/// A folder with model, data and workflow.
fn place(workflow: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let fixtures = repository().join("fixtures");
    std::fs::create_dir(folder.path().join("phi")).unwrap();
    for entry in std::fs::read_dir(fixtures.join("tiny-phi3")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join("phi").join(entry.file_name())).unwrap();
    }
    std::fs::copy(
        fixtures.join("data_sample_travel.jsonl"),
        folder.path().join("travel.jsonl"),
    )
    .unwrap();
    std::fs::copy(
        fixtures.join("calibration-public-domain.txt"),
        folder.path().join("text.txt"),
    )
    .unwrap();
    write(folder.path(), workflow);
    folder
}

fn write(folder: &Path, workflow: &Value) {
    std::fs::write(folder.join("flow.json"), workflow.to_string()).unwrap();
}

/// The passes that have run, by the times of their records.
fn runs(folder: &Path) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder.join("cache/default_workflow/runs")).unwrap() {
        let record = entry.unwrap().path().join("run.json");
        let Ok(text) = std::fs::read(&record) else {
            continue;
        };
        let record: Value = serde_json::from_slice(&text).unwrap();
        *found
            .entry(record["pass_name"].as_str().unwrap().to_owned())
            .or_default() += 1;
    }
    found
}

#[test]
fn a_second_run_takes_no_time_and_a_changed_byte_what_depends_on_it() {
    let folder = place(&workflow());
    let folder = folder.path();
    let (said, _) = succeeds(folder, &["run", "--config", "flow.json"]);
    assert!(
        said.contains("AutoAWQQuantizer > ModelBuilder > OnnxPeepholeOptimizer"),
        "{said}"
    );
    assert!(
        said.contains("text-perplexity") && said.contains("Model is saved at"),
        "{said}"
    );
    for name in [
        "out/model/model.onnx",
        "out/model/model.onnx.data",
        "out/metrics.json",
        "out/footprint.json",
    ] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.join("out/model_config.json")).unwrap()).unwrap();
    assert_eq!(config["config"]["model_path"], "model");
    let before = files(&folder.join("out"));

    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        let (again, _) = succeeds(folder, &["run", "--config", "flow.json"]);
        fastest = fastest.min(start.elapsed());
        assert_eq!(again, said);
    }
    eprintln!("a second run takes {:.3} s", fastest.as_secs_f64());
    assert!(fastest < Duration::from_millis(500), "{fastest:?}");
    assert_eq!(files(&folder.join("out")), before);
    let once = [
        ("AutoAWQQuantizer", 1),
        ("ModelBuilder", 1),
        ("OnnxPeepholeOptimizer", 1),
    ];
    let count = |counts: [(&str, u64); 3]| counts.map(|(name, n)| (name.to_owned(), n)).into();
    assert_eq!(runs(folder), count(once));

    // A byte of the text that is only measured: no pass.
    change_byte(&folder.join("text.txt"), 40);
    let (measured, _) = succeeds(folder, &["run", "--config", "flow.json"]);
    assert_eq!(runs(folder), count(once));
    assert_ne!(measured, said);
    // A byte of the calibration data: the pass that reads it, and what follows.
    change_byte(&folder.join("travel.jsonl"), 13);
    succeeds(folder, &["run", "--config", "flow.json"]);
    let twice = [
        ("AutoAWQQuantizer", 2),
        ("ModelBuilder", 2),
        ("OnnxPeepholeOptimizer", 2),
    ];
    assert_eq!(runs(folder), count(twice));
    // A parameter of the second pass: not the first.
    let mut changed = workflow();
    changed["passes"]["build"]["precision"] = json!("fp32");
    write(folder, &changed);
    succeeds(folder, &["run", "--config", "flow.json"]);
    let thrice = [
        ("AutoAWQQuantizer", 2),
        ("ModelBuilder", 3),
        ("OnnxPeepholeOptimizer", 3),
    ];
    assert_eq!(runs(folder), count(thrice));
}

/// Changes a letter of a text file.
fn change_byte(path: &Path, near: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = (near..).find(|at| bytes[*at].is_ascii_lowercase()).unwrap();
    bytes[at] = if bytes[at] == b'e' { b'o' } else { b'e' };
    std::fs::write(path, bytes).unwrap();
}

/// What a run leaves, without the times of the run.
fn result(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = files(&folder.join("out"));
    for name in ["footprint.json", "output_footprint.json", "run_history.txt"] {
        assert!(found.remove(Path::new(name)).is_some(), "{name}");
    }
    found
}

fn wait(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_killed_run_continues_to_the_same_result() {
    let undisturbed = place(&workflow());
    let start = Instant::now();
    succeeds(undisturbed.path(), &["run", "--config", "flow.json"]);
    let time = start.elapsed();
    let expected = result(undisturbed.path());
    let folder = place(&workflow());
    let mut killed = 0;
    for moment in [0.2, 0.5, 0.8] {
        let mut child = command(folder.path(), &["run", "--config", "flow.json"])
            .spawn()
            .unwrap();
        std::thread::sleep(time.mul_f64(moment));
        killed += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    succeeds(folder.path(), &["run", "--config", "flow.json"]);
    assert!(killed > 0, "no run was still running when it was to be killed");
    let found = result(folder.path());
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, bytes) in &expected {
        assert!(found[name] == *bytes, "`{}` differs", name.display());
    }
}

#[test]
fn parallel_runs_on_one_cache_do_each_pass_once() {
    let folder = place(&workflow());
    let mut other = workflow();
    other["output_dir"] = json!("other");
    std::fs::write(folder.path().join("other.json"), other.to_string()).unwrap();
    let children: Vec<Child> = ["flow.json", "flow.json", "other.json"]
        .iter()
        .map(|name| {
            command(folder.path(), &["run", "--config", name])
                .spawn()
                .unwrap()
        })
        .collect();
    children.into_iter().for_each(wait);
    let once = [
        ("AutoAWQQuantizer", 1),
        ("ModelBuilder", 1),
        ("OnnxPeepholeOptimizer", 1),
    ];
    assert_eq!(
        runs(folder.path()),
        once.map(|(name, n)| (name.to_owned(), n)).into()
    );
    let model = |name: &str| files(&folder.path().join(name).join("model"));
    assert_eq!(model("out"), model("other"));
}

#[test]
fn a_dry_run_prints_the_plan_and_touches_nothing() {
    let folder = place(&workflow());
    let before = files(folder.path());
    let (plan, warned) = succeeds(folder.path(), &["run", "--config", "flow.json", "--dry_run"]);
    for part in [
        "AutoAWQQuantizer",
        "ModelBuilder",
        "int4",
        "calibration",
        "text-generation-with-past",
    ] {
        assert!(plan.contains(part), "{part} is not in {plan}");
    }
    assert!(warned.is_empty(), "{warned}");
    // A model of the hub is planned for, not fetched; where it comes from can be overridden.
    let mut remote = workflow();
    remote["input_model"]["model_path"] = json!("org/name");
    remote["engine"] = json!({"execution_providers": ["CPUExecutionProvider"]});
    std::fs::write(folder.path().join("remote.json"), remote.to_string()).unwrap();
    let words = ["run", "--config", "remote.json", "--dry_run", "-o", "elsewhere"];
    let (plan, warned) = succeeds(folder.path(), &words);
    assert!(
        plan.contains("org/name (hub)") && plan.contains("elsewhere"),
        "{plan}"
    );
    assert_eq!(warned.matches("execution_providers").count(), 1, "{warned}");
    let words = ["run", "--config", "remote.json", "--dry_run", "-m", "phi"];
    assert!(succeeds(folder.path(), &words).0.contains("phi, task"));
    let mut after = files(folder.path());
    after.remove(Path::new("remote.json"));
    assert_eq!(after, before);
}

#[test]
fn mistakes_are_named_before_anything_runs() {
    let folder = place(&workflow());
    let run = ["run", "--config", "flow.json"];
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed = workflow();
        change(&mut changed);
        write(folder.path(), &changed);
    };
    with(&|flow| flow["passes"]["awq"]["bitz"] = json!(4));
    let said = fails(folder.path(), &run, 2);
    assert!(said.contains("`passes.awq.bitz`, did you mean `bits`?"), "{said}");
    with(&|flow| flow["outputdir"] = json!("x"));
    assert!(fails(folder.path(), &run, 2).contains("did you mean `output_dir`?"));
    with(&|flow| flow["passes"]["last"] = json!({"type": "OpenVINOIoUpdate"}));
    assert!(fails(folder.path(), &run, 1).contains("OpenVINOIoUpdate"));
    with(&|flow| {
        flow["evaluators"]["e"]["metrics"][0]["sub_types"] = json!([{"name": "wer", "priority": 1}])
    });
    assert!(fails(folder.path(), &run, 1).contains("`wer`"));
    with(&|flow| flow["evaluators"]["e"] = json!({"type": "LMEvaluator", "tasks": ["mmlu"]}));
    assert!(fails(folder.path(), &run, 1).contains("`mmlu`"));
    assert!(fails(folder.path(), &["run"], 2).contains("--config"));
    assert!(fails(folder.path(), &["run", "--config", "none.json"], 1).contains("none.json"));
    assert!(!folder.path().join("cache").exists() && !folder.path().join("out").exists());
}

#[test]
fn one_pass_runs_alone_and_passes_are_listed() {
    let folder = place(&workflow());
    let (list, _) = succeeds(folder.path(), &["run-pass", "--list-passes"]);
    for name in [
        "AutoAWQQuantizer",
        "LoRA",
        "ModelBuilder",
        "OnnxPeepholeOptimizer",
    ] {
        assert!(list.lines().any(|line| line == name), "{name} is not in {list}");
    }
    let (parameters, _) = succeeds(
        folder.path(),
        &["run-pass", "--list-passes", "--pass-name", "modelbuilder"],
    );
    assert!(parameters.contains("precision"), "{parameters}");
    let words = [
        "run-pass",
        "--pass-name",
        "modelbuilder",
        "--pass-config",
        r#"{"precision": "int4"}"#,
        "-m",
        "phi",
    ];
    let (said, _) = succeeds(folder.path(), &[&words[..], &["-o", "one"]].concat());
    assert!(said.contains("Model is saved at"), "{said}");
    let left: Vec<PathBuf> = files(&folder.path().join("one")).into_keys().collect();
    assert!(
        left.contains(&"model/model.onnx".into()) && left.contains(&"model_config.json".into()),
        "{left:?}"
    );
    assert!(
        left.iter().all(|path| !path.starts_with(".olive-work")),
        "{left:?}"
    );
    // An ONNX folder is told apart by what it holds.
    let words = [
        "run-pass",
        "--pass-name",
        "OnnxPeepholeOptimizer",
        "-m",
        "one",
        "-o",
        "two",
    ];
    succeeds(folder.path(), &words);
    assert!(folder.path().join("two/model/model.onnx").is_file());
    let wrong = [
        "run-pass",
        "--pass-name",
        "ModelBuilder",
        "--pass-config",
        r#"{"precission": "int4"}"#,
        "-m",
        "phi",
    ];
    assert!(fails(folder.path(), &wrong, 2).contains("did you mean `precision`?"));
    let unknown = ["run-pass", "--pass-name", "ModelBuildr", "-m", "phi"];
    assert!(fails(folder.path(), &unknown, 2).contains("`ModelBuilder`"));
}

#[test]
fn commands_expand_to_passes() {
    let folder = place(&workflow());
    let expansion = |words: &[&str]| -> Vec<String> {
        let words = [words, &["-m", "org/name", "-o", "plan", "--dry_run"]].concat();
        succeeds(folder.path(), &words);
        let text = std::fs::read(folder.path().join("plan/config.json")).unwrap();
        let config: Value = serde_json::from_slice(&text).unwrap();
        let passes = config["passes"].as_object().unwrap().values();
        passes
            .map(|pass| pass["type"].as_str().unwrap().to_owned())
            .collect()
    };
    for (words, passes) in [
        (&["optimize"][..], &["ModelBuilder"][..]),
        (&["optimize", "--precision", "int4"], &["Gptq", "ModelBuilder"]),
        (
            &[
                "optimize",
                "--precision",
                "int4",
                "--provider",
                "WebGpuExecutionProvider",
            ],
            &["Gptq", "ModelBuilder", "OnnxIODataTypeConverter"],
        ),
        (
            &[
                "optimize",
                "--surgeries",
                "RemoveRopeMultiCache",
                "--dim_param",
                "batch_size",
                "--dim_value",
                "1",
            ],
            &["ModelBuilder", "GraphSurgeries", "DynamicToFixedShape"],
        ),
        (
            &["optimize", "--exporter", "dynamo_exporter"],
            &["OnnxConversion", "OnnxPeepholeOptimizer"],
        ),
        (&["auto-opt", "--use_ort_genai"], &["ModelBuilder"]),
        (
            &[
                "auto-opt",
                "--precision",
                "int4",
                "--num-splits",
                "2",
                "--use_qdq_encoding",
            ],
            &[
                "CaptureSplitInfo",
                "ModelBuilder",
                "MatMulNBitsToQDQ",
                "SplitModel",
            ],
        ),
        (
            &["capture-onnx-graph", "--use_model_builder", "--precision", "bf16"],
            &["ModelBuilder"],
        ),
        (
            &[
                "capture-onnx-graph",
                "--use_dynamo_exporter",
                "--fixed_param_dict",
                "batch_size=1",
            ],
            &["OnnxConversion", "DynamicToFixedShape"],
        ),
    ] {
        assert_eq!(expansion(words), passes, "{words:?}");
    }
    // What is written down can be run as it is.
    let words = [
        "capture-onnx-graph",
        "-m",
        "phi",
        "--precision",
        "int4",
        "-o",
        "plan",
        "--save_config_file",
    ];
    succeeds(folder.path(), &words);
    assert!(folder.path().join("plan/model/model.onnx").is_file());
    succeeds(
        folder.path(),
        &["run", "--config", "plan/config.json", "--dry_run"],
    );
}
