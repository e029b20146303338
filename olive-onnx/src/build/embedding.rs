//! Token embedding. A tied model stores one matrix, the head's, and the embedding reads it from there.

use olive_core::{Error, Result};

use super::graph::Builder;
use super::linear::{packed_names, part_names};
use super::options::Algorithm;
use super::quantize::Method;
use super::weights::{Kind, PackedKind};
use super::{blocks::Blocks, options::ORIGIN};
use crate::ir::{MICROSOFT, Node, OnnxType};

const GATHER: &str = "/model/embed_tokens/Gather";

/// Where the embedding's rows are in the graph.
enum Place {
    /// In a table of their own.
    Own,
    /// In the float head, transposed.
    FloatHead,
    /// In the blocks of the head: names of integers, scales and zero points, bits and block size.
    Blocks([String; 3], usize, usize, bool),
}

impl Builder<'_> {
    /// From `input_ids [batch, sequence]` to `[batch, sequence, hidden]`; `inputs_embeds` where the graph has none.
    pub fn embedding(&mut self) -> Result<String> {
        if self.options.exclude_embeds {
            return Ok("inputs_embeds".to_owned());
        }
        match self.place()? {
            Place::Own => self.own_embedding(),
            Place::FloatHead => self.float_head_embedding(),
            Place::Blocks(names, bits, block_size, has_zeros) => {
                self.packed_head_embedding(&names, bits, block_size, has_zeros)
            }
        }
    }

    fn place(&self) -> Result<Place> {
        let tied = self.spec.tie_word_embeddings;
        if self.options.shared_embeddings == Some(true) && !tied {
            let expected = "false for a model whose embedding and head differ";
            return Err(Error::config(ORIGIN, "shared_embeddings", expected, "true"));
        }
        if !self.options.shared_embeddings.unwrap_or(tied) || self.options.exclude_lm_head {
            return Ok(Place::Own);
        }
        let hidden = self.spec.hidden_size;
        let (names, bits, block_size, has_zeros) =
            match (self.weights.kind(&self.head_rows())?, self.method("/lm_head")) {
                _ if self.options.use_qdq && self.options.precision.bits().is_some() => {
                    return Ok(Place::Own);
                }
                (Kind::Packed(kind), _) => (
                    packed_names("lm_head"),
                    kind.bits,
                    kind.block_size,
                    kind.has_zeros,
                ),
                (_, None) => return Ok(Place::FloatHead),
                (_, Some(method)) => (
                    part_names("lm_head", method),
                    method.bits,
                    method.block_size,
                    method.has_zeros(),
                ),
            };
        // Zero points are found by their number over all rows, so that a row has to end with a byte.
        let whole = hidden.is_multiple_of(block_size);
        let aligned = !has_zeros || (hidden / block_size * bits).is_multiple_of(8);
        Ok(match whole && aligned {
            true => Place::Blocks(names, bits, block_size, has_zeros),
            false => Place::Own,
        })
    }

    /// A table of its own: float, packed as the checkpoint has it, or quantized where that is asked for.
    fn own_embedding(&mut self) -> Result<String> {
        let hidden = self.spec.hidden_size;
        let stored = self.vocabulary_rows(self.spec.embedding_name());
        let output = format!("{GATHER}/output_0");
        let kind = self.weights.kind(&stored)?;
        if let Kind::Packed(kind) = kind
            && kind.row_is_aligned(hidden)
        {
            let blocks = self.weights.packed(&stored, kind);
            return self.looked_up_blocks(&blocks);
        }
        let quantized = self.options.quantize_embedding
            && self.options.precision.bits() == Some(4)
            && !self.options.nodes_to_exclude.contains(GATHER)
            && hidden.is_multiple_of(self.options.block_size);
        if quantized && self.options.algorithm == Algorithm::Default && kind == Kind::Dense {
            let method = Method {
                algorithm: Algorithm::Default,
                bits: 4,
                block_size: self.options.block_size,
                symmetric: self.options.is_symmetric,
            };
            let blocks = self.weights.quantized(&stored, method);
            return self.gathered_integers(&blocks);
        }
        if self.options.quantize_embedding && self.options.precision.bits().is_some() {
            tracing::warn!(
                "the embedding stays float: 4 bits of whole blocks by the default algorithm are looked up"
            );
        }
        let weight = "model.embed_tokens.weight";
        self.initializer(self.weights.table(weight, &stored)?);
        let node = Node::new(GATHER, "Gather", &[weight, "input_ids"], &[&output]);
        Ok(self.hidden(node, hidden))
    }

    /// 4-bit integers of ONNX's own type, `[vocab, hidden]`.
    fn gathered_integers(&mut self, blocks: &Blocks) -> Result<String> {
        let hidden = self.spec.hidden_size;
        let base = "model.embed_tokens.weight";
        let tensors = super::qdq::rows(blocks, base, hidden)?;
        let mut names = Vec::new();
        for tensor in tensors.into_iter().flatten() {
            names.push(tensor.name.clone());
            self.quantized_initializer(tensor);
        }
        names.insert(1, "input_ids".to_owned());
        let inputs: Vec<&str> = names.iter().map(String::as_str).collect();
        let node = Node::new(
            format!("{GATHER}_Q4"),
            "GatherBlockQuantized",
            &inputs,
            &[&format!("{GATHER}/output_0")],
        )
        .in_domain(MICROSOFT)
        .with("block_size", blocks.block_size as i64)
        .with("gather_axis", 0)
        .with("quantize_axis", 1);
        Ok(self.hidden(node, hidden))
    }

    /// A table that the checkpoint holds packed.
    fn looked_up_blocks(&mut self, blocks: &Blocks) -> Result<String> {
        let base = "model.embed_tokens";
        let rows = blocks.rows;
        let mut tensors = vec![
            blocks.values(&format!("{base}.qweight"), &[rows, blocks.row_bytes()])?,
            blocks.scales(&format!("{base}.scales"), &[rows, blocks.blocks])?,
        ];
        if blocks.has_zeros {
            tensors.push(blocks.zeros(&format!("{base}.qzeros"), &[rows, blocks.zero_bytes()])?);
        }
        let mut inputs: Vec<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        for tensor in tensors {
            self.initializer(tensor);
        }
        inputs.insert(1, "input_ids".to_owned());
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let (bits, block_size) = (blocks.bits, blocks.block_size);
        Ok(self.gather_blocks(&inputs, bits, block_size))
    }

    fn float_head_embedding(&mut self) -> Result<String> {
        let (vocab, hidden) = (self.spec.vocab_size, self.spec.hidden_size);
        let path = "/model/embed_tokens/Transpose";
        let table = Node::new(
            path,
            "Transpose",
            &["lm_head.MatMul.weight"],
            &[&format!("{path}/output_0")],
        );
        let table = table.with("perm", vec![1, 0]);
        let table = self.node(table, self.io, [vocab.into(), hidden.into()]);
        let output = format!("{GATHER}/output_0");
        let node = Node::new(GATHER, "Gather", &[&table, "input_ids"], &[&output]);
        Ok(self.hidden(node, hidden))
    }

    /// Rows of the packed head, unpacked as they are looked up.
    fn packed_head_embedding(
        &mut self,
        [values, scales, zeros]: &[String; 3],
        bits: usize,
        block_size: usize,
        has_zeros: bool,
    ) -> Result<String> {
        let (vocab, hidden) = (self.spec.vocab_size, self.spec.hidden_size);
        let row_bytes = hidden * bits / 8;
        let shape = self.list(&[vocab as i64, row_bytes as i64])?;
        let path = "/model/embed_tokens/Reshape";
        let rows = Node::new(path, "Reshape", &[values, &shape], &[&format!("{path}/output_0")]);
        let rows = self.node(rows, OnnxType::Uint8, [vocab.into(), row_bytes.into()]);
        let mut inputs = vec![rows.as_str(), "input_ids", scales];
        if has_zeros {
            inputs.push(zeros);
        }
        Ok(self.gather_blocks(&inputs, bits, block_size))
    }

    fn gather_blocks(&mut self, inputs: &[&str], bits: usize, block_size: usize) -> String {
        let path = "/model/embed_tokens/GatherBlockQuantized";
        let node = Node::new(
            path,
            "GatherBlockQuantized",
            inputs,
            &[&format!("{path}/output_0")],
        )
        .in_domain(MICROSOFT)
        .with("bits", bits as i64)
        .with("block_size", block_size as i64)
        .with("gather_axis", 0)
        .with("quantize_axis", 1);
        self.hidden(node, self.spec.hidden_size)
    }
}

impl PackedKind {
    /// Whether the zero points of a row of `cols` end with a byte, as looking them up needs.
    fn row_is_aligned(self, cols: usize) -> bool {
        !self.has_zeros || (cols / self.block_size * self.bits).is_multiple_of(8)
    }
}
