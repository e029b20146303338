//! The passes as a workflow finds them: by Olive's names, with Olive's parameters and defaults.

use std::collections::BTreeSet;

use olive_core::workflow::registry::PassRegistry;
use olive_core::workflow::schema::passes;
use olive_core::{ModelKind, PassConfig};
use serde_json::{Map, Value};

/// Parameters that only olive has.
const OWN: &[(&str, &str)] = &[("ModelBuilder", "execution_provider")];

/// Defaults that differ, because Olive's asks for what no graph here has.
const OTHER_DEFAULTS: &[(&str, &str)] = &[];

#[test]
fn every_pass_has_olives_parameters_and_defaults() {
    let mut registry = PassRegistry::new();
    olive_onnx::register_passes(&mut registry);
    let names: BTreeSet<&str> = registry.iter().map(olive_core::Pass::name).collect();
    for name in [
        "ModelBuilder",
        "OnnxConversion",
        "OnnxFloatToFloat16",
        "OnnxPeepholeOptimizer",
        "OnnxBlockWiseRtnQuantization",
        "OnnxKQuantQuantization",
        "OnnxHqqQuantization",
        "MatMulNBitsToQDQ",
        "OnnxDynamicQuantization",
        "DynamicToFixedShape",
        "GraphSurgeries",
        "SplitModel",
        "CaptureSplitInfo",
        "AddOliveMetadata",
        "ExtractAdapters",
        "OnnxIODataTypeConverter",
    ] {
        assert!(names.contains(name), "{name}");
    }
    let mut wrong = Vec::new();
    for pass in registry.iter() {
        let known = passes::find(pass.name()).unwrap_or_else(|| unreachable!("{}", pass.name()));
        let theirs: BTreeSet<&str> = known.params.iter().map(|param| param.name).collect();
        let ours: BTreeSet<&str> = pass.params().iter().map(|param| param.name).collect();
        for name in ours.symmetric_difference(&theirs) {
            if !OWN.contains(&(pass.name(), name)) {
                wrong.push(format!("{} {name}", pass.name()));
            }
        }
        for spec in pass.params() {
            let Some(param) = known.param(spec.name) else {
                continue;
            };
            let default: Value = spec
                .default
                .map_or(Value::Null, |text| serde_json::from_str(text).unwrap());
            if !same(&default, &param.default) && !OTHER_DEFAULTS.contains(&(pass.name(), spec.name)) {
                wrong.push(format!(
                    "{} {}: {default} where Olive has {}",
                    pass.name(),
                    spec.name,
                    param.default
                ));
            }
        }
        let (from, to) = pass.transforms();
        assert!(to == ModelKind::Onnx || pass.name() == "CaptureSplitInfo");
        assert!(from == ModelKind::Onnx || PassConfig::new("t", pass.params(), &Map::new()).is_ok());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether two defaults say the same.
fn same(a: &Value, b: &Value) -> bool {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    a == b || (empty(a) && empty(b)) || (a.as_f64().is_some() && a.as_f64() == b.as_f64())
}
