//! Parameters that many passes share.

use olive_core::{ParamKind, ParamSpec};

/// A parameter without values to search.
pub const fn param(
    name: &'static str,
    kind: ParamKind,
    default: &'static str,
    doc: &'static str,
) -> ParamSpec {
    ParamSpec {
        name,
        kind,
        default: Some(default),
        doc,
        search: &[],
    }
}

/// A parameter with values that a search tries.
pub const fn searched(spec: ParamSpec, search: &'static [&'static str]) -> ParamSpec {
    ParamSpec { search, ..spec }
}

/// Where constants are written. Accepted for the sake of workflow files: olive always writes one data file beside the
/// graph.
const EXTERNAL_DATA: [ParamSpec; 5] = [
    param(
        "save_as_external_data",
        ParamKind::Bool,
        "false",
        "Without effect: constants always go to a data file.",
    ),
    param(
        "all_tensors_to_one_file",
        ParamKind::Bool,
        "true",
        "Without effect: there is always one data file.",
    ),
    param(
        "external_data_name",
        ParamKind::Text,
        "null",
        "Without effect: the data file is `model.onnx.data`.",
    ),
    param(
        "size_threshold",
        ParamKind::Int,
        "1024",
        "Without effect: every initializer goes to the data file.",
    ),
    param(
        "convert_attribute",
        ParamKind::Bool,
        "false",
        "Without effect: constants of nodes stay in the graph file.",
    ),
];

/// The pass's own parameters and those about external data. `M` is `N + 5`.
pub const fn with_external_data<const N: usize, const M: usize>(own: [ParamSpec; N]) -> [ParamSpec; M] {
    assert!(M == N + EXTERNAL_DATA.len(), "M has to be N + 5");
    let mut all = [EXTERNAL_DATA[0]; M];
    let mut i = 0;
    while i < M {
        all[i] = if i < N { own[i] } else { EXTERNAL_DATA[i - N] };
        i += 1;
    }
    all
}

/// How exactly activations are computed in MatMulNBits: 0 not said, 1 fp32, 2 fp16, 3 bf16, 4 int8.
pub const ACCURACY_LEVEL: ParamSpec = param(
    "accuracy_level",
    ParamKind::OneOfInt(&[0, 1, 2, 3, 4]),
    "0",
    "Accuracy of activations in MatMulNBits: 0 not said, 1 fp32, 2 fp16, 3 bf16, 4 int8.",
);

/// Names of nodes that a pass leaves alone.
pub const NODES_TO_EXCLUDE: ParamSpec = param(
    "nodes_to_exclude",
    ParamKind::TextList,
    "null",
    "Names of nodes to leave as they are.",
);
