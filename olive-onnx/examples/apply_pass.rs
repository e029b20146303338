//! Applies one pass to an ONNX model folder: `apply_pass <pass> <parameters as JSON> <in> <out>`.
//!
//! Prints whether the pass changed anything the first time, and whether a second run on the result does.

use std::path::Path;
use std::process::ExitCode;

use olive_onnx::passes;
use serde_json::{Map, Value};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, parameters, input, output] = arguments.as_slice() else {
        eprintln!("usage: apply_pass <pass> <parameters as JSON> <in> <out>");
        return ExitCode::from(2);
    };
    match apply(name, parameters, Path::new(input), Path::new(output)) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(inner) = source {
                text = format!("{text}: {inner}");
                source = inner.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn apply(name: &str, parameters: &str, input: &Path, output: &Path) -> olive_core::Result<String> {
    let pass = passes::find(name)?;
    let given: Map<String, Value> =
        serde_json::from_str(parameters).map_err(olive_core::Error::json("parameters"))?;
    let first = pass.run_on_folder(&given, input, output)?;
    if !output.join("model.onnx").is_file() {
        return Ok(format!("changed {} again -", first.changed));
    }
    let mut draft = passes::Draft::open(output)?;
    let second = pass.apply(pass.configure(&given)?.as_ref(), &mut draft)?;
    Ok(format!("changed {} again {}", first.changed, second.changed))
}
