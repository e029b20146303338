//! What a command expands to: a model, passes in order, and where the result goes.

use std::path::Path;

use olive_core::{Error, Result};
use serde_json::{Map, Value, json};

use crate::args::{CommonArgs, ConfigArgs};
use crate::command::Context;
use crate::workflow::Workflow;

/// A workflow in the making.
pub struct Pipeline {
    document: Map<String, Value>,
    passes: Map<String, Value>,
}

impl Pipeline {
    /// A workflow without passes that starts from `model`.
    pub fn new(model: Value) -> Self {
        let mut document = Map::new();
        document.insert("input_model".to_owned(), model);
        Self {
            document,
            passes: Map::new(),
        }
    }

    /// What the model is made for.
    pub fn target(mut self, system: Value) -> Self {
        self.set("systems", json!({"local_system": system}));
        self.set("target", json!("local_system"));
        self
    }

    /// A further part of the document.
    pub fn set(&mut self, key: &str, value: Value) {
        self.document.insert(key.to_owned(), value);
    }

    /// Adds a pass of this type; parameters that are null are left out.
    pub fn pass(&mut self, name: &str, kind: &str, parameters: Value) {
        let mut pass = Map::new();
        pass.insert("type".to_owned(), json!(kind));
        let given = parameters.as_object().into_iter().flatten();
        pass.extend(
            given
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key.clone(), value.clone())),
        );
        self.passes.insert(name.to_owned(), Value::Object(pass));
    }

    /// Whether there is a pass yet.
    pub fn is_empty(&self) -> bool {
        self.passes.is_empty()
    }

    /// The whole document, for a folder.
    pub fn document(mut self, output: &Path, log_level: u8) -> Value {
        self.document
            .insert("passes".to_owned(), Value::Object(self.passes));
        for (key, value) in [
            ("evaluate_input_model", json!(false)),
            ("no_artifacts", json!(true)),
            ("output_dir", json!(output)),
            ("log_severity_level", json!(log_level)),
        ] {
            self.document.entry(key).or_insert(value);
        }
        Value::Object(self.document)
    }

    /// Runs it, or writes it down where that is asked for.
    ///
    /// # Errors
    /// Those of [`Workflow::of_command`].
    pub fn run(
        self,
        output: &Path,
        memory: Option<u64>,
        (config, common): (&ConfigArgs, &CommonArgs),
        context: &Context<'_>,
    ) -> Result<()> {
        if self.is_empty() {
            return Err(Error::config(
                "command line",
                "passes",
                "something to do",
                "nothing",
            ));
        }
        let document = self.document(output, common.log_level);
        Workflow::of_command(&document, output, config, memory, context)
    }
}

/// Pairs such as `batch_size=1,sequence_length=64`.
///
/// # Errors
/// [`Error::Config`] naming the flag.
pub fn pairs<'t>(flag: &str, text: &'t str) -> Result<Vec<(&'t str, &'t str)>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let pair = part
                .split_once('=')
                .map(|(key, value)| (key.trim(), value.trim()));
            pair.filter(|(key, value)| !key.is_empty() && !value.is_empty())
                .ok_or_else(|| {
                    Error::config(
                        "command line",
                        flag,
                        "pairs key=value, separated by commas",
                        format!("`{part}`"),
                    )
                })
        })
        .collect()
}

/// The options of the builder in `key=value,key=value`.
///
/// # Errors
/// As [`pairs`].
pub fn builder_options(flag: &str, text: Option<&str>) -> Result<Value> {
    let Some(text) = text else { return Ok(Value::Null) };
    let pairs = pairs(flag, text)?.into_iter().map(|(key, value)| {
        let value = match value.to_ascii_lowercase().as_str() {
            "true" => json!(true),
            "false" => json!(false),
            _ => value
                .parse::<i64>()
                .map_or_else(|_| json!(value), |number| json!(number)),
        };
        (key.to_owned(), value)
    });
    Ok(Value::Object(pairs.collect()))
}

/// Parameters of `DynamicToFixedShape`: names of dimensions and their sizes.
///
/// # Errors
/// [`Error::Config`] if there are not as many of one as of the other.
pub fn fixed_shape(flag: &str, names: &[String], sizes: &[i64]) -> Result<Value> {
    if names.len() != sizes.len() {
        let expected = format!("{} sizes, one for each name", names.len());
        return Err(Error::config(
            "command line",
            flag,
            expected,
            sizes.len().to_string(),
        ));
    }
    Ok(json!({"dim_param": names, "dim_value": sizes}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_and_options_are_read() {
        assert_eq!(pairs("--f", "a=1, b=x").unwrap(), [("a", "1"), ("b", "x")]);
        assert!(pairs("--f", "a").unwrap_err().is_usage());
        let options =
            builder_options("--f", Some("int4_block_size=64,use_qdq=True,filename=m.onnx")).unwrap();
        assert_eq!(
            options,
            json!({"int4_block_size": 64, "use_qdq": true, "filename": "m.onnx"})
        );
        assert_eq!(builder_options("--f", None).unwrap(), Value::Null);
        assert!(fixed_shape("--f", &["a".to_owned()], &[]).is_err());
    }

    #[test]
    fn a_pipeline_is_a_workflow() {
        let mut pipeline = Pipeline::new(json!({"type": "HfModel", "model_path": "a/b"}));
        pipeline.pass(
            "builder",
            "ModelBuilder",
            json!({"precision": "int4", "search": null}),
        );
        let document = pipeline.document(Path::new("out"), 3);
        assert_eq!(
            document["passes"],
            json!({"builder": {"type": "ModelBuilder", "precision": "int4"}})
        );
        assert_eq!(
            (&document["output_dir"], &document["no_artifacts"]),
            (&json!("out"), &json!(true))
        );
    }
}
