//! A model split into stages that run one after the other, as `genai_config.json` lists them: read, and joined into the
//! one graph that they are together.

use std::collections::HashSet;
use std::path::Path;

use olive_core::{Error, Result, fsio};
use serde_json::Value;

use super::GENAI_CONFIG_FILE;
use crate::ir::{Graph, Model};
use crate::serde::read_model;

/// File names of the stages, in order; none where the model is one graph.
///
/// # Errors
/// [`Error::File`] for an entry without a file name.
pub fn stages(folder: &Path, config: &Value) -> Result<Vec<String>> {
    let Some(list) = config
        .pointer("/model/decoder/pipeline")
        .and_then(Value::as_array)
    else {
        return Ok(Vec::new());
    };
    let name = |stage: &Value| {
        let described = stage.as_object().and_then(|stage| stage.values().next());
        let name = described
            .and_then(|stage| stage.get("filename"))
            .and_then(Value::as_str);
        name.map(str::to_owned).ok_or_else(|| {
            let expected = "a `filename` in each stage of the pipeline";
            Error::file(folder.join(GENAI_CONFIG_FILE), expected, stage.to_string())
        })
    };
    list.iter().map(name).collect()
}

/// The stages with their file names.
///
/// # Errors
/// As [`stages`]; errors of reading a graph; a path out of the folder.
pub fn read(folder: &Path, config: &Value) -> Result<Vec<(String, Model)>> {
    let read = |name: String| Ok((name.clone(), read_model(&fsio::contained(folder, &name)?)?));
    stages(folder, config)?.into_iter().map(read).collect()
}

/// Stages as one graph: what one makes and another reads stays inside; constants that several have are kept once.
///
/// # Errors
/// [`Error::Unsupported`] without a stage.
pub fn join(stages: &[(String, Model)]) -> Result<Model> {
    let Some((_, first)) = stages.first() else {
        return Err(Error::unsupported(
            "a pipeline without stages",
            "there is nothing to join",
        ));
    };
    let graphs = || stages.iter().map(|(_, model)| &model.graph);
    let made: HashSet<&str> = graphs()
        .flat_map(|graph| &graph.nodes)
        .flat_map(|node| node.outputs.iter().map(String::as_str))
        .collect();
    let crossing: HashSet<&str> = graphs()
        .flat_map(|graph| &graph.inputs)
        .map(|input| input.name.as_str())
        .filter(|name| made.contains(name))
        .collect();
    let mut joined = Graph {
        name: first.graph.name.trim_end_matches("_split_0").to_owned(),
        ..Graph::default()
    };
    let mut seen: [HashSet<&str>; 4] = Default::default();
    let [inputs, initializers, outputs, infos] = &mut seen;
    for graph in graphs() {
        for input in &graph.inputs {
            let name = input.name.as_str();
            if !crossing.contains(name) && inputs.insert(name) {
                joined.inputs.push(input.clone());
            }
        }
        for tensor in &graph.initializers {
            if initializers.insert(tensor.name.as_str()) {
                joined.initializers.push(tensor.clone());
            }
        }
        for node in &graph.nodes {
            // Constants are copied to each stage that reads them.
            let copied = node
                .outputs
                .first()
                .is_some_and(|name| outputs.contains(name.as_str()));
            if !copied {
                outputs.extend(node.outputs.iter().map(String::as_str));
                joined.nodes.push(node.clone());
            }
        }
        for output in &graph.outputs {
            match crossing.contains(output.name.as_str()) {
                false => joined.outputs.push(output.clone()),
                true => {
                    if infos.insert(output.name.as_str()) {
                        joined.value_infos.push(output.clone());
                    }
                }
            }
        }
        for info in &graph.value_infos {
            if infos.insert(info.name.as_str()) {
                joined.value_infos.push(info.clone());
            }
        }
    }
    Ok(Model {
        graph: joined,
        opsets: first.opsets.clone(),
        producer_name: first.producer_name.clone(),
        producer_version: first.producer_version.clone(),
        metadata: first.metadata.clone(),
        ..*first
    })
}
