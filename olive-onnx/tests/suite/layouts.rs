//! Checkpoints packed in every layout that is read: the graph holds the same integers, scales and zero points, module by
//! module, or for 4-bit floats the values that they stand for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use olive_core::packed::{compressed_tensors, gptq, nf4, olive};
use olive_core::{DType, HfModel, ModelHandle, ModelSpec, QuantMatrix, TensorInfo, checkpoint};
use olive_onnx::ir::{Graph, Node};
use olive_onnx::{OnnxFolder, Precision};
use serde_json::{Value, json};

use crate::building::build;

type Part = (String, DType, Vec<usize>, Vec<u8>);

/// A packed module as a layout stores it, and what it stands for.
type Packed = (Vec<Part>, Vec<f32>);

fn family(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/families")
        .join(name)
}

/// Integers, scales and zero points that differ everywhere; their own for each module.
fn matrix(module: &str, [rows, cols]: [usize; 2], bits: usize, group: usize, zeros: bool) -> QuantMatrix {
    let seed: usize = module.bytes().map(usize::from).sum();
    let most = 1usize << bits;
    let number = |i: usize, k: usize| ((i + 1) * k + seed * 31) % 1009;
    let groups = cols / group;
    let codes: Vec<u8> = (0..rows * cols).map(|i| (number(i, 7919) % most) as u8).collect();
    let scales = (0..rows * groups).map(|i| (number(i, 104_729) + 1) as f32 / 65_536.0);
    let points: Vec<u8> = (0..rows * groups)
        .map(|i| (number(i, 1299) % most) as u8)
        .collect();
    let shape = [rows, cols];
    let scales = (scales.collect(), DType::F32);
    QuantMatrix::pack(shape, bits, group, &codes, scales, zeros.then_some(&points)).unwrap()
}

/// Writes a copy of a family's checkpoint in which `pack` packs modules, and reads the graph that is built of it.
fn packed_graph(
    name: &str,
    precision: Precision,
    quantization: Value,
    pack: impl Fn(&str, [usize; 2]) -> Option<Packed>,
) -> (Graph, ModelSpec, BTreeMap<String, Vec<f32>>) {
    let source = HfModel::open(family(name)).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("hf");
    std::fs::create_dir(&folder).unwrap();
    let mut config: Value = olive_core::fsio::read_json(source.path().join("config.json")).unwrap();
    config["quantization_config"] = quantization;
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, TensorInfo, Vec<u8>)> = Vec::new();
    let mut values = BTreeMap::new();
    for (tensor, shape) in source.spec().dense_tensors() {
        let module = tensor.trim_end_matches(".weight").to_owned();
        let packed = match shape.as_slice() {
            [rows, cols] => pack(&module, [*rows, *cols]),
            _ => None,
        };
        match packed {
            Some((parts, dense)) => {
                tensors.extend(
                    parts
                        .into_iter()
                        .map(|(name, dtype, shape, bytes)| (name, TensorInfo { dtype, shape }, bytes)),
                );
                values.insert(module, dense);
            }
            None => {
                let info = source.tensors().info(&tensor).unwrap().clone();
                let bytes = source.tensors().bytes(&tensor).unwrap().into_owned();
                values.insert(module, source.tensors().read_f32(&tensor).unwrap());
                tensors.push((tensor, info, bytes));
            }
        }
    }
    checkpoint::write_file(folder.join("model.safetensors"), &tensors).unwrap();
    let output = scratch.path().join("out/model");
    build(&folder, precision, None, &output);
    let mut graph = OnnxFolder::open(&output).unwrap().into_model().graph;
    // Bytes are in files that go away.
    for tensor in &mut graph.initializers {
        let bytes = tensor.bytes().unwrap().into_owned();
        *tensor =
            olive_onnx::ir::Tensor::inline(&tensor.name, tensor.dtype(), tensor.shape().to_vec(), bytes)
                .unwrap();
    }
    (graph, source.spec().clone(), values)
}

/// What a MatMulNBits or GatherBlockQuantized stands for, `[rows, cols]`.
fn dequantized(graph: &Graph, node: &Node, cols: usize) -> Vec<f32> {
    let gathers = node.op_type == "GatherBlockQuantized";
    let mut data = node.input(usize::from(!gathers)).unwrap();
    if gathers && graph.initializer(data).is_none() {
        // The shared head, reshaped.
        let reshape = graph.nodes.iter().find(|node| node.outputs[0] == data).unwrap();
        data = reshape.input(0).unwrap();
    }
    let bits = node.int("bits").unwrap().unwrap() as usize;
    let block = node.int("block_size").unwrap().unwrap() as usize;
    let values = graph.initializer(data).unwrap().bytes().unwrap();
    let scales = graph
        .initializer(node.input(2).unwrap())
        .unwrap()
        .to_f32()
        .unwrap();
    let zeros = node.input(3).filter(|name| !name.is_empty());
    let zeros = zeros.map(|name| graph.initializer(name).unwrap().bytes().unwrap());
    let blocks = cols / block;
    let rows = scales.len() / blocks;
    let get = |bytes: &[u8], width: usize, row: usize, at: usize| -> f32 {
        let line = &bytes[row * width..(row + 1) * width];
        match bits {
            4 => f32::from((line[at / 2] >> (4 * (at % 2))) & 15),
            _ => f32::from(line[at]),
        }
    };
    let mut out = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        for col in 0..cols {
            let zero = match &zeros {
                Some(zeros) => get(zeros, (blocks * bits).div_ceil(8), row, col / block),
                None => (1u32 << (bits - 1)) as f32,
            };
            let code = get(&values, cols * bits / 8, row, col);
            out.push((code - zero) * scales[row * blocks + col / block]);
        }
    }
    out
}

/// The checkpoint's rows behind a linear of the graph: `model.layers.0.attn.qkv_proj`.
fn stored(spec: &ModelSpec, values: &BTreeMap<String, Vec<f32>>, place: &str) -> Vec<f32> {
    if place == "lm_head" {
        return values[spec.lm_head_name().trim_end_matches(".weight")].clone();
    }
    let place = place.replace(".attn.", ".self_attn.");
    if let Some(rows) = values.get(&place) {
        return rows.clone();
    }
    let (base, part) = place.rsplit_once('.').unwrap();
    let (hidden, mlp) = (spec.hidden_size, spec.intermediate_size);
    match part {
        "qkv_proj" => ["q_proj", "k_proj", "v_proj"]
            .iter()
            .flat_map(|part| values[&format!("{base}.{part}")].clone())
            .collect(),
        "gate_proj" => values[&format!("{base}.gate_up_proj")][..mlp * hidden].to_vec(),
        "up_proj" => values[&format!("{base}.gate_up_proj")][mlp * hidden..].to_vec(),
        other => unreachable!("{other}"),
    }
}

/// Checks every packed product of the graph, and says how many there are.
fn check(graph: &Graph, spec: &ModelSpec, values: &BTreeMap<String, Vec<f32>>) -> usize {
    let mut count = 0;
    for node in graph.nodes.iter().filter(|node| node.op_type == "MatMulNBits") {
        let place = node.name.trim_start_matches('/').trim_end_matches("/MatMulNBits");
        let cols = node.int("K").unwrap().unwrap() as usize;
        let expected = stored(spec, values, &place.replace('/', "."));
        assert_eq!(dequantized(graph, node, cols), expected, "{place}");
        count += 1;
    }
    count
}

#[test]
fn olives_layout_with_its_overrides_head_and_embedding() {
    let quantization = json!({
        "quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": false, "lm_head": true, "embeds": true,
        "overrides": {
            "model.layers.1.self_attn.k_proj": {"bits": 8},
            "re:.*layers\\.0\\.mlp\\.down_proj": {"group_size": -1},
            "re:.*layers\\.1\\.mlp\\..*": {"symmetric": true, "group_size": 16},
            "model.embed_tokens": {"bits": 8},
        },
    });
    let settings =
        olive_core::arch::QuantizationConfig::clone(&serde_json::from_value(quantization.clone()).unwrap());
    let pack = |module: &str, shape: [usize; 2]| {
        let own = settings.module(module).unwrap();
        let group = own.group_for(shape[1]);
        let matrix = matrix(module, shape, own.bits, group, !own.symmetric);
        Some((olive::store(module, &matrix).unwrap(), matrix.dequantize()))
    };
    let (graph, spec, values) = packed_graph("llama3-rope", Precision::Fp32, quantization, pack);
    // k of layer 1 has other bits, so q, k and v stay apart there.
    assert_eq!(check(&graph, &spec, &values), 1 + 5 + 7);
    assert!(graph.node("/model/layers.1/attn/k_proj/MatMulNBits").is_some());
    let bits = |name: &str| graph.node(name).unwrap().int("bits").unwrap();
    assert_eq!(bits("/model/layers.1/attn/k_proj/MatMulNBits"), Some(8));
    assert_eq!(bits("/lm_head/MatMulNBits"), Some(8));
    let lookup = graph.node("/model/embed_tokens/GatherBlockQuantized").unwrap();
    let table = dequantized(&graph, lookup, spec.hidden_size);
    assert_eq!(table, values["model.embed_tokens"]);
    let whole = graph.node("/model/layers.0/mlp/down_proj/MatMulNBits").unwrap();
    assert_eq!(
        whole.int("block_size").unwrap(),
        Some(spec.intermediate_size as i64)
    );
    let symmetric = graph.node("/model/layers.1/mlp/up_proj/MatMulNBits").unwrap();
    assert_eq!(symmetric.inputs.len(), 3);
}

#[test]
fn gptqs_layout_with_its_order_of_groups() {
    for (bits, group, name) in [(4, 32, "mistral"), (8, 16, "mistral"), (4, -1, "phi3-partial")] {
        let quantization = json!({
            "quant_method": "gptq", "bits": bits, "group_size": group, "sym": false, "desc_act": false,
        });
        let pack = |module: &str, shape: [usize; 2]| {
            if !module.contains(".layers.") {
                return None;
            }
            let group = usize::try_from(group).unwrap_or(shape[1]);
            let matrix = matrix(module, shape, bits, group, true);
            let parts = gptq::store(&matrix, gptq::Version::V1).unwrap();
            let bytes = [parts.qweight, parts.qzeros, parts.scales, parts.g_idx];
            let stored = gptq::plan(&matrix)
                .into_iter()
                .zip(bytes)
                .map(|((part, dtype, shape), bytes)| (format!("{module}.{part}"), dtype, shape, bytes));
            Some((stored.collect(), matrix.dequantize()))
        };
        let (graph, spec, values) = packed_graph(name, Precision::Fp32, quantization.clone(), pack);
        assert_eq!(
            check(&graph, &spec, &values),
            5 * spec.n_layers,
            "{name} {bits} {group}"
        );
    }
}

#[test]
fn compressed_tensors_by_group_and_by_channel() {
    for (bits, strategy, symmetric) in [(4, "group", true), (8, "channel", true), (4, "group", false)] {
        let weights = json!({
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
            "group_size": (strategy == "group").then_some(32),
        });
        let quantization = json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        });
        let pack = |module: &str, shape: [usize; 2]| {
            if !module.contains(".layers.") {
                return None;
            }
            let group = if strategy == "group" { 32 } else { shape[1] };
            let matrix = matrix(module, shape, bits, group, !symmetric);
            Some((
                compressed_tensors::store(module, &matrix).unwrap(),
                matrix.dequantize(),
            ))
        };
        let (graph, spec, values) = packed_graph("mistral", Precision::Fp32, quantization, pack);
        assert_eq!(
            check(&graph, &spec, &values),
            5 * spec.n_layers,
            "{bits} {strategy}"
        );
    }
}

#[test]
fn normal_floats_become_what_they_stand_for() {
    let quantization = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true,
    });
    let pack = |module: &str, shape: [usize; 2]| {
        if !module.contains(".layers.") {
            return None;
        }
        let dense = matrix(module, shape, 8, 16, true).dequantize();
        let options = nf4::Nf4Options {
            double_quant: true,
            ..nf4::Nf4Options::default()
        };
        let packed = nf4::quantize(module, &dense, shape, options, DType::BF16).unwrap();
        Some((nf4::store(module, &packed).unwrap(), packed.dequantize()))
    };
    let (graph, spec, values) = packed_graph("mistral", Precision::Fp32, quantization, pack);
    let products: Vec<&Node> = graph
        .nodes
        .iter()
        .filter(|node| node.op_type == "MatMul" && node.name.contains("layers"))
        .collect();
    assert_eq!(products.len(), 5 * spec.n_layers);
    for node in products {
        let place = node.name.trim_start_matches('/').trim_end_matches("/MatMul");
        let weight = graph.initializer(node.input(1).unwrap()).unwrap();
        let [cols, rows] = [weight.shape()[0], weight.shape()[1]];
        let expected = stored(&spec, &values, &place.replace('/', "."));
        let got = weight.to_f32().unwrap();
        for row in 0..rows {
            for col in 0..cols {
                assert_eq!(got[col * rows + row], expected[row * cols + col], "{place}");
            }
        }
    }
}
