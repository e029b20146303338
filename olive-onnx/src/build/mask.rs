//! From the attention mask `[batch, total]` to what GroupQueryAttention wants: the last position of each row, and the
//! length of the longest.

use olive_core::Result;

use super::graph::Builder;
use crate::ir::{Node, OnnxType};

const PREFIX: &str = "/model/attn_mask_reformat/attn_mask_subgraph";

/// `sum(mask) - 1` of each row, INT32.
pub const LAST_POSITIONS: &str = "/model/attn_mask_reformat/attn_mask_subgraph/Sub/Cast/output_0";
/// Width of the mask, INT32 scalar.
pub const TOTAL_LENGTH: &str = "/model/attn_mask_reformat/attn_mask_subgraph/Gather/Cast/output_0";

/// ONNX's number for INT32.
const INT32: i64 = OnnxType::Int32.code() as i64;

impl Builder<'_> {
    /// Adds the nodes behind [`LAST_POSITIONS`] and [`TOTAL_LENGTH`].
    pub fn mask(&mut self) -> Result<()> {
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
