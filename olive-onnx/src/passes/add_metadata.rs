//! `AddOliveMetadata`: a name for the graph, and key and value texts that say where the model is from.

use olive_core::{Error, ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::params::{param, with_external_data};
use super::{Draft, GraphPass, OnnxPass};

const PARAMS: [ParamSpec; 8] = with_external_data([
    ParamSpec {
        name: "graph_name",
        kind: ParamKind::Text,
        default: None,
        doc: "The graph's name.",
        search: &[],
    },
    param(
        "custom_metadata",
        ParamKind::Object,
        "{}",
        "More keys and values.",
    ),
    param(
        "add_optimization_info",
        ParamKind::Bool,
        "true",
        "Whether passes, task and quantization are noted, where known.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("AddOliveMetadata", &PARAMS, parse);

#[derive(Deserialize)]
struct Metadata {
    graph_name: String,
    custom_metadata: Map<String, Value>,
    add_optimization_info: bool,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    let given: Metadata = config.parse(origin)?;
    if given.graph_name.is_empty() {
        return Err(Error::config(origin, "graph_name", "a name", "an empty text"));
    }
    Ok(Box::new(given))
}

impl GraphPass for Metadata {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        let mut entries: Vec<(&str, String)> = Vec::new();
        entries.extend(
            self.custom_metadata
                .iter()
                .map(|(key, value)| (key.as_str(), text(value))),
        );
        entries.push(("olive_version", env!("CARGO_PKG_VERSION").to_owned()));
        let name = draft.attributes.get("_name_or_path").and_then(Value::as_str);
        entries.extend(name.map(|name| ("hf_model_name", name.to_owned())));
        if self.add_optimization_info {
            for key in ["optimization_passes", "hf_task", "quantization_config"] {
                entries.extend(draft.attributes.get(key).map(|value| (key, text(value))));
            }
        }
        let mut changed = draft.model.graph.name != self.graph_name;
        self.graph_name.clone_into(&mut draft.model.graph.name);
        for (key, value) in entries {
            let metadata = &mut draft.model.metadata;
            match metadata.iter_mut().find(|(known, _)| known == key) {
                Some((_, old)) if *old == value => {}
                Some((_, old)) => {
                    *old = value;
                    changed = true;
                }
                None => {
                    metadata.push((key.to_owned(), value));
                    changed = true;
                }
            }
        }
        Ok(changed)
    }
}

/// Texts as they are, lists with commas, the rest as JSON.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<String>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{find, surgery};

    #[test]
    fn keys_are_set_once_and_the_name_is_needed() {
        let pass = find("AddOliveMetadata").unwrap();
        let given = serde_json::json!({"graph_name": "tones", "custom_metadata": {"author": "me", "tags": ["a", "b"]}});
        let configured = pass.configure(given.as_object().unwrap()).unwrap();
        let mut draft = Draft::of(surgery::sample_model());
        draft
            .attributes
            .insert("hf_task".into(), "text-generation".into());
        assert!(pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        assert_eq!(draft.model.graph.name, "tones");
        let get = |key: &str| {
            draft
                .model
                .metadata
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v.as_str())
        };
        assert_eq!(
            (get("author"), get("tags"), get("hf_task")),
            (Some("me"), Some("a, b"), Some("text-generation"))
        );
        assert!(!pass.apply(configured.as_ref(), &mut draft).unwrap().changed);
        assert!(pass.configure(&Map::new()).is_err());
    }
}
