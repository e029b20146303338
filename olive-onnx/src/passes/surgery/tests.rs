use super::*;
use crate::ir::{Dim, Graph, MICROSOFT, Model, Node, OnnxType, Tensor, ValueInfo};
use crate::passes::find;

fn run(surgeries: Value, draft: &mut Draft) -> Result<bool> {
    let pass = find("GraphSurgeries").unwrap();
    let given = serde_json::json!({"surgeries": surgeries});
    let configured = pass.configure(given.as_object().unwrap())?;
    let changed = pass.apply(configured.as_ref(), draft)?.changed;
    let once = draft.model.clone();
    assert!(
        !pass.apply(configured.as_ref(), draft)?.changed,
        "a second run changes nothing"
    );
    assert_eq!(once, draft.model);
    Ok(changed)
}

fn on(model: Model, surgeries: Value) -> (bool, Model) {
    let mut draft = Draft::of(model);
    let changed = run(surgeries, &mut draft).unwrap();
    (changed, draft.model)
}

fn graph(nodes: Vec<Node>, initializers: Vec<Tensor>) -> Model {
    let mut model = sample_model();
    model.graph.nodes = nodes;
    model.graph.initializers = initializers;
    model.graph.value_infos.clear();
    model
}

fn ops(model: &Model) -> Vec<&str> {
    model
        .graph
        .nodes
        .iter()
        .map(|node| node.op_type.as_str())
        .collect()
}

#[test]
fn unknown_surgeons_and_arguments_are_refused_by_name() {
    let refuse = |surgery: Value| {
        run(Value::Array(vec![surgery]), &mut Draft::of(sample_model()))
            .unwrap_err()
            .to_string()
    };
    assert!(
        refuse(serde_json::json!({"surgeon": "TieWordEmbedings"}))
            .contains("did you mean `TieWordEmbeddings`")
    );
    assert!(
        refuse(serde_json::json!({"surgeon": "RenameInputs", "old_name": ["x"]})).contains("`old_names`")
    );
    assert!(refuse(serde_json::json!({"surgeon": "RenameInputs", "old_names": ["x"]})).contains("new_names"));
    assert!(refuse(serde_json::json!({"names": ["x"]})).contains("surgeon"));
}

#[test]
fn names_follow_into_the_config() {
    let mut draft = Draft::of(sample_model());
    draft.genai_config = Some(
        serde_json::json!({"model": {"decoder": {"inputs": {"input_ids": "x"}, "outputs": {"k": "y.%d.key"}}}}),
    );
    let changed = run(
        serde_json::json!([
            {"surgeon": "RenameInputs", "old_names": ["x"], "new_names": ["tokens"]},
            {"surgeon": "renameoutputs", "old_names": ["y"], "new_names": ["out"]},
        ]),
        &mut draft,
    );
    assert!(changed.unwrap());
    assert_eq!(
        (
            draft.model.graph.inputs[0].name.as_str(),
            draft.model.graph.outputs[0].name.as_str()
        ),
        ("tokens", "out")
    );
    assert_eq!(
        draft.genai_config.unwrap()["model"]["decoder"]["inputs"]["input_ids"],
        "tokens"
    );
}

#[test]
fn inputs_are_removed_reordered_and_lose_defaults() {
    let mut model = graph(
        vec![Node::new("s", "Sum", &["x", "w", "z"], &["y"])],
        vec![Tensor::floats("w", [1], &[1.0]).unwrap()],
    );
    for name in ["w", "z"] {
        model
            .graph
            .inputs
            .push(ValueInfo::new(name, OnnxType::Float, vec![Dim::from(1)]));
    }
    let (changed, after) = on(
        model.clone(),
        serde_json::json!([{"surgeon": "RemoveInitializerFromInputs"}]),
    );
    assert!(changed && after.graph.inputs.len() == 2 && after.graph.initializers.len() == 1);
    let (_, after) = on(
        model.clone(),
        serde_json::json!([{"surgeon": "RemoveInputs", "names": ["z"]}]),
    );
    assert_eq!(after.graph.nodes[0].inputs, ["x", "w"]);
    let pass = find("GraphSurgeries").unwrap();
    let given = serde_json::json!({"surgeries": [{"surgeon": "ReorderInputs", "permutation": [2, 0, 1]}]});
    let mut draft = Draft::of(model);
    pass.apply(
        pass.configure(given.as_object().unwrap()).unwrap().as_ref(),
        &mut draft,
    )
    .unwrap();
    assert_eq!(
        draft
            .model
            .graph
            .inputs
            .iter()
            .map(|i| i.name.as_str())
            .collect::<Vec<_>>(),
        ["z", "x", "w"]
    );
}

#[test]
fn values_are_exposed_and_sizes_renamed() {
    let (_, model) = on(
        sample_model(),
        serde_json::json!([
            {"surgeon": "ExposeOutputs", "names": ["a"]},
            {"surgeon": "RenameInputDims", "input_name": "x", "dim_idx": 0, "dim_name": "n"},
            {"surgeon": "RenameOutputDims", "output_idx": 0, "dim_idx": 1, "dim_name": "m"},
        ]),
    );
    let outputs: Vec<String> = model.graph.outputs.iter().map(ToString::to_string).collect();
    assert_eq!(outputs, ["y: FLOAT[batch, m]", "t: FLOAT[batch, 4]"]);
    assert_eq!(model.graph.inputs[0].to_string(), "x: FLOAT[n, 4]");
}

#[test]
fn broken_graphs_are_repaired() {
    let mut model = sample_model();
    model
        .graph
        .nodes
        .insert(1, Node::new("again", "Neg", &["x"], &["t"]));
    assert!(model.graph.check().is_err());
    let (changed, model) = on(model, serde_json::json!([{"surgeon": "DeduplicateNodes"}]));
    assert!(changed && model.graph.nodes.len() == 2);
    let constant = Tensor::floats("c", [1], &[1.0]).unwrap();
    let branch = Graph {
        name: "b".into(),
        outputs: vec![ValueInfo::new("c", OnnxType::Float, [])],
        initializers: vec![constant.clone(), constant],
        ..Graph::default()
    };
    let broken = graph(
        vec![Node::new("if", "If", &["x"], &["y"]).with("then_branch", branch)],
        vec![],
    );
    let (changed, model) = on(
        broken,
        serde_json::json!([{"surgeon": "DeduplicateSubgraphInitializers"}]),
    );
    assert!(changed);
    model.graph.check().unwrap();
}

fn norm(op: &str, outputs: &[&str]) -> Model {
    let (domain, inputs): (&str, &[&str]) = if op.starts_with("Skip") {
        (MICROSOFT, &["x", "s", "w"])
    } else {
        ("", &["x", "w"])
    };
    let node = Node::new("n", op, inputs, outputs)
        .in_domain(domain)
        .with("epsilon", 1e-5f32);
    let mut model = graph(
        vec![node],
        vec![Tensor::floats("w", [4], &[1.0, 2.0, 3.0, 4.0]).unwrap()],
    );
    model.graph.inputs.push(ValueInfo::new(
        "s",
        OnnxType::Float,
        vec![Dim::from("batch"), Dim::from(4)],
    ));
    model
}

#[test]
fn norms_are_taken_apart_unless_their_statistics_are_read() {
    let rms = serde_json::json!([{"surgeon": "SimplifiedLayerNormToRMSNorm"}]);
    let (_, model) = on(norm("SimplifiedLayerNormalization", &["y"]), rms.clone());
    assert_eq!(ops(&model), ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]);
    let mut skip = norm("SkipSimplifiedLayerNormalization", &["y", "", "", "sum"]);
    skip.graph
        .outputs
        .push(ValueInfo::new("sum", OnnxType::Float, []));
    let (_, model) = on(skip.clone(), rms.clone());
    assert_eq!(
        ops(&model),
        ["Add", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    );
    let (_, model) = on(
        skip,
        serde_json::json!([{"surgeon": "SimplifiedLayerNormToL2Norm"}]),
    );
    assert_eq!(ops(&model), ["Add", "LpNormalization", "Mul"]);
    assert_eq!(
        model
            .graph
            .initializer("w_l2norm_scaled")
            .unwrap()
            .to_f32()
            .unwrap(),
        [2.0, 4.0, 6.0, 8.0]
    );
    let mut read = norm("SkipSimplifiedLayerNormalization", &["y", "mean"]);
    read.graph
        .outputs
        .push(ValueInfo::new("mean", OnnxType::Float, []));
    assert!(!on(read, rms.clone()).0);
    // What the one surgery makes, the other finds.
    let (_, model) = on(norm("SimplifiedLayerNormalization", &["y"]), rms);
    let (changed, model) = on(model, serde_json::json!([{"surgeon": "RMSNormToL2Norm"}]));
    assert!(changed);
    assert_eq!(ops(&model), ["LpNormalization", "Mul"]);
}

fn tied(same: bool) -> Model {
    let table: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let head: Vec<f32> = (0..3)
        .flat_map(|col| (0..4).map(move |row| (row * 3 + col) as f32))
        .map(|v| if same { v } else { v + 1.0 })
        .collect();
    let mut model = graph(
        vec![
            Node::new(
                "/model/embed_tokens/Gather",
                "Gather",
                &["embed", "input_ids"],
                &["e"],
            ),
            Node::new("/lm_head/MatMul", "MatMul", &["e", "head"], &["logits"]),
        ],
        vec![
            Tensor::floats("embed", [4, 3], &table).unwrap(),
            Tensor::floats("head", [3, 4], &head).unwrap(),
        ],
    );
    model.graph.inputs = vec![ValueInfo::new("input_ids", OnnxType::Int64, [])];
    model.graph.outputs = vec![ValueInfo::new("logits", OnnxType::Float, [])];
    model
}

#[test]
fn only_equal_weights_are_tied() {
    let tie = serde_json::json!([{"surgeon": "TieWordEmbeddings"}]);
    let (changed, model) = on(tied(true), tie.clone());
    assert!(changed);
    assert_eq!(
        (ops(&model), model.graph.initializers.len()),
        (vec!["Gather", "Transpose", "MatMul"], 1)
    );
    assert!(!on(tied(false), tie).0);
}

#[test]
fn an_index_of_groups_in_order_is_removed() {
    let model = |groups: &[i64]| {
        let bytes: Vec<u8> = groups.iter().flat_map(|g| (*g as i32).to_le_bytes()).collect();
        let node = Node::new("m", "MatMulNBits", &["x", "q", "s", "", "g"], &["y"])
            .in_domain(MICROSOFT)
            .with("K", 32)
            .with("N", 1)
            .with("bits", 4)
            .with("block_size", 16);
        let tensors = vec![
            Tensor::inline("q", OnnxType::Uint8, [1, 2, 8], vec![0; 16]).unwrap(),
            Tensor::floats("s", [1, 2], &[1.0, 1.0]).unwrap(),
            Tensor::inline("g", OnnxType::Int32, [32], bytes).unwrap(),
        ];
        graph(vec![node], tensors)
    };
    let surgery = serde_json::json!([{"surgeon": "RemoveGidxFromMatMulNBits"}]);
    let in_order: Vec<i64> = (0..32).map(|k| k / 16).collect();
    let (changed, after) = on(model(&in_order), surgery.clone());
    assert!(
        changed && after.graph.nodes[0].inputs == ["x", "q", "s"] && after.graph.initializer("g").is_none()
    );
    let reordered: Vec<i64> = (0..32).map(|k| k % 2).collect();
    assert!(!on(model(&reordered), surgery).0);
}

#[test]
fn arithmetic_is_rewritten() {
    let (_, model) = on(
        graph(
            vec![
                Node::new("r", "Reciprocal", &["x"], &["r"]),
                Node::new("m", "Mul", &["r", "x"], &["y"]),
            ],
            vec![],
        ),
        serde_json::json!([{"surgeon": "ReciprocalMulToDiv"}]),
    );
    assert_eq!(
        (ops(&model), model.graph.nodes[0].inputs.clone()),
        (vec!["Div"], vec!["x".to_owned(), "x".to_owned()])
    );
    let (_, model) = on(
        graph(vec![Node::new("e", "Erf", &["x"], &["y"])], vec![]),
        serde_json::json!([{"surgeon": "ReplaceErfWithTanh"}]),
    );
    assert_eq!(ops(&model), ["Mul", "Tanh"]);
    let gelu = Node::new("q", "QuickGelu", &["x"], &["y"]).in_domain(MICROSOFT);
    let (_, model) = on(
        graph(vec![gelu], vec![]),
        serde_json::json!([{"surgeon": "DecomposeQuickGelu"}]),
    );
    assert_eq!(ops(&model), ["Mul", "Sigmoid", "Mul"]);
    let gemm = Node::new("g", "Gemm", &["x", "w", "b"], &["y"]).with("transB", 1);
    let tensors = vec![
        Tensor::floats("w", [4, 4], &[1.0; 16]).unwrap(),
        Tensor::floats("b", [4], &[1.0; 4]).unwrap(),
    ];
    let (_, model) = on(
        graph(vec![gemm], tensors),
        serde_json::json!([{"surgeon": "GemmToMatMulAdd"}]),
    );
    assert_eq!(ops(&model), ["Transpose", "MatMul", "Add"]);
    let (_, model) = on(
        model,
        serde_json::json!([{"surgeon": "CastOutputs", "names": ["y"], "to": "FLOAT16"}]),
    );
    assert_eq!(ops(&model).last(), Some(&"Cast"));
    let (_, model) = on(
        sample_model(),
        serde_json::json!([{"surgeon": "ZeroOutInput", "node_name": "b", "input_idx": 0}]),
    );
    assert_eq!(ops(&model), ["Constant", "Neg"]);
}

#[test]
fn masks_lose_their_extreme_values() {
    let model = graph(
        vec![
            Node::new("a", "Add", &["x", "m"], &["t"]),
            Node::new("b", "MatMul", &["t", "w"], &["y"]),
        ],
        vec![
            Tensor::floats("m", [2], &[-3.4e38, 0.0]).unwrap(),
            Tensor::floats("w", [2], &[-3.4e38, 0.0]).unwrap(),
        ],
    );
    let (_, model) = on(
        model,
        serde_json::json!([{"surgeon": "ReplaceAttentionMaskValue"}]),
    );
    assert_eq!(
        model.graph.initializer("m").unwrap().to_f32().unwrap(),
        [-1e4, 0.0]
    );
    assert_eq!(
        model.graph.initializer("w").unwrap().to_f32().unwrap(),
        [-3.4e38, 0.0]
    );
}
