//! Our graphs from the checkpoints that the real builder built, against what it built.

use std::path::{Path, PathBuf};

use olive_core::{CancelToken, HfModel, NoProgress};
use olive_onnx::ir::{Attribute, Graph, Node, Tensor};
use olive_onnx::{BuildReport, BuilderOptions, OnnxFolder, Precision, build_model_folder};
use serde_json::Value;

use crate::golden;

const FAMILIES: [&str; 3] = ["llama", "phi3", "qwen2"];
const PRECISIONS: [(&str, Precision); 2] = [("fp32-cpu", Precision::Fp32), ("int4-cpu", Precision::Int4)];

/// The real builder makes cosine and sine with vectorised single-precision functions, which are off by an ulp or two
/// of 1; ours round correctly. LongRoPE multiplies by up to 1.2.
const TABLE_TOLERANCE: f32 = 3e-7;

pub fn build(source: &Path, precision: Precision, adapter: Option<&Path>, output: &Path) -> BuildReport {
    let model = HfModel::open(source).unwrap();
    let options = BuilderOptions::with_precision(precision);
    build_model_folder(
        &model,
        adapter,
        &options,
        output,
        &NoProgress,
        &CancelToken::default(),
    )
    .unwrap()
}

fn each(check: impl Fn(&str, &PathBuf, &OnnxFolder, &OnnxFolder)) {
    let Some(root) = golden::genai() else { return };
    for family in FAMILIES {
        for (folder, precision) in PRECISIONS {
            let scratch = tempfile::tempdir().unwrap();
            let output = scratch.path().join("model");
            build(&root.join(family).join("hf"), precision, None, &output);
            let ours = OnnxFolder::open(scratch.path()).unwrap();
            let reference = root.join(family).join(folder);
            let theirs = OnnxFolder::open(&reference).unwrap();
            check(&format!("{family}/{folder}"), &reference, &ours, &theirs);
        }
    }
}

fn is_table(name: &str) -> bool {
    name.starts_with("cos_cache") || name.starts_with("sin_cache")
}

fn assert_close(label: &str, ours: &Tensor, theirs: &Tensor) {
    assert_eq!(ours.shape(), theirs.shape(), "{label}");
    let (ours, theirs) = (ours.to_f32().unwrap(), theirs.to_f32().unwrap());
    let worst = ours
        .iter()
        .zip(&theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst <= TABLE_TOLERANCE, "{label}: off by {worst:e}");
}

#[test]
fn initializers_are_those_of_the_real_builder() {
    each(|label, _, ours, theirs| {
        let (ours, theirs) = (
            &ours.model().graph.initializers,
            &theirs.model().graph.initializers,
        );
        let names = |list: &[Tensor]| list.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(ours), names(theirs), "{label}");
        for (ours, theirs) in ours.iter().zip(theirs) {
            let label = format!("{label} {}", ours.name);
            match is_table(&ours.name) {
                true => assert_close(&label, ours, theirs),
                false => assert!(ours == theirs, "{label} differs"),
            }
        }
    });
}

/// A node without the constants that it carries.
fn outline(node: &Node) -> Node {
    let mut node = node.clone();
    node.attributes
        .retain(|(_, value)| !matches!(value, Attribute::Tensor(_) | Attribute::Graph(_)));
    node
}

fn assert_same_nodes(label: &str, ours: &Graph, theirs: &Graph) {
    for (ours, theirs) in ours.nodes.iter().zip(&theirs.nodes) {
        assert_eq!(outline(ours), outline(theirs), "{label}");
        for (name, value) in &ours.attributes {
            match (value, theirs.attribute(name)) {
                (Attribute::Graph(ours), Some(Attribute::Graph(theirs))) => {
                    assert_eq!((&ours.name, &ours.outputs), (&theirs.name, &theirs.outputs));
                    assert_same_nodes(label, ours, theirs);
                }
                (Attribute::Tensor(a), Some(Attribute::Tensor(b))) if is_table(&ours.outputs[0]) => {
                    assert_close(&format!("{label} {}", ours.name), a, b);
                }
                (Attribute::Tensor(a), Some(Attribute::Tensor(b))) => {
                    assert!(a == b, "{label} {}", ours.name)
                }
                _ => {}
            }
        }
    }
    assert_eq!(ours.nodes.len(), theirs.nodes.len(), "{label}");
}

#[test]
fn nodes_and_values_are_those_of_the_real_builder() {
    each(|label, _, ours, theirs| {
        assert_eq!(ours.model().ir_version, theirs.model().ir_version);
        assert_eq!(ours.model().opsets, theirs.model().opsets);
        let (ours, theirs) = (&ours.model().graph, &theirs.model().graph);
        assert_eq!(ours.name, theirs.name);
        assert_eq!(ours.inputs, theirs.inputs, "{label}");
        assert_eq!(ours.outputs, theirs.outputs, "{label}");
        assert_same_nodes(label, ours, theirs);
    });
}

#[test]
fn the_runtime_config_is_that_of_the_real_builder() {
    each(|label, reference, ours, _| {
        let theirs: Value =
            serde_json::from_slice(&std::fs::read(reference.join("genai_config.json")).unwrap()).unwrap();
        assert_eq!(ours.genai_config(), Some(&theirs), "{label}");
        let template = std::fs::read_to_string(reference.join("chat_template.jinja")).unwrap();
        assert_eq!(
            std::fs::read_to_string(ours.path().join("chat_template.jinja")).unwrap(),
            template
        );
        assert!(ours.path().join("tokenizer.json").is_file());
    });
}
