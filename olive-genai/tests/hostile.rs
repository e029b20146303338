//! Folders that are broken or ask for more than there is: each is an error that says what is wrong.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;

use olive_genai::Model;
use olive_onnx::ir::{Dim, Graph, Model as Onnx, Node, OnnxType, Opset, Tensor, ValueInfo};
use olive_onnx::serde::encode_model;

const CONFIG: &str = r#"{"model": {"type": "llama", "context_length": 64, "eos_token_id": 3, "vocab_size": 8,
    "decoder": {"filename": "model.onnx", "num_hidden_layers": 0}}, "search": {"top_k": 1}}"#;

/// Token ids through a table of logits.
fn graph() -> Graph {
    let dims = |names: &[&str]| names.iter().map(|name| Dim::from(*name)).collect::<Vec<_>>();
    Graph {
        name: "main_graph".into(),
        inputs: vec![
            ValueInfo::new("input_ids", OnnxType::Int64, dims(&["batch", "steps"])),
            ValueInfo::new("attention_mask", OnnxType::Int64, dims(&["batch", "total"])),
        ],
        outputs: vec![ValueInfo::new(
            "logits",
            OnnxType::Float,
            dims(&["batch", "steps", "vocabulary"]),
        )],
        nodes: vec![
            Node::new("/table", "Gather", &["table", "input_ids"], &["rows"]),
            Node::new("/head", "MatMul", &["rows", "head"], &["logits"]),
        ],
        initializers: vec![
            Tensor::floats("table", [8, 4], &[0.5; 32]).unwrap(),
            Tensor::floats("head", [4, 8], &[0.25; 32]).unwrap(),
        ],
        value_infos: Vec::new(),
    }
}

fn write(folder: &Path, graph: Graph) {
    let opsets = vec![Opset {
        domain: String::new(),
        version: 22,
    }];
    let model = Onnx {
        ir_version: 10,
        opsets,
        producer_name: "test".into(),
        producer_version: String::new(),
        metadata: Vec::new(),
        graph,
    };
    std::fs::write(folder.join("model.onnx"), encode_model(&model).unwrap()).unwrap();
}

fn open(change: impl FnOnce(&mut Graph), config: &str) -> Result<Model, String> {
    let folder = tempfile::tempdir().unwrap();
    let mut graph = graph();
    change(&mut graph);
    write(folder.path(), graph);
    std::fs::write(folder.path().join("genai_config.json"), config).unwrap();
    Model::open(folder.path()).map_err(|error| error.to_string())
}

fn fails(change: impl FnOnce(&mut Graph), wanted: &[&str]) {
    let error = open(change, CONFIG).unwrap_err();
    assert!(
        wanted.iter().all(|part| error.contains(part)),
        "{wanted:?}: {error}"
    );
}

#[test]
fn the_plain_graph_runs_and_every_unsupported_node_is_named() {
    let model = open(|_| {}, CONFIG).unwrap();
    let blocks: [&[u32]; 2] = [&[1, 2, 3], &[4, 5]];
    let measured = olive_genai::perplexity(&model, blocks, &Default::default(), |_| {}).unwrap();
    assert_eq!((measured.tokens, measured.blocks), (3, 2));
    assert!((measured.perplexity - 8.0).abs() < 1e-6);
    fails(
        |graph| {
            graph.nodes[0].op_type = "Einsum".into();
            graph.nodes[1].op_type = "NonMaxSuppression".into();
        },
        &[
            "2 node(s)",
            "`/table`",
            "ai.onnx::Einsum",
            "`/head`",
            "ai.onnx::NonMaxSuppression",
        ],
    );
}

#[test]
fn what_cannot_be_given_or_computed_is_named() {
    fails(
        |graph| {
            graph
                .inputs
                .push(ValueInfo::new("pixels", OnnxType::Float, [Dim::Unknown]))
        },
        &["`pixels`"],
    );
    fails(|graph| graph.inputs[0].name = "ids".into(), &["input_ids"]);
    fails(|graph| graph.initializers.remove(0).name.clear(), &["table"]);
    fails(
        |graph| {
            graph.nodes[1].op_type = "MatMulNBits".into();
            graph.nodes[1].domain = "com.microsoft".into();
        },
        &["`/head`", "`N`"],
    );
    let error = open(|_| {}, &CONFIG.replace("layers\": 0", "layers\": 2")).unwrap_err();
    assert!(error.contains("num_hidden_layers"), "{error}");
    let error = open(|_| {}, &CONFIG.replace("model.onnx", "../model.onnx")).unwrap_err();
    assert!(error.contains(".."), "{error}");
}

#[test]
fn sizes_that_do_not_fit_are_errors_of_the_run() {
    let model = open(
        |graph| graph.initializers[1] = Tensor::floats("head", [5, 8], &[0.25; 40]).unwrap(),
        CONFIG,
    )
    .unwrap();
    let mut generator =
        olive_genai::Generator::new(&model, &olive_genai::GeneratorParams::new(&model)).unwrap();
    let error = generator.append_tokens(&[1, 2]).unwrap_err().to_string();
    assert!(error.contains("/head") && error.contains("[5, 8]"), "{error}");
}
