//! `olive shared-cache`: what a cache folder holds, and clearing it.

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use olive_core::workflow::cache::{CachedRun, cached_runs, remove_runs};
use olive_core::{Error, Result};
use serde_json::json;

use crate::args::SharedCacheArgs;
use crate::output;

/// Where workflows keep their cache unless they say otherwise.
const DEFAULT_CACHE: &str = ".olive-cache";

/// Runs the command.
///
/// # Errors
/// [`Error::Unsupported`] for a remote cache; [`Error::Config`] if it is not said what is removed; [`Error::Io`].
pub fn run(args: &SharedCacheArgs) -> Result<()> {
    if let (Some(account), Some(container)) = (&args.account, &args.container) {
        return Err(Error::unsupported(
            format!("the remote cache `{container}` of the Azure account `{account}`"),
            "this program keeps its cache in a folder; name it with --cache_dir",
        ));
    }
    let folder = match &args.cache_dir {
        Some(folder) => folder.clone(),
        None => std::env::var_os("OLIVE_CACHE_DIR").map_or_else(|| DEFAULT_CACHE.into(), PathBuf::from),
    };
    let runs = cached_runs(&folder)?;
    match args.delete {
        false => list(args, &folder, &runs),
        true => delete(args, &folder, runs),
    }
}

fn list(args: &SharedCacheArgs, folder: &Path, runs: &[CachedRun]) -> Result<()> {
    let bytes: u64 = runs.iter().map(|run| run.bytes).sum();
    if args.json {
        let listed: Vec<_> = runs
            .iter()
            .map(|run| {
                json!({"workflow": run.workflow, "id": run.id, "pass": run.pass,
                    "finished": run.finished, "bytes": run.bytes})
            })
            .collect();
        return output::json(&json!({"cache_dir": folder, "bytes": bytes, "runs": listed}));
    }
    for run in runs {
        let pass = run.pass.as_deref().unwrap_or("(unfinished)");
        output::line(&format!(
            "{}  {}  {:>12}  {pass}",
            run.workflow, run.id, run.bytes
        ))?;
    }
    let count = runs.len();
    output::line(&format!("{count} runs, {bytes} bytes in {}", folder.display()))
}

fn delete(args: &SharedCacheArgs, folder: &Path, mut runs: Vec<CachedRun>) -> Result<()> {
    match (&args.model_hash, args.all) {
        (Some(hash), _) => {
            runs.retain(|run| !hash.is_empty() && run.id.starts_with(hash.as_str()));
            if runs.is_empty() {
                let expected = format!("a run in `{}`", folder.display());
                return Err(Error::config(
                    "command line",
                    "--model_hash",
                    expected,
                    format!("`{hash}`"),
                ));
            }
        }
        (None, true) => {}
        (None, false) => {
            let expected = "what to remove, by --all or --model_hash";
            return Err(Error::config("command line", "--delete", expected, "neither"));
        }
    }
    if !args.yes && !confirmed(runs.len())? {
        return output::line("Nothing was removed");
    }
    let total = runs.len();
    let busy = remove_runs(&runs)?;
    for id in &busy {
        tracing::warn!("{id} is being computed by another process and stays");
    }
    output::line(&format!("{} runs removed", total - busy.len()))
}

/// Asks at the terminal; without one the answer is no.
fn confirmed(count: usize) -> Result<bool> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Error::config(
            "command line",
            "--yes",
            "the flag, as nobody can be asked",
            "nothing",
        ));
    }
    output::text(&format!("Remove {count} runs? [y/N] "))?;
    let mut answer = String::new();
    stdin
        .lock()
        .read_line(&mut answer)
        .map_err(Error::io("read", "stdin"))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
