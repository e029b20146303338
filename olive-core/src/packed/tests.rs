//! Round trips of the layouts through safetensors files.

use super::nf4::{self, Absmax, NestedAbsmax, Nf4Matrix};
use super::{QuantMatrix, compressed_tensors, gptq, olive};
use crate::arch::{ModuleQuantization, QuantizationConfig};
use crate::checkpoint::{Checkpoint, CheckpointPlan, CheckpointWriter};
use crate::dtype::DType;
use crate::weight::WeightKind;
use proptest::prelude::*;

type Stored = Vec<olive::StoredPart>;

fn checkpoint(folder: &std::path::Path, parts: &Stored) -> Checkpoint {
    let mut plan = CheckpointPlan::default();
    for (name, dtype, shape, _) in parts {
        plan.push(name, *dtype, shape.clone());
    }
    let mut writer = CheckpointWriter::create(folder, &plan).unwrap();
    for (name, _, _, bytes) in parts {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
    Checkpoint::open(folder).unwrap()
}

fn noise(seed: u32, i: usize) -> u32 {
    seed.wrapping_add(i as u32).wrapping_mul(2_654_435_761) >> 8
}

fn matrix(shape: [usize; 2], bits: usize, group_size: usize, symmetric: bool, seed: u32) -> QuantMatrix {
    let [rows, cols] = shape;
    let mask = (1u32 << bits) - 1;
    let integers = |n: usize, seed: u32| (0..n).map(|i| (noise(seed, i) & mask) as u8).collect::<Vec<_>>();
    let groups = rows * cols / group_size;
    let scales = (0..groups)
        .map(|i| DType::BF16.round(0.01 + noise(seed, i) as f32 / 1e8))
        .collect();
    let zeros = (!symmetric).then(|| integers(groups, seed ^ 7));
    let values = integers(rows * cols, seed);
    QuantMatrix::pack(
        shape,
        bits,
        group_size,
        &values,
        (scales, DType::BF16),
        zeros.as_deref(),
    )
    .unwrap()
}

fn config(json: serde_json::Value) -> QuantizationConfig {
    serde_json::from_value(json).unwrap()
}

fn gptq_parts(matrix: &QuantMatrix, version: gptq::Version) -> Stored {
    let tensors = gptq::store(matrix, version).unwrap();
    let bytes = [tensors.qweight, tensors.qzeros, tensors.scales, tensors.g_idx];
    let plan = gptq::plan(matrix).into_iter().zip(bytes);
    plan.map(|((part, dtype, shape), bytes)| (format!("w.{part}"), dtype, shape, bytes))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the layout, reading gives the stored matrix.
    #[test]
    fn reading_undoes_storing(
        row_words in 1usize..4, groups in 1usize..4, wide in any::<bool>(), symmetric in any::<bool>(),
        second in any::<bool>(), seed in any::<u32>(),
    ) {
        let (bits, group_size) = (if wide { 8 } else { 4 }, if second { 32 } else { 16 });
        let shape = [row_words * 8, groups * group_size];
        let stored = matrix(shape, bits, group_size, symmetric, seed);
        let folder = tempfile::tempdir().unwrap();
        let read = |method: serde_json::Value, parts: &Stored| {
            let source = checkpoint(folder.path(), parts);
            let quantization = config(method);
            WeightKind::read(&source, Some(&quantization), "w", shape).unwrap()
        };
        let parts = olive::store("w", &stored).unwrap();
        let json = serde_json::json!({
            "quant_method": "olive", "bits": bits, "group_size": group_size, "symmetric": symmetric,
        });
        prop_assert_eq!(read(json, &parts), WeightKind::Packed(stored.clone()));

        let settings = ModuleQuantization { bits, group_size: group_size as i64, symmetric };
        let source = checkpoint(folder.path(), &compressed_tensors::store("w", &stored).unwrap());
        let back = compressed_tensors::read(&source, "w", shape, settings).unwrap();
        prop_assert_eq!(&back, &stored);

        for (version, format) in [(gptq::Version::V1, "gptq"), (gptq::Version::V2, "gptq_v2")] {
            let json = serde_json::json!({
                "quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": format,
                "sym": symmetric, "desc_act": false,
            });
            let read = read(json, &gptq_parts(&stored, version));
            prop_assert_eq!(read.to_dense(), stored.dequantize());
        }
    }

    /// NF4 with and without double quantization, at sizes that end inside a block.
    #[test]
    fn normal_floats_survive_storing(rows in 1usize..9, cols in 1usize..50, nested in any::<bool>(), seed in any::<u32>()) {
        let blocks = (rows * cols).div_ceil(nf4::BLOCK);
        let absmax: Vec<f32> = (0..blocks).map(|i| noise(seed, i) as f32 / 1e7).collect();
        let stored = Nf4Matrix {
            rows,
            cols,
            block_size: nf4::BLOCK,
            values: (0..(rows * cols).div_ceil(2)).map(|i| noise(seed, i) as u8).collect(),
            absmax: match nested {
                false => Absmax::Plain(absmax),
                true => Absmax::Nested(NestedAbsmax {
                    codes: (0..blocks).map(|i| noise(seed, i) as u8).collect(),
                    absmax: vec![0.5; blocks.div_ceil(nf4::NESTED_BLOCK)],
                    map: (0..256).map(|i| i as f32 / 128.0 - 1.0).collect(),
                    offset: 0.7,
                    block_size: nf4::NESTED_BLOCK,
                }),
            },
            code: nf4::CODE,
            dtype: DType::BF16,
        };
        let folder = tempfile::tempdir().unwrap();
        let source = checkpoint(folder.path(), &nf4::store("w", &stored).unwrap());
        let quantization =
            config(serde_json::json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}));
        let read = WeightKind::read(&source, Some(&quantization), "w", [rows, cols]).unwrap();
        let dense = stored.dequantize();
        for (i, w) in dense.iter().enumerate() {
            let byte = stored.values[i / 2];
            let nibble = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
            prop_assert_eq!(*w, nf4::CODE[usize::from(nibble)] * stored.absmax.get(i / 64));
        }
        let mut last = vec![0.0; cols];
        stored.dequantize_rows(rows - 1, &mut last);
        prop_assert_eq!(&last[..], &dense[(rows - 1) * cols..]);
        prop_assert_eq!(read, WeightKind::Nf4(stored));
    }
}

#[test]
fn the_code_is_that_of_the_paper() {
    let code = [
        -1.0,
        -0.696_192_800_998_687_7,
        -0.525_073_051_452_636_7,
        -0.394_917_488_098_144_53,
        -0.284_441_381_692_886_35,
        -0.184_773_430_228_233_34,
        -0.091_050_036_251_544_95,
        0.0,
        0.079_580_299_556_255_34,
        0.160_930_201_411_247_25,
        0.246_112_301_945_686_34,
        0.337_915_241_718_292_24,
        0.440_709_829_330_444_34,
        0.562_617_003_917_694_1,
        0.722_956_836_223_602_3,
        1.0f64,
    ];
    assert_eq!(nf4::CODE, code.map(|value| value as f32));
}

#[test]
fn zero_points_of_zero_borrow_in_the_first_version() {
    let mut stored = matrix([8, 16], 4, 16, false, 3);
    stored.zeros = Some(super::pack_rows(&[0, 1, 0, 15, 0, 0, 2, 0], 1, 4));
    let v1 = gptq_parts(&stored, gptq::Version::V1);
    // 0x02000f010 - 0x11111111, low nibbles first: 0, 1, 0, f, 0, 0, 2, 0.
    assert_eq!(v1[1].3, (0x0200_f010u32.wrapping_sub(0x1111_1111)).to_le_bytes());
}

#[test]
fn what_olive_cannot_read_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let stored = matrix([8, 32], 4, 16, false, 5);
    let mut parts = gptq_parts(&stored, gptq::Version::V2);
    let refuse = |parts: &Stored, json: serde_json::Value| {
        let source = checkpoint(folder.path(), parts);
        let error = WeightKind::read(&source, Some(&config(json)), "w", [8, 32]).unwrap_err();
        error.to_string()
    };
    let gptq = serde_json::json!({"quant_method": "gptq", "group_size": 16});
    parts[3].3[..4].copy_from_slice(&1u32.to_le_bytes());
    assert!(refuse(&parts, gptq.clone()).contains("`w.g_idx`"));
    parts.pop();
    parts[0].2 = vec![8, 4];
    assert!(refuse(&parts, gptq).contains("`w.qweight`"));
    for (json, word) in [
        (
            serde_json::json!({"quant_method": "gptq", "desc_act": true}),
            "desc_act",
        ),
        (
            serde_json::json!({"quant_method": "gptq", "checkpoint_format": "marlin"}),
            "marlin",
        ),
        (
            serde_json::json!({"quant_method": "compressed-tensors", "format": "dense"}),
            "dense",
        ),
        (
            serde_json::json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            "fp4",
        ),
        (serde_json::json!({"quant_method": "aqlm"}), "aqlm"),
    ] {
        assert!(refuse(&parts, json).contains(word), "{word}");
    }
    let mut olive = olive::store("w", &stored).unwrap();
    let symmetric = serde_json::json!({"quant_method": "olive", "group_size": 16, "symmetric": true});
    assert!(refuse(&olive, symmetric).contains("`w.weight_qzeros`"));
    olive.pop();
    let asymmetric = serde_json::json!({"quant_method": "olive", "group_size": 16});
    assert!(refuse(&olive, asymmetric).contains("weight_qzeros"));
}
