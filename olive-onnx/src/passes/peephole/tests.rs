use super::*;
use crate::ir::{Graph, Node, OnnxType, Opset, Tensor, ValueInfo};
use crate::passes::find;

fn model(nodes: Vec<Node>, initializers: Vec<Tensor>) -> Model {
    let graph = Graph {
        name: "g".into(),
        inputs: vec![ValueInfo::new("x", OnnxType::Float, [2.into(), 3.into()])],
        outputs: vec![ValueInfo::new("y", OnnxType::Float, [])],
        nodes,
        initializers,
        value_infos: vec![],
    };
    Model {
        ir_version: 10,
        opsets: vec![Opset {
            domain: String::new(),
            version: 21,
        }],
        producer_name: String::new(),
        producer_version: String::new(),
        metadata: vec![],
        graph,
    }
}

fn run(given: serde_json::Value, model: Model) -> (bool, Graph) {
    let pass = find("OnnxPeepholeOptimizer").unwrap();
    let configured = pass.configure(given.as_object().unwrap()).unwrap();
    let mut draft = Draft::of(model);
    let before = draft.model.clone();
    let changed = pass.apply(configured.as_ref(), &mut draft).unwrap().changed;
    assert_eq!(changed, before != draft.model);
    let once = draft.model.clone();
    assert!(!pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
    assert_eq!(once, draft.model);
    (changed, draft.model.graph)
}

fn ops(graph: &Graph) -> Vec<&str> {
    graph.nodes.iter().map(|node| node.op_type.as_str()).collect()
}

#[test]
fn nodes_that_pass_on_go_but_inputs_and_outputs_keep_their_names() {
    let all = serde_json::json!({});
    let (_, graph) = run(
        all.clone(),
        model(
            vec![
                Node::new("a", "Identity", &["x"], &["b"]),
                Node::new("b", "Neg", &["b"], &["c"]),
                Node::new("c", "Identity", &["c"], &["y"]),
            ],
            vec![],
        ),
    );
    assert_eq!(
        (ops(&graph), graph.nodes[0].outputs[0].as_str()),
        (vec!["Neg"], "y")
    );
    // Both names belong to the graph.
    let (changed, _) = run(
        all,
        model(vec![Node::new("a", "Identity", &["x"], &["y"])], vec![]),
    );
    assert!(!changed);
}

#[test]
fn shapes_are_folded() {
    let nodes = vec![
        Node::new("s", "Shape", &["x"], &["s"]),
        Node::new("g", "Gather", &["s", "one"], &["g"]).with("axis", 0),
        Node::new("u", "Unsqueeze", &["g", "zero"], &["u"]),
        Node::new("m", "Mul", &["u", "two"], &["m"]),
        Node::new("c", "Concat", &["minus", "m"], &["c"]).with("axis", 0),
        Node::new("r", "Reshape", &["x", "c"], &["y"]),
    ];
    let constants = vec![
        Tensor::ints("one", [], &[1]).unwrap(),
        Tensor::ints("zero", [1], &[0]).unwrap(),
        Tensor::ints("two", [1], &[2]).unwrap(),
        Tensor::ints("minus", [1], &[-1]).unwrap(),
    ];
    let (_, graph) = run(serde_json::json!({}), model(nodes, constants));
    assert_eq!(ops(&graph), ["Reshape"]);
    assert_eq!(graph.initializers.len(), 1);
    assert_eq!(graph.initializer("c").unwrap().to_i64().unwrap(), [-1, 6]);
}

#[test]
fn casts_are_fused_only_where_nothing_is_lost() {
    let chain = |middle: OnnxType| {
        vec![
            Node::new("a", "Cast", &["x"], &["m"]).with("to", i64::from(middle.code())),
            Node::new("b", "Cast", &["m"], &["n"]).with("to", 1),
            Node::new("c", "Neg", &["n"], &["y"]),
        ]
    };
    let (_, graph) = run(serde_json::json!({}), model(chain(OnnxType::Double), vec![]));
    assert_eq!(ops(&graph), ["Neg"]);
    let (changed, _) = run(serde_json::json!({}), model(chain(OnnxType::Float16), vec![]));
    assert!(!changed);
    let (_, graph) = run(
        serde_json::json!({"cast_chain_elimination": true}),
        model(chain(OnnxType::Float16), vec![]),
    );
    assert_eq!(ops(&graph), ["Neg"]);
    let (changed, _) = run(
        serde_json::json!({"cast_chain_elimination": true}),
        model(chain(OnnxType::Int32), vec![]),
    );
    assert!(!changed);
}

#[test]
fn reshapes_and_transposes_are_fused() {
    let nodes = |shape: &str| {
        vec![
            Node::new("t", "Transpose", &["x"], &["t"]).with("perm", vec![1, 0]),
            Node::new("u", "Transpose", &["t"], &["u"]).with("perm", vec![1, 0]),
            Node::new("a", "Reshape", &["u", "s"], &["a"]),
            Node::new("b", "Reshape", &["a", shape], &["y"]),
        ]
    };
    let constants = || {
        vec![
            Tensor::ints("s", [3], &[3, 1, 2]).unwrap(),
            Tensor::ints("flat", [1], &[-1]).unwrap(),
            Tensor::ints("copy", [2], &[0, -1]).unwrap(),
        ]
    };
    let (_, graph) = run(serde_json::json!({}), model(nodes("flat"), constants()));
    assert_eq!(
        (ops(&graph), graph.nodes[0].inputs[0].as_str()),
        (vec!["Reshape"], "x")
    );
    let (_, graph) = run(serde_json::json!({}), model(nodes("copy"), constants()));
    assert_eq!(
        ops(&graph),
        ["Reshape", "Reshape"],
        "a copied size depends on the first"
    );
    let (_, graph) = run(
        serde_json::json!({"fuse_reshape_operations": false}),
        model(nodes("flat"), constants()),
    );
    assert_eq!(ops(&graph), ["Reshape", "Reshape"]);
}

#[test]
fn equal_nodes_and_constants_are_merged_and_outputs_stay() {
    let nodes = vec![
        Node::new("a", "Mul", &["x", "c"], &["a"]),
        Node::new("b", "Mul", &["x", "d"], &["b"]),
        Node::new("e", "Mul", &["x", "e"], &["e1"]),
        Node::new("s", "Sum", &["a", "b", "e1"], &["y"]),
    ];
    let float = |name: &str, value: f32| Tensor::floats(name, [1], &[value]).unwrap();
    let (_, graph) = run(
        serde_json::json!({}),
        model(nodes, vec![float("c", 1.5), float("d", 1.5), float("e", 2.5)]),
    );
    assert_eq!(ops(&graph), ["Mul", "Mul", "Sum"]);
    assert_eq!(graph.nodes[2].inputs, ["a", "a", "e1"]);
    assert_eq!(graph.initializers.len(), 2);
    let nodes = vec![
        Node::new("a", "Neg", &["x"], &["a"]),
        Node::new("b", "Neg", &["x"], &["y"]),
    ];
    let mut with_output = model(nodes, vec![]);
    with_output
        .graph
        .outputs
        .push(ValueInfo::new("a", OnnxType::Float, []));
    assert!(!run(serde_json::json!({}), with_output).0);
}
