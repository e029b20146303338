//! Systems and their accelerators.

use serde_json::Value;

use super::{Object, Reader, list, text};
use crate::error::{Error, Result};
use crate::workflow::schema::config::{Accelerator, Reference, System, SystemKind};
use crate::workflow::schema::shape::{brief, join};

impl Reader<'_> {
    pub(in crate::workflow) fn system(&self, value: &Value, path: &str) -> Result<System> {
        let empty = Object::new();
        let system = value.as_object().unwrap_or(&empty);
        let kind =
            text(system, "type").ok_or_else(|| self.missing(&join(path, "type"), "the type of a system"))?;
        let kind = match kind.to_ascii_lowercase().as_str() {
            "pythonenvironment" | "isolatedort" => SystemKind::PythonEnvironment,
            "docker" => SystemKind::Docker,
            "azureml" => SystemKind::AzureMl,
            _ => SystemKind::Local,
        };
        let accelerators = list(system, "accelerators");
        let accelerator = match accelerators.as_slice() {
            [] => Accelerator::default(),
            [one] => self.accelerator(one, &format!("{path}.accelerators[0]"))?,
            several => {
                let found = format!("{}", several.len());
                let key = join(path, "accelerators");
                return Err(Error::config(self.origin, key, "one accelerator", found));
            }
        };
        let mut settings = system.clone();
        settings.shift_remove("type");
        settings.shift_remove("accelerators");
        Ok(System {
            kind,
            accelerator,
            settings,
        })
    }

    fn accelerator(&self, value: &Value, path: &str) -> Result<Accelerator> {
        let empty = Object::new();
        let accelerator = value.as_object().unwrap_or(&empty);
        let device = text(accelerator, "device").map(|device| device.to_ascii_lowercase());
        let key = join(path, "execution_providers");
        let providers = list(accelerator, "execution_providers");
        let name = |value: &Value| match value {
            Value::Array(pair) => pair.first().and_then(Value::as_str).map(str::to_owned),
            value => value.as_str().map(str::to_owned),
        };
        let provider = match providers.as_slice() {
            [] => None,
            [one] => name(one),
            _ => {
                let found = brief(&Value::Array(providers));
                return Err(Error::config(self.origin, key, "one execution provider", found));
            }
        };
        let known = match &provider {
            None => None,
            Some(name) => Some(find_provider(name).ok_or_else(|| {
                let names = PROVIDERS
                    .iter()
                    .map(|(name, _)| *name)
                    .collect::<Vec<_>>()
                    .join(", ");
                Error::config(self.origin, &key, format!("one of {names}"), format!("`{name}`"))
            })?),
        };
        let (device, provider) = match (device, known) {
            (Some(device), Some((name, devices))) => {
                let plain = device.trim_end_matches("_spr");
                if !devices.contains(&plain) {
                    let expected = format!("a provider for the device `{device}`");
                    return Err(Error::config(self.origin, key, expected, format!("`{name}`")));
                }
                (device, name)
            }
            (None, Some((name, devices))) => (devices[0].to_owned(), name),
            (Some(device), None) => {
                let provider = match device.as_str() {
                    "gpu" => "CUDAExecutionProvider",
                    "npu" => "QNNExecutionProvider",
                    _ => "CPUExecutionProvider",
                };
                (device, provider)
            }
            (None, None) => return Ok(Accelerator::default()),
        };
        Ok(Accelerator {
            device,
            provider: provider.to_owned(),
        })
    }

    pub(super) fn system_reference(
        &self,
        value: Option<&Value>,
        path: &str,
    ) -> Result<Option<Reference<System>>> {
        Ok(match value {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(Reference::Name(name.clone())),
            Some(value) => Some(Reference::Inline(Box::new(self.system(value, path)?))),
        })
    }
}

/// Execution providers and the devices that they drive, the usual one first.
const PROVIDERS: &[(&str, &[&str])] = &[
    ("CPUExecutionProvider", &["cpu", "gpu", "npu"]),
    ("CUDAExecutionProvider", &["gpu"]),
    ("DmlExecutionProvider", &["gpu", "npu"]),
    ("JsExecutionProvider", &["gpu"]),
    ("MIGraphXExecutionProvider", &["gpu"]),
    ("NvTensorRTRTXExecutionProvider", &["gpu"]),
    ("OpenVINOExecutionProvider", &["cpu", "gpu", "npu"]),
    ("QNNExecutionProvider", &["npu", "gpu", "cpu"]),
    ("ROCMExecutionProvider", &["gpu"]),
    ("TensorrtExecutionProvider", &["gpu"]),
    ("VitisAIExecutionProvider", &["npu"]),
    ("WebGpuExecutionProvider", &["gpu"]),
];

fn find_provider(name: &str) -> Option<(&'static str, &'static [&'static str])> {
    PROVIDERS
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .copied()
}
