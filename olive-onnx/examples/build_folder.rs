//! Builds a model folder from a checkpoint, with the places and the file of an adapter if one is given.
//!
//! ```text
//! cargo run --release -p olive-onnx --example build_folder -- CHECKPOINT OUTPUT PRECISION [ADAPTER]
//! ```
//! PRECISION is `fp32`, `int4`, or `int4-asym` for blocks with zero points.

use std::path::Path;

use olive_core::{CancelToken, HfModel, LogProgress};
use olive_onnx::{BuilderOptions, Precision, build_model_folder};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (source, output, precision, adapter) = match arguments.as_slice() {
        [source, output, precision] => (source, output, precision, None),
        [source, output, precision, adapter] => (source, output, precision, Some(Path::new(adapter))),
        _ => return Err("expected CHECKPOINT OUTPUT PRECISION [ADAPTER]".into()),
    };
    let mut options = BuilderOptions::with_precision(match precision.as_str() {
        "fp32" => Precision::Fp32,
        "int4" | "int4-asym" => Precision::Int4,
        other => return Err(format!("expected fp32, int4 or int4-asym, found {other}").into()),
    });
    options.is_symmetric = precision != "int4-asym";
    let model = HfModel::open(source)?;
    let progress = LogProgress::default();
    let report = build_model_folder(
        &model,
        adapter,
        &options,
        Path::new(output),
        &progress,
        &CancelToken::default(),
    )?;
    println!("{report:#?}");
    Ok(())
}
