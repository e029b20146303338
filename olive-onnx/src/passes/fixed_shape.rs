//! `DynamicToFixedShape`: symbolic sizes become numbers, by the symbol or by an input's shape.

use std::collections::HashMap;

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;

use super::params::{param, with_external_data};
use super::rewrite::branches_mut;
use super::{Draft, GraphPass, OnnxPass};
use crate::ir::{Dim, Graph};

const PARAMS: [ParamSpec; 9] = with_external_data([
    param("dim_param", ParamKind::TextList, "null", "Symbols to replace."),
    param(
        "dim_value",
        ParamKind::Object,
        "null",
        "A number for each of `dim_param`.",
    ),
    param(
        "input_name",
        ParamKind::TextList,
        "null",
        "Inputs whose shape is given.",
    ),
    param(
        "input_shape",
        ParamKind::Object,
        "null",
        "A list of numbers for each of `input_name`.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("DynamicToFixedShape", &PARAMS, parse);

#[derive(Deserialize)]
struct Parameters {
    dim_param: Option<Vec<String>>,
    dim_value: Option<Vec<usize>>,
    input_name: Option<Vec<String>>,
    input_shape: Option<Vec<Vec<usize>>>,
}

struct Fix {
    symbols: Vec<(String, usize)>,
    inputs: Vec<(String, Vec<usize>)>,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let found = serde_json::Value::Object(config.values().clone()).to_string();
    let given: Parameters = config.parse(origin).map_err(|_| {
        Error::config(
            origin,
            "dim_value",
            "positive whole numbers, as in `input_shape`",
            found,
        )
    })?;
    let symbols = paired(
        origin,
        ["dim_param", "dim_value"],
        given.dim_param,
        given.dim_value,
    )?;
    let inputs = paired(
        origin,
        ["input_name", "input_shape"],
        given.input_name,
        given.input_shape,
    )?;
    if symbols.is_empty() && inputs.is_empty() {
        return Err(Error::config(
            origin,
            "dim_param",
            "symbols, or `input_name`",
            "neither",
        ));
    }
    if symbols.iter().any(|(_, value)| *value == 0) || inputs.iter().any(|(_, shape)| shape.contains(&0)) {
        return Err(Error::config(
            origin,
            "dim_value",
            "numbers above 0, as in `input_shape`",
            "0",
        ));
    }
    Ok(Box::new(Fix { symbols, inputs }))
}

fn paired<T>(
    origin: &str,
    keys: [&str; 2],
    names: Option<Vec<String>>,
    values: Option<Vec<T>>,
) -> Result<Vec<(String, T)>> {
    let (names, values) = (names.unwrap_or_default(), values.unwrap_or_default());
    if names.len() != values.len() {
        let expected = format!("as many as `{}` ({})", keys[0], names.len());
        return Err(Error::config(origin, keys[1], expected, values.len().to_string()));
    }
    Ok(names.into_iter().zip(values).collect())
}

impl GraphPass for Fix {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let mut sizes: HashMap<String, usize> = HashMap::new();
        let mut changed = false;
        for (name, shape) in &self.inputs {
            changed |= fix_input(graph, name, shape, &mut sizes)?;
        }
        for (symbol, size) in &self.symbols {
            match sizes.insert(symbol.clone(), *size) {
                Some(other) if other != *size => {
                    return Err(Error::config(
                        "pass `DynamicToFixedShape`",
                        "dim_value",
                        format!("{other} for `{symbol}`, as its input has"),
                        size.to_string(),
                    ));
                }
                _ => {}
            }
        }
        Ok(replace(graph, &sizes) | changed)
    }
}

/// Fixes sizes of an input that have no symbol, and notes those of its symbols.
fn fix_input(
    graph: &mut Graph,
    name: &str,
    shape: &[usize],
    sizes: &mut HashMap<String, usize>,
) -> Result<bool> {
    let origin = "pass `DynamicToFixedShape`";
    let known: Vec<String> = graph.inputs.iter().map(|input| input.name.clone()).collect();
    let Some(input) = graph.inputs.iter_mut().find(|input| input.name == name) else {
        return Err(Error::config(
            origin,
            "input_name",
            format!("one of {}", known.join(", ")),
            format!("`{name}`"),
        ));
    };
    let display = input.to_string();
    let wrong = || {
        Error::config(
            origin,
            "input_shape",
            format!("a shape that fits `{display}`"),
            format!("{shape:?}"),
        )
    };
    let dims = input.shape.get_or_insert_with(|| vec![Dim::Unknown; shape.len()]);
    if dims.len() != shape.len() {
        return Err(wrong());
    }
    let mut changed = false;
    for (dim, size) in dims.iter_mut().zip(shape) {
        match dim {
            Dim::Known(known) if known != size => return Err(wrong()),
            Dim::Known(_) => {}
            Dim::Unknown => {
                *dim = Dim::Known(*size);
                changed = true;
            }
            Dim::Symbol(symbol) => match sizes.insert(symbol.clone(), *size) {
                Some(other) if other != *size => return Err(wrong()),
                _ => {}
            },
        }
    }
    Ok(changed)
}

fn replace(graph: &mut Graph, sizes: &HashMap<String, usize>) -> bool {
    let mut changed = false;
    let infos = graph
        .inputs
        .iter_mut()
        .chain(&mut graph.outputs)
        .chain(&mut graph.value_infos);
    for dim in infos.filter_map(|info| info.shape.as_mut()).flatten() {
        if let Dim::Symbol(symbol) = dim
            && let Some(size) = sizes.get(symbol)
        {
            *dim = Dim::Known(*size);
            changed = true;
        }
    }
    for branch in graph.nodes.iter_mut().flat_map(branches_mut) {
        changed |= replace(branch, sizes);
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{find, surgery};

    #[test]
    fn symbols_are_replaced_everywhere_and_once() {
        let pass = find("DynamicToFixedShape").unwrap();
        for given in [
            serde_json::json!({"dim_param": ["batch", "nowhere"], "dim_value": [2, 3]}),
            serde_json::json!({"input_name": ["x"], "input_shape": [[2, 4]]}),
        ] {
            let configured = pass.configure(given.as_object().unwrap()).unwrap();
            let mut draft = Draft::of(surgery::sample_model());
            assert!(pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
            assert_eq!(draft.model.graph.inputs[0].to_string(), "x: FLOAT[2, 4]");
            assert_eq!(draft.model.graph.outputs[0].to_string(), "y: FLOAT[2, 4]");
            assert!(!pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let pass = find("DynamicToFixedShape").unwrap();
        for wrong in [
            serde_json::json!({}),
            serde_json::json!({"dim_param": ["a"], "dim_value": [1, 2]}),
            serde_json::json!({"dim_param": ["a"], "dim_value": [0]}),
            serde_json::json!({"dim_param": ["a"], "dim_value": [-1]}),
        ] {
            assert!(pass.configure(wrong.as_object().unwrap()).is_err(), "{wrong}");
        }
        for wrong in [
            serde_json::json!({"input_name": ["q"], "input_shape": [[2]]}),
            serde_json::json!({"input_name": ["x"], "input_shape": [[2]]}),
            serde_json::json!({"input_name": ["x"], "input_shape": [[2, 5]]}),
        ] {
            let configured = pass.configure(wrong.as_object().unwrap()).unwrap();
            assert!(
                pass.apply(configured.as_ref(), &mut Draft::of(surgery::sample_model()))
                    .is_err()
            );
        }
    }
}
