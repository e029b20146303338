//! A linear, whatever its weight: dense, packed in the checkpoint, or quantized on the way; with a bias, an adapter, or
//! both.

use olive_core::{Error, Result};

use super::graph::{Builder, dotted};
use super::lora::LoraInput;
use super::options::Precision;
use super::weights::{Blocks, Kind, Stored};
use crate::ir::{MICROSOFT, Node, Tensor};

/// One linear of the graph.
pub struct Linear {
    /// Path of its nodes: `/model/layers.0/attn/q_proj`.
    pub path: String,
    /// Where its rows are.
    pub stored: Stored,
    /// Its adapter.
    pub adapter: Option<LoraInput>,
}

impl Builder<'_> {
    /// Adds a linear over `input [batch, sequence, in]`. Its last node makes the value `output`, if one is named.
    pub fn linear(&mut self, linear: &Linear, input: &str, output: Option<&str>) -> Result<String> {
        let out_features = linear.stored.out_features();
        let path = &linear.path;
        let bias = self.weights.bias(&linear.stored)?;
        let low_rank = match &linear.adapter {
            Some(place) => Some(self.low_rank(path, input, place)?),
            None => None,
        };
        let alone = bias.is_none() && low_rank.is_none();
        let mut value = self.product(linear, input, output.filter(|_| alone))?;
        if let Some(low_rank) = low_rank {
            let name = format!("{path}/lora/Add");
            let own = format!("{name}/output_0");
            let target = output.filter(|_| bias.is_none()).unwrap_or(&own);
            value = self.hidden(
                Node::new(&name, "Add", &[&value, &low_rank], &[target]),
                out_features,
            );
        }
        if let Some(bias) = bias {
            let name = format!("{path}/Add");
            let own = format!("{name}/output_0");
            let constant = format!("{}.Add.bias", dotted(path));
            self.initializer(Tensor::floats(&constant, [out_features], &bias)?);
            let node = Node::new(&name, "Add", &[&value, &constant], &[output.unwrap_or(&own)]);
            value = self.hidden(node, out_features);
        }
        Ok(value)
    }

    /// The matrix product alone.
    fn product(&mut self, linear: &Linear, input: &str, output: Option<&str>) -> Result<String> {
        let path = &linear.path;
        let name = dotted(path);
        let out_features = linear.stored.out_features();
        let own = format!("{path}/MatMul/output_0");
        match (self.weights.kind(&linear.stored), self.options.precision) {
            (Kind::Dense, Precision::Fp32 | Precision::Fp16 | Precision::Bf16) => {
                let weight = format!("{name}.MatMul.weight");
                let tensor = self.weights.transposed(&weight, &linear.stored)?;
                self.initializer(tensor);
                let node = Node::new(
                    format!("{path}/MatMul"),
                    "MatMul",
                    &[input, &weight],
                    &[output.unwrap_or(&own)],
                );
                Ok(self.hidden(node, out_features))
            }
            (Kind::Dense, Precision::Int4 | Precision::Int8) => {
                let blocks = self.weights.quantized(&linear.stored, self.options);
                let (rows, count) = (blocks.rows, blocks.blocks);
                let mut inputs = vec![input.to_owned()];
                let mut add = |builder: &mut Self, tensor: Tensor| {
                    inputs.push(tensor.name.clone());
                    builder.quantized_initializer(tensor);
                };
                add(self, blocks.values(&format!("{name}.MatMul.weight_Q4"))?);
                add(
                    self,
                    blocks.scales(&format!("{name}.MatMul.weight_scales"), &[rows, count])?,
                );
                if blocks.has_zeros {
                    let zeros = format!("{name}.MatMul.weight_zero_points");
                    add(self, blocks.zeros(&zeros, &[rows, count.div_ceil(2)])?);
                }
                let output = output.unwrap_or(&own);
                let node = self.block_product(format!("{path}/MatMul_Q4"), linear, &blocks, inputs, output);
                Ok(self.hidden(node, out_features))
            }
            (Kind::Packed, _) => {
                let blocks = self.weights.packed(&linear.stored)?;
                let (rows, count) = (blocks.rows, blocks.blocks);
                let own = format!("{path}/MatMulNBits/output_0");
                let tensors = [
                    blocks.values(&format!("{name}.MatMulNBits.qweight"))?,
                    blocks.scales(&format!("{name}.MatMulNBits.scales"), &[rows * count])?,
                    blocks.zeros(&format!("{name}.MatMulNBits.qzeros"), &[rows * count.div_ceil(2)])?,
                ];
                let mut inputs = vec![input.to_owned()];
                for tensor in tensors {
                    inputs.push(tensor.name.clone());
                    self.initializer(tensor);
                }
                let output = output.unwrap_or(&own);
                let node = self.block_product(format!("{path}/MatMulNBits"), linear, &blocks, inputs, output);
                Ok(self.hidden(node, out_features))
            }
            (Kind::Mixed, _) => Err(Error::unsupported(
                format!("`{name}`, of which a part is packed and a part is not"),
                "a linear is one or the other",
            )),
        }
    }

    fn block_product(
        &self,
        name: String,
        linear: &Linear,
        blocks: &Blocks,
        inputs: Vec<String>,
        output: &str,
    ) -> Node {
        let mut node = Node::new(name, "MatMulNBits", &[], &[output])
            .in_domain(MICROSOFT)
            .with("K", linear.stored.in_features() as i64)
            .with("N", linear.stored.out_features() as i64);
        let level = self.options.effective_accuracy_level();
        if level != 0 {
            node = node.with("accuracy_level", level);
        }
        node.inputs = inputs;
        node.with("bits", 4).with("block_size", blocks.block_size as i64)
    }
}
