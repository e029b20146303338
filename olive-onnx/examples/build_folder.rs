//! Builds a model folder from a checkpoint, with the places and the file of an adapter if one is given.
//!
//! ```text
//! build_folder CHECKPOINT OUTPUT PRECISION [PROVIDER] [adapter=FOLDER] [OPTION=VALUE …]
//! ```
//! PRECISION is `fp32`, `fp16`, `bf16`, `int8` or `int4`; PROVIDER `cpu`, `cuda`, `dml` or `webgpu`; options are those of
//! onnxruntime-genai's builder.

use std::path::{Path, PathBuf};

use olive_core::{CancelToken, HfModel, LogProgress};
use olive_onnx::{BuilderOptions, Precision, build_model_folder};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, output, precision, rest @ ..] = arguments.as_slice() else {
        return Err("expected CHECKPOINT OUTPUT PRECISION [PROVIDER] [OPTION=VALUE …]".into());
    };
    let precision = Precision::from_name(precision).ok_or("an unknown precision")?;
    let mut options = BuilderOptions::with_precision(precision);
    let mut adapter = None;
    for argument in rest {
        match argument.split_once('=') {
            None => options.set_provider(argument)?,
            Some(("adapter", folder)) => adapter = Some(PathBuf::from(folder)),
            Some((key, value)) => options.set(key, &value.into())?,
        }
    }
    let report = build_model_folder(
        &HfModel::open(source)?,
        adapter.as_deref(),
        &options,
        Path::new(output),
        &LogProgress::default(),
        &CancelToken::default(),
    )?;
    println!("{report:#?}");
    Ok(())
}
