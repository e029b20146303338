//! `SplitModel`: one graph becomes several that run one after the other.
//!
//! `split_assignments` gives modules numbers (`model.layers.0=0;model.layers.1=1`), as CaptureSplitInfo notes them; a
//! node belongs to the module whose dotted name its own name begins with. The other nodes go where their inputs are,
//! those before every module into split 0; `Constant` nodes are copied to each split that reads them. A value that a
//! later split reads becomes an output of the split that makes it.

use std::collections::{BTreeSet, HashMap, HashSet};

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde_json::{Map, Value, json};

use super::params::{param, with_external_data};
use super::rewrite::{is_op, output_names, reads};
use super::types::{Types, infer};
use super::{Draft, GraphPass, OnnxPass};
use crate::ir::{Graph, Model, Node, ValueInfo};

const PARAMS: [ParamSpec; 6] = with_external_data([param(
    "split_assignments",
    ParamKind::Any,
    "null",
    "Numbers of splits by module, as `name1=0;name2=1` or an object; else what CaptureSplitInfo noted.",
)]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("SplitModel", &PARAMS, parse);

/// The key under which assignments are noted in a model's metadata and attributes.
pub const SPLIT_ASSIGNMENTS: &str = "split_assignments";

struct Split {
    given: Option<Assignments>,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given = config
        .values()
        .get(SPLIT_ASSIGNMENTS)
        .filter(|value| !value.is_null());
    Ok(Box::new(Split {
        given: given.map(|value| Assignments::of(origin, value)).transpose()?,
    }))
}

/// Numbers of splits by dotted module name.
pub struct Assignments(Vec<(String, usize)>);

impl Assignments {
    /// From `name1=0;name2=1` or an object.
    ///
    /// # Errors
    /// [`Error::Config`] for another form, or numbers that are not 0, 1, 2, …
    pub fn of(origin: &str, value: &Value) -> Result<Self> {
        let wrong = |found: String| {
            Error::config(
                origin,
                SPLIT_ASSIGNMENTS,
                "`name1=0;name2=1` or an object, numbered from 0",
                found,
            )
        };
        let entries: Option<Vec<(String, usize)>> = match value {
            Value::String(text) => text
                .split(';')
                .map(str::trim)
                .filter(|entry| !entry.is_empty())
                .map(|entry| {
                    entry
                        .split_once('=')
                        .and_then(|(name, n)| Some((name.trim().to_owned(), n.trim().parse().ok()?)))
                })
                .collect(),
            Value::Object(map) => map
                .iter()
                .map(|(name, n)| Some((name.clone(), usize::try_from(n.as_u64()?).ok()?)))
                .collect(),
            _ => None,
        };
        let entries = entries
            .filter(|entries| !entries.is_empty())
            .ok_or_else(|| wrong(value.to_string()))?;
        let numbers: BTreeSet<usize> = entries.iter().map(|(_, number)| *number).collect();
        match numbers.iter().copied().eq(0..numbers.len()) {
            true => Ok(Self(entries)),
            false => Err(wrong(format!("{numbers:?}"))),
        }
    }

    fn count(&self) -> usize {
        self.0.iter().map(|(_, number)| number + 1).max().unwrap_or(0)
    }

    /// The split of a node's name; the longest module that it lies in decides.
    fn of_node(&self, name: &str) -> Option<usize> {
        let dotted = name.replace('/', ".");
        let dotted = dotted.trim_start_matches('.');
        let inside = |module: &str| {
            dotted
                .strip_prefix(module)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let found = self.0.iter().filter(|(module, _)| inside(module));
        found
            .max_by_key(|(module, _)| module.len())
            .map(|(_, number)| *number)
    }
}

impl GraphPass for Split {
    /// A model that is split already stays so, unless other assignments are given.
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        if !draft.stages.is_empty() && self.given.is_none() {
            draft.parts = std::mem::take(&mut draft.stages);
            return Ok(false);
        }
        let noted = draft
            .model
            .metadata
            .iter()
            .find(|(key, _)| key == SPLIT_ASSIGNMENTS);
        let noted = noted.map(|(_, value)| Value::from(value.as_str()));
        let noted = noted.or_else(|| draft.attributes.get(SPLIT_ASSIGNMENTS).cloned());
        let from_model;
        let assignments = match (&self.given, noted) {
            (Some(given), _) => given,
            (None, Some(noted)) => {
                from_model = Assignments::of("the model", &noted)?;
                &from_model
            }
            (None, None) => {
                return Err(Error::config(
                    "pass `SplitModel`",
                    SPLIT_ASSIGNMENTS,
                    "assignments, or a model that CaptureSplitInfo noted them in",
                    "neither",
                ));
            }
        };
        let parts = split(&draft.model, assignments)?;
        let named = parts
            .into_iter()
            .enumerate()
            .map(|(index, model)| (format!("split_{index}.onnx"), model));
        draft.parts = named.collect();
        if same_stages(&draft.stages, &draft.parts) {
            draft.parts = std::mem::take(&mut draft.stages);
            return Ok(false);
        }
        if let Some(config) = &mut draft.genai_config {
            describe(config, &draft.parts);
        }
        Ok(true)
    }
}

/// Whether both are the same nodes in the same stages.
fn same_stages(before: &[(String, Model)], after: &[(String, Model)]) -> bool {
    let nodes = |(_, model): &(String, Model)| -> BTreeSet<Vec<String>> {
        model
            .graph
            .nodes
            .iter()
            .map(|node| node.outputs.clone())
            .collect()
    };
    before.len() == after.len() && before.iter().zip(after).all(|(a, b)| nodes(a) == nodes(b))
}

/// The graphs, in the order in which they run.
fn split(model: &Model, assignments: &Assignments) -> Result<Vec<Model>> {
    let graph = &model.graph;
    let places = place(graph, assignments)?;
    let types = infer(graph, &Types::new())?;
    let crossing = crossing(graph, &places);
    let shapes: HashMap<&str, &ValueInfo> = graph
        .value_infos
        .iter()
        .map(|info| (info.name.as_str(), info))
        .collect();
    let info = |name: &str| ValueInfo {
        name: name.to_owned(),
        dtype: types.get(name).copied(),
        shape: shapes.get(name).and_then(|info| info.shape.clone()),
    };
    let mut parts = Vec::new();
    for number in 0..assignments.count() {
        let nodes: Vec<Node> = graph
            .nodes
            .iter()
            .zip(&places)
            .filter(|(_, place)| place.contains(&number))
            .map(|(node, _)| node.clone())
            .collect();
        if nodes.iter().all(|node| is_op(node, "Constant")) {
            return Err(Error::config(
                "pass `SplitModel`",
                SPLIT_ASSIGNMENTS,
                "modules that the graph has",
                format!("no node in split {number}"),
            ));
        }
        let read: HashSet<&str> = nodes.iter().flat_map(reads).collect();
        let made: HashSet<&str> = nodes
            .iter()
            .flat_map(|node| node.outputs.iter().map(String::as_str))
            .collect();
        let mut inputs: Vec<ValueInfo> = graph
            .inputs
            .iter()
            .filter(|input| read.contains(input.name.as_str()))
            .cloned()
            .collect();
        inputs.extend(
            crossing
                .iter()
                .filter(|name| read.contains(**name) && !made.contains(**name))
                .map(|name| info(name)),
        );
        let mut outputs: Vec<ValueInfo> = graph
            .outputs
            .iter()
            .filter(|output| made.contains(output.name.as_str()))
            .cloned()
            .collect();
        let declared: HashSet<String> = outputs.iter().map(|output| output.name.clone()).collect();
        outputs.extend(
            crossing
                .iter()
                .filter(|name| made.contains(**name) && !declared.contains(**name))
                .map(|name| info(name)),
        );
        let part = Graph {
            name: format!("{}_split_{number}", graph.name),
            initializers: graph
                .initializers
                .iter()
                .filter(|tensor| read.contains(tensor.name.as_str()))
                .cloned()
                .collect(),
            value_infos: graph
                .value_infos
                .iter()
                .filter(|info| made.contains(info.name.as_str()))
                .cloned()
                .collect(),
            nodes,
            inputs,
            outputs,
        };
        let metadata = model
            .metadata
            .iter()
            .filter(|(key, _)| key != SPLIT_ASSIGNMENTS)
            .cloned()
            .collect();
        parts.push(Model {
            graph: part,
            metadata,
            opsets: model.opsets.clone(),
            producer_name: model.producer_name.clone(),
            producer_version: model.producer_version.clone(),
            ..*model
        });
    }
    Ok(parts)
}

/// The splits of each node: one, or several for a constant.
fn place(graph: &Graph, assignments: &Assignments) -> Result<Vec<BTreeSet<usize>>> {
    let mut made_in: HashMap<&str, usize> = HashMap::new();
    let mut places: Vec<BTreeSet<usize>> = Vec::with_capacity(graph.nodes.len());
    let mut copied: HashMap<&str, usize> = HashMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        if is_op(node, "Constant") {
            copied.extend(node.output(0).map(|name| (name, index)));
            places.push(BTreeSet::new());
            continue;
        }
        let earliest = reads(node)
            .iter()
            .filter_map(|name| made_in.get(name).copied())
            .max()
            .unwrap_or(0);
        let number = match assignments.of_node(&node.name) {
            Some(number) if number < earliest => {
                let found = format!(
                    "node `{}` in split {number} reads what split {earliest} makes",
                    node.name
                );
                return Err(Error::config(
                    "pass `SplitModel`",
                    SPLIT_ASSIGNMENTS,
                    "splits that run in order",
                    found,
                ));
            }
            assigned => assigned.unwrap_or(earliest),
        };
        made_in.extend(
            node.outputs
                .iter()
                .filter(|name| !name.is_empty())
                .map(|name| (name.as_str(), number)),
        );
        places.push(BTreeSet::from([number]));
        for name in reads(node) {
            if let Some(constant) = copied.get(name) {
                places[*constant].insert(number);
            }
        }
    }
    for name in output_names(graph) {
        if let Some(constant) = copied.get(name) {
            places[*constant].insert(0);
        }
    }
    Ok(places)
}

/// Values that a split makes and a later one reads, in the order in which they are made.
fn crossing<'a>(graph: &'a Graph, places: &[BTreeSet<usize>]) -> Vec<&'a str> {
    let mut read_in: HashMap<&str, BTreeSet<usize>> = HashMap::new();
    for (node, place) in graph.nodes.iter().zip(places) {
        for name in reads(node) {
            read_in.entry(name).or_default().extend(place);
        }
    }
    let nodes = graph
        .nodes
        .iter()
        .zip(places)
        .filter(|(node, _)| !is_op(node, "Constant"));
    let outputs = nodes.flat_map(|(node, place)| node.outputs.iter().map(move |name| (name.as_str(), place)));
    outputs
        .filter(|(name, place)| read_in.get(name).is_some_and(|read| !read.is_subset(place)))
        .map(|(name, _)| name)
        .collect()
}

/// Lets `genai_config.json` describe a pipeline.
fn describe(config: &mut Value, parts: &[(String, Model)]) {
    let names = |infos: &[ValueInfo]| {
        infos
            .iter()
            .map(|info| info.name.clone())
            .collect::<Vec<String>>()
    };
    let stage = |(file, model): &(String, Model)| {
        let key = file.trim_end_matches(".onnx").to_owned();
        let required: Vec<ValueInfo> = model.graph.required_inputs().cloned().collect();
        let entry =
            json!({"filename": file, "inputs": names(&required), "outputs": names(&model.graph.outputs)});
        Value::Object(Map::from_iter([(key, entry)]))
    };
    if let Some(Value::Object(decoder)) = config.pointer_mut("/model/decoder") {
        decoder.shift_remove("filename");
        decoder.insert("pipeline".to_owned(), parts.iter().map(stage).collect());
    }
    if let Some(kind) = config.pointer_mut("/model/type") {
        *kind = Value::from("decoder-pipeline");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{OnnxType, Opset, Tensor};
    use crate::passes::find;

    fn model() -> Model {
        let graph = Graph {
            name: "g".into(),
            inputs: vec![
                ValueInfo::new("x", OnnxType::Float, []),
                ValueInfo::new("past.1", OnnxType::Float, []),
            ],
            outputs: vec![
                ValueInfo::new("y", OnnxType::Float, []),
                ValueInfo::new("k", OnnxType::Float, []),
            ],
            nodes: vec![
                Node::new("/c", "Constant", &[], &["c"])
                    .with("value", Tensor::floats("", [], &[2.0]).unwrap()),
                Node::new("/mask/Neg", "Neg", &["x"], &["mask"]),
                Node::new("/model/layers.0/Mul", "Mul", &["x", "c"], &["k"]),
                Node::new("/model/layers.1/Mul", "Mul", &["k", "c"], &["b"]),
                Node::new(
                    "/model/layers.1/Add",
                    "Sum",
                    &["b", "mask", "past.1", "w"],
                    &["d"],
                ),
                Node::new("/norm/Neg", "Neg", &["d"], &["y"]),
            ],
            initializers: vec![Tensor::floats("w", [], &[1.0]).unwrap()],
            value_infos: vec![],
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

    fn run(given: Value) -> Result<Draft> {
        let pass = find("SplitModel").unwrap();
        let configured = pass.configure(given.as_object().unwrap())?;
        let mut draft = Draft::of(model());
        pass.apply(configured.as_ref(), &mut draft)?;
        Ok(draft)
    }

    #[test]
    fn values_that_cross_become_outputs_and_inputs() {
        let draft = run(json!({"split_assignments": "model.layers.0=0;model.layers.1=1"})).unwrap();
        let names = |infos: &[ValueInfo]| infos.iter().map(|info| info.name.clone()).collect::<Vec<_>>();
        let [(first_file, first), (_, second)] = draft.parts.as_slice() else {
            panic!("two parts")
        };
        assert_eq!(first_file, "split_0.onnx");
        assert_eq!(
            (names(&first.graph.inputs), names(&first.graph.outputs)),
            (vec!["x".into()], vec!["k".into(), "mask".into()])
        );
        let inputs: Vec<String> = ["past.1", "mask", "k"].map(str::to_owned).into();
        assert_eq!(
            (names(&second.graph.inputs), names(&second.graph.outputs)),
            (inputs, vec!["y".into()])
        );
        assert!(first.graph.initializers.is_empty() && second.graph.initializers.len() == 1);
        assert!(first.graph.node("/c").is_some() && second.graph.node("/c").is_some());
    }

    #[test]
    fn a_split_folder_opens_as_one_graph_and_is_not_split_again() {
        let folder = tempfile::tempdir().unwrap();
        let [plain, first, second, joined] =
            ["plain", "first", "second", "joined"].map(|name| folder.path().join(name));
        let config = json!({"model": {"type": "llama", "decoder": {"filename": "model.onnx"}}});
        let mut draft = Draft::of(model());
        draft.genai_config = Some(config);
        let write = |draft: &Draft, to: &std::path::Path| {
            draft
                .write(to, &olive_core::NoProgress, &olive_core::CancelToken::default())
                .unwrap();
        };
        write(&draft, &plain);
        let pass = find("SplitModel").unwrap();
        let given = json!({"split_assignments": "model.layers.0=0;model.layers.1=1"});
        let given = given.as_object().unwrap();
        assert!(pass.run_on_folder(given, &plain, &first).unwrap().changed);
        let opened = crate::OnnxFolder::open(&first).unwrap();
        let (before, after) = (&draft.model.graph, &opened.model().graph);
        let names = |graph: &Graph| -> BTreeSet<String> {
            graph.nodes.iter().map(|node| node.name.clone()).collect()
        };
        assert_eq!(names(before), names(after));
        let values = |infos: &[ValueInfo]| -> BTreeSet<String> {
            infos.iter().map(|info| info.name.clone()).collect()
        };
        assert_eq!(values(&before.inputs), values(&after.inputs));
        // `k` is read by the second part too, which hides that it is an output.
        assert_eq!(values(&after.outputs), BTreeSet::from(["y".to_owned()]));
        assert_eq!(after.initializers.len(), 1);
        for again in [given.clone(), Map::new()] {
            assert!(!pass.run_on_folder(&again, &first, &second).unwrap().changed);
            let bytes = |name: &str| [&first, &second].map(|f| std::fs::read(f.join(name)).unwrap());
            for file in ["split_0.onnx", "split_1.onnx", "genai_config.json"] {
                let [a, b] = bytes(file);
                assert_eq!(a, b, "{file}");
            }
            std::fs::remove_dir_all(&second).unwrap();
        }
        let metadata = json!({"graph_name": "whole"});
        let other = find("AddOliveMetadata").unwrap();
        assert!(
            other
                .run_on_folder(metadata.as_object().unwrap(), &first, &joined)
                .unwrap()
                .changed
        );
        assert!(joined.join("model.onnx").is_file() && !joined.join("split_0.onnx").exists());
        let config: Value = olive_core::fsio::read_json(joined.join("genai_config.json")).unwrap();
        assert_eq!(config["model"]["decoder"]["filename"], "model.onnx");
        assert_eq!(
            crate::OnnxFolder::open(&joined).unwrap().model().graph.name,
            "whole"
        );
    }

    #[test]
    fn wrong_assignments_are_refused() {
        for wrong in [
            json!({}),
            json!({"split_assignments": "model.layers.0"}),
            json!({"split_assignments": {"model.layers.0": 1}}),
            json!({"split_assignments": "model.layers.0=1;model.layers.1=0"}),
            json!({"split_assignments": "model.layers.0=0;model.layers.7=1"}),
        ] {
            assert!(run(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
