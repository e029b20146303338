//! The real builder's folders are read whole, and bad files are refused.

use olive_onnx::OnnxFolder;
use olive_onnx::ir::{Dim, OnnxType};

use crate::golden;

#[test]
fn the_real_builders_folders_are_read() {
    let Some(root) = golden::genai() else { return };
    for folder in [
        "llama/fp32-cpu",
        "llama/int4-cpu",
        "llama/fp32-cpu-adapters",
        "phi3/fp32-cpu",
        "phi3/int4-cpu",
        "qwen2/fp32-cpu",
        "qwen2/int4-cpu",
    ] {
        let opened = OnnxFolder::open(root.join(folder)).unwrap();
        let graph = &opened.model().graph;
        assert_eq!(graph.name, "main_graph");
        assert_eq!(opened.model().opset(""), Some(22));
        assert_eq!(opened.model().opset("com.microsoft"), Some(1));
        assert_eq!(
            graph.inputs[0].shape,
            Some(vec![Dim::from("batch_size"), Dim::from("sequence_length")])
        );
        assert_eq!(graph.inputs[0].dtype, Some(OnnxType::Int64));
        assert!(
            graph
                .initializers
                .iter()
                .all(|tensor| tensor.bytes().unwrap().len() == tensor.byte_len())
        );
        assert!(opened.genai_config().is_some());
    }
}
