//! From the attention mask `[batch, total]` to what GroupQueryAttention wants: the last position of each row, and the
//! length of the longest.

use olive_core::Result;

use super::graph::Builder;
use super::options::Provider;
use crate::ir::{Node, OnnxType};

const PREFIX: &str = "/model/attn_mask_reformat/attn_mask_subgraph";

/// `sum(mask) - 1` of each row, INT32.
const LAST_POSITIONS: &str = "/model/attn_mask_reformat/attn_mask_subgraph/Sub/Cast/output_0";
/// Width of the mask, INT32 scalar.
const TOTAL_LENGTH: &str = "/model/attn_mask_reformat/attn_mask_subgraph/Gather/Cast/output_0";

/// ONNX's number for INT32.
const INT32: i64 = OnnxType::Int32.code() as i64;

/// As [`LAST_POSITIONS`], where the graph is captured.
const CAPTURED_LAST_POSITIONS: &str = "/model/attn_mask_reformat/attn_mask_subgraph/Sub/output_0";
/// As [`TOTAL_LENGTH`], where the graph is captured: the longest sum of a row, as the mask has a fixed width.
const CAPTURED_TOTAL_LENGTH: &str = "/model/attn_mask_reformat/attn_mask_subgraph/ReduceMax/output_0";

impl Builder<'_> {
    /// The values that attention reads: the last position of each row, and the length of the longest.
    pub fn mask_values(&self) -> [&'static str; 2] {
        match self.is_captured_webgpu() {
            true => [CAPTURED_LAST_POSITIONS, CAPTURED_TOTAL_LENGTH],
            false => [LAST_POSITIONS, TOTAL_LENGTH],
        }
    }

    /// Whether the graph is captured on WebGPU, where the mask has a fixed width and all its nodes run on the device.
    pub fn is_captured_webgpu(&self) -> bool {
        self.options.provider == Provider::WebGpu && self.options.enable_webgpu_graph
    }

    /// Adds the nodes behind [`Builder::mask_values`].
    pub fn mask(&mut self) -> Result<()> {
        if self.is_captured_webgpu() {
            return self.captured_mask();
        }
        let one = self.list(&[1])?;
        let path = format!("{PREFIX}/ReduceSum");
        let sum = Node::new(
            &path,
            "ReduceSum",
            &["attention_mask", &one],
            &[&format!("{path}/output_0")],
        );
        let sum = self.node(sum.with("keepdims", 0), OnnxType::Int64, ["batch_size".into()]);
        let path = format!("{PREFIX}/Sub");
        let last = Node::new(&path, "Sub", &[&sum, &one], &[&format!("{path}/output_0")]);
        let last = self.node(last, OnnxType::Int64, ["batch_size".into()]);
        let cast = Node::new(format!("{PREFIX}/Sub/Cast"), "Cast", &[&last], &[LAST_POSITIONS]);
        self.node(cast.with("to", INT32), OnnxType::Int32, ["batch_size".into()]);
        let width = self.mask_width()?;
        let cast = Node::new(
            format!("{PREFIX}/Gather/Cast"),
            "Cast",
            &[&width],
            &[TOTAL_LENGTH],
        );
        self.node(cast.with("to", INT32), OnnxType::Int32, []);
        Ok(())
    }

    fn captured_mask(&mut self) -> Result<()> {
        let rows = ["batch_size".into()];
        let path = format!("{PREFIX}/Cast");
        let mask = Node::new(&path, "Cast", &["attention_mask"], &[&format!("{path}/output_0")]);
        let shape = ["batch_size".into(), "total_sequence_length".into()];
        let mask = self.node(mask.with("to", INT32), OnnxType::Int32, shape);
        let axis = self.list(&[1])?;
        let path = format!("{PREFIX}/ReduceSum");
        let sum = Node::new(
            &path,
            "ReduceSum",
            &[&mask, &axis],
            &[&format!("{path}/output_0")],
        );
        let sum = self.node(sum.with("keepdims", 0), OnnxType::Int32, rows.clone());
        let one = self.narrow_list(1)?;
        let last = Node::new(
            format!("{PREFIX}/Sub"),
            "Sub",
            &[&sum, &one],
            &[CAPTURED_LAST_POSITIONS],
        );
        self.node(last, OnnxType::Int32, rows);
        let longest = Node::new(
            format!("{PREFIX}/ReduceMax"),
            "ReduceMax",
            &[&sum],
            &[CAPTURED_TOTAL_LENGTH],
        );
        self.node(longest.with("keepdims", 0), OnnxType::Int32, []);
        Ok(())
    }

    /// The width of the mask, INT64 scalar; its nodes are added once.
    pub fn mask_width(&mut self) -> Result<String> {
        let output = format!("{PREFIX}/Gather/output_0");
        if self.graph.nodes.iter().any(|node| node.outputs[0] == output) {
            return Ok(output);
        }
        let path = format!("{PREFIX}/Shape");
        let shape = Node::new(
            &path,
            "Shape",
            &["attention_mask"],
            &[&format!("{path}/output_0")],
        );
        let shape = self.node(shape, OnnxType::Int64, [2.into()]);
        let index = self.scalar(1)?;
        let gather = Node::new(
            format!("{PREFIX}/Gather"),
            "Gather",
            &[&shape, &index],
            &[&output],
        );
        Ok(self.node(gather.with("axis", 0), OnnxType::Int64, []))
    }
}
