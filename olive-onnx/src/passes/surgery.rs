//! `GraphSurgeries`: a list of small changes, each by the name and with the arguments that Olive gives it.

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::params::{param, with_external_data};
use super::peephole::duplicates;
use super::{Draft, GraphPass, OnnxPass};

mod arithmetic;
mod attention;
mod embedding;
mod names;
mod norms;
mod quantized;
mod tidying;
mod tie;

const PARAMS: [ParamSpec; 7] = with_external_data([
    ParamSpec {
        name: "surgeries",
        kind: ParamKind::Object,
        default: None,
        doc: "The surgeries, each with its name as `surgeon` and its arguments.",
        search: &[],
    },
    param(
        "remove_duplicate_initializers",
        ParamKind::Bool,
        "true",
        "Whether equal constants are merged afterwards.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass {
    repairs: true,
    ..OnnxPass::new("GraphSurgeries", &PARAMS, parse)
};

/// One change.
pub trait Surgery: Send + Sync {
    /// Makes it. Whether anything changed.
    ///
    /// # Errors
    /// What does not fit the graph.
    fn operate(&self, draft: &mut Draft) -> Result<bool>;
}

type Build = fn(&str, &Map<String, Value>) -> Result<Box<dyn Surgery>>;

/// A surgery, before its arguments are known.
pub struct Surgeon {
    /// The name, compared without case.
    pub name: &'static str,
    /// The arguments that it takes.
    pub arguments: &'static [&'static str],
    build: Build,
}

impl Surgeon {
    const fn new(name: &'static str, arguments: &'static [&'static str], build: Build) -> Self {
        Self {
            name,
            arguments,
            build,
        }
    }
}

/// All surgeries that there are.
pub static SURGEONS: &[Surgeon] = &[
    Surgeon::new(
        "AddIntermediateTensorsToOutputs",
        &["intermediate_tensor_to_add"],
        build::<names::ExposeValues>,
    ),
    Surgeon::new(
        "AttentionMaskToSequenceLengths",
        &[],
        build::<attention::MaskToLengths>,
    ),
    Surgeon::new("CastOutputs", &["names", "to"], build::<arithmetic::CastOutputs>),
    Surgeon::new(
        "ConstantAttributesToTensor",
        &[],
        build::<tidying::ConstantAttributes>,
    ),
    Surgeon::new("DecomposeQuickGelu", &[], build::<arithmetic::QuickGelu>),
    Surgeon::new("DeduplicateNodes", &[], build::<tidying::DuplicateNodes>),
    Surgeon::new(
        "DeduplicateSubgraphInitializers",
        &[],
        build::<tidying::DuplicateInitializers>,
    ),
    Surgeon::new("ExposeOutputs", &["names"], build::<names::ExposeOutputs>),
    Surgeon::new("MatMulAddToGemm", &[], build::<arithmetic::MatMulAddToGemm>),
    Surgeon::new("GemmToMatMulAdd", &[], build::<arithmetic::GemmToMatMulAdd>),
    Surgeon::new(
        "QuantizeEmbeddingInt8",
        &[],
        build::<embedding::QuantizeEmbedding>,
    ),
    Surgeon::new("ReciprocalMulToDiv", &[], build::<arithmetic::ReciprocalMul>),
    Surgeon::new("RemoveAllTensorValueShapes", &[], build::<tidying::RemoveShapes>),
    Surgeon::new(
        "RemoveGidxFromMatMulNBits",
        &[],
        build::<quantized::RemoveGroupIndex>,
    ),
    Surgeon::new("RemoveInitializerFromInputs", &[], build::<names::RemoveDefaults>),
    Surgeon::new(
        "RemoveInitializerValueInfo",
        &[],
        build::<tidying::RemoveInitializerInfo>,
    ),
    Surgeon::new("RemoveInputs", &["names"], build::<names::RemoveInputs>),
    Surgeon::new("RemoveMemcpy", &[], build::<tidying::RemoveMemcpy>),
    Surgeon::new(
        "RemoveQDQ",
        &["keep_clip_after_inputs"],
        build::<quantized::RemoveQdq>,
    ),
    Surgeon::new(
        "RemoveRopeMultiCache",
        &["use_large_cache"],
        build::<attention::RemoveMultiCache>,
    ),
    Surgeon::new("RemoveShapes", &[], build::<tidying::RemoveShapes>),
    Surgeon::new(
        "RemoveUnusedNodeOutputs",
        &["op_types"],
        build::<tidying::UnusedOutputs>,
    ),
    Surgeon::new(
        "RenameInputDims",
        &["input_idx", "input_name", "dim_idx", "dim_name"],
        build::<names::InputDims>,
    ),
    Surgeon::new(
        "RenameInputs",
        &["old_names", "new_names"],
        build::<names::RenameInputs>,
    ),
    Surgeon::new(
        "RenameOutputDims",
        &["output_idx", "dim_idx", "dim_name"],
        build::<names::OutputDims>,
    ),
    Surgeon::new(
        "RenameOutputs",
        &["old_names", "new_names"],
        build::<names::RenameOutputs>,
    ),
    Surgeon::new("ReorderInputs", &["permutation"], build::<names::ReorderInputs>),
    Surgeon::new(
        "ReplaceAttentionMaskValue",
        &["threshold", "replacement"],
        build::<attention::MaskValue>,
    ),
    Surgeon::new("ReplaceErfWithTanh", &[], build::<arithmetic::ErfToTanh>),
    Surgeon::new("RMSNormToL2Norm", &["op_types"], build::<norms::DecomposedToL2>),
    Surgeon::new("ShareEmbeddingLmHead", &[], build::<embedding::ShareHead>),
    Surgeon::new("SimplifiedLayerNormToL2Norm", &["op_types"], build::<norms::ToL2>),
    Surgeon::new(
        "SimplifiedLayerNormToRMSNorm",
        &["op_types"],
        build::<norms::ToRms>,
    ),
    Surgeon::new("TieWordEmbeddings", &[], build::<tie::TieEmbeddings>),
    Surgeon::new(
        "ZeroOutInput",
        &["node_name", "input_idx"],
        build::<arithmetic::ZeroOut>,
    ),
];

/// A surgery whose arguments are its fields.
trait FromArguments: Surgery + DeserializeOwned + 'static {
    /// Checks what the types do not say.
    fn checked(self, _origin: &str) -> Result<Self> {
        Ok(self)
    }
}

fn build<T: FromArguments>(origin: &str, arguments: &Map<String, Value>) -> Result<Box<dyn Surgery>> {
    let parsed: T = serde_json::from_value(Value::Object(arguments.clone()))
        .map_err(|error| Error::config(origin, "arguments", "those of the surgery", error.to_string()))?;
    Ok(Box::new(parsed.checked(origin)?))
}

/// A name, or several.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Many(Vec<String>),
}

impl Names {
    fn list(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

struct Surgeries {
    list: Vec<Box<dyn Surgery>>,
    merge_constants: bool,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given = config.values().get("surgeries").cloned().unwrap_or_default();
    let entries = given
        .as_array()
        .ok_or_else(|| Error::config(origin, "surgeries", "a list", given.to_string()))?;
    let merge_constants = config
        .values()
        .get("remove_duplicate_initializers")
        .and_then(Value::as_bool)
        .unwrap_or(true);
    let list = entries
        .iter()
        .enumerate()
        .map(|(index, entry)| surgery(origin, index, entry))
        .collect::<Result<_>>()?;
    Ok(Box::new(Surgeries {
        list,
        merge_constants,
    }))
}

fn surgery(origin: &str, index: usize, entry: &Value) -> Result<Box<dyn Surgery>> {
    let key = format!("surgeries.{index}");
    let mut arguments = entry
        .as_object()
        .cloned()
        .ok_or_else(|| Error::config(origin, &key, "an object", entry.to_string()))?;
    let name = match arguments.shift_remove("surgeon") {
        Some(Value::String(name)) => name,
        other => {
            return Err(Error::config(
                origin,
                format!("{key}.surgeon"),
                "a name",
                format!("{other:?}"),
            ));
        }
    };
    let found = SURGEONS
        .iter()
        .find(|surgeon| surgeon.name.eq_ignore_ascii_case(&name));
    let Some(surgeon) = found else {
        return Err(Error::unknown_key(
            origin,
            format!("{key}.{name}"),
            SURGEONS.iter().map(|surgeon| surgeon.name),
        ));
    };
    arguments.retain(|_, value| !value.is_null());
    for argument in arguments.keys() {
        if !surgeon.arguments.contains(&argument.as_str()) {
            return Err(Error::unknown_key(
                origin,
                format!("{key}.{argument}"),
                surgeon.arguments.iter().copied(),
            ));
        }
    }
    (surgeon.build)(&format!("{origin}: {key} ({})", surgeon.name), &arguments)
}

impl GraphPass for Surgeries {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let mut changed = false;
        for surgery in &self.list {
            changed |= surgery.operate(draft)?;
        }
        if self.merge_constants {
            changed |= duplicates::constants(&mut draft.model.graph)?;
        }
        Ok(changed)
    }
}

/// A model with one input, one output and a symbolic size.
#[cfg(test)]
pub fn sample_model() -> crate::ir::Model {
    use crate::ir::{Dim, Graph, Model, Node, OnnxType, Opset, ValueInfo};
    let value = |name: &str| ValueInfo::new(name, OnnxType::Float, vec![Dim::from("batch"), Dim::from(4)]);
    let graph = Graph {
        name: "g".into(),
        inputs: vec![value("x")],
        outputs: vec![value("y")],
        nodes: vec![
            Node::new("a", "Neg", &["x"], &["t"]),
            Node::new("b", "Neg", &["t"], &["y"]),
        ],
        value_infos: vec![value("t")],
        ..Graph::default()
    };
    let opsets = vec![Opset {
        domain: String::new(),
        version: 21,
    }];
    Model {
        ir_version: 10,
        opsets,
        producer_name: String::new(),
        producer_version: String::new(),
        metadata: vec![],
        graph,
    }
}

#[cfg(test)]
mod tests;
