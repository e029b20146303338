//! Where a command computes.

use olive_core::{Error, Result};

use crate::args::Device;

/// Whether the GPU computes.
///
/// # Errors
/// [`Error::Config`] for a device that this build does not compute on.
pub fn on_gpu(device: Device) -> Result<bool> {
    let expected = match device {
        Device::Cpu => return Ok(false),
        Device::Gpu if cfg!(feature = "cuda") => return Ok(true),
        Device::Gpu => "cpu; this olive was built without the feature `cuda`",
        Device::Npu => "cpu or gpu",
    };
    let found = format!("`{}`", format!("{device:?}").to_lowercase());
    Err(Error::config("command line", "--device", expected, found))
}
