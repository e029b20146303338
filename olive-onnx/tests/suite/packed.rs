//! An AutoAWQ checkpoint in the graph: the same integers, zero points and scales.

use olive_core::{Checkpoint, ModelHandle, TensorSource};
use olive_onnx::ir::Tensor;
use olive_onnx::{OnnxFolder, Precision};

use crate::building::build;
use crate::golden;

/// Output channel, within eight, that nibble `i` of a word of an AutoAWQ checkpoint holds.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Words `[lines, out / 8]` as integers `[out][line]`.
fn integers(checkpoint: &Checkpoint, name: &str) -> Vec<Vec<u8>> {
    let info = checkpoint.info(name).unwrap();
    let (lines, words) = (info.shape[0], info.shape[1]);
    let bytes = checkpoint.bytes(name).unwrap();
    let mut out = vec![vec![0; lines]; words * 8];
    for (at, bytes) in bytes.as_chunks::<4>().0.iter().enumerate() {
        let (line, word) = (at / words, at % words);
        for (nibble, channel) in ORDER.iter().enumerate() {
            let number = u32::from_le_bytes(*bytes) >> (4 * nibble);
            out[word * 8 + channel][line] = (number & 15) as u8;
        }
    }
    out
}

/// Row `row` of packed integers, two in a byte.
fn unpacked(tensor: &Tensor, rows: usize, row: usize, count: usize) -> Vec<u8> {
    let bytes = tensor.bytes().unwrap();
    let row_bytes = bytes.len() / rows;
    let line = &bytes[row * row_bytes..(row + 1) * row_bytes];
    (0..count).map(|i| (line[i / 2] >> (4 * (i % 2))) & 15).collect()
}

#[test]
fn integers_zero_points_and_scales_are_those_of_the_checkpoint() {
    let Some(root) = golden::shared() else { return };
    let source = root.join("golden/autoawq/quantized");
    let checkpoint = Checkpoint::open(&source).unwrap();
    let tensors: &dyn TensorSource = &checkpoint;
    for precision in [Precision::Fp32, Precision::Int4] {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("model");
        build(&source, precision, None, &output);
        let graph = OnnxFolder::open(&output).unwrap().into_model().graph;
        let spec = olive_core::HfModel::open(&source).unwrap().spec().clone();
        let parts = |module: &str| -> Vec<String> {
            match module {
                "attn.qkv_proj" => ["q", "k", "v"].map(|p| format!("self_attn.{p}_proj")).to_vec(),
                "attn.o_proj" => vec!["self_attn.o_proj".to_owned()],
                other => vec![other.to_owned()],
            }
        };
        for layer in 0..spec.n_layers {
            for module in [
                "attn.qkv_proj",
                "attn.o_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            ] {
                let name = format!("model.layers.{layer}.{module}.MatMulNBits");
                let get = |part: &str| graph.initializer(&format!("{name}.{part}")).unwrap();
                let (qweight, scales, qzeros) =
                    (get("qweight"), get("scales").to_f32().unwrap(), get("qzeros"));
                let [rows, groups, _] = qweight.shape() else {
                    panic!("{name}")
                };
                let mut row = 0;
                for part in parts(module) {
                    let stored = |kind: &str| format!("model.layers.{layer}.{part}.{kind}");
                    let values = integers(&checkpoint, &stored("qweight"));
                    let zeros = integers(&checkpoint, &stored("qzeros"));
                    let stored_scales = tensors.read_f32(&stored("scales")).unwrap();
                    for channel in 0..values.len() {
                        assert_eq!(
                            unpacked(qweight, *rows, row, values[channel].len()),
                            values[channel],
                            "{name}"
                        );
                        assert_eq!(unpacked(qzeros, *rows, row, *groups), zeros[channel], "{name}");
                        for group in 0..*groups {
                            let stored = stored_scales[group * values.len() + channel];
                            assert_eq!(scales[row * groups + group].to_bits(), stored.to_bits());
                        }
                        row += 1;
                    }
                }
                assert_eq!(row, *rows);
                let path = format!("/{}", name.replace('.', "/").replace("layers/", "layers."));
                let node = graph.node(&path).unwrap();
                assert_eq!(node.int("block_size").unwrap(), Some(128));
                let level = matches!(precision, Precision::Int4).then_some(4);
                assert_eq!(node.int("accuracy_level").unwrap(), level);
            }
        }
        let head = graph
            .nodes
            .iter()
            .find(|node| node.outputs[0] == "logits")
            .unwrap();
        let expected = match precision {
            Precision::Fp32 | Precision::Fp16 | Precision::Bf16 => "MatMul",
            Precision::Int4 | Precision::Int8 => "MatMulNBits",
        };
        assert_eq!(head.op_type, expected);
    }
}
