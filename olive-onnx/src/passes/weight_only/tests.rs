use super::blocks::{BlockQuantizer, Integers, Layout};
use super::hqq::Hqq;
use super::kquant::KQuant;
use super::rtn::Rtn;
use super::*;
use crate::ir::ValueInfo;
use crate::passes::Draft;

fn weights(count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 7919 % 1013) as f32 - 500.0) / 300.0)
        .collect()
}

fn model() -> Model {
    let graph = Graph {
        name: "g".into(),
        inputs: vec![
            ValueInfo::new("ids", OnnxType::Int64, []),
            ValueInfo::new("x", OnnxType::Float, []),
        ],
        outputs: vec![
            ValueInfo::new("y", OnnxType::Float, []),
            ValueInfo::new("z", OnnxType::Float, []),
            ValueInfo::new("u", OnnxType::Float, []),
        ],
        nodes: vec![
            Node::new("embed", "Gather", &["table", "ids"], &["e"]),
            Node::new("a", "MatMul", &["e", "w"], &["y"]),
            Node::new("b", "MatMul", &["e", "w"], &["z"]),
            // A near miss: the constant is on the left.
            Node::new("c", "MatMul", &["w", "x"], &["u"]),
        ],
        initializers: vec![
            Tensor::floats("table", [6, 32], &weights(192)).unwrap(),
            Tensor::floats("w", [32, 8], &weights(256)).unwrap(),
        ],
        value_infos: vec![],
    };
    Model {
        ir_version: 10,
        opsets: vec![crate::ir::Opset {
            domain: String::new(),
            version: 21,
        }],
        producer_name: String::new(),
        producer_version: String::new(),
        metadata: vec![],
        graph,
    }
}

fn dequantized(got: &Integers, cols: usize, layout: Layout) -> Vec<f32> {
    let blocks = cols.div_ceil(layout.block_size);
    let width = blocks * layout.block_size;
    let rows = got.values.len() / width;
    let value = |row: usize, col: usize| {
        let block = row * blocks + col / layout.block_size;
        (f32::from(got.values[row * width + col]) - got.zeros[block]) * got.scales[block]
    };
    (0..rows)
        .flat_map(|row| (0..cols).map(move |col| value(row, col)))
        .collect()
}

#[test]
fn nodes_that_share_a_weight_share_what_it_becomes_and_a_second_run_changes_nothing() {
    for name in [
        "OnnxBlockWiseRtnQuantization",
        "OnnxKQuantQuantization",
        "OnnxHqqQuantization",
    ] {
        let pass = crate::passes::find(name).unwrap();
        let given = serde_json::json!({"block_size": 16, "accuracy_level": 4});
        let configured = pass.configure(given.as_object().unwrap()).unwrap();
        let mut draft = Draft::of(model());
        assert!(pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        let graph = &draft.model.graph;
        let quantized: Vec<&Node> = graph
            .nodes
            .iter()
            .filter(|node| node.op_type == "MatMulNBits")
            .collect();
        assert_eq!(quantized.len(), 2);
        assert_eq!(quantized[0].inputs[1..], quantized[1].inputs[1..]);
        assert_eq!(quantized[0].name, "a_Q4");
        assert_eq!(quantized[0].int("K").unwrap(), Some(32));
        assert_eq!(graph.initializer("w_Q4").unwrap().shape(), [8, 2, 8]);
        assert_eq!(graph.initializer("w_scales").unwrap().shape(), [8, 2]);
        assert!(graph.initializer("w").is_some(), "another node reads it");
        assert_eq!(graph.node("embed_Q4").is_some(), name.contains("Rtn"));
        for tensor in &graph.initializers {
            tensor.bytes().unwrap();
            assert_eq!(tensor.bytes().unwrap(), tensor.bytes().unwrap());
        }
        let before = draft.model.clone();
        assert!(!pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        assert_eq!(before, draft.model);
    }
}

#[test]
fn names_choose_the_nodes() {
    let pass = crate::passes::find("OnnxBlockWiseRtnQuantization").unwrap();
    let count = |given: serde_json::Value| {
        let configured = pass.configure(given.as_object().unwrap()).unwrap();
        let mut draft = Draft::of(model());
        pass.apply(configured.as_ref(), &mut draft).unwrap();
        draft
            .model
            .graph
            .nodes
            .iter()
            .filter(|node| node.domain == MICROSOFT)
            .count()
    };
    assert_eq!(count(serde_json::json!({"block_size": 32})), 3);
    assert_eq!(
        count(serde_json::json!({"block_size": 32, "nodes_to_exclude": ["a", "em*"]})),
        1
    );
    assert_eq!(
        count(serde_json::json!({"block_size": 32, "nodes_to_include": ["b"]})),
        1
    );
    for wrong in [
        serde_json::json!({"bits": 3}),
        serde_json::json!({"block_size": 24}),
        serde_json::json!({"axis": 1}),
    ] {
        assert!(pass.configure(wrong.as_object().unwrap()).is_err());
    }
}

#[test]
fn each_search_is_at_least_as_near_as_rounding() {
    let (rows, cols) = (24, 80);
    let weight = weights(rows * cols);
    let error = |quantizer: &dyn BlockQuantizer, layout: Layout| {
        let back = dequantized(&quantizer.quantize(&weight, [rows, cols], layout), cols, layout);
        weight
            .iter()
            .zip(&back)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    for bits in [4, 8] {
        let layout = Layout { bits, block_size: 32 };
        let rtn = error(&Rtn { symmetric: false }, layout);
        assert!(error(&KQuant, layout) <= rtn * 1.02);
        assert!(error(&Hqq, layout) <= rtn * 1.1);
        assert!(rtn < error(&Rtn { symmetric: true }, layout) * 1.2);
    }
}

#[test]
fn constant_blocks_are_kept() {
    let layout = Layout {
        bits: 4,
        block_size: 16,
    };
    for value in [0.0f32, 0.3, -0.7] {
        let weight = vec![value; 32];
        for quantizer in [
            &Rtn { symmetric: false } as &dyn BlockQuantizer,
            &Rtn { symmetric: true },
            &KQuant,
            &Hqq,
        ] {
            let back = dequantized(&quantizer.quantize(&weight, [2, 16], layout), 16, layout);
            assert!(
                back.iter().all(|found| (found - value).abs() < 1e-6),
                "{value}: {back:?}"
            );
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let weight = weights(16 * 96);
    let layout = Layout {
        bits: 4,
        block_size: 32,
    };
    for quantizer in [&Hqq as &dyn BlockQuantizer, &KQuant] {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let got = pool.install(|| quantizer.quantize(&weight, [16, 96], layout));
            (got.values, got.scales, got.zeros)
        };
        assert_eq!(run(1), run(3));
    }
}

#[test]
fn globs_fit_whole_names() {
    for (pattern, name, fits) in [
        ("/lm_head/MatMul", "/lm_head/MatMul", true),
        ("*/projector/*", "/vision/projector/MatMul", true),
        ("*/projector/*", "/vision/projections/MatMul", false),
        ("/layers.?/a", "/layers.1/a", true),
        ("/layers.?/a", "/layers.12/a", false),
        ("a*b*c", "aXbXbXc", true),
        ("a*b", "ab/c", false),
    ] {
        assert_eq!(glob(pattern, name), fits, "{pattern} {name}");
    }
}

#[test]
fn halves_round_away_from_zero_whatever_they_are() {
    use super::rtn::round_to_nearest;
    for bits in [4, 8] {
        let layout = Layout { bits, block_size: 16 };
        let most = layout.max();
        let step = |i: usize| i as f32 / 64.0;
        // A block whose scale is exactly 1/4 without a zero point.
        let middle = (most + 1.0) / 2.0;
        for start in (0..(most as usize + 1) * 64).step_by(15) {
            let mut block: Vec<f32> = (start..start + 15)
                .map(|i| ((step(i) - middle) * 0.25).max(-middle * 0.25 + 0.001))
                .collect();
            block.push(-middle * 0.25);
            let largest = block.iter().fold(0f32, |most, value| most.max(value.abs()));
            if largest > middle * 0.25 {
                continue;
            }
            let mut codes = [0u8; 16];
            let (scale, zero) = round_to_nearest(&block, &mut codes, layout, true);
            assert_eq!((scale, zero), (0.25, middle));
            for (code, value) in codes.iter().zip(&block) {
                let exact = value * (1.0 / scale) + zero;
                assert_eq!(f32::from(*code), exact.round().clamp(0.0, most), "{exact}");
            }
        }
    }
}
