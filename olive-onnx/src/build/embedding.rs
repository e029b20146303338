//! Token embedding. A tied model stores one matrix, the head's, and the embedding reads it from there.

use olive_core::Result;

use super::graph::Builder;
use super::options::Precision;
use crate::ir::{MICROSOFT, Node, OnnxType};

impl Builder<'_> {
    /// From `input_ids [batch, sequence]` to `[batch, sequence, hidden]`.
    pub fn embedding(&mut self) -> Result<String> {
        let (vocab, hidden) = (self.spec.vocab_size, self.spec.hidden_size);
        let gather = "/model/embed_tokens/Gather";
        let output = format!("{gather}/output_0");
        if !self.spec.tie_word_embeddings || (self.head_is_quantized() && !self.head_is_shared()) {
            let weight = "model.embed_tokens.weight";
            self.initializer(
                self.weights
                    .table(weight, self.spec.embedding_name(), [vocab, hidden])?,
            );
            return Ok(self.hidden(
                Node::new(gather, "Gather", &[weight, "input_ids"], &[&output]),
                hidden,
            ));
        }
        if self.head_is_quantized() {
            return self.packed_embedding();
        }
        let path = "/model/embed_tokens/Transpose";
        let table = Node::new(
            path,
            "Transpose",
            &["lm_head.MatMul.weight"],
            &[&format!("{path}/output_0")],
        );
        let table = table.with("perm", vec![1, 0]);
        let table = self.node(table, OnnxType::Float, [vocab.into(), hidden.into()]);
        Ok(self.hidden(
            Node::new(gather, "Gather", &[&table, "input_ids"], &[&output]),
            hidden,
        ))
    }

    /// Rows of the packed head, unpacked as they are looked up.
    fn packed_embedding(&mut self) -> Result<String> {
        let (vocab, hidden) = (self.spec.vocab_size, self.spec.hidden_size);
        let row_bytes = hidden / 2;
        let shape = self.list(&[vocab as i64, row_bytes as i64])?;
        let path = "/model/embed_tokens/Reshape";
        let rows = Node::new(
            path,
            "Reshape",
            &["lm_head.MatMul.weight_Q4", &shape],
            &[&format!("{path}/output_0")],
        );
        let rows = self.node(rows, OnnxType::Uint8, [vocab.into(), row_bytes.into()]);
        let path = "/model/embed_tokens/GatherBlockQuantized";
        let inputs = [rows.as_str(), "input_ids", "lm_head.MatMul.weight_scales"];
        let node = Node::new(
            path,
            "GatherBlockQuantized",
            &inputs,
            &[&format!("{path}/output_0")],
        )
        .in_domain(MICROSOFT)
        .with("bits", 4)
        .with("block_size", self.options.block_size as i64)
        .with("gather_axis", 0)
        .with("quantize_axis", 1);
        Ok(self.hidden(node, hidden))
    }

    /// Whether the head is stored in 4-bit blocks.
    pub fn head_is_quantized(&self) -> bool {
        self.options.precision == Precision::Int4
    }

    /// Whether the embedding reads the head's blocks: GatherBlockQuantized takes zero points in another layout than
    /// MatMulNBits, so only symmetric ones are shared; and rows have to be whole blocks.
    fn head_is_shared(&self) -> bool {
        self.options.is_symmetric && self.spec.hidden_size.is_multiple_of(self.options.block_size)
    }
}
