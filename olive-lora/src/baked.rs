//! Adapters that a checkpoint carries within itself, as Phi-4-multimodal does for its modalities:
//!
//! ```text
//! <module>.base_layer.weight           the frozen weight
//! <module>.lora_A.<adapter>.weight     [r, in]
//! <module>.lora_B.<adapter>.weight     [out, r]
//! config.json: <adapter>_lora          {"r": …, "lora_alpha": …}
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use olive_core::checkpoint::{Checkpoint, TensorInfo, TensorSource, write_file};
use olive_core::{Error, Result, fsio};
use serde_json::{Map, Value};

use crate::adapter::WEIGHTS_FILE;
use crate::matching::Targets;
use crate::options::LoraOptions;
use crate::peft_config::{self, CONFIG_FILE};

/// An adapter that was taken out of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BakedAdapter {
    /// Its name: `vision`, `speech`.
    pub name: String,
    /// The PEFT folder that was written.
    pub folder: PathBuf,
    /// How many modules it adapts.
    pub modules: usize,
}

/// The parts of one module: names of `A` and `B`.
#[derive(Default)]
struct Parts {
    a: Option<String>,
    b: Option<String>,
}

/// Splits `<module>.lora_A.<adapter>.weight`.
fn place(tensor: &str) -> Option<(&str, &str, bool)> {
    let path = tensor.strip_suffix(".weight")?;
    for (part, is_a) in [(".lora_A.", true), (".lora_B.", false)] {
        if let Some((module, adapter)) = path.split_once(part) {
            return (!adapter.is_empty() && !adapter.contains('.')).then_some((module, adapter, is_a));
        }
    }
    None
}

/// Writes every adapter that the checkpoint in `folder` has within it as a PEFT folder `output/<adapter>`, bytes and
/// types unchanged; the base is not touched.
///
/// # Errors
/// [`Error::Unsupported`] if there is none; [`Error::MissingTensors`] or [`Error::Tensor`] for a module whose parts are
/// not whole; [`Error::Config`] naming the key of `config.json` that lacks the scale; errors of reading and writing.
pub fn extract_baked(folder: &Path, output: &Path) -> Result<Vec<BakedAdapter>> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut adapters: BTreeMap<&str, BTreeMap<&str, Parts>> = BTreeMap::new();
    for tensor in checkpoint.names() {
        if let Some((module, adapter, is_a)) = place(tensor) {
            let parts = adapters.entry(adapter).or_default().entry(module).or_default();
            *(if is_a { &mut parts.a } else { &mut parts.b }) = Some(tensor.to_owned());
        }
    }
    if adapters.is_empty() {
        let what = format!("extracting adapters of `{}`", folder.display());
        return Err(Error::unsupported(
            what,
            "no tensor is named `….lora_A.<adapter>.weight`",
        ));
    }
    let config_path = folder.join("config.json");
    let config: Map<String, Value> = fsio::read_json(&config_path)?;
    let base = folder
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let mut written = Vec::new();
    for (name, modules) in &adapters {
        let (tensors, ranks) = read(&checkpoint, folder, modules)?;
        let options = options(&config_path.display().to_string(), &config, name, &ranks)?;
        let target = output.join(name);
        fsio::create_dir(&target)?;
        write_file(target.join(WEIGHTS_FILE), &tensors)?;
        let ends: BTreeSet<&str> = modules
            .keys()
            .map(|module| module.rsplit('.').next().unwrap_or(module))
            .collect();
        let targets = Targets::Names(ends.into_iter().map(str::to_owned).collect());
        fsio::write_json(
            target.join(CONFIG_FILE),
            &peft_config::to_json(&options, &targets, &base),
            2,
        )?;
        written.push(BakedAdapter {
            name: (*name).to_owned(),
            folder: target,
            modules: modules.len(),
        });
    }
    Ok(written)
}

type Tensors = Vec<(String, TensorInfo, Vec<u8>)>;

/// The tensors under PEFT's names, and the rank of each module.
fn read<'a>(
    checkpoint: &Checkpoint,
    folder: &Path,
    modules: &BTreeMap<&'a str, Parts>,
) -> Result<(Tensors, BTreeMap<&'a str, usize>)> {
    let source: &dyn TensorSource = checkpoint;
    let (mut tensors, mut ranks) = (Vec::new(), BTreeMap::new());
    for (module, parts) in modules {
        let (Some(a), Some(b)) = (&parts.a, &parts.b) else {
            let half = parts.a.as_ref().or(parts.b.as_ref()).cloned().unwrap_or_default();
            return Err(Error::MissingTensors {
                path: folder.to_path_buf(),
                names: vec![format!("the other half of {half}")],
            });
        };
        let (a_info, b_info) = (source.require(a)?.clone(), source.require(b)?.clone());
        let rank = match (a_info.shape.as_slice(), b_info.shape.as_slice()) {
            ([rank, _], [_, same]) if rank == same && *rank > 0 => *rank,
            _ => {
                let expected = format!("[out, r] for the [r, in] of `{a}` {:?}", a_info.shape);
                return Err(Error::tensor(b, expected, format!("{:?}", b_info.shape)));
            }
        };
        ranks.insert(*module, rank);
        for (part, tensor, info) in [("lora_A", a, a_info), ("lora_B", b, b_info)] {
            let bytes = source.bytes(tensor)?.into_owned();
            tensors.push((format!("base_model.model.{module}.{part}.weight"), info, bytes));
        }
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((tensors, ranks))
}

/// Rank and scale of an adapter; ranks that differ from the config's become a pattern.
fn options(
    origin: &str,
    config: &Map<String, Value>,
    name: &str,
    ranks: &BTreeMap<&str, usize>,
) -> Result<LoraOptions> {
    let key = format!("{name}_lora");
    let own = config.get(&key).and_then(Value::as_object);
    let number = |part: &str| own.and_then(|own| own.get(part)).and_then(Value::as_f64);
    let missing = |part: &str| Error::config(origin, format!("{key}.{part}"), "a number", "none");
    let alpha = number("lora_alpha").ok_or_else(|| missing("lora_alpha"))?;
    let r = number("r").filter(|r| *r >= 1.0).ok_or_else(|| missing("r"))? as usize;
    let others = ranks.iter().filter(|(_, rank)| **rank != r);
    Ok(LoraOptions {
        r,
        alpha,
        dropout: number("dp").unwrap_or(0.0),
        rank_pattern: others
            .map(|(module, rank)| (regex::escape(module), *rank))
            .collect(),
        ..LoraOptions::default()
    })
}

#[cfg(test)]
mod tests {
    use olive_core::DType;

    use super::*;

    fn tensor(name: &str, shape: [usize; 2], first: f32) -> (String, TensorInfo, Vec<u8>) {
        let values: Vec<f32> = (0..shape[0] * shape[1])
            .map(|i| first + i as f32 / 64.0)
            .collect();
        let info = TensorInfo {
            dtype: DType::BF16,
            shape: shape.to_vec(),
        };
        (name.to_owned(), info, DType::BF16.from_f32(&values).unwrap())
    }

    fn checkpoint(folder: &Path, tensors: &[(String, TensorInfo, Vec<u8>)]) {
        write_file(folder.join("model.safetensors"), tensors).unwrap();
        let config = serde_json::json!({
            "vision_lora": {"r": 2, "lora_alpha": 4, "dp": 0.1}, "speech_lora": {"r": 3, "lora_alpha": 6},
        });
        fsio::write_json(folder.join("config.json"), &config, 2).unwrap();
    }

    #[test]
    fn each_adapter_becomes_a_folder_of_pefts_files() {
        let folder = tempfile::tempdir().unwrap();
        let (qkv, down) = (
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.0.mlp.down_proj",
        );
        let tensors = [
            tensor(&format!("{qkv}.base_layer.weight"), [12, 4], 0.0),
            tensor(&format!("{qkv}.lora_A.speech.weight"), [3, 4], 1.0),
            tensor(&format!("{qkv}.lora_A.vision.weight"), [2, 4], 2.0),
            tensor(&format!("{qkv}.lora_B.speech.weight"), [12, 3], 3.0),
            tensor(&format!("{qkv}.lora_B.vision.weight"), [12, 2], 4.0),
            tensor(&format!("{down}.lora_A.vision.weight"), [1, 8], 5.0),
            tensor(&format!("{down}.lora_B.vision.weight"), [4, 1], 6.0),
        ];
        checkpoint(folder.path(), &tensors);
        let output = folder.path().join("adapters");
        let found = extract_baked(folder.path(), &output).unwrap();
        let names: Vec<_> = found.iter().map(|a| (a.name.as_str(), a.modules)).collect();
        assert_eq!(names, [("speech", 1), ("vision", 2)]);
        let vision = peft_config::read(&output.join("vision")).unwrap();
        assert_eq!((vision.r, vision.alpha, vision.dropout), (2, 4.0, 0.1));
        assert_eq!(
            vision.target_modules,
            Some(Targets::Names(vec!["down_proj".into(), "qkv_proj".into()]))
        );
        assert_eq!(vision.rank_pattern.values().collect::<Vec<_>>(), [&1]);
        let file = output.join("vision").join(WEIGHTS_FILE);
        let written = Checkpoint::open_files(&output, vec![file]).unwrap();
        assert_eq!(written.names().len(), 4);
        let b = format!("base_model.model.{qkv}.lora_B.weight");
        assert_eq!(written.bytes(&b).unwrap(), tensors[4].2);
        assert_eq!(written.info(&b), Some(&tensors[4].1));
    }

    #[test]
    fn what_is_not_whole_is_refused_by_name() {
        let module = "model.layers.0.self_attn.o_proj";
        for (tensors, named) in [
            (vec![tensor("model.norm.weight", [1, 4], 0.0)], "lora_A"),
            (
                vec![tensor(&format!("{module}.lora_A.vision.weight"), [2, 4], 0.0)],
                module,
            ),
            (
                vec![
                    tensor(&format!("{module}.lora_A.vision.weight"), [2, 4], 0.0),
                    tensor(&format!("{module}.lora_B.vision.weight"), [4, 3], 0.0),
                ],
                "lora_B.vision",
            ),
            (
                vec![
                    tensor(&format!("{module}.lora_A.audio.weight"), [2, 4], 0.0),
                    tensor(&format!("{module}.lora_B.audio.weight"), [4, 2], 0.0),
                ],
                "audio_lora.lora_alpha",
            ),
        ] {
            let folder = tempfile::tempdir().unwrap();
            checkpoint(folder.path(), &tensors);
            let error = extract_baked(folder.path(), &folder.path().join("out"))
                .unwrap_err()
                .to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
