//! The checkpoint that a run is writing, and what is known of its finished parts.
//!
//! ```text
//! <output>/.olive-quantize/manifest.json                   what the run was asked to do
//! <output>/.olive-quantize/result/.model.safetensors.part  the checkpoint, parts of it still empty
//! <output>/.olive-quantize/layer-017.json                  written last: the part is finished and on the disk
//! ```
//!
//! Nothing but the checkpoint is written by a run that takes less than [`INTERVAL`] and is not interrupted.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use olive_core::{Checkpoint, CheckpointWriter, Result, fsio};

use super::layout::{Layout, Part};
use super::run::UniformLinear;
use crate::work::{Manifest, WorkFolder};

/// What a killed process loses at most, besides the part it worked on.
const INTERVAL: Duration = Duration::from_secs(10);

/// The unfinished result of a run.
pub(crate) struct Draft<'a> {
    work: WorkFolder,
    writer: CheckpointWriter,
    manifest: &'a (dyn Fn() -> Result<Manifest> + Sync),
    /// Whether an earlier run of the same manifest has left its bytes.
    resumed: bool,
    journal: Mutex<Journal>,
}

struct Journal {
    /// Finished parts that are not known to be on the disk.
    pending: Vec<(String, Vec<UniformLinear>)>,
    described: bool,
    flushed: Instant,
}

impl<'a> Draft<'a> {
    /// Opens the work folder of `output`; what another request left there is removed. `manifest` is asked for when
    /// there is something to compare it with, or to write down.
    pub fn open(
        output: &Path,
        layout: &Layout,
        manifest: &'a (dyn Fn() -> Result<Manifest> + Sync),
    ) -> Result<Self> {
        let described = WorkFolder::exists(output);
        let work = match described {
            true => WorkFolder::open(output, &manifest()?)?,
            false => WorkFolder::begin(output)?,
        };
        let (writer, resumed) = CheckpointWriter::draft(work.path("result"), &layout.plan())?;
        Ok(Self {
            work,
            writer,
            manifest,
            resumed,
            journal: Mutex::new(Journal {
                pending: Vec::new(),
                described,
                flushed: Instant::now(),
            }),
        })
    }

    /// What is to be written.
    pub fn writer(&self) -> &CheckpointWriter {
        &self.writer
    }

    /// Removes all of it.
    pub fn abandon(self) {
        drop(self.writer);
        self.work.abandon();
    }

    /// What is written so far.
    pub fn reader(&self) -> Result<Checkpoint> {
        self.writer.reader()
    }

    /// What an earlier run found out about a part, if it finished it.
    pub fn finished(&self, part: &Part) -> Result<Option<Vec<UniformLinear>>> {
        if part.targets.is_empty() {
            return Ok(Some(Vec::new()));
        }
        let report = self
            .resumed
            .then(|| fsio::read_json(self.report(&part.name)).ok());
        let report: Option<Vec<UniformLinear>> = report.flatten();
        if report.is_some() {
            for (name, _) in part.plan().tensors {
                self.writer.keep(&name)?;
            }
        }
        Ok(report)
    }

    fn report(&self, part: &str) -> std::path::PathBuf {
        self.work.path(&format!("{part}.json"))
    }

    /// Notes that a part is written.
    pub fn finish_part(&self, part: &Part, reports: &[UniformLinear]) -> Result<()> {
        let due = {
            let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
            journal.pending.push((part.name.clone(), reports.to_vec()));
            journal.flushed.elapsed() >= INTERVAL
        };
        if due { self.flush() } else { Ok(()) }
    }

    /// Makes what is finished so far last.
    pub fn flush(&self) -> Result<()> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        self.writer.sync()?;
        if !journal.described {
            self.work.describe(&(self.manifest)()?)?;
            journal.described = true;
        }
        for (part, reports) in std::mem::take(&mut journal.pending) {
            fsio::write_json(self.report(&part), &reports, 2)?;
        }
        journal.flushed = Instant::now();
        Ok(())
    }

    /// Gives the checkpoint its names; the work folder holds it under `result`.
    pub fn finish(self) -> Result<WorkFolder> {
        self.writer.finish()?;
        Ok(self.work)
    }
}
