//! A linear, whatever its weight: dense, packed in the checkpoint, or quantized on the way; with a bias, an adapter, or
//! both.

use olive_core::{Error, Result};

use super::blocks::Blocks;
use super::graph::{Builder, dotted};
use super::lora::LoraInput;
use super::options::Algorithm;
use super::quantize::Method;
use super::weights::{Kind, Stored};
use crate::ir::{Dim, MICROSOFT, Node, Tensor};

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
            self.initializer(self.weights.constant(&constant, &bias)?);
            let node = Node::new(&name, "Add", &[&value, &constant], &[output.unwrap_or(&own)]);
            value = self.hidden(node, out_features);
        }
        Ok(value)
    }

    /// How the linear of this path is quantized; `None` if it stays float.
    pub fn method(&self, path: &str) -> Option<Method> {
        let options = self.options;
        let bits = options.precision.bits()?;
        let excluded = |path: &str| options.nodes_to_exclude.contains(&format!("{path}/MatMul"));
        // A fused product is named by either name.
        let part = path
            .strip_suffix("/gate_up_proj")
            .map(|mlp| format!("{mlp}/gate_proj"));
        if !options.quantize_linears || excluded(path) || part.is_some_and(|part| excluded(&part)) {
            return None;
        }
        let bits = match path {
            "/lm_head" => options.last_matmul_bits.unwrap_or(bits),
            _ if self.is_sensitive(path) => options.mixed_layer_bits.unwrap_or(bits),
            _ => bits,
        };
        Some(Method {
            algorithm: options.algorithm,
            bits,
            block_size: options.block_size,
            symmetric: options.is_symmetric,
        })
    }

    /// Whether a linear is one of those that quantization harms most, as llama.cpp chooses them: v and down of the first
    /// and the last eighth of the layers and of every third between.
    fn is_sensitive(&self, path: &str) -> bool {
        let Some((layer, part)) = path
            .strip_prefix("/model/layers.")
            .and_then(|rest| rest.split_once('/'))
        else {
            return false;
        };
        let Ok(layer) = layer.parse::<usize>() else {
            return false;
        };
        let count = self.spec.n_layers;
        let eighth = (count as f64 / 8.0).round_ties_even() as usize;
        let third = (layer + 3 * count - eighth) % 3 == 2;
        let chosen = 8 * layer < count || 8 * layer >= 7 * count || third;
        chosen && matches!(part, "attn/qkv_proj" | "attn/v_proj" | "mlp/down_proj")
    }

    /// The matrix product alone.
    fn product(&mut self, linear: &Linear, input: &str, output: Option<&str>) -> Result<String> {
        let name = dotted(&linear.path);
        match (self.weights.kind(&linear.stored)?, self.method(&linear.path)) {
            (Kind::Mixed, _) => Err(Error::unsupported(
                format!("`{name}`, whose parts are packed differently"),
                "a linear is one or the other",
            )),
            (Kind::Packed(kind), _) if self.options.use_qdq => {
                let blocks = self.weights.packed(&linear.stored, kind);
                self.dequantized_product(linear, &blocks, input, output)
            }
            (Kind::Packed(kind), _) => {
                let blocks = self.weights.packed(&linear.stored, kind);
                self.packed_product(linear, &blocks, input, output)
            }
            (Kind::Dense, None) => self.float_product(linear, input, output),
            (Kind::Dense, Some(method)) => {
                let blocks = self.weights.quantized(&linear.stored, method);
                match self.options.use_qdq {
                    true => self.dequantized_product(linear, &blocks, input, output),
                    false => self.quantized_product(linear, method, &blocks, input, output),
                }
            }
        }
    }

    fn float_product(&mut self, linear: &Linear, input: &str, output: Option<&str>) -> Result<String> {
        let path = &linear.path;
        let own = format!("{path}/MatMul/output_0");
        let weight = format!("{}.MatMul.weight", dotted(path));
        self.initializer(self.weights.transposed(&weight, &linear.stored)?);
        let node = Node::new(
            format!("{path}/MatMul"),
            "MatMul",
            &[input, &weight],
            &[output.unwrap_or(&own)],
        );
        Ok(self.hidden(node, linear.stored.out_features()))
    }

    fn quantized_product(
        &mut self,
        linear: &Linear,
        method: Method,
        blocks: &Blocks,
        input: &str,
        output: Option<&str>,
    ) -> Result<String> {
        let path = &linear.path;
        let own = format!("{path}/MatMul/output_0");
        let [values, scales, zeros] = part_names(&dotted(path), method);
        let (rows, count) = (blocks.rows, blocks.blocks);
        let blob = blocks.block_size * blocks.bits / 8;
        let mut tensors = vec![
            blocks.values(&values, &[rows, count, blob])?,
            blocks.scales(&scales, &[rows, count])?,
        ];
        if blocks.has_zeros {
            tensors.push(blocks.zeros(&zeros, &[rows, blocks.zero_bytes()])?);
        }
        let mut inputs = vec![input.to_owned()];
        for tensor in tensors {
            inputs.push(tensor.name.clone());
            self.quantized_initializer(tensor);
        }
        let name = format!("{path}/MatMul_Q{}", blocks.bits);
        let node = self.block_product(name, linear, blocks, inputs, output.unwrap_or(&own));
        Ok(self.hidden(node, linear.stored.out_features()))
    }

    fn packed_product(
        &mut self,
        linear: &Linear,
        blocks: &Blocks,
        input: &str,
        output: Option<&str>,
    ) -> Result<String> {
        let path = &linear.path;
        let own = format!("{path}/MatMulNBits/output_0");
        let names = packed_names(&dotted(path));
        let (rows, count) = (blocks.rows, blocks.blocks);
        let blob = blocks.block_size * blocks.bits / 8;
        let zero_bytes = blocks.zero_bytes();
        // A shared head is looked up by rows too, which a list of scales does not have.
        let flat = path != "/lm_head";
        let shape = |width: usize| match flat {
            true => vec![rows * width],
            false => vec![rows, width],
        };
        let mut tensors = vec![
            blocks.values(&names[0], &[rows, count, blob])?,
            blocks.scales(&names[1], &shape(count))?,
        ];
        if blocks.has_zeros {
            tensors.push(blocks.zeros(&names[2], &shape(zero_bytes))?);
        }
        let mut inputs = vec![input.to_owned()];
        for tensor in tensors {
            inputs.push(tensor.name.clone());
            self.initializer(tensor);
        }
        let name = format!("{path}/MatMulNBits");
        let node = self.block_product(name, linear, blocks, inputs, output.unwrap_or(&own));
        Ok(self.hidden(node, linear.stored.out_features()))
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
        node.with("bits", blocks.bits as i64)
            .with("block_size", blocks.block_size as i64)
    }

    /// `DequantizeLinear` of `[in, out]` integers, then `MatMul`.
    fn dequantized_product(
        &mut self,
        linear: &Linear,
        blocks: &Blocks,
        input: &str,
        output: Option<&str>,
    ) -> Result<String> {
        let path = &linear.path;
        if blocks.bits != 4 {
            let what = format!("`{}` with {} bits and use_qdq", dotted(path), blocks.bits);
            return Err(Error::unsupported(
                what,
                "only 4 bits are dequantized in the graph",
            ));
        }
        let base = format!("{}.MatMul.weight_DQ", dotted(path));
        let [cols, rows] = [linear.stored.in_features(), linear.stored.out_features()];
        let tensors: [Option<Tensor>; 3] = super::qdq::tensors(blocks, &base, cols)?;
        let mut inputs = Vec::new();
        for tensor in tensors.into_iter().flatten() {
            inputs.push(tensor.name.clone());
            self.quantized_initializer(tensor);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let weight = format!("{base}_Q4_output");
        let node = Node::new(
            format!("{path}/MatMul_DQ_Q4"),
            "DequantizeLinear",
            &inputs,
            &[&weight],
        )
        .with("axis", 0)
        .with("block_size", blocks.block_size as i64);
        self.node(node, self.io, [Dim::Known(cols), Dim::Known(rows)]);
        let own = format!("{path}/MatMul/output_0");
        let node = Node::new(
            format!("{path}/MatMul_matmul_Q4"),
            "MatMul",
            &[input, &weight],
            &[output.unwrap_or(&own)],
        );
        Ok(self.hidden(node, rows))
    }
}

/// Names of integers, scales and zero points that are made here.
pub fn part_names(name: &str, method: Method) -> [String; 3] {
    let weight = format!("{name}.MatMul.weight");
    let bits = method.bits;
    match method.algorithm {
        Algorithm::Default => [
            format!("{weight}_Q{bits}"),
            format!("{weight}_scales"),
            format!("{weight}_zero_points"),
        ],
        Algorithm::Rtn | Algorithm::KQuant => [
            format!("{weight}_Q{bits}G{}", method.block_size),
            format!("{weight}_scale"),
            format!("{weight}_zp"),
        ],
    }
}

/// Names of integers, scales and zero points that the checkpoint holds packed.
pub fn packed_names(name: &str) -> [String; 3] {
    ["qweight", "scales", "qzeros"].map(|part| format!("{name}.MatMulNBits.{part}"))
}
