//! Packing results: a zip file of the best models, or a Dockerfile around the best one.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::session::{Node, Session};
use crate::error::{Error, Result};
use crate::fsio;
use crate::workflow::cache::files_below;
use crate::workflow::schema::Packaging;

/// Packs `nodes`, best first, into a file in `folder`.
pub(super) fn pack(
    session: &Session<'_>,
    packaging: &Packaging,
    nodes: &[Node],
    folder: &Path,
) -> Result<PathBuf> {
    if packaging.kind.eq_ignore_ascii_case("dockerfile") {
        let path = folder.join("Dockerfile");
        let text = "FROM scratch\nCOPY model_config.json /olive/model_config.json\nCOPY model /olive/model\n";
        fsio::write(&path, text.as_bytes())?;
        return Ok(path);
    }
    let name = format!("{}.zip", packaging.name);
    let path = fsio::contained(folder, &name)?;
    let temporary = fsio::temporary_name(&path);
    let packed = write_zip(session, nodes, &temporary).and_then(|()| fsio::rename(&temporary, &path));
    if packed.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    packed?;
    Ok(path)
}

fn write_zip(session: &Session<'_>, nodes: &[Node], path: &Path) -> Result<()> {
    let failed = |e: zip::result::ZipError| Error::stage::<zip::result::ZipError>("zip packaging")(e);
    let file = File::create(path).map_err(Error::io("create", path))?;
    let mut zip = ZipWriter::new(file);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(true);
    let accelerator = session.pipeline.target.value.accelerator.to_string();
    let most = session.pipeline.search.as_ref().and_then(|s| s.output_model_num);
    let mut ranks = Vec::new();
    for (index, node) in nodes.iter().take(most.unwrap_or(usize::MAX)).enumerate() {
        let rank = index + 1;
        let base = format!("CandidateModels/{accelerator}/BestCandidateModel_{rank}");
        let model = node
            .path
            .parent()
            .filter(|_| node.path.is_file())
            .unwrap_or(&node.path);
        for (folder, below) in [(Some(model), "model"), (node.adapter.as_deref(), "adapter")] {
            let Some(folder) = folder else { continue };
            for source in files_below(folder)? {
                let name = source
                    .strip_prefix(folder)
                    .unwrap_or(&source)
                    .to_string_lossy()
                    .into_owned();
                zip.start_file(format!("{base}/{below}/{name}"), options)
                    .map_err(failed)?;
                let mut reader = File::open(&source).map_err(Error::io("open", &source))?;
                std::io::copy(&mut reader, &mut zip).map_err(Error::io("pack", &source))?;
            }
        }
        let metrics = session.footprint.metrics(&node.id).cloned().unwrap_or_default();
        let about = session.footprint.nodes().iter().find(|n| n.model_id == node.id);
        let config = about.map_or(
            Value::Null,
            |n| json!({"type": n.from_pass, "config": n.pass_run_config}),
        );
        let info = json!({"model_id": node.id, "accelerator": accelerator, "rank": rank});
        let inference = json!({"execution_provider": session.pipeline.target.value.accelerator.provider});
        for (name, value) in [
            ("metrics.json", json!(metrics)),
            ("configurations.json", config),
            ("model_info.json", info),
            ("inference_config.json", inference),
        ] {
            write_entry(&mut zip, options, &format!("{base}/{name}"), &value, path)?;
        }
        ranks.push(json!({"rank": rank, "model_id": node.id, "model_path": base, "metrics": metrics}));
    }
    write_entry(
        &mut zip,
        options,
        "CandidateModels/models_rank.json",
        &Value::Array(ranks),
        path,
    )?;
    let file = zip.finish().map_err(failed)?;
    file.sync_all().map_err(Error::io("sync", path))
}

fn write_entry(
    zip: &mut ZipWriter<File>,
    options: SimpleFileOptions,
    name: &str,
    value: &Value,
    path: &Path,
) -> Result<()> {
    zip.start_file(name, options)
        .map_err(Error::stage("zip packaging"))?;
    let text = serde_json::to_vec_pretty(value).map_err(Error::json(path))?;
    zip.write_all(&text).map_err(Error::io("write", path))
}
