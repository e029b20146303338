//! `CaptureSplitInfo`: notes in a Hugging Face model which layers go into which split, for SplitModel to use later.
//!
//! With `num_splits` the layers are divided evenly, the first splits taking what is left over. With `cost_model` (a
//! table of module, parameters, bytes and operations) layers are put into splits until the memory of the device is
//! full; with both, into `num_splits` splits whose largest has as few bytes as possible.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use olive_core::cost_model::COLUMNS;
use olive_core::{
    Error, HfModel, ModelConfigFile, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig,
    PassContext, Result, fsio,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::params::param;
use super::split::SPLIT_ASSIGNMENTS;

const PARAMS: &[ParamSpec] = &[
    param("num_splits", ParamKind::Int, "null", "Number of splits."),
    param(
        "block_to_split",
        ParamKind::Any,
        "null",
        "The module, or modules, whose children are divided; the decoder's layers.",
    ),
    param(
        "cost_model",
        ParamKind::Text,
        "null",
        "A CSV file with the columns module,num_params,num_bytes,num_flops.",
    ),
    param(
        "unique_embeds_lm_head_splits",
        ParamKind::Bool,
        "false",
        "Whether embedding and head get splits of their own.",
    ),
];

/// The pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct CaptureSplitInfo {
    /// Bytes of the device's memory, which a cost model without a number of splits divides by.
    pub memory: Option<u64>,
}

#[derive(Deserialize)]
struct Parameters {
    num_splits: Option<usize>,
    block_to_split: Option<Blocks>,
    cost_model: Option<PathBuf>,
    unique_embeds_lm_head_splits: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Blocks {
    One(String),
    Many(Vec<String>),
}

const ORIGIN: &str = "pass `CaptureSplitInfo`";

impl CaptureSplitInfo {
    /// Numbers of splits by module.
    ///
    /// # Errors
    /// [`Error::Config`] for parameters that do not fit the model; errors of reading the cost model.
    pub fn assignments(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<Vec<(String, usize)>> {
        let found = Value::Object(config.values().clone()).to_string();
        let wrong = |_| {
            Error::config(
                ORIGIN,
                "num_splits",
                "a positive number, and names as `block_to_split`",
                found,
            )
        };
        let given: Parameters = config.parse(ORIGIN).map_err(wrong)?;
        let spec = model.spec();
        let blocks = match given.block_to_split {
            None => vec!["model.layers".to_owned()],
            Some(Blocks::One(name)) => vec![name],
            Some(Blocks::Many(names)) => names,
        };
        if let Some(other) = blocks.iter().find(|name| *name != "model.layers") {
            return Err(Error::config(
                ORIGIN,
                "block_to_split",
                "`model.layers`",
                format!("`{other}`"),
            ));
        }
        let layers: Vec<String> = (0..spec.n_layers)
            .map(|layer| format!("model.layers.{layer}"))
            .collect();
        let numbers = match (given.num_splits, &given.cost_model) {
            (None, None) => {
                return Err(Error::config(
                    ORIGIN,
                    "num_splits",
                    "a number, or a `cost_model`",
                    "neither",
                ));
            }
            (Some(n), _) if n == 0 || n > layers.len() => {
                return Err(Error::config(
                    ORIGIN,
                    "num_splits",
                    format!("1 to {} (the layers)", layers.len()),
                    n.to_string(),
                ));
            }
            (Some(n), None) => evenly(layers.len(), n),
            (Some(n), Some(table)) => balanced(&costs(table, &layers)?, n),
            (None, Some(table)) => match self.memory {
                Some(memory) => filled(&costs(table, &layers)?, memory)?,
                None => {
                    return Err(Error::config(
                        ORIGIN,
                        "cost_model",
                        "a device of known memory, or `num_splits`",
                        "neither",
                    ));
                }
            },
        };
        let shift = usize::from(given.unique_embeds_lm_head_splits);
        let last = numbers.last().map_or(0, |number| number + shift);
        let mut entries: Vec<(String, usize)> = Vec::new();
        if given.unique_embeds_lm_head_splits {
            entries.push(("model.embed_tokens".to_owned(), 0));
        }
        entries.extend(
            layers
                .into_iter()
                .zip(numbers.into_iter().map(|number| number + shift)),
        );
        if given.unique_embeds_lm_head_splits {
            entries.push(("lm_head".to_owned(), last + 1));
        }
        Ok(entries)
    }
}

/// `count` things in `splits` runs whose lengths differ by one at most, the longer first.
fn evenly(count: usize, splits: usize) -> Vec<usize> {
    let (length, longer) = (count / splits, count % splits);
    (0..splits)
        .flat_map(|split| std::iter::repeat_n(split, length + usize::from(split < longer)))
        .collect()
}

/// Runs of which none has more than `memory` bytes.
fn filled(bytes: &[u64], memory: u64) -> Result<Vec<usize>> {
    let (mut split, mut used) = (0, 0u64);
    let mut numbers = Vec::with_capacity(bytes.len());
    for (layer, size) in bytes.iter().enumerate() {
        if *size > memory {
            return Err(Error::config(
                ORIGIN,
                "cost_model",
                format!("layers within {memory} bytes"),
                format!("{size} bytes for layer {layer}"),
            ));
        }
        if used + size > memory {
            split += 1;
            used = 0;
        }
        used += size;
        numbers.push(split);
    }
    Ok(numbers)
}

/// `splits` runs, none empty, the largest as small as it can be.
fn balanced(bytes: &[u64], splits: usize) -> Vec<usize> {
    let n = bytes.len();
    let mut sums = vec![0u64];
    for size in bytes {
        sums.push(sums[sums.len() - 1] + size);
    }
    // best[k][i]: the least largest run when the first i layers are in k + 1 runs; cut[k][i]: where the last begins.
    let mut best = vec![sums.clone()];
    let mut cut = vec![vec![0; n + 1]];
    for k in 1..splits {
        let (mut row, mut starts) = (vec![u64::MAX; n + 1], vec![0; n + 1]);
        for i in k + 1..=n {
            for start in k..i {
                let largest = best[k - 1][start].max(sums[i] - sums[start]);
                if largest < row[i] {
                    (row[i], starts[i]) = (largest, start);
                }
            }
        }
        best.push(row);
        cut.push(starts);
    }
    let mut numbers = vec![0; n];
    let mut end = n;
    for k in (0..splits).rev() {
        let start = cut[k][end];
        numbers[start..end].fill(k);
        end = start;
    }
    numbers
}

/// Bytes of each layer, from a cost model.
fn costs(path: &Path, layers: &[String]) -> Result<Vec<u64>> {
    let text = fsio::read_to_string(path)?;
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let header = lines.next().unwrap_or_default();
    if header != COLUMNS {
        return Err(Error::file(
            path,
            format!("a table with the columns {COLUMNS}"),
            format!("`{header}`"),
        ));
    }
    let mut bytes = vec![0u64; layers.len()];
    let index: HashMap<&str, usize> = layers
        .iter()
        .enumerate()
        .map(|(i, name)| (name.as_str(), i))
        .collect();
    for line in lines {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        // Olive writes `0.5 * parameters` for 4-bit weights, so bytes may have a fraction.
        let size = (fields.len() == 4)
            .then(|| fields[2].parse::<f64>().ok())
            .flatten()
            .filter(|size| size.is_finite() && *size >= 0.0)
            .map(|size| size.ceil() as u64);
        let size = size.ok_or_else(|| {
            Error::file(
                path,
                "a module and three numbers in each line",
                format!("`{line}`"),
            )
        })?;
        let layer = fields[0]
            .match_indices('.')
            .map(|(at, _)| &fields[0][..at])
            .find_map(|prefix| index.get(prefix));
        if let Some(layer) = layer.or_else(|| index.get(fields[0])) {
            bytes[*layer] += size;
        }
    }
    if let Some(empty) = bytes.iter().position(|size| *size == 0) {
        return Err(Error::file(
            path,
            format!("a cost for `{}`", layers[empty]),
            "none",
        ));
    }
    Ok(bytes)
}

impl Pass for CaptureSplitInfo {
    fn name(&self) -> &'static str {
        "CaptureSplitInfo"
    }

    fn params(&self) -> &'static [ParamSpec] {
        PARAMS
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }

    fn input_files(&self, config: &PassConfig) -> Vec<PathBuf> {
        config
            .values()
            .get("cost_model")
            .and_then(Value::as_str)
            .map(PathBuf::from)
            .into_iter()
            .collect()
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        if model.kind() != ModelKind::HuggingFace {
            return Err(Error::file(model.path(), "a Hugging Face model", "an ONNX model"));
        }
        self.assignments(model, config).map(|_| ())
    }

    /// Leaves the model's own files, linked, with `model_config.json` beside them, which holds the assignments under
    /// `model_attributes`.
    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let assignments = self.assignments(model, config)?;
        fsio::create_dir(context.output)?;
        let mut noted = ModelConfigFile::read(model.path())?
            .map(|file| file.config)
            .unwrap_or_default();
        link_files(model.path(), context.output, context)?;
        let text: Vec<String> = assignments
            .iter()
            .map(|(name, number)| format!("{name}={number}"))
            .collect();
        let attributes = noted.entry("model_attributes").or_insert_with(|| json!({}));
        if let Value::Object(map) = attributes {
            map.insert(SPLIT_ASSIGNMENTS.to_owned(), Value::from(text.join(";")));
        }
        noted.insert("model_path".to_owned(), Value::from("."));
        if let Some(adapter) = model.adapter() {
            link_files(adapter, &context.output.join("adapter"), context)?;
            noted.insert("adapter_path".to_owned(), Value::from("adapter"));
        }
        ModelConfigFile {
            kind: "HfModel".to_owned(),
            config: noted,
        }
        .write(context.output)?;
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}

fn link_files(from: &Path, to: &Path, context: &PassContext<'_>) -> Result<()> {
    fsio::create_dir(to)?;
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(from).map_err(Error::io("read folder", from))? {
        files.push(entry.map_err(Error::io("read folder", from))?.path());
    }
    files.sort();
    for file in files.iter().filter(|file| file.is_file()) {
        context.cancel.check()?;
        let name = file.file_name().unwrap_or_default();
        if name != "model_config.json" {
            fsio::link_or_copy(file, &to.join(name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_divided_in_runs() {
        assert_eq!(evenly(7, 3), [0, 0, 0, 1, 1, 2, 2]);
        assert_eq!(balanced(&[9, 1, 1, 2, 9], 2), [0, 0, 0, 1, 1]);
        assert_eq!(balanced(&[1, 1, 1, 1, 10], 3), [0, 0, 1, 1, 2]);
        assert_eq!(balanced(&[5, 5], 2), [0, 1]);
        assert_eq!(filled(&[3, 3, 3, 6], 6).unwrap(), [0, 0, 1, 2]);
        assert!(filled(&[7], 6).is_err());
    }

    #[test]
    fn balanced_runs_are_the_best_there_are() {
        let bytes = [4u64, 9, 2, 2, 7, 1, 3];
        for splits in 1..=bytes.len() {
            let largest = |numbers: &[usize]| {
                (0..splits)
                    .map(|k| {
                        numbers
                            .iter()
                            .zip(&bytes)
                            .filter(|(n, _)| **n == k)
                            .map(|(_, b)| b)
                            .sum::<u64>()
                    })
                    .max()
                    .unwrap()
            };
            let got = balanced(&bytes, splits);
            assert!(got.is_sorted() && (0..splits).all(|k| got.contains(&k)));
            let mut best = u64::MAX;
            for mask in 0u32..1 << (bytes.len() - 1) {
                if mask.count_ones() as usize + 1 == splits {
                    let mut numbers = vec![0];
                    numbers.extend((0..bytes.len() - 1).scan(0, |n, i| {
                        *n += (mask >> i & 1) as usize;
                        Some(*n)
                    }));
                    best = best.min(largest(&numbers));
                }
            }
            assert_eq!(largest(&got), best, "{splits} {got:?}");
        }
    }

    #[test]
    fn our_cost_models_and_those_with_half_bytes_are_read() {
        use olive_core::cost_model::{cost_model, write_cost_model};

        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("cost.csv");
        let model = HfModel::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-phi3")).unwrap();
        let names: Vec<String> = (0..4).map(|layer| format!("model.layers.{layer}")).collect();
        let rows = cost_model(model.spec(), 4);
        write_cost_model(&path, &rows).unwrap();
        let whole = costs(&path, &names).unwrap();
        let first: u64 = rows
            .iter()
            .filter(|row| row.module.starts_with("model.layers.0."))
            .map(|row| row.bytes)
            .sum();
        assert_eq!(whole, [first; 4]);

        std::fs::write(&path, format!("{COLUMNS}\nmodel.layers.0.mlp,3,1.5,6\n")).unwrap();
        assert_eq!(costs(&path, &names[..1]).unwrap(), [2]);
        std::fs::write(&path, format!("{COLUMNS}\nmodel.layers.0.mlp,3,-1.5,6\n")).unwrap();
        assert!(costs(&path, &names[..1]).is_err());
    }
}
