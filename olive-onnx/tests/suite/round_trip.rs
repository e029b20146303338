//! What is written is read back, whatever the graph; and the same build gives the same bytes.

use std::path::Path;

use olive_core::{CancelToken, NoProgress};
use olive_onnx::Precision;
use olive_onnx::ir::{Attribute, Dim, Graph, Model, Node, OnnxType, Opset, Tensor, ValueInfo};
use olive_onnx::serde::{WriteOptions, decode_model, encode_model, read_model, write_model};
use proptest::prelude::*;

use crate::building::build;
use crate::golden;

fn dims() -> impl Strategy<Value = Vec<Dim>> {
    let dim = prop_oneof![
        (0usize..9).prop_map(Dim::Known),
        "[a-z_]{1,8}".prop_map(Dim::Symbol),
        Just(Dim::Unknown)
    ];
    prop::collection::vec(dim, 0..4)
}

fn info(prefix: &'static str) -> impl Strategy<Value = ValueInfo> {
    let dtype = prop::option::of((1i32..23).prop_filter_map("a number without a type", OnnxType::from_code));
    (0usize..1000, dtype, prop::option::of(dims())).prop_map(move |(number, dtype, shape)| ValueInfo {
        name: format!("{prefix}{number}"),
        dtype,
        shape,
    })
}

fn tensor() -> impl Strategy<Value = Tensor> {
    let dtype = (1i32..23).prop_filter_map("a number without a type", OnnxType::from_code);
    (dtype, prop::collection::vec(0usize..4, 0..4), any::<u8>()).prop_map(|(dtype, shape, seed)| {
        let length = dtype.byte_len(shape.iter().product()).unwrap();
        let bytes: Vec<u8> = (0..length).map(|i| seed.wrapping_mul(i as u8 ^ 0x5b)).collect();
        Tensor::inline(format!("t{seed}"), dtype, shape, bytes).unwrap()
    })
}

fn attribute() -> impl Strategy<Value = Attribute> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(Attribute::Int),
        (-1e9f32..1e9).prop_map(Attribute::Float),
        ".{0,6}".prop_map(Attribute::Text),
        prop::collection::vec(any::<i64>(), 0..4).prop_map(Attribute::Ints),
        prop::collection::vec(-1.0f32..1.0, 0..4).prop_map(Attribute::Floats),
        prop::collection::vec(".{0,4}", 0..3).prop_map(Attribute::Texts),
        tensor().prop_map(Attribute::Tensor),
    ];
    leaf.prop_recursive(2, 8, 2, |inner| {
        prop::collection::vec(inner, 0..3).prop_map(|attributes| {
            let mut node = Node::new("inner", "Op", &["", "a"], &["b"]).in_domain("com.microsoft");
            for (i, attribute) in attributes.into_iter().enumerate() {
                node = node.with(&format!("a{i}"), attribute);
            }
            Attribute::Graph(Box::new(Graph {
                name: "branch".into(),
                nodes: vec![node],
                ..Graph::default()
            }))
        })
    })
}

fn model() -> impl Strategy<Value = Model> {
    let infos = || prop::collection::vec(info("v"), 0..4);
    let tensors = prop::collection::vec(tensor(), 0..4);
    (
        infos(),
        infos(),
        infos(),
        tensors,
        prop::collection::vec(attribute(), 0..5),
    )
        .prop_map(|(inputs, outputs, value_infos, initializers, attributes)| {
            let nodes = attributes.into_iter().enumerate().map(|(i, attribute)| {
                Node::new(format!("n{i}"), "Op", &["x", "", "y"], &["", "z"]).with("value", attribute)
            });
            Model {
                ir_version: 10,
                opsets: vec![Opset {
                    domain: String::new(),
                    version: 22,
                }],
                producer_name: "olive".into(),
                producer_version: "1".into(),
                metadata: vec![("key".into(), "välue".into())],
                graph: Graph {
                    name: "g".into(),
                    inputs,
                    outputs,
                    nodes: nodes.collect(),
                    initializers,
                    value_infos,
                },
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn decoding_undoes_encoding(model in model()) {
        let bytes = encode_model(&model).unwrap();
        let back = decode_model(&bytes, Path::new("x"), None).unwrap();
        prop_assert_eq!(&back, &model);
        prop_assert_eq!(back.to_string(), model.to_string());
    }
}

#[test]
fn a_read_folder_is_written_and_read_back() {
    let Some(root) = golden::genai() else { return };
    let model = read_model(&root.join("phi3/int4-cpu/model.onnx")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = WriteOptions {
        graph_file: "model.onnx",
        progress: &NoProgress,
        cancel: &CancelToken::default(),
    };
    write_model(&model, folder.path(), &options).unwrap();
    assert_eq!(read_model(&folder.path().join("model.onnx")).unwrap(), model);
    let data = |folder: &Path| std::fs::read(folder.join("model.onnx.data")).unwrap();
    assert!(data(folder.path()) == data(&root.join("phi3/int4-cpu")));
    // A cancelled run leaves nothing.
    let cancelled = tempfile::tempdir().unwrap();
    let cancel = CancelToken::default();
    cancel.cancel();
    let options = WriteOptions {
        cancel: &cancel,
        ..options
    };
    assert!(write_model(&model, cancelled.path(), &options).is_err());
    assert_eq!(std::fs::read_dir(cancelled.path()).unwrap().count(), 0);
}

#[test]
fn the_same_build_gives_the_same_bytes_on_any_number_of_threads() {
    let Some(root) = golden::genai() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let folder = |threads: usize| {
        let output = scratch.path().join(format!("{threads}/model"));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let adapter = root.join("llama/adapter-poem");
        // Twice: a folder that exists is replaced by the same bytes.
        for _ in 0..2 {
            pool.install(|| build(&root.join("llama/hf"), Precision::Int4, Some(&adapter), &output));
        }
        output
    };
    let (one, three) = (folder(1), folder(3));
    for entry in std::fs::read_dir(&one).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert!(read(&one) == read(&three), "{name:?}");
    }
}
