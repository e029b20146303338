//! ONNX Runtime model packages: variants of one model for several execution providers, in one folder.
//!
//! ```text
//! <name>.ortpackage/
//! ├── manifest.json                     schema 1.0: component → folder, producer
//! ├── models/model/component.json       variant → execution provider
//! ├── models/model/<variant>/           graph, data, adapters and a complete genai_config.json
//! └── shared_assets/sha256-<hex>/       tokenizer and the like, once for all variants that have the same
//! ```
//!
//! A variant's `model.tokenizer_dir` names its assets as `sha256:<hex>`: the SHA-256 of the lines
//! `<SHA-256 of a file>  <its name>`, sorted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use olive_core::model::MODEL_CONFIG_FILE;
use olive_core::{Error, Result, fsio};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::staging::Staging;
use crate::model::{GENAI_CONFIG_FILE, OnnxFolder};

/// The ending of a package's name.
pub const PACKAGE_SUFFIX: &str = "ortpackage";
const COMPONENT: &str = "model";
/// Endings of files that belong to one graph.
const GRAPH_SUFFIXES: &[&str] = &["onnx", "data", "bin", "xml", "onnx_adapter"];

/// `provider_options` of `genai_config.json` name execution providers by these short names, compared without case.
const PROVIDERS: &[(&str, &str)] = &[
    ("cpu", "CPUExecutionProvider"),
    ("cuda", "CUDAExecutionProvider"),
    ("dml", "DmlExecutionProvider"),
    ("webgpu", "WebGpuExecutionProvider"),
    ("js", "JsExecutionProvider"),
    ("qnn", "QNNExecutionProvider"),
    ("openvino", "OpenVINOExecutionProvider"),
    ("rocm", "ROCMExecutionProvider"),
    ("tensorrt", "TensorrtExecutionProvider"),
    ("nvtensorrtrtx", "NvTensorRTRTXExecutionProvider"),
    ("vitisai", "VitisAIExecutionProvider"),
    ("migraphx", "MIGraphXExecutionProvider"),
];

/// What goes into `manifest.json` besides the variants.
#[derive(Debug, Clone, Copy)]
pub struct PackageInfo<'a> {
    /// The model's name; that of the package where there is none.
    pub model_name: Option<&'a str>,
    /// The model's version.
    pub model_version: &'a str,
}

/// One model folder, looked into.
struct Variant {
    name: String,
    provider: &'static str,
    genai_config: Value,
    own: Vec<PathBuf>,
    shared: Vec<PathBuf>,
}

/// Packs model folders into one package, which appears whole at `output` (with `.ortpackage` added to the name where
/// it lacks); gives its path. Each folder becomes a variant that is called as the folder is.
///
/// # Errors
/// [`Error::Config`] without a folder, or if two have the same name; [`Error::File`] for a folder without a sound
/// model and `genai_config.json`, or if the package exists and is not empty; [`Error::Unsupported`] for an execution
/// provider that is not known.
pub fn write_ort_package(sources: &[PathBuf], output: &Path, info: PackageInfo<'_>) -> Result<PathBuf> {
    let mut variants: Vec<Variant> = Vec::new();
    for source in sources {
        let variant = Variant::open(source)?;
        if variants.iter().any(|other| other.name == variant.name) {
            let found = format!("two of the name `{}`", variant.name);
            let expected = "folders with names of their own, which the variants get";
            return Err(Error::config("model package", "source", expected, found));
        }
        variants.push(variant);
    }
    if variants.is_empty() {
        return Err(Error::config(
            "model package",
            "source",
            "at least one model folder",
            "none",
        ));
    }
    let output = match output.extension().is_some_and(|suffix| suffix == PACKAGE_SUFFIX) {
        true => output.to_path_buf(),
        false => {
            let mut name = output.file_name().unwrap_or_default().to_owned();
            name.push(format!(".{PACKAGE_SUFFIX}"));
            output.with_file_name(name)
        }
    };
    let occupied = std::fs::read_dir(&output).is_ok_and(|mut entries| entries.next().is_some());
    if occupied || output.is_file() {
        return Err(Error::file(&output, "an empty folder or none", "something else"));
    }
    let stem = output
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let name = info.model_name.unwrap_or(&stem);

    let staging = Staging::begin(&output)?;
    let component = staging.path().join("models").join(COMPONENT);
    let mut listed = Map::new();
    for variant in &variants {
        let asset = share(&variant.shared, staging.path())?;
        let folder = component.join(&variant.name);
        fsio::create_dir(&folder)?;
        for file in &variant.own {
            fsio::link_or_copy(file, &folder.join(file.file_name().unwrap_or_default()))?;
        }
        let mut config = variant.genai_config.clone();
        config["model"]["tokenizer_dir"] = asset.map_or(Value::Null, |hash| format!("sha256:{hash}").into());
        fsio::write_json(folder.join(GENAI_CONFIG_FILE), &config, 4)?;
        listed.insert(variant.name.clone(), json!({"ep": variant.provider}));
    }
    let described = json!({"component_name": COMPONENT, "variants": listed});
    fsio::write_json(component.join("component.json"), &described, 2)?;
    let manifest = json!({
        "schema_version": "1.0",
        "package_name": name,
        "package_version": info.model_version,
        "components": {COMPONENT: format!("models/{COMPONENT}")},
        "additional_metadata": {"producer": {
            "tool": "olive",
            "tool_version": env!("CARGO_PKG_VERSION"),
            "model_name": name,
            "model_version": info.model_version,
            "task": "text_generation",
        }},
    });
    fsio::write_json(staging.path().join("manifest.json"), &manifest, 2)?;
    staging.finish()?;
    Ok(output)
}

impl Variant {
    fn open(source: &Path) -> Result<Self> {
        let opened = OnnxFolder::open(source)?;
        let folder = opened.path();
        let Some(genai_config) = opened.genai_config().cloned() else {
            return Err(Error::file(
                folder,
                "a model folder with genai_config.json",
                "none",
            ));
        };
        let provider = provider(&genai_config, &folder.join(GENAI_CONFIG_FILE))?;
        // `x/model` of Olive's layout is called `x`, as it was named.
        let named = std::path::absolute(source).map_err(Error::io("resolve", source))?;
        let name = named
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let constants = &opened.model().graph.initializers;
        let mapped: Vec<&Path> = constants
            .iter()
            .filter_map(|tensor| tensor.mapped_file())
            .collect();
        let mut variant = Self {
            name,
            provider,
            genai_config,
            own: Vec::new(),
            shared: Vec::new(),
        };
        for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
            let path = entry.map_err(Error::io("list", folder))?.path();
            let file = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !path.is_file()
                || file.starts_with('.')
                || file == GENAI_CONFIG_FILE
                || file == MODEL_CONFIG_FILE
            {
                continue;
            }
            let suffix = path
                .extension()
                .and_then(|suffix| suffix.to_str())
                .unwrap_or_default();
            match GRAPH_SUFFIXES.contains(&suffix) || mapped.contains(&path.as_path()) {
                true => variant.own.push(path),
                false => variant.shared.push(path),
            }
        }
        variant.own.sort();
        variant.shared.sort();
        Ok(variant)
    }
}

/// The execution provider that a `genai_config.json` asks for first; the CPU's if none.
fn provider(genai_config: &Value, path: &Path) -> Result<&'static str> {
    let options = genai_config.pointer("/model/decoder/session_options/provider_options");
    let first = options
        .and_then(Value::as_array)
        .and_then(|list| list.first())
        .and_then(Value::as_object)
        .and_then(|entry| entry.keys().next());
    let Some(name) = first else {
        return Ok("CPUExecutionProvider");
    };
    let known = PROVIDERS
        .iter()
        .find(|(short, long)| short.eq_ignore_ascii_case(name) || long.eq_ignore_ascii_case(name));
    known.map(|(_, long)| *long).ok_or_else(|| {
        let what = format!("the execution provider `{name}` of `{}`", path.display());
        Error::unsupported(what, "no package can name it")
    })
}

/// Puts files into `shared_assets` of a package, unless the same are there; gives the hash of the whole.
fn share(files: &[PathBuf], package: &Path) -> Result<Option<String>> {
    if files.is_empty() {
        return Ok(None);
    }
    let mut lines = BTreeMap::new();
    for file in files {
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        lines.insert(format!("{}  {name}\n", hex(&fsio::read(file)?)), file);
    }
    let hash = hex(lines.keys().map(String::as_str).collect::<String>().as_bytes());
    let folder = package.join("shared_assets").join(format!("sha256-{hash}"));
    if !folder.is_dir() {
        fsio::create_dir(&folder)?;
        for file in files {
            fsio::link_or_copy(file, &folder.join(file.file_name().unwrap_or_default()))?;
        }
    }
    Ok(Some(hash))
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use olive_core::{CancelToken, HfModel, NoProgress};

    use super::*;
    use crate::{BuilderOptions, Precision, build_model_folder};

    fn build(folder: &Path, precision: Precision) {
        let model = HfModel::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-phi3")).unwrap();
        let options = BuilderOptions::with_precision(precision);
        build_model_folder(
            &model,
            None,
            &options,
            folder,
            &NoProgress,
            &CancelToken::default(),
        )
        .unwrap();
    }

    #[test]
    fn variants_share_their_tokenizer_and_keep_their_graphs() {
        let scratch = tempfile::tempdir().unwrap();
        let (small, large) = (scratch.path().join("small"), scratch.path().join("large"));
        build(&small.join("model"), Precision::Int4);
        build(&large, Precision::Fp32);
        let info = PackageInfo {
            model_name: None,
            model_version: "1.0",
        };
        let sources = [small.clone(), large.clone()];
        let package = write_ort_package(&sources, &scratch.path().join("tones"), info).unwrap();
        assert!(package.ends_with("tones.ortpackage"));
        let manifest: Value = fsio::read_json(package.join("manifest.json")).unwrap();
        assert_eq!(
            (&manifest["package_name"], &manifest["components"]["model"]),
            (&"tones".into(), &"models/model".into())
        );
        let component: Value = fsio::read_json(package.join("models/model/component.json")).unwrap();
        assert_eq!(component["variants"]["small"]["ep"], "CPUExecutionProvider");
        let assets = std::fs::read_dir(package.join("shared_assets")).unwrap().count();
        assert_eq!(assets, 1, "both have the same tokenizer");
        for (variant, source) in [("small", small.join("model")), ("large", large)] {
            let folder = package.join("models/model").join(variant);
            let config: Value = fsio::read_json(folder.join("genai_config.json")).unwrap();
            let asset = config["model"]["tokenizer_dir"]
                .as_str()
                .unwrap()
                .replace(':', "-");
            assert!(
                package
                    .join("shared_assets")
                    .join(asset)
                    .join("tokenizer.json")
                    .is_file()
            );
            let read = |folder: &Path| std::fs::read(folder.join("model.onnx.data")).unwrap();
            assert_eq!(read(&folder), read(&source));
        }
        let again = write_ort_package(&sources, &package, info)
            .unwrap_err()
            .to_string();
        assert!(again.contains("an empty folder or none"), "{again}");
        let twice = write_ort_package(&[small.clone(), small], &scratch.path().join("x"), info);
        assert!(twice.unwrap_err().to_string().contains("two of the name `small`"));
        let none = write_ort_package(&[scratch.path().join("absent")], &scratch.path().join("x"), info);
        assert!(none.is_err());
    }
}
