//! Element types of values in between: declared ones, and those that follow from the operators.

use std::collections::HashMap;

use olive_core::{Error, Result};

use super::rewrite::branches;
use crate::ir::{Attribute, Graph, MICROSOFT, Node, OnnxType};

/// The element type of each value of a graph, by name.
pub type Types = HashMap<String, OnnxType>;

/// Operators whose outputs all have the type of their first input.
const LIKE_FIRST: &[&str] = &[
    "Abs",
    "Acos",
    "Add",
    "And",
    "Asin",
    "Atan",
    "AveragePool",
    "BatchNormalization",
    "BiasGelu",
    "BitShift",
    "Ceil",
    "Celu",
    "Clip",
    "Compress",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Cos",
    "Cosh",
    "CumSum",
    "DepthToSpace",
    "Div",
    "Einsum",
    "Elu",
    "Erf",
    "Exp",
    "Expand",
    "FastGelu",
    "Flatten",
    "Floor",
    "FusedMatMul",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "InstanceNormalization",
    "LeakyRelu",
    "LogSoftmax",
    "Log",
    "LpNormalization",
    "MatMul",
    "MatMulNBits",
    "Max",
    "MaxPool",
    "Mean",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "MultiHeadAttention",
    "Neg",
    "PRelu",
    "Pad",
    "Pow",
    "QuickGelu",
    "RMSNormalization",
    "Range",
    "Reciprocal",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Relu",
    "Reshape",
    "Resize",
    "RotaryEmbedding",
    "Round",
    "ScatterElements",
    "ScatterND",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Slice",
    "Softmax",
    "Softplus",
    "Softsign",
    "SpaceToDepth",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Attention",
    "GroupQueryAttention",
];

/// Types of a graph's values. `outer` holds those that its branches may read from around them.
///
/// # Errors
/// [`Error::Unsupported`] for an operator whose output's type is neither declared nor known here.
pub fn infer(graph: &Graph, outer: &Types) -> Result<Types> {
    let mut types = outer.clone();
    for info in graph
        .inputs
        .iter()
        .chain(&graph.value_infos)
        .chain(&graph.outputs)
    {
        if let Some(dtype) = info.dtype {
            types.insert(info.name.clone(), dtype);
        }
    }
    for tensor in &graph.initializers {
        types.insert(tensor.name.clone(), tensor.dtype());
    }
    for node in &graph.nodes {
        for index in 0..node.outputs.len() {
            let Some(name) = node.output(index) else { continue };
            match output_type(node, index, &types)? {
                Some(dtype) => _ = types.insert(name.to_owned(), dtype),
                None if types.contains_key(name) => {}
                None => {
                    let what = format!(
                        "the element type of `{name}`, an output of operator `{}`",
                        node.op_type
                    );
                    return Err(Error::unsupported(what, "declare it in the graph's value infos"));
                }
            }
        }
    }
    Ok(types)
}

/// The type of an output, where the operator settles it.
fn output_type(node: &Node, index: usize, types: &Types) -> Result<Option<OnnxType>> {
    let input = |place: usize| node.input(place).and_then(|name| types.get(name).copied());
    let by_code = |attribute: &str| -> Result<Option<OnnxType>> {
        Ok(node
            .int(attribute)?
            .and_then(|code| OnnxType::from_code(code as i32)))
    };
    if node.domain == MICROSOFT {
        return Ok(match node.op_type.as_str() {
            "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" if index == 1 || index == 2 => {
                Some(OnnxType::Float)
            }
            "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => input(0),
            "GroupQueryAttention" | "MultiHeadAttention" if index == 1 || index == 2 => {
                input(2 + index).or_else(|| input(0))
            }
            "GatherBlockQuantized" => input(2),
            "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" => None,
            op if LIKE_FIRST.contains(&op) => input(0),
            _ => None,
        });
    }
    if !node.domain.is_empty() {
        return Ok(None);
    }
    Ok(match node.op_type.as_str() {
        "Cast" => by_code("to")?,
        "CastLike" | "Where" => input(1),
        "OneHot" => input(2),
        "Constant" => constant_type(node),
        "ConstantOfShape" => Some(
            node.tensor("value")?
                .map_or(OnnxType::Float, |value| value.dtype()),
        ),
        "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" => Some(OnnxType::Int64),
        "TopK" if index == 1 => Some(OnnxType::Int64),
        "TopK" => input(0),
        "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "And" | "Or" | "Xor" | "Not"
        | "IsNaN" | "IsInf" => Some(OnnxType::Bool),
        "Dropout" if index == 1 => Some(OnnxType::Bool),
        "Dropout" => input(0),
        "DequantizeLinear" => match by_code("output_dtype")? {
            Some(dtype) => Some(dtype),
            None => input(1),
        },
        "QuantizeLinear" => match by_code("output_dtype")? {
            Some(dtype) => Some(dtype),
            None => Some(input(2).unwrap_or(OnnxType::Uint8)),
        },
        "DynamicQuantizeLinear" => Some(if index == 1 {
            OnnxType::Float
        } else {
            OnnxType::Uint8
        }),
        "MatMulInteger" | "ConvInteger" => Some(OnnxType::Int32),
        "SimplifiedLayerNormalization" | "LayerNormalization" if index > 0 => Some(OnnxType::Float),
        "SimplifiedLayerNormalization" | "LayerNormalization" => input(0),
        "If" => branch_output(node, index, types)?,
        op if LIKE_FIRST.contains(&op) => input(0),
        _ => None,
    })
}

fn constant_type(node: &Node) -> Option<OnnxType> {
    node.attributes
        .iter()
        .find_map(|(name, value)| match (name.as_str(), value) {
            ("value", Attribute::Tensor(tensor)) => Some(tensor.dtype()),
            ("value_float" | "value_floats", _) => Some(OnnxType::Float),
            ("value_int" | "value_ints", _) => Some(OnnxType::Int64),
            _ => None,
        })
}

fn branch_output(node: &Node, index: usize, types: &Types) -> Result<Option<OnnxType>> {
    let Some(branch) = branches(node).next() else {
        return Ok(None);
    };
    let inner = infer(branch, types)?;
    let output = branch.outputs.get(index);
    Ok(output.and_then(|output| inner.get(&output.name).copied()))
}
