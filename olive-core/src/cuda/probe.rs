//! Whether this machine can run CUDA at all: asked before Burn is, which panics where something is missing.

use std::path::PathBuf;

use crate::error::{Error, Result};

/// What an error calls the thing that was asked for.
const WHAT: &str = "--device gpu";

/// Checks the driver, a device, the run-time compiler and its headers, in this order.
///
/// # Errors
/// [`Error::Unsupported`] saying what is missing and where it was looked for.
pub fn check() -> Result<()> {
    let missing = |reason: String| Err(Error::unsupported(WHAT, reason));
    // SAFETY: opening a library runs its initialisers; these are NVIDIA's own and have none with an effect.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return missing("no NVIDIA driver was found: `libcuda.so.1` is not on the loader's path".to_owned());
    }
    let no_device = cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE;
    if let Err(error) = cudarc::driver::result::init() {
        if error.0 == no_device {
            return missing(no_gpu());
        }
        return missing(format!("the NVIDIA driver does not start: {error:?}"));
    }
    match cudarc::driver::result::device::get_count() {
        Ok(0) => return missing(no_gpu()),
        Ok(_) => {}
        Err(error) => return missing(format!("the NVIDIA driver cannot list its GPUs: {error:?}")),
    }
    // SAFETY: as above.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return missing(
            "CUDA's run-time compiler was not found: put the folder of `libnvrtc.so` (a CUDA toolkit's `lib64`) on \
             LD_LIBRARY_PATH"
                .to_owned(),
        );
    }
    let headers = toolkit().map(|toolkit| toolkit.join("include/cuda_runtime.h"));
    match headers {
        Some(headers) if headers.is_file() => Ok(()),
        found => missing(format!(
            "CUDA's headers were not found{}: set CUDA_PATH to a CUDA toolkit",
            found.map_or(String::new(), |path| format!(" (no `{}`)", path.display()))
        )),
    }
}

/// That there is a driver and no GPU, or none that it may use.
fn no_gpu() -> String {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES");
    let hidden = visible.map_or(String::new(), |own| format!(" (CUDA_VISIBLE_DEVICES is `{own}`)"));
    format!("the NVIDIA driver finds no GPU{hidden}")
}

/// The toolkit that the run-time compiler will take its headers from; the places are CubeCL's.
fn toolkit() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("CUDA_PATH") {
        return Some(path.into());
    }
    ["/usr/local/cuda", "/opt/cuda"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        // On a machine with a GPU there is nothing to see here, and the other tests of this module run.
        if let Err(error) = check() {
            let text = error.to_string();
            let known = ["driver", "compiler", "headers"];
            assert!(
                text.contains("--device gpu") && known.iter().any(|part| text.contains(part)),
                "{text}"
            );
        }
    }
}
