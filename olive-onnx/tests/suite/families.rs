//! What differs between families, on tiny checkpoints of the repository; and checkpoints that are refused.

use std::path::{Path, PathBuf};

use olive_core::{CancelToken, Checkpoint, HfModel, ModelHandle, ModelKind, NoProgress, TensorSource};
use olive_onnx::ir::Graph;
use olive_onnx::{BuilderOptions, OnnxFolder, OnnxModel, Precision, build_model_folder, plan_model_folder};
use serde_json::Value;

use crate::building::build;

fn checkpoint(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/families")
        .join(family)
}

fn graph(family: &str, precision: Precision) -> (Graph, Value) {
    let scratch = tempfile::tempdir().unwrap();
    build(
        &checkpoint(family),
        precision,
        None,
        &scratch.path().join("model"),
    );
    let folder = OnnxFolder::open(scratch.path()).unwrap();
    let config = folder.genai_config().unwrap().clone();
    (folder.into_model().graph, config)
}

fn count(graph: &Graph, op_type: &str) -> usize {
    graph.nodes.iter().filter(|node| node.op_type == op_type).count()
}

#[test]
fn a_sliding_window_is_on_every_attention_and_not_in_the_runtimes_config() {
    let (windowed, config) = graph("mistral", Precision::Fp32);
    let windows = |graph: &Graph| -> Vec<Option<i64>> {
        let attention = graph
            .nodes
            .iter()
            .filter(|node| node.op_type == "GroupQueryAttention");
        attention
            .map(|node| node.int("local_window_size").unwrap())
            .collect()
    };
    assert_eq!(windows(&windowed), [Some(16), Some(16)]);
    assert!(config.pointer("/model/decoder/sliding_window").is_none());
    assert_eq!(config.pointer("/model/type").unwrap(), "mistral");
    assert_eq!(windows(&graph("qwen2", Precision::Fp32).0), [Some(-1), Some(-1)]);
}

#[test]
fn norms_on_heads_stand_before_the_attention() {
    let (graph, _) = graph("qwen3", Precision::Int4);
    assert_eq!(count(&graph, "Split"), 2);
    assert_eq!(count(&graph, "SimplifiedLayerNormalization"), 1 + 2 * 2);
    let attention = graph.node("/model/layers.1/attn/GroupQueryAttention").unwrap();
    assert_eq!(
        attention.input(0),
        Some("/model/layers.1/attn/q_norm/Reshape_2/output_0")
    );
    assert_eq!(
        attention.input(2),
        Some("/model/layers.1/attn/qkv_proj/Split/output_2")
    );
    assert_eq!(
        graph
            .initializer("model.layers.0.attn.k_norm.layernorm.weight")
            .unwrap()
            .shape(),
        [16]
    );
}

#[test]
fn partial_rotation_and_tied_heads_have_the_sizes_they_should() {
    let (partial, _) = graph("phi3-partial", Precision::Fp32);
    assert_eq!(partial.initializer("cos_cache").unwrap().shape(), [128, 24]);
    let (tied, _) = graph("llama3-rope", Precision::Int4);
    assert_eq!(count(&tied, "GatherBlockQuantized"), 1);
    assert!(tied.initializer("model.embed_tokens.weight").is_none());
    // With two blocks a row, zero points are whole bytes and shared; with one they are not.
    for (block_size, shared) in [(32, 1), (64, 0)] {
        let options = BuilderOptions {
            block_size,
            is_symmetric: false,
            ..BuilderOptions::with_precision(Precision::Int4)
        };
        let model = HfModel::open(checkpoint("llama3-rope")).unwrap();
        let plan = plan_model_folder(&model, None, &options).unwrap();
        let graph = &plan.model().graph;
        assert_eq!(count(graph, "GatherBlockQuantized"), shared);
        let own = graph.initializer("model.embed_tokens.weight");
        assert_eq!(own.is_some(), shared == 0);
        assert!(graph.initializer("lm_head.MatMul.weight_zero_points").is_some());
    }
}

#[test]
fn the_estimate_is_what_is_written_and_the_folder_is_a_model() {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("model");
    let source = HfModel::open(checkpoint("mistral")).unwrap();
    let plan = plan_model_folder(&source, None, &BuilderOptions::default()).unwrap();
    plan.write(&output, &NoProgress, &CancelToken::default()).unwrap();
    let data = std::fs::metadata(output.join("model.onnx.data")).unwrap().len();
    assert_eq!(plan.weight_bytes(), data);
    let model = OnnxModel::open(scratch.path()).unwrap();
    assert_eq!((model.kind(), model.spec()), (ModelKind::Onnx, source.spec()));
    let norm = model
        .tensors()
        .read_f32("model.layers.0.input_layernorm.weight")
        .unwrap();
    assert_eq!(
        norm,
        source
            .tensors()
            .read_f32("model.layers.0.input_layernorm.weight")
            .unwrap()
    );
    assert_eq!(
        model.fingerprint().unwrap(),
        OnnxModel::open(&output).unwrap().fingerprint().unwrap()
    );
    assert!(plan_model_folder(&model, None, &BuilderOptions::default()).is_err());
}

/// The Mistral checkpoint with its config or weights changed.
fn broken(config: impl Fn(&mut Value), weights: impl Fn(&mut Vec<u8>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint("mistral");
    let mut fields: Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config(&mut fields);
    std::fs::write(folder.path().join("config.json"), fields.to_string()).unwrap();
    let mut bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    weights(&mut bytes);
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

#[test]
fn bad_checkpoints_are_refused_by_name_and_leave_nothing() {
    let refuse = |folder: tempfile::TempDir| {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("model");
        let model = HfModel::open(folder.path()).unwrap();
        let options = BuilderOptions::default();
        let cancel = CancelToken::default();
        let built = build_model_folder(&model, None, &options, &output, &NoProgress, &cancel);
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
        built.unwrap_err().to_string()
    };
    let deeper = refuse(broken(|config| config["num_hidden_layers"] = 3.into(), |_| ()));
    assert!(deeper.contains("model.layers.2."), "{deeper}");
    let shallower = refuse(broken(|config| config["num_hidden_layers"] = 1.into(), |_| ()));
    assert!(shallower.contains("model.layers.1."), "{shallower}");
    let wider = refuse(broken(|config| config["intermediate_size"] = 48.into(), |_| ()));
    assert!(wider.contains("expected shape [48, 64]"), "{wider}");
    // A NaN in the last tensor shows while weights are written; what was staged is removed.
    let nan = refuse(broken(
        |_| (),
        |bytes| {
            let end = bytes.len();
            bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        },
    ));
    let source = checkpoint("mistral");
    assert!(
        Checkpoint::open(&source)
            .unwrap()
            .names()
            .iter()
            .any(|name| nan.contains(name)),
        "{nan}"
    );
}
