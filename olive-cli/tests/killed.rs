//! A step of the lab that is killed with no warning, then run again: it finishes, with the bytes of a run that nobody
//! disturbed.

#![expect(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Shares of the undisturbed run's time after which a run is killed.
const MOMENTS: [f64; 4] = [0.1, 0.35, 0.6, 0.85];

/// Values that hold times: they are not compared.
const TIMES: [&str; 4] = ["seconds", "tokens_per_s", "train_runtime", "elapsed_s"];

fn olive(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_olive"));
    command
        .current_dir(folder)
        .args(words)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn finish(folder: &Path, words: &[&str]) -> Duration {
    let start = Instant::now();
    let output = olive(folder, words).output().unwrap();
    assert!(
        output.status.success(),
        "{words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    start.elapsed()
}

/// Kills the run after `time`; whether it was still running then.
fn kill_after(folder: &Path, words: &[&str], time: Duration) -> bool {
    let mut child = olive(folder, words).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(time);
    let running = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    running
}

/// Contents of all files below a folder by relative path, without the times in JSON files.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            found.insert(
                path.strip_prefix(folder).unwrap().to_path_buf(),
                timeless(&path, bytes),
            );
        }
    }
    found
}

fn timeless(path: &Path, bytes: Vec<u8>) -> Vec<u8> {
    let json = path.extension().is_some_and(|e| e == "json" || e == "jsonl");
    if !json {
        return bytes;
    }
    let text = String::from_utf8(bytes).unwrap();
    let one = serde_json::from_str::<Value>(&text).map(|value| vec![value]);
    let values = one.unwrap_or_else(|_| {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    });
    let values: Vec<String> = values
        .into_iter()
        .map(|value| without_times(value).to_string())
        .collect();
    values.join("\n").into_bytes()
}

fn without_times(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.into_iter().filter(|(key, _)| !TIMES.contains(&key.as_str()));
            Value::Object(kept.map(|(key, value)| (key, without_times(value))).collect())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(without_times).collect()),
        other => other,
    }
}

/// Runs `words` undisturbed in one folder, and killed and repeated in others; all leave the same bytes in `output`.
fn survives(prepare: impl Fn(&Path), words: &[&str], output: &str) {
    let undisturbed = tempfile::tempdir().unwrap();
    prepare(undisturbed.path());
    let time = finish(undisturbed.path(), words);
    let expected = contents(&undisturbed.path().join(output));
    assert!(!expected.is_empty());
    let mut killed = 0;
    for moment in MOMENTS {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        killed += usize::from(kill_after(folder.path(), words, time.mul_f64(moment)));
        finish(folder.path(), words);
        let found = contents(&folder.path().join(output));
        let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "killed at {moment}");
        for (name, bytes) in &expected {
            assert!(
                found[name] == *bytes,
                "`{}` differs after a kill at {moment}",
                name.display()
            );
        }
    }
    assert!(killed > 0, "no run was still running when it was to be killed");
}

fn model(folder: &Path) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    std::fs::create_dir_all(folder.join("phi")).unwrap();
    for entry in std::fs::read_dir(fixtures.join("tiny-phi3")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join("phi").join(entry.file_name())).unwrap();
    }
    std::fs::copy(
        fixtures.join("data_sample_travel.jsonl"),
        folder.join("travel.jsonl"),
    )
    .unwrap();
}

#[rustfmt::skip]
const QUANTIZE: &[&str] = &[
    "quantize", "-m", "phi", "--algorithm", "awq", "-d", "json", "--data_files", "travel.jsonl",
    "--text_template", "{prompt} {response}", "--max_seq_len", "64", "--max_samples", "4", "-o", "awq",
];

#[rustfmt::skip]
const FINETUNE: &[&str] = &[
    "finetune", "-m", "phi", "-d", "json", "--data_files", "travel.jsonl", "--text_template", "{prompt} {response}",
    "--max_seq_len", "64", "--max_steps", "8", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
    "--save_strategy", "steps", "--save_steps", "2", "-o", "ft",
];

#[rustfmt::skip]
const EXPORT: &[&str] = &[
    "auto-opt", "-m", "ft/model", "--adapter_path", "ft/adapter", "--device", "cpu", "--provider",
    "CPUExecutionProvider", "--use_ort_genai", "-o", "onnx",
];

#[test]
fn a_killed_quantization_continues_to_the_same_bytes() {
    survives(model, QUANTIZE, "awq");
}

#[test]
fn a_killed_training_continues_to_the_same_bytes() {
    survives(model, FINETUNE, "ft");
}

#[test]
fn a_killed_export_is_made_again_with_the_same_bytes() {
    let prepare = |folder: &Path| {
        model(folder);
        let mut words = FINETUNE.to_vec();
        let steps = words.iter().position(|word| *word == "8").unwrap();
        words[steps] = "1";
        finish(folder, &words);
    };
    survives(prepare, EXPORT, "onnx");
}

#[test]
fn times_are_left_out_of_the_comparison_and_nothing_else() {
    let kept = without_times(
        serde_json::json!({"loss": 1.0, "seconds": 3.0, "list": [{"tokens_per_s": 2, "a": 1}]}),
    );
    assert_eq!(kept, serde_json::json!({"loss": 1.0, "list": [{"a": 1}]}));
}
