//! Files from outside that are broken or mean harm: an error each, and nothing read outside the folder.

use std::path::Path;

use olive_onnx::OnnxFolder;
use olive_onnx::adapter::read_adapter;
use olive_onnx::serde::{decode_model, read_model};

use crate::golden;

/// `model.onnx` of a golden folder with some bytes replaced, in a folder of its own.
fn open_with(change: impl Fn(Vec<u8>) -> Vec<u8>, data: Option<usize>) -> Option<String> {
    let source = golden::genai()?.join("llama/int4-cpu");
    let folder = tempfile::tempdir().unwrap();
    let bytes = change(std::fs::read(source.join("model.onnx")).unwrap());
    std::fs::write(folder.path().join("model.onnx"), bytes).unwrap();
    let mut weights = std::fs::read(source.join("model.onnx.data")).unwrap();
    weights.truncate(data.unwrap_or(weights.len()));
    std::fs::write(folder.path().join("model.onnx.data"), weights).unwrap();
    Some(match OnnxFolder::open(folder.path()) {
        Ok(_) => "opened".to_owned(),
        Err(error) => error.to_string(),
    })
}

/// Replaces every occurrence of `from` by `to`, of the same length.
fn replace(mut bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    for at in 0..bytes.len().saturating_sub(from.len()) {
        if bytes[at..].starts_with(from.as_bytes()) {
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        }
    }
    bytes
}

#[test]
fn external_data_stay_inside_their_file_and_folder() {
    let Some(opened) = open_with(|bytes| bytes, None) else {
        return;
    };
    assert_eq!(opened, "opened");
    let refused = |from: &str, to: &str| open_with(|bytes| replace(bytes, from, to), None).unwrap();
    assert!(refused("model.onnx.data", "/etc/./././host").contains("inside it"));
    assert!(refused("model.onnx.data", "../../../passwd").contains("inside it"));
    assert!(refused("model.onnx.data", "no.such.file.xx").contains("no.such.file.xx"));
    assert!(refused("928256", "999999").contains("inside its file"));
    assert!(refused("928256", "-28256").contains("`offset`"));
    assert!(refused("524288", "524289").contains("bytes of external data"));
    let truncated = open_with(|bytes| bytes, Some(940_000)).unwrap();
    assert!(truncated.contains("lm_head.MatMul.weight_scales"), "{truncated}");
}

#[test]
fn truncated_and_changed_graphs_are_errors_or_sound() {
    let Some(root) = golden::genai() else { return };
    let source = root.join("phi3/fp32-cpu");
    let bytes = std::fs::read(source.join("model.onnx")).unwrap();
    let path = source.join("model.onnx");
    for keep in (0..bytes.len()).step_by(997) {
        // A cut between two top-level fields leaves a message that still parses.
        if let Ok(model) = decode_model(&bytes[..keep], &path, Some(&source)) {
            assert!(model.graph.nodes.len() < 36, "{keep}");
        }
    }
    for place in (0..bytes.len()).step_by(211) {
        let mut changed = bytes.clone();
        changed[place] ^= 0x5a;
        if let Ok(model) = decode_model(&changed, &path, Some(&source)) {
            let _ = model.graph.check();
        }
    }
    assert!(decode_model(&bytes, &path, None).is_err());
    assert!(decode_model(b"", &path, None).is_err());
    assert!(read_model(Path::new("no/such/model.onnx")).is_err());
}

#[test]
fn deep_nesting_does_not_end_the_stack() {
    // A graph in an attribute of a node in a graph in …: fields 7 (model.graph), 1 (node), 5 (attribute), 6 (graph).
    let mut graph: Vec<u8> = Vec::new();
    let wrap = |field: u8, inner: &[u8]| {
        let mut out = vec![(field << 3) | 2];
        let mut length = inner.len();
        while length >= 0x80 {
            out.push((length as u8 & 0x7f) | 0x80);
            length >>= 7;
        }
        out.push(length as u8);
        out.extend_from_slice(inner);
        out
    };
    for _ in 0..10_000 {
        graph = wrap(1, &wrap(5, &wrap(6, &graph)));
    }
    assert!(decode_model(&wrap(7, &graph), Path::new("x"), None).is_err());
}

#[test]
fn a_foreign_adapter_file_is_refused() {
    let Some(root) = golden::genai() else { return };
    let bytes = std::fs::read(root.join("llama/poem.onnx_adapter")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.onnx_adapter");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        read_adapter(&path)
    };
    assert_eq!(read(&bytes).unwrap().parameters.len(), 28);
    let identifier = replace(bytes.clone(), "TORT", "TART");
    assert!(read(&identifier).unwrap_err().to_string().contains("TORT"));
    for keep in (0..bytes.len()).step_by(503) {
        assert!(read(&bytes[..keep]).is_err(), "{keep}");
    }
    for place in (0..bytes.len()).step_by(89) {
        let mut changed = bytes.clone();
        changed[place] ^= 0xff;
        if let Ok(adapter) = read(&changed) {
            assert!(adapter.parameters.iter().all(|tensor| tensor.bytes().is_ok()));
        }
    }
}
