//! The surgeons of `GraphSurgeries` and the arguments of each.

use super::shape::{Field, Shape, field};

/// All names, in alphabetical order.
pub const NAMES: &[&str] = &[
    "AddIntermediateTensorsToOutputs",
    "AttentionMaskToSequenceLengths",
    "CastOutputs",
    "ConstantAttributesToTensor",
    "DecomposeQuickGelu",
    "DecomposeRotaryEmbedding",
    "DeduplicateNodes",
    "DeduplicateSubgraphInitializers",
    "ExposeOutputs",
    "ExposeQuantizedOutput",
    "Flatten",
    "FuseDecomposedRMSNorm",
    "Gather",
    "GatherElements",
    "GemmToMatMulAdd",
    "InferShapes",
    "MatMulAddToGemm",
    "MatMulToTransposeConvTranspose",
    "Non4DExpand",
    "Non4DInitializers",
    "Non4DLpNorm",
    "Non4DModelInputs",
    "Non4DModelOutputs",
    "Non4DReshape",
    "Non4DSlice",
    "Non4DTranspose",
    "PackedAttentionToLoopMHA",
    "PackedAttentionToPackedMHA",
    "PowReduceSumPowDiv2LpNorm",
    "QDQToClip",
    "QuantizeEmbeddingInt8",
    "RMSNormToL2Norm",
    "ReciprocalMulToDiv",
    "ReduceMax",
    "RemoveAllTensorValueShapes",
    "RemoveDeqLin",
    "RemoveGidxFromMatMulNBits",
    "RemoveInitializerFromInputs",
    "RemoveInitializerValueInfo",
    "RemoveInputs",
    "RemoveIntermediarySqueezeAndUnsqueeze",
    "RemoveMemcpy",
    "RemoveQDQ",
    "RemoveRopeMultiCache",
    "RemoveShapes",
    "RemoveUnusedNodeOutputs",
    "RenameInputDims",
    "RenameInputs",
    "RenameOutputDims",
    "RenameOutputs",
    "ReorderInputs",
    "ReplaceAttentionMaskValue",
    "ReplaceErfWithTanh",
    "ReshapeClipReduceSum",
    "ReshapeReduceSum",
    "ShareEmbeddingLmHead",
    "SimplifiedLayerNormToL2Norm",
    "SimplifiedLayerNormToRMSNorm",
    "StandaloneReduceSum",
    "TieWordEmbeddings",
    "ZeroOutInput",
];

/// The arguments that a surgeon takes.
pub fn params(surgeon: &str) -> &'static [Field] {
    const TEXTS: Shape = Shape::List(&Shape::Text);
    const NAME_LIST: Shape = Shape::Either(&[TEXTS, Shape::Text]);
    const RENAME: &[Field] = &[field("old_names", TEXTS), field("new_names", TEXTS)];
    const NAMES_ONLY: &[Field] = &[field("names", NAME_LIST)];
    const OP_TYPES: &[Field] = &[field("op_types", TEXTS)];
    const CAST: &[Field] = &[field("names", NAME_LIST), field("to", Shape::Text)];
    const QUANTIZED_OUTPUT: &[Field] = &[field("output_name", Shape::Text)];
    const ZERO_OUT: &[Field] = &[field("node_name", Shape::Text), field("input_idx", Shape::Int)];
    const REORDER: &[Field] = &[field("permutation", Shape::List(&Shape::Int))];
    const MASK: &[Field] = &[
        field("threshold", Shape::Float),
        field("replacement", Shape::Float),
    ];
    const ROPE: &[Field] = &[field("use_large_cache", Shape::Bool)];
    const QDQ: &[Field] = &[field("keep_clip_after_inputs", Shape::Bool)];
    const INTERMEDIATE: &[Field] = &[field("intermediate_tensor_to_add", TEXTS)];
    const OUTPUT_DIM: &[Field] = &[
        field("output_idx", Shape::Int),
        field("dim_idx", Shape::Int),
        field("dim_name", Shape::Text),
    ];
    const INPUT_DIM: &[Field] = &[
        field("dim_idx", Shape::Int),
        field("dim_name", Shape::Text),
        field("input_name", Shape::Text),
        field("input_idx", Shape::Int),
    ];
    let canonical = NAMES.iter().find(|name| name.eq_ignore_ascii_case(surgeon));
    match canonical.copied().unwrap_or_default() {
        "RenameInputs" | "RenameOutputs" => RENAME,
        "RemoveInputs" | "ExposeOutputs" => NAMES_ONLY,
        "RemoveUnusedNodeOutputs"
        | "RMSNormToL2Norm"
        | "SimplifiedLayerNormToL2Norm"
        | "SimplifiedLayerNormToRMSNorm" => OP_TYPES,
        "CastOutputs" => CAST,
        "ExposeQuantizedOutput" => QUANTIZED_OUTPUT,
        "ZeroOutInput" => ZERO_OUT,
        "ReorderInputs" => REORDER,
        "ReplaceAttentionMaskValue" => MASK,
        "RemoveRopeMultiCache" => ROPE,
        "RemoveQDQ" => QDQ,
        "AddIntermediateTensorsToOutputs" => INTERMEDIATE,
        "RenameOutputDims" => OUTPUT_DIM,
        "RenameInputDims" => INPUT_DIM,
        _ => &[],
    }
}
