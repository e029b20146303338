use super::*;
use crate::ir::{Model, Opset, ValueInfo};
use crate::passes::find;

fn model() -> Model {
    let value = |name: &str| ValueInfo::new(name, OnnxType::Float, []);
    let branch = |name: &str, value_: f32| Graph {
        name: name.into(),
        outputs: vec![value(&format!("{name}_out"))],
        nodes: vec![
            Node::new(format!("{name}_c"), "Constant", &[], &[&format!("{name}_v")])
                .with("value", Tensor::floats("", [1], &[value_]).unwrap()),
            Node::new(
                format!("{name}_m"),
                "Mul",
                &["n", &format!("{name}_v")],
                &[&format!("{name}_out")],
            ),
        ],
        ..Graph::default()
    };
    let graph = Graph {
        name: "g".into(),
        inputs: vec![value("x"), ValueInfo::new("flag", OnnxType::Bool, [])],
        outputs: vec![value("y"), value("t")],
        nodes: vec![
            Node::new("neg", "Neg", &["x"], &["n"]),
            Node::new("if", "If", &["flag"], &["b"])
                .with("then_branch", branch("then", 2.0))
                .with("else_branch", branch("else", 1e9)),
            Node::new("max", "Max", &["b", "c"], &["t"]),
            Node::new("add", "Add", &["t", "c"], &["y"]),
        ],
        initializers: vec![Tensor::floats("c", [4], &[1e-9, -1e6, 0.0, f32::INFINITY]).unwrap()],
        value_infos: vec![value("n")],
    };
    let opsets = vec![Opset {
        domain: String::new(),
        version: 21,
    }];
    Model {
        ir_version: 10,
        opsets,
        producer_name: String::new(),
        producer_version: String::new(),
        metadata: vec![],
        graph,
    }
}

fn run(given: serde_json::Value) -> Graph {
    let pass = find("OnnxFloatToFloat16").unwrap();
    let configured = pass.configure(given.as_object().unwrap()).unwrap();
    let mut draft = Draft::of(model());
    assert!(pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
    let once = draft.model.clone();
    let again = pass.apply(configured.as_ref(), &mut draft).unwrap().changed;
    assert_eq!(once, draft.model);
    assert!(!again);
    draft.model.graph
}

fn casts(graph: &Graph) -> Vec<(String, i64)> {
    let casts = graph.nodes.iter().filter(|node| node.op_type == "Cast");
    casts
        .map(|node| (node.inputs[0].clone(), node.int("to").unwrap().unwrap()))
        .collect()
}

#[test]
fn everything_changes_but_blocked_nodes() {
    let graph = run(serde_json::json!({}));
    assert!(
        graph.inputs[0].dtype == Some(OnnxType::Float16)
            && graph.outputs.iter().all(|o| o.dtype == Some(OnnxType::Float16))
    );
    assert_eq!(graph.value_infos[0].dtype, Some(OnnxType::Float16));
    // `Max` is blocked by default: it reads through casts, and its output goes back.
    let casts = casts(&graph);
    assert!(
        casts.contains(&("b".into(), 1)) && casts.contains(&("c".into(), 1)),
        "{casts:?}"
    );
    let types = infer(&graph, &Types::new()).unwrap();
    assert_eq!(types["y"], OnnxType::Float16);
    assert_eq!(types["t"], OnnxType::Float16);
    let constant = graph.initializer("c").unwrap().to_f32().unwrap();
    assert_eq!(
        constant,
        [f16::from_f32(1e-7).to_f32(), -10000.0, 0.0, f32::INFINITY]
    );
    let branch = super::super::rewrite::branches(
        &graph.nodes[graph.nodes.iter().position(|n| n.op_type == "If").unwrap()],
    )
    .nth(1)
    .unwrap();
    let value = branch.nodes[0].tensor("value").unwrap().unwrap();
    assert_eq!(value.to_f32().unwrap(), [10000.0]);
    assert_eq!(branch.outputs[0].dtype, Some(OnnxType::Float16));
}

#[test]
fn inputs_and_outputs_can_stay() {
    let graph = run(serde_json::json!({"keep_io_types": true, "op_block_list": []}));
    assert!(
        graph.inputs[0].dtype == Some(OnnxType::Float)
            && graph.outputs.iter().all(|o| o.dtype == Some(OnnxType::Float))
    );
    let casts = casts(&graph);
    assert_eq!(casts.len(), 3, "{casts:?}");
    let graph = run(serde_json::json!({"keep_io_types": ["y"]}));
    assert_eq!(
        (graph.inputs[0].dtype, graph.outputs[0].dtype),
        (Some(OnnxType::Float16), Some(OnnxType::Float))
    );
    assert_eq!(graph.outputs[1].dtype, Some(OnnxType::Float16));
}

#[test]
fn lists_choose_nodes() {
    let graph = run(serde_json::json!({"node_include_list": ["add"]}));
    assert_eq!(infer(&graph, &Types::new()).unwrap()["n"], OnnxType::Float);
    let pass = find("OnnxFloatToFloat16").unwrap();
    for wrong in [
        serde_json::json!({"op_block_list": [], "op_include_list": []}),
        serde_json::json!({"max_finite_val": 1e6}),
        serde_json::json!({"keep_io_types": 3}),
    ] {
        assert!(pass.configure(wrong.as_object().unwrap()).is_err(), "{wrong}");
    }
}
