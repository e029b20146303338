//! `OnnxIODataTypeConverter`: inputs and outputs of one type get another, with a `Cast` inside the graph.

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;

use super::params::{param, with_external_data};
use super::rewrite::{FreshNames, rename_value};
use super::{Draft, GraphPass, OnnxPass};
use crate::ir::{Graph, Node, OnnxType};

const PARAMS: [ParamSpec; 8] = with_external_data([
    param(
        "name_pattern",
        ParamKind::Text,
        "\"logits\"",
        "A part of the names; `^` and `$` mark their ends, `.*` anything between.",
    ),
    param(
        "source_dtype",
        ParamKind::Int,
        "10",
        "ONNX's number of the type to convert.",
    ),
    param(
        "target_dtype",
        ParamKind::Int,
        "1",
        "ONNX's number of the new type.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("OnnxIODataTypeConverter", &PARAMS, parse);

#[derive(Deserialize)]
struct Parameters {
    name_pattern: String,
    source_dtype: i32,
    target_dtype: i32,
}

struct Convert {
    pattern: Pattern,
    source: OnnxType,
    target: OnnxType,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given: Parameters = config.parse(origin)?;
    let dtype = |key: &str, code: i32| {
        OnnxType::from_code(code)
            .filter(|dtype| !matches!(dtype, OnnxType::Int4 | OnnxType::Uint4))
            .ok_or_else(|| Error::config(origin, key, "the number of an ONNX type", code.to_string()))
    };
    Ok(Box::new(Convert {
        pattern: Pattern::new(origin, &given.name_pattern)?,
        source: dtype("source_dtype", given.source_dtype)?,
        target: dtype("target_dtype", given.target_dtype)?,
    }))
}

/// The part of regular expressions that names of inputs and outputs need.
struct Pattern {
    start: bool,
    end: bool,
    parts: Vec<String>,
}

impl Pattern {
    fn new(origin: &str, text: &str) -> Result<Self> {
        let body = text.strip_prefix('^').unwrap_or(text);
        let body = body.strip_suffix('$').unwrap_or(body);
        let parts: Vec<String> = body
            .split(".*")
            .map(|part| part.replace("\\.", "\u{1}"))
            .collect();
        if parts
            .iter()
            .any(|part| part.contains(['*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '\\', '^', '$']))
        {
            let expected = "a name, with `^`, `$`, `.` and `.*` as in regular expressions";
            return Err(Error::config(
                origin,
                "name_pattern",
                expected,
                format!("`{text}`"),
            ));
        }
        Ok(Self {
            start: text.starts_with('^'),
            end: text.ends_with('$'),
            parts,
        })
    }

    fn fits(&self, name: &str) -> bool {
        let name: Vec<char> = name.chars().collect();
        let mut from = 0;
        for (index, part) in self.parts.iter().enumerate() {
            let part: Vec<char> = part.chars().collect();
            let here = |at: usize| {
                let found = name.get(at..at + part.len());
                found.is_some_and(|found| {
                    found
                        .iter()
                        .zip(&part)
                        .all(|(c, p)| *p == '.' || (*p == '\u{1}' && *c == '.') || p == c)
                })
            };
            let last = index + 1 == self.parts.len();
            let place = if index == 0 && self.start {
                (here(0) && (!last || !self.end || part.len() == name.len())).then_some(0)
            } else if last && self.end {
                name.len()
                    .checked_sub(part.len())
                    .filter(|at| *at >= from && here(*at))
            } else {
                (from..=name.len()).find(|at| here(*at))
            };
            match place {
                Some(at) => from = at + part.len(),
                None => return false,
            }
        }
        true
    }
}

impl GraphPass for Convert {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let graph = &mut draft.model.graph;
        let chosen =
            |dtype: Option<OnnxType>, name: &str| dtype == Some(self.source) && self.pattern.fits(name);
        let pick = |infos: &[crate::ir::ValueInfo]| -> Vec<String> {
            infos
                .iter()
                .filter(|info| chosen(info.dtype, &info.name))
                .map(|info| info.name.clone())
                .collect()
        };
        let (inputs, outputs) = (pick(&graph.inputs), pick(&graph.outputs));
        if self.source == self.target || inputs.len() + outputs.len() == 0 {
            return Ok(false);
        }
        let mut names = FreshNames::new(graph);
        for name in &inputs {
            if graph.initializer(name).is_some() {
                return Err(Error::unsupported(
                    format!("another type for input `{name}`"),
                    "it has a default",
                ));
            }
            self.convert_input(graph, name, &mut names);
        }
        for name in &outputs {
            self.convert_output(graph, name, &mut names);
        }
        Ok(true)
    }
}

impl Convert {
    fn convert_input(&self, graph: &mut Graph, name: &str, names: &mut FreshNames) {
        let inner = names.make(&format!("{name}_converted"));
        let info = graph.inputs.iter().find(|input| input.name == name).cloned();
        rename_value(graph, name, &inner);
        for input in &mut graph.inputs {
            if input.name == inner {
                name.clone_into(&mut input.name);
                input.dtype = Some(self.target);
            }
        }
        graph.value_infos.extend(info.map(|info| crate::ir::ValueInfo {
            name: inner.clone(),
            ..info
        }));
        let cast = names.make(&format!("{name}_cast"));
        graph.nodes.insert(0, self.cast(cast, name, &inner, self.source));
    }

    fn convert_output(&self, graph: &mut Graph, name: &str, names: &mut FreshNames) {
        let inner = names.make(&format!("{name}_unconverted"));
        rename_value(graph, name, &inner);
        let declared = graph.outputs.iter().find(|output| output.name == inner).cloned();
        graph.value_infos.extend(declared);
        for output in &mut graph.outputs {
            if output.name == inner {
                name.clone_into(&mut output.name);
                output.dtype = Some(self.target);
            }
        }
        let cast = names.make(&format!("{name}_cast"));
        graph.nodes.push(self.cast(cast, &inner, name, self.target));
    }

    fn cast(&self, node: String, from: &str, to: &str, dtype: OnnxType) -> Node {
        Node::new(node, "Cast", &[from], &[to]).with("to", i64::from(dtype.code()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{find, surgery};

    #[test]
    fn an_input_and_an_output_change_type_once() {
        let pass = find("OnnxIODataTypeConverter").unwrap();
        let given = serde_json::json!({"name_pattern": "^[xy]$", "source_dtype": 1, "target_dtype": 10});
        assert!(pass.configure(given.as_object().unwrap()).is_err());
        let given = serde_json::json!({"name_pattern": ".", "source_dtype": 1, "target_dtype": 10});
        let configured = pass.configure(given.as_object().unwrap()).unwrap();
        let mut draft = Draft::of(surgery::sample_model());
        assert!(pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        assert_eq!(draft.model.graph.inputs[0].dtype, Some(OnnxType::Float16));
        assert_eq!(draft.model.graph.outputs[0].dtype, Some(OnnxType::Float16));
        assert!(!pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
    }

    #[test]
    fn patterns_fit_as_regular_expressions_do() {
        for (pattern, name, fits) in [
            ("logits", "logits", true),
            ("logits", "my_logits_0", true),
            ("^logits$", "logits_0", false),
            ("^logits", "logits_0", true),
            ("present.*key$", "present.0.key", true),
            ("present.*key$", "present.0.key.x", false),
            ("^past\\.0", "past_0", false),
            ("^past.0", "past_0", true),
        ] {
            assert_eq!(
                Pattern::new("t", pattern).unwrap().fits(name),
                fits,
                "{pattern} {name}"
            );
        }
    }
}
