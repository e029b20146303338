//! A folder that appears whole: filled under a hidden name beside its own, then renamed.

use std::path::{Path, PathBuf};

use olive_core::{Error, Result, fsio};

/// A folder being filled. Dropped without [`Staging::finish`], it is removed.
pub struct Staging {
    target: PathBuf,
    path: PathBuf,
    kept: bool,
}

impl Staging {
    /// Makes the hidden folder for `target`; those that killed runs left are removed.
    pub fn begin(target: &Path) -> Result<Self> {
        remove_abandoned(target);
        let path = fsio::temporary_name(target);
        let _ = std::fs::remove_dir_all(&path);
        fsio::create_dir(&path)?;
        Ok(Self {
            target: target.to_path_buf(),
            path,
            kept: false,
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the folder its name. An older one is moved aside first and removed afterwards.
    pub fn finish(mut self) -> Result<()> {
        let mut old = None;
        if self.target.exists() {
            let aside = self.path.with_extension("old.tmp");
            let _ = std::fs::remove_dir_all(&aside);
            fsio::rename(&self.target, &aside)?;
            old = Some(aside);
        }
        if let Err(error) = fsio::rename(&self.path, &self.target) {
            if let Some(aside) = &old {
                fsio::rename(aside, &self.target)?;
            }
            return Err(error);
        }
        self.kept = true;
        match old {
            Some(aside) => std::fs::remove_dir_all(&aside).map_err(Error::io("remove", &aside)),
            None => Ok(()),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes hidden folders for `target` of processes that are gone.
fn remove_abandoned(target: &Path) {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Ok(entries) = std::fs::read_dir(parent.unwrap_or(Path::new("."))) else {
        return;
    };
    let prefix = format!(".{}.", target.file_name().unwrap_or_default().to_string_lossy());
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let inner = name
            .strip_prefix(&prefix)
            .and_then(|rest| rest.strip_suffix(".tmp"));
        let process = inner.map(|inner| inner.trim_end_matches(".old"));
        let Some(process) = process.and_then(|text| text.parse::<u32>().ok()) else {
            continue;
        };
        let alive = Path::new("/proc").is_dir() && Path::new("/proc").join(process.to_string()).exists();
        if !alive && entry.path().is_dir() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_replaced_as_a_whole_and_nothing_else_is_left() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        for content in ["one", "two"] {
            // What a killed process left; no process has this number.
            std::fs::create_dir(root.path().join(".model.4294967295.tmp")).unwrap();
            let staging = Staging::begin(&target).unwrap();
            std::fs::write(staging.path().join(content), content).unwrap();
            staging.finish().unwrap();
            assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1);
            assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
        }
        drop(Staging::begin(&target).unwrap());
        assert!(target.join("two").is_file());
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
