//! PEFT adapters in graphs and files, against what the real packages made of them.

use std::path::Path;

use olive_core::checkpoint::write_file;
use olive_core::{CancelToken, Checkpoint, DType, HfModel, NoProgress, TensorInfo, TensorSource};
use olive_onnx::adapter::{ADAPTER_FILE, AdapterFile, ConvertOptions, convert_adapter, read_adapter};
use olive_onnx::ir::{Dim, Tensor};
use olive_onnx::{BuilderOptions, OnnxFolder, Precision, build_model_folder};

use crate::building::build;
use crate::golden;

fn sorted(adapter: &AdapterFile, rename: impl Fn(&str) -> String) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let entry = |tensor: &Tensor| {
        (
            rename(&tensor.name),
            tensor.shape().to_vec(),
            tensor.bytes().unwrap().into_owned(),
        )
    };
    let mut list: Vec<_> = adapter.parameters.iter().map(entry).collect();
    list.sort();
    list
}

fn plain(name: &str) -> String {
    name.to_owned()
}

#[test]
fn the_graph_takes_the_adapter_as_olives_own_extraction_does() {
    let Some(root) = golden::genai() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("model");
    build(
        &root.join("llama/hf"),
        Precision::Fp32,
        Some(&root.join("llama/adapter-travel")),
        &output,
    );
    let ours = OnnxFolder::open(&output).unwrap();
    let theirs = OnnxFolder::open(root.join("llama/fp32-cpu-adapters")).unwrap();
    let (ours, theirs) = (&ours.model().graph, &theirs.model().graph);
    assert_eq!(ours.inputs, theirs.inputs);
    assert_eq!(ours.nodes, theirs.nodes);
    for input in ours.optional_inputs() {
        assert!(ours.initializer(&input.name).unwrap().is_empty());
        assert!(input.shape.as_ref().unwrap().contains(&Dim::from("lora_r")));
    }
    let written = read_adapter(&output.join(ADAPTER_FILE)).unwrap();
    let reference = read_adapter(&root.join("llama/fp32-cpu-adapters").join(ADAPTER_FILE)).unwrap();
    assert_eq!(sorted(&written, plain), sorted(&reference, plain));
}

#[test]
fn int4_keeps_the_adapter_in_float() {
    let Some(root) = golden::genai() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("model");
    build(
        &root.join("llama/hf"),
        Precision::Int4,
        Some(&root.join("llama/adapter-travel")),
        &output,
    );
    let graph = OnnxFolder::open(&output).unwrap().into_model().graph;
    let count = |op: &str| graph.nodes.iter().filter(|node| node.op_type == op).count();
    assert_eq!((count("MatMul"), count("MatMulNBits")), (28, 15));
    assert_eq!(graph.optional_inputs().count(), 28);
}

#[test]
fn an_adapters_file_has_the_types_of_the_graphs_inputs() {
    let Some(root) = golden::genai() else { return };
    for precision in [Precision::Fp16, Precision::Bf16, Precision::Int8] {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("model");
        build(
            &root.join("llama/hf"),
            precision,
            Some(&root.join("llama/adapter-travel")),
            &output,
        );
        let folder = OnnxFolder::open(&output).unwrap();
        let graph = &folder.model().graph;
        let adapter = read_adapter(&output.join(ADAPTER_FILE)).unwrap();
        assert!(!adapter.parameters.is_empty());
        for parameter in &adapter.parameters {
            let input = graph.input(&parameter.name).unwrap();
            let default = graph.initializer(&parameter.name).unwrap();
            assert_eq!(
                input.dtype,
                Some(parameter.dtype()),
                "{precision:?} {}",
                parameter.name
            );
            assert_eq!(default.dtype(), parameter.dtype());
        }
    }
}

#[test]
fn a_converted_adapter_holds_what_olives_converter_gives_under_the_graphs_names() {
    let Some(root) = golden::genai() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let reference = read_adapter(&root.join("llama/poem.onnx_adapter")).unwrap();
    let graph_name = |name: &str| {
        name.replace(".self_attn.", ".attn.")
            .replace(".weight", ".MatMul.weight")
    };
    let model = root.join("llama/fp32-cpu-adapters");
    for model in [None, Some(model.as_path())] {
        let output = scratch.path().join("poem.onnx_adapter");
        let options = ConvertOptions {
            model,
            dtype: DType::F32,
        };
        convert_adapter(&root.join("llama/adapter-poem"), &options, &output).unwrap();
        let ours = read_adapter(&output).unwrap();
        assert_eq!(sorted(&ours, plain), sorted(&reference, graph_name));
    }
}

/// A copy of the poem adapter with some tensors changed.
fn changed(
    root: &Path,
    change: impl Fn(&str, &TensorInfo) -> Option<(String, TensorInfo)>,
) -> tempfile::TempDir {
    let source = root.join("llama/adapter-poem");
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        source.join("adapter_config.json"),
        folder.path().join("adapter_config.json"),
    )
    .unwrap();
    let weights = Checkpoint::open_files(&source, vec![source.join("adapter_model.safetensors")]).unwrap();
    let tensors: Vec<_> = weights
        .names()
        .into_iter()
        .filter_map(|name| {
            let (new_name, info) = change(name, weights.info(name).unwrap())?;
            let mut bytes = weights.bytes(name).unwrap().into_owned();
            bytes.resize(info.byte_len(), 0);
            Some((new_name, info, bytes))
        })
        .collect();
    write_file(folder.path().join("adapter_model.safetensors"), &tensors).unwrap();
    folder
}

#[test]
fn an_adapter_for_another_model_is_refused_by_name() {
    let Some(root) = golden::genai() else { return };
    let model = root.join("llama/fp32-cpu-adapters");
    let convert = |folder: &Path, dtype| {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("x.onnx_adapter");
        let options = ConvertOptions {
            model: Some(&model),
            dtype,
        };
        let error = convert_adapter(folder, &options, &output)
            .unwrap_err()
            .to_string();
        assert!(!output.exists());
        error
    };
    let lacking = changed(&root, |name, info| {
        (!name.contains("layers.1.mlp")).then(|| (name.to_owned(), info.clone()))
    });
    let error = convert(lacking.path(), DType::F32);
    assert!(error.contains("without 6 weight(s)"), "{error}");
    assert!(
        error.contains("model.layers.1.mlp.down_proj.lora_B.MatMul.weight"),
        "{error}"
    );
    let deeper = changed(&root, |name, info| {
        Some((name.replace("layers.1.", "layers.7."), info.clone()))
    });
    let error = convert(deeper.path(), DType::F32);
    assert!(
        error.contains("model.layers.7.attn.q_proj.lora_A.MatMul.weight"),
        "{error}"
    );
    let wider = changed(&root, |name, info| {
        let mut info = info.clone();
        if name.ends_with("layers.0.mlp.up_proj.lora_B.weight") {
            info.shape[0] = 384;
        }
        Some((name.to_owned(), info))
    });
    let error = convert(wider.path(), DType::F32);
    assert!(
        error.contains("model.layers.0.mlp.up_proj.lora_B.MatMul.weight") && error.contains("384"),
        "{error}"
    );
    let head = changed(&root, |name, info| {
        Some((
            name.replace("model.layers.1.mlp.up_proj", "lm_head"),
            info.clone(),
        ))
    });
    assert!(convert(head.path(), DType::F32).contains("lm_head"));
    let error = convert(&root.join("llama/adapter-poem"), DType::F16);
    assert!(error.contains("expected float32 as the graph has it"), "{error}");
}

#[test]
fn a_build_refuses_an_adapter_of_another_model_before_it_writes() {
    let Some(root) = golden::genai() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let model = HfModel::open(root.join("phi3/hf")).unwrap();
    let adapter = root.join("llama/adapter-poem");
    let output = scratch.path().join("model");
    let build = build_model_folder(
        &model,
        Some(&adapter),
        &BuilderOptions::default(),
        &output,
        &NoProgress,
        &CancelToken::default(),
    );
    // The Llama has two key/value heads, this Phi-3 eight.
    let error = build.unwrap_err().to_string();
    assert!(error.contains("model.layers.0.attn.k_proj"), "{error}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn fused_projections_are_cut_and_ranks_are_evened_out() {
    let Some(root) = golden::genai() else { return };
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"qkv_proj": 3}}"#;
    std::fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    let value = |i: usize| (i % 89) as f32 - 40.0;
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: [usize; 2]| {
        let info = TensorInfo {
            dtype: DType::F32,
            shape: shape.to_vec(),
        };
        let values: Vec<f32> = (0..info.len()).map(value).collect();
        tensors.push((name, info, DType::F32.from_f32(&values).unwrap()));
    };
    for layer in 0..2 {
        for (part, rank, input, output) in [
            ("self_attn.qkv_proj", 3, 128, 384),
            ("mlp.gate_up_proj", 2, 128, 640),
        ] {
            let name = format!("base_model.model.model.layers.{layer}.{part}");
            add(format!("{name}.lora_A.weight"), [rank, input]);
            add(format!("{name}.lora_B.weight"), [output, rank]);
        }
    }
    write_file(folder.path().join("adapter_model.safetensors"), &tensors).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("model");
    build(
        &root.join("phi3/hf"),
        Precision::Fp32,
        Some(folder.path()),
        &output,
    );
    let adapter = read_adapter(&output.join(ADAPTER_FILE)).unwrap();
    assert_eq!(adapter.parameters.len(), 2 * 5 * 2);
    let read = |name: &str| {
        let tensor = adapter
            .parameter(&format!("model.layers.1.{name}.MatMul.weight"))
            .unwrap();
        (tensor.shape().to_vec(), tensor.to_f32().unwrap())
    };
    // k takes rows 128..256 of B, scaled by 4 / 3; up takes rows 320..640 with a third, empty rank.
    let (shape, k) = read("attn.k_proj.lora_B");
    assert_eq!(shape, [3, 128]);
    let (shape, a) = read("attn.k_proj.lora_A");
    assert_eq!(shape, [128, 3]);
    for column in 0..128 {
        for rank in 0..3 {
            assert_eq!(
                k[rank * 128 + column],
                value((128 + column) * 3 + rank) * (4.0f64 / 3.0) as f32
            );
            assert_eq!(a[column * 3 + rank], value(rank * 128 + column));
        }
    }
    let (shape, up) = read("mlp.up_proj.lora_B");
    assert_eq!(shape, [3, 320]);
    for column in 0..320 {
        assert_eq!(up[column], value((320 + column) * 2) * 2.0);
        assert_eq!(up[640 + column], 0.0);
    }
}

#[test]
fn a_graph_with_the_checkpoints_own_names_takes_its_adapter_as_it_is() {
    let Some(root) = golden::shared() else { return };
    // What Olive 0.7.1 exported through PyTorch, in a folder that names a place where it is no longer.
    let root = root.join("golden/olive");
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("x.onnx_adapter");
    let model = root.join("onnx-ao");
    let options = ConvertOptions {
        model: Some(&model),
        dtype: DType::F32,
    };
    convert_adapter(&root.join("ft/adapter"), &options, &output).unwrap();
    let reference = read_adapter(&model.join("model").join(ADAPTER_FILE)).unwrap();
    assert_eq!(
        sorted(&read_adapter(&output).unwrap(), plain),
        sorted(&reference, plain)
    );
}
