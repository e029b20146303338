//! Which operators there are.

use olive_core::Result;
use olive_onnx::ir::MICROSOFT;

use super::context::{BuildContext, OpContext};
use super::ops::{attention, control, elementwise, gather, matmul, norm, reduce, shape};

/// An operator with its attributes and prepared weights.
pub trait Op: Send + Sync {
    /// Computes the outputs.
    ///
    /// # Errors
    /// If the inputs have types or sizes that do not fit.
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()>;
}

/// Makes an operator from a node.
pub type Builder = fn(&BuildContext<'_>) -> Result<Box<dyn Op>>;

/// The domain of operators that the rewriter makes.
pub const OLIVE: &str = "olive";

/// The builder of an operator; `None` if there is no such operator.
pub fn builder(domain: &str, op_type: &str) -> Option<Builder> {
    let builder: Builder = match (domain, op_type) {
        ("" | "ai.onnx", _) => return onnx_builder(op_type),
        (MICROSOFT, "MatMulNBits") => matmul::n_bits,
        (MICROSOFT, "GroupQueryAttention") => attention::group_query,
        (MICROSOFT, "SkipSimplifiedLayerNormalization") => norm::skip_simplified,
        (MICROSOFT, "SimplifiedLayerNormalization") => norm::simplified,
        (MICROSOFT, "GatherBlockQuantized") => gather::block_quantized,
        (MICROSOFT, "RotaryEmbedding") => attention::rotary,
        (MICROSOFT, "FastGelu") => elementwise::fast_gelu,
        (MICROSOFT, "Gelu") => elementwise::gelu,
        (OLIVE, "LoraAdd") => matmul::lora_add,
        (OLIVE, "GatherColumns") => gather::columns,
        _ => return None,
    };
    Some(builder)
}

fn onnx_builder(op_type: &str) -> Option<Builder> {
    let builder: Builder = match op_type {
        "Add" | "Sub" | "Mul" | "Div" => elementwise::arithmetic,
        "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Equal" => elementwise::comparison,
        "Sigmoid" | "Tanh" | "Relu" | "Exp" | "Sqrt" | "Neg" => elementwise::unary,
        "Gelu" => elementwise::gelu,
        "Cast" => elementwise::cast,
        "Gather" => gather::gather,
        "MatMul" => matmul::dense,
        "SimplifiedLayerNormalization" | "RMSNormalization" => norm::simplified,
        "ReduceSum" => reduce::sum,
        "ReduceMax" => reduce::max,
        "Shape" => shape::shape,
        "Reshape" => shape::reshape,
        "Transpose" => shape::transpose,
        "Unsqueeze" => shape::unsqueeze,
        "Squeeze" => shape::squeeze,
        "Concat" => shape::concat,
        "Split" => shape::split,
        "Slice" => shape::slice,
        "Identity" => control::identity,
        "Constant" => control::constant,
        _ => return None,
    };
    Some(builder)
}
