//! The engine on toy passes: what runs, what is found again, what is searched.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed expectation in a test is a failed test"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use olive_core::workflow::engine::{Engine, Outcome};
use olive_core::workflow::plan::Plan;
use olive_core::workflow::registry::{
    EvalContext, Evaluator, EvaluatorRegistry, HfOpener, Measured, PassRegistry,
};
use olive_core::workflow::schema::document::Document;
use olive_core::workflow::schema::{MetricSpec, RunConfig};
use olive_core::{
    CancelToken, Error, HfModel, ModelHandle, ModelKind, NoProgress, ParamKind, ParamSpec, Pass, PassConfig,
    PassContext, Result,
};
use serde_json::{Value, json};

const fn number(name: &'static str, default: &'static str, search: &'static [&'static str]) -> ParamSpec {
    ParamSpec {
        name,
        kind: ParamKind::Int,
        default: Some(default),
        doc: "",
        search,
    }
}

/// Adds a number to the one that the toy model holds.
struct Add {
    name: &'static str,
    runs: Arc<AtomicUsize>,
}

impl Pass for Add {
    fn name(&self) -> &'static str {
        self.name
    }
    fn params(&self) -> &'static [ParamSpec] {
        const PARAMS: &[ParamSpec] = &[
            number("by", "1", &["0", "1", "2", "3", "4"]),
            number("fail_at", "-1", &[]),
            ParamSpec {
                name: "data_config",
                kind: ParamKind::DataConfig,
                default: Some("null"),
                doc: "",
                search: &[],
            },
        ];
        PARAMS
    }
    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }
    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        let int = |key: &str| config.values()[key].as_i64().unwrap();
        let sum = held(model) + int("by");
        if int("by") == int("fail_at") {
            return Err(Error::unsupported("this number", "it is the one that fails"));
        }
        let folder = context.output.join("model");
        std::fs::create_dir_all(&folder).unwrap();
        for entry in std::fs::read_dir(model.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        std::fs::write(
            folder.join("generation_config.json"),
            json!({"sum": sum}).to_string(),
        )
        .unwrap();
        Ok(Arc::new(HfModel::open(folder)?))
    }
}

fn held(model: &dyn ModelHandle) -> i64 {
    let text = std::fs::read_to_string(model.path().join("generation_config.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["sum"]
        .as_i64()
        .unwrap()
}

/// How far the number is from 5, and how large it is.
struct Distance(Arc<AtomicUsize>);

impl Evaluator for Distance {
    fn metric(&self) -> &'static str {
        "accuracy"
    }
    fn evaluate(
        &self,
        model: &dyn ModelHandle,
        metric: &MetricSpec,
        _: &EvalContext<'_>,
    ) -> Result<Vec<Measured>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let sum = held(model) as f64;
        let measured = metric.sub_types.iter().map(|sub| Measured {
            name: sub.name.clone(),
            value: if sub.name == "perplexity" {
                (sum - 5.0).abs()
            } else {
                sum
            },
            higher_is_better: sub.higher_is_better,
        });
        Ok(measured.collect())
    }
}

/// A toy workflow in a folder of its own.
struct Toy {
    folder: tempfile::TempDir,
    passes: PassRegistry,
    evaluators: EvaluatorRegistry,
    runs: Arc<AtomicUsize>,
    evaluations: Arc<AtomicUsize>,
}

impl Toy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
            "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "vocab_size": 32, "hidden_act": "silu",
            "tie_word_embeddings": false, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2});
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        std::fs::write(model.join("generation_config.json"), r#"{"sum": 0}"#).unwrap();
        let header = br#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend([0; 4]);
        std::fs::write(model.join("model.safetensors"), bytes).unwrap();
        std::fs::write(folder.path().join("data.json"), r#"{"text": "a"}"#).unwrap();
        let (runs, evaluations) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (mut passes, mut evaluators) = (PassRegistry::new(), EvaluatorRegistry::new());
        for name in ["ToyAdd", "ToyMore"] {
            passes.register(Box::new(Add {
                name,
                runs: runs.clone(),
            }));
        }
        evaluators.register(Box::new(Distance(evaluations.clone())));
        Self {
            folder,
            passes,
            evaluators,
            runs,
            evaluations,
        }
    }

    fn run(&self, workflow: &Value) -> Result<Outcome> {
        self.run_with(workflow, &CancelToken::default())
    }

    fn run_with(&self, workflow: &Value, cancel: &CancelToken) -> Result<Outcome> {
        let document = Document::from_value("toy.json", self.folder.path(), workflow.clone());
        let plan = Plan::new(&RunConfig::from_document(&document)?, &self.passes)?;
        let engine = Engine {
            passes: &self.passes,
            evaluators: &self.evaluators,
            opener: &HfOpener,
            progress: &NoProgress,
            cancel,
            device: "cpu",
            keep_runs: true,
        };
        Ok(engine.run(&plan)?.remove(0))
    }

    /// How many passes and evaluations were computed since the last call.
    fn work(&self) -> (usize, usize) {
        (
            self.runs.swap(0, Ordering::SeqCst),
            self.evaluations.swap(0, Ordering::SeqCst),
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn out(&self) -> i64 {
        let text = std::fs::read_to_string(self.path("out/model/generation_config.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["sum"]
            .as_i64()
            .unwrap()
    }
}

fn workflow(passes: Value) -> Value {
    json!({
        "input_model": {"type": "HfModel", "model_path": "model"},
        "data_configs": [{"name": "d", "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": "data.json"}}],
        "evaluators": {"e": {"metrics": [{"name": "m", "type": "accuracy", "sub_types": [
            {"name": "perplexity", "priority": 1}, {"name": "accuracy_score", "priority": 2}]}]}},
        "passes": passes,
        "evaluator": "e", "cache_dir": "cache", "output_dir": "out"
    })
}

#[test]
fn a_second_run_does_no_work_and_leaves_the_same_files() {
    let toy = Toy::new();
    let flow = workflow(json!({"a": {"type": "ToyAdd", "by": 2}, "b": {"type": "toymore", "by": 4}}));
    let first = toy.run(&flow).unwrap();
    assert_eq!((first.ran, first.cached, toy.work()), (2, 0, (2, 2)));
    assert_eq!(toy.out(), 6);
    assert_eq!(first.metrics["m-perplexity"].value, 1.0);
    let files = [
        "footprint.json",
        "output_footprint.json",
        "run_history.txt",
        "metrics.json",
        "input_model_metrics.json",
        "model_config.json",
        "model/config.json",
        "model/model.safetensors",
    ];
    let bytes =
        |name: &str| std::fs::read(toy.path("out").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let before: Vec<Vec<u8>> = files.iter().map(|name| bytes(name)).collect();
    let start = std::time::Instant::now();
    let second = toy.run(&flow).unwrap();
    assert!(start.elapsed().as_millis() < 500, "{:?}", start.elapsed());
    assert_eq!((second.ran, second.cached, toy.work()), (0, 2, (0, 0)));
    assert_eq!(before, files.iter().map(|name| bytes(name)).collect::<Vec<_>>());
    let config: Value = serde_json::from_slice(&bytes("model_config.json")).unwrap();
    assert_eq!(config["config"]["model_path"], "model");
    // What was taken away is placed again, without any work.
    std::fs::remove_file(toy.path("out/model/config.json")).unwrap();
    toy.run(&flow).unwrap();
    assert_eq!(
        (toy.work(), bytes("model/config.json").is_empty()),
        ((0, 0), false)
    );
}

#[test]
fn what_depends_on_a_change_runs_again_and_nothing_else() {
    let toy = Toy::new();
    let flow = workflow(json!({
        "a": {"type": "ToyAdd", "by": 2},
        "b": {"type": "ToyMore", "by": 4, "data_config": "d"},
        "c": {"type": "ToyAdd", "by": 1}
    }));
    toy.run(&flow).unwrap();
    assert_eq!(toy.work(), (3, 2));
    // One byte of the data: the pass that reads it and the one after it.
    std::fs::write(toy.path("data.json"), r#"{"text": "b"}"#).unwrap();
    toy.run(&flow).unwrap();
    assert_eq!(toy.work(), (2, 1));
    // Back again: everything is still known.
    std::fs::write(toy.path("data.json"), r#"{"text": "a"}"#).unwrap();
    toy.run(&flow).unwrap();
    assert_eq!(toy.work(), (0, 0));
    // The same bytes under another name are the same data.
    std::fs::rename(toy.path("data.json"), toy.path("other.json")).unwrap();
    let mut renamed = flow.clone();
    renamed["data_configs"][0]["load_dataset_config"]["data_files"] = json!("other.json");
    toy.run(&renamed).unwrap();
    assert_eq!(toy.work(), (0, 0));
    // One byte of the model: everything.
    let weights = toy.path("model/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() = 1;
    std::fs::write(&weights, bytes).unwrap();
    toy.run(&renamed).unwrap();
    assert_eq!(toy.work(), (3, 2));
    // A parameter: its pass and the ones after it.
    renamed["passes"]["b"]["by"] = json!(3);
    toy.run(&renamed).unwrap();
    assert_eq!(toy.work(), (2, 1));
    assert_eq!(toy.out(), 6);
}

#[test]
fn a_result_that_was_tampered_with_is_made_again() {
    let toy = Toy::new();
    let flow = workflow(json!({"a": {"type": "ToyAdd", "by": 2}}));
    let outcome = toy.run(&flow).unwrap();
    toy.work();
    let kept = toy
        .path("cache/default_workflow/runs")
        .join(&outcome.model_id)
        .join("models/model/config.json");
    let text = std::fs::read_to_string(&kept).unwrap();
    std::fs::write(&kept, text + " ").unwrap();
    toy.run(&flow).unwrap();
    assert_eq!(toy.work().0, 1);
}

#[test]
fn a_killed_run_continues_and_a_failed_one_is_tried_again() {
    let toy = Toy::new();
    let flow = workflow(json!({"a": {"type": "ToyAdd", "by": 2}, "b": {"type": "ToyMore", "by": 4}}));
    let cancel = CancelToken::default();
    cancel.cancel();
    assert!(matches!(toy.run_with(&flow, &cancel), Err(Error::Cancelled)));
    assert_eq!(toy.work(), (0, 0));
    // As if the process had been killed between the two passes: the first is done, the second left a part.
    let outcome = toy.run(&flow).unwrap();
    toy.work();
    let run = toy.path("cache/default_workflow/runs").join(&outcome.model_id);
    std::fs::remove_file(run.join("run.json")).unwrap();
    std::fs::remove_file(run.join("models/model/config.json")).unwrap();
    assert_eq!(toy.run(&flow).unwrap().ran, 1);
    assert_eq!(toy.work().0, 1);
    // A failure is not remembered as a result.
    let failing = workflow(json!({"a": {"type": "ToyAdd", "by": 3, "fail_at": 3}}));
    for _ in 0..2 {
        let error = toy.run(&failing).unwrap_err().to_string();
        assert!(
            error.contains("ToyAdd") && error.contains("the one that fails"),
            "{error}"
        );
        assert_eq!(toy.work().0, 1);
    }
}

#[test]
fn threads_on_one_cache_do_each_run_once() {
    let toy = Toy::new();
    let flow = workflow(json!({"a": {"type": "ToyAdd", "by": 2}, "b": {"type": "ToyMore", "by": 4}}));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| toy.run(&flow).unwrap());
        }
    });
    assert_eq!(toy.work(), (2, 2));
    assert_eq!(toy.out(), 6);
}

fn search(strategy: Value, passes: Value) -> Value {
    let mut flow = workflow(passes);
    flow["search_strategy"] = strategy;
    flow
}

#[test]
fn a_search_finds_the_front_twice_the_same() {
    let passes = json!({"a": {"type": "ToyAdd", "by": [0, 1, 2, 3]},
        "b": [{"type": "ToyMore", "by": [0, 2, 4], "fail_at": 2}, {"type": "ToyAdd", "by": 10}]});
    for strategy in [
        json!({"execution_order": "joint", "sampler": "sequential"}),
        json!({"execution_order": "joint", "sampler": "random", "seed": 3}),
        json!({"execution_order": "joint", "sampler": "tpe", "seed": 3}),
        json!({"execution_order": "pass-by-pass", "sampler": "sequential"}),
    ] {
        let flow = search(strategy.clone(), passes.clone());
        let (one, two) = (Toy::new(), Toy::new());
        let first = one.run(&flow).unwrap();
        // Nearest to 5, then largest: 1 + 4; 3 + 10 is farther and larger, so it is on the front, too.
        assert_eq!(one.out(), 5, "{strategy}");
        assert_eq!(first.metrics["m-perplexity"].value, 0.0);
        assert_eq!(first.failed.len(), 4, "{:?}", first.failed);
        let report = std::fs::read_to_string(one.path("out/pareto_frontier_footprint_chart.html")).unwrap();
        assert!(report.contains("<svg") && report.contains("ToyAdd → ToyMore") && report.contains("Failed"));
        let second = two.run(&flow).unwrap();
        assert_eq!(first.front, second.front);
        assert_eq!(first.model_id, second.model_id);
        one.work();
        // A search that is run again computes only what failed.
        let again = one.run(&flow).unwrap();
        assert_eq!(one.work(), (4, 0), "{strategy}");
        assert_eq!((again.ran, again.front), (0, first.front));
    }
}

#[test]
fn limits_and_goals_end_a_search() {
    let toy = Toy::new();
    let passes = json!({"a": {"type": "ToyAdd", "by": "SEARCHABLE_VALUES"}, "b": {"type": "ToyMore"}});
    let tried = |strategy: Value| {
        let outcome = toy.run(&search(strategy, passes.clone())).unwrap();
        outcome.ran + outcome.cached
    };
    assert_eq!(tried(json!({"sampler": "random", "max_samples": 7})), 14);
    assert_eq!(tried(json!({"sampler": "sequential", "max_iter": 3})), 6);
    assert_eq!(
        tried(json!({"sampler": "sequential", "include_pass_params": false})),
        10
    );
    let mut goal = search(
        json!({"sampler": "sequential", "stop_when_goals_met": true}),
        passes.clone(),
    );
    goal["evaluators"]["e"]["metrics"][0]["sub_types"][0]["goal"] = json!({"type": "threshold", "value": 3});
    let outcome = toy.run(&goal).unwrap();
    assert_eq!(toy.out(), 2);
    assert_eq!(outcome.ran + outcome.cached, 6);
    let mut none = search(json!(true), passes);
    none["evaluator"] = Value::Null;
    assert!(toy.run(&none).unwrap_err().to_string().contains("search"));
}

#[test]
fn a_zip_file_holds_the_candidates() {
    let toy = Toy::new();
    let mut flow = workflow(json!({"a": {"type": "ToyAdd", "by": 2}}));
    flow["packaging_config"] = json!({"type": "Zipfile", "name": "Packed"});
    let outcome = toy.run(&flow).unwrap();
    let bytes = std::fs::read(&outcome.packages[0]).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    for name in [
        "cpu-cpu/BestCandidateModel_1/model/config.json",
        "BestCandidateModel_1/metrics.json",
        "models_rank.json",
    ] {
        assert!(text.contains(name), "{name}");
    }
}

#[test]
fn parameters_and_references_are_checked_before_anything_runs() {
    let toy = Toy::new();
    let refuse = |flow: Value| {
        let error = toy.run(&flow).unwrap_err();
        assert_eq!(toy.work(), (0, 0));
        error.to_string()
    };
    let typo = refuse(workflow(json!({"a": {"type": "ToyAdd", "byy": 2}})));
    assert!(typo.contains("`passes.a.byy`, did you mean `by`?"), "{typo}");
    let data = refuse(workflow(json!({"a": {"type": "ToyAdd", "data_config": "e"}})));
    assert!(data.contains("`passes.a.data_config`"), "{data}");
    let pass = refuse(workflow(json!({"a": {"type": "ToyAdds"}})));
    assert!(pass.contains("`ToyAdd`"), "{pass}");
    let absent = refuse(workflow(json!({"a": {"type": "ToyAdd"}, "b": {"type": "Gptq"}})));
    assert!(
        absent.contains("the pass Gptq is not built into this program"),
        "{absent}"
    );
    let vendor = refuse(workflow(json!({"b": {"type": "OpenVINOIoUpdate"}})));
    assert!(vendor.contains("can only be planned"), "{vendor}");
    let mut host = workflow(json!({"a": {"type": "ToyAdd"}}));
    host["host"] = json!("nowhere");
    assert!(refuse(host).contains("`host`"));
}
