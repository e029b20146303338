use super::*;
use crate::ir::{MICROSOFT, Model, Opset};
use crate::passes::find as find_pass;
use crate::passes::weight_only::pack;

fn model(ranks: [usize; 2], packed: bool) -> Model {
    let values = |count: usize| (0..count).map(|i| i as f32 / 8.0 - 1.0).collect::<Vec<f32>>();
    let mut nodes = vec![Node::new("/m/q_proj/MatMul", "MatMul", &["x", "w"], &["base"])];
    let mut initializers = vec![Tensor::floats("w", [32, 4], &values(128)).unwrap()];
    let mut sum = "base".to_owned();
    for (index, rank) in ranks.into_iter().enumerate() {
        let name = |part: &str| format!("m.{index}.{part}.MatMul.weight");
        initializers.push(Tensor::floats(name("lora_A"), [32, rank], &values(32 * rank)).unwrap());
        initializers.push(Tensor::floats(name("lora_B"), [rank, 4], &values(rank * 4)).unwrap());
        let (a, b, y) = (format!("a{index}"), format!("b{index}"), format!("y{index}"));
        nodes.push(Node::new(
            format!("/m/{index}/lora_A/MatMul"),
            "MatMul",
            &["x", &name("lora_A")],
            &[&a],
        ));
        nodes.push(Node::new(
            format!("/m/{index}/lora_B/MatMul"),
            "MatMul",
            &[&a, &name("lora_B")],
            &[&b],
        ));
        nodes.push(Node::new(
            format!("/m/{index}/lora/Add"),
            "Add",
            &[&sum, &b],
            &[&y],
        ));
        sum = y;
    }
    if packed {
        let codes: Vec<u8> = (0..ranks[0] * 32).map(|i| (i * 5 % 16) as u8).collect();
        let shape = [ranks[0], 1, 16];
        initializers.push(
            Tensor::inline(
                "m.0.lora_A.MatMul.weight_Q4",
                OnnxType::Uint8,
                shape,
                pack(&codes, 4),
            )
            .unwrap(),
        );
        initializers.push(
            Tensor::floats(
                "m.0.lora_A.MatMul.weight_scales",
                [ranks[0], 1],
                &vec![0.5; ranks[0]],
            )
            .unwrap(),
        );
        initializers.retain(|tensor| tensor.name != "m.0.lora_A.MatMul.weight");
        nodes[1] = Node::new(
            "/m/0/lora_A/MatMul_Q4",
            "MatMulNBits",
            &[
                "x",
                "m.0.lora_A.MatMul.weight_Q4",
                "m.0.lora_A.MatMul.weight_scales",
            ],
            &["a0"],
        )
        .in_domain(MICROSOFT)
        .with("K", 32)
        .with("N", ranks[0] as i64)
        .with("bits", 4)
        .with("block_size", 32);
    }
    let graph = Graph {
        name: "g".into(),
        inputs: vec![ValueInfo::new("x", OnnxType::Float, [])],
        outputs: vec![ValueInfo::new(sum, OnnxType::Float, [])],
        nodes,
        initializers,
        value_infos: vec![],
    };
    let opsets = vec![
        Opset {
            domain: String::new(),
            version: 21,
        },
        Opset {
            domain: MICROSOFT.into(),
            version: 1,
        },
    ];
    Model {
        ir_version: 10,
        opsets,
        producer_name: String::new(),
        producer_version: String::new(),
        metadata: vec![],
        graph,
    }
}

fn run(given: serde_json::Value, model: Model) -> (bool, Draft) {
    let pass = find_pass("ExtractAdapters").unwrap();
    let configured = pass.configure(given.as_object().unwrap()).unwrap();
    let mut draft = Draft::of(model);
    let changed = pass.apply(configured.as_ref(), &mut draft).unwrap().changed;
    let once = draft.model.clone();
    assert!(!pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
    assert_eq!(once, draft.model);
    (changed, draft)
}

#[test]
fn weights_become_optional_inputs_of_rank_zero() {
    let (changed, draft) = run(serde_json::json!({}), model([2, 2], false));
    assert!(changed);
    let graph = &draft.model.graph;
    let optional: Vec<String> = graph.optional_inputs().map(ToString::to_string).collect();
    assert_eq!(
        optional[..2],
        [
            "m.0.lora_A.MatMul.weight: FLOAT[32, lora_r]",
            "m.0.lora_B.MatMul.weight: FLOAT[lora_r, 4]"
        ]
    );
    assert_eq!((optional.len(), graph.inputs.len()), (4, 5));
    assert!(graph.initializer("m.1.lora_A.MatMul.weight").unwrap().is_empty());
    let adapter = draft.adapter.unwrap();
    assert_eq!(
        adapter.parameter("m.1.lora_B.MatMul.weight").unwrap().shape(),
        [2, 4]
    );
    assert!(graph.initializer("w").is_some());
}

#[test]
fn lower_ranks_are_padded_with_zeros() {
    let (_, draft) = run(serde_json::json!({}), model([3, 1], false));
    let adapter = draft.adapter.unwrap();
    let a = adapter.parameter("m.1.lora_A.MatMul.weight").unwrap();
    let b = adapter.parameter("m.1.lora_B.MatMul.weight").unwrap();
    assert_eq!((a.shape(), b.shape()), ([32, 3].as_slice(), [3, 4].as_slice()));
    let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
    assert_eq!(a[3..6], [1.0 / 8.0 - 1.0, 0.0, 0.0]);
    assert!(b[4..].iter().all(|value| *value == 0.0));
}

#[test]
fn packed_weights_are_dequantized() {
    let (_, draft) = run(serde_json::json!({}), model([2, 2], true));
    let graph = &draft.model.graph;
    assert!(graph.nodes.iter().all(|node| node.op_type != "MatMulNBits"));
    assert!(
        graph
            .initializers
            .iter()
            .all(|tensor| !tensor.name.contains("_Q4"))
    );
    let adapter = draft.adapter.unwrap();
    let a = adapter.parameter("m.0.lora_A.MatMul.weight").unwrap();
    assert_eq!(a.shape(), [32, 2]);
    // Row 1, column 1 is code (32 + 1)·5 mod 16.
    assert_eq!(a.to_f32().unwrap()[3], ((33 * 5 % 16) as f32 - 8.0) * 0.5);
}

#[test]
fn fixed_ranks_and_needed_inputs() {
    let given = serde_json::json!({"dynamic_lora_r": false});
    let (_, draft) = run(given, model([2, 2], false));
    let default = draft
        .model
        .graph
        .initializer("m.0.lora_A.MatMul.weight")
        .unwrap()
        .clone();
    assert_eq!(default.shape(), [32, 2]);
    assert!(default.to_f32().unwrap().iter().all(|value| *value == 0.0));
    let (_, draft) = run(
        serde_json::json!({"optional_inputs": false}),
        model([2, 2], false),
    );
    assert_eq!(draft.model.graph.required_inputs().count(), 5);
}

#[test]
fn what_is_not_lora_stays() {
    let mut plain = model([2, 2], false);
    for node in &mut plain.graph.nodes {
        node.name = node.name.replace("lora_A", "down").replace("lora_B", "up");
    }
    for name in ["m.0.lora_A", "m.0.lora_B", "m.1.lora_A", "m.1.lora_B"] {
        let old = format!("{name}.MatMul.weight");
        crate::passes::rewrite::rename_value(&mut plain.graph, &old, &old.replace("lora_", "part"));
    }
    let (changed, draft) = run(serde_json::json!({}), plain);
    assert!(!changed && draft.adapter.is_none());
    let (changed, _) = run(serde_json::json!({"make_inputs": false}), model([2, 2], false));
    assert!(!changed);
    let pass = find_pass("ExtractAdapters").unwrap();
    for wrong in [
        serde_json::json!({"adapter_type": "dora"}),
        serde_json::json!({"save_format": "pt"}),
    ] {
        assert!(pass.configure(wrong.as_object().unwrap()).is_err());
    }
}
