//! Data configs and the files that they name.

use std::path::PathBuf;

use serde_json::Value;

use super::{Object, Reader, object, text};
use crate::data::Template;
use crate::error::{Error, Result};
use crate::workflow::schema::config::{DataConfig, Reference};
use crate::workflow::schema::location::{Location, resolve};
use crate::workflow::schema::shape::join;

impl Reader<'_> {
    pub(super) fn data_configs(&self, value: Option<&Value>) -> Result<Vec<DataConfig>> {
        let mut configs: Vec<DataConfig> = Vec::new();
        for (index, entry) in value.and_then(Value::as_array).into_iter().flatten().enumerate() {
            let path = format!("data_configs[{index}]");
            let config = self.data_config(entry, &path)?;
            let key = join(&path, "name");
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if config.name.is_empty() || !config.name.chars().all(plain) {
                let expected = "a name of letters, digits and `_`";
                return Err(Error::config(
                    self.origin,
                    key,
                    expected,
                    format!("`{}`", config.name),
                ));
            }
            if configs.iter().any(|other| other.name == config.name) {
                let found = format!("`{}` twice", config.name);
                return Err(Error::config(self.origin, key, "a name of its own", found));
            }
            configs.push(config);
        }
        Ok(configs)
    }

    pub(in crate::workflow) fn data_config(&self, value: &Value, path: &str) -> Result<DataConfig> {
        let empty = Object::new();
        let config = value.as_object().unwrap_or(&empty);
        let mut load = object(config, "load_dataset_config");
        let (files, remote) = self.data_files(&mut load);
        let pre_process = object(config, "pre_process_data_config");
        if let Some(template) = text(&pre_process, "text_template") {
            Template::parse(&template).map_err(|problem| {
                let key = join(&join(path, "pre_process_data_config"), "text_template");
                Error::config(self.origin, key, "columns in braces", problem)
            })?;
        }
        Ok(DataConfig {
            name: text(config, "name").unwrap_or_default(),
            kind: text(config, "type"),
            load_dataset: load,
            pre_process,
            post_process: object(config, "post_process_data_config"),
            dataloader: object(config, "dataloader_config"),
            files,
            remote,
        })
    }

    /// Makes the paths of a `load_dataset_config` absolute and lists them.
    fn data_files(&self, load: &mut Object) -> (Vec<PathBuf>, Vec<Location>) {
        /// Formats, as opposed to repositories of the hub, whose `data_files` are inside the repository.
        const FORMATS: &[&str] = &["json", "jsonl", "csv", "tsv", "text", "txt", "parquet", "arrow"];
        let (mut files, mut remote) = (Vec::new(), Vec::new());
        let name = text(load, "data_name");
        if let Some(name) = &name
            && resolve(self.folder, name).exists()
            && !FORMATS.contains(&name.as_str())
        {
            let path = resolve(self.folder, name);
            load.insert("data_name".to_owned(), Value::from(path.display().to_string()));
            files.push(path);
        }
        let formats = name.is_none_or(|name| FORMATS.contains(&name.as_str()));
        if let Some(value) = load.get_mut("data_files") {
            self.absolute(value, formats, &mut files, &mut remote);
        }
        if let Some(value) = load.get_mut("data_dir") {
            self.absolute(value, formats, &mut files, &mut remote);
        }
        (files, remote)
    }

    fn absolute(&self, value: &mut Value, here: bool, files: &mut Vec<PathBuf>, remote: &mut Vec<Location>) {
        match value {
            Value::String(text) if here && !text.contains("://") => {
                let split: Vec<String> = text
                    .split(',')
                    .map(|part| {
                        let path = resolve(self.folder, part.trim());
                        let shown = path.display().to_string();
                        files.push(path);
                        shown
                    })
                    .collect();
                *text = split.join(",");
            }
            Value::Object(object) if object.contains_key("type") => {
                let resource = Value::Object(object.clone());
                match Location::read(&resource, self.folder) {
                    Some(Location::Local(path)) => {
                        *value = Value::from(path.display().to_string());
                        files.push(path);
                    }
                    Some(other) => remote.push(other),
                    None => {}
                }
            }
            Value::Object(object) => {
                for entry in object.values_mut() {
                    self.absolute(entry, here, files, remote);
                }
            }
            Value::Array(list) => {
                for entry in list {
                    self.absolute(entry, here, files, remote);
                }
            }
            _ => {}
        }
    }

    pub(super) fn data_reference(
        &self,
        value: Option<&Value>,
        path: &str,
    ) -> Result<Option<Reference<DataConfig>>> {
        Ok(match value {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(Reference::Name(name.clone())),
            Some(value) => Some(Reference::Inline(Box::new(self.data_config(value, path)?))),
        })
    }
}
