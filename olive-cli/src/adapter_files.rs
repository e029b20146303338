//! Adapter files of other formats than ONNX Runtime's: safetensors, numpy's `.npz`, PyTorch's `.pt`.

use std::io::Write;
use std::path::{Path, PathBuf};

use olive_core::checkpoint::write_file;
use olive_core::{DType, Error, Result, TensorInfo, fsio};
use olive_onnx::adapter::AdapterFile;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::args::AdapterFormat;

/// One tensor, as bytes.
struct Entry {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The path with the suffix of the format, added where it is missing.
pub fn with_suffix(path: &Path, format: AdapterFormat) -> PathBuf {
    let suffix = match format {
        AdapterFormat::Pt => "pt",
        AdapterFormat::Numpy => "npz",
        AdapterFormat::Safetensors => "safetensors",
        AdapterFormat::OnnxAdapter => "onnx_adapter",
    };
    let mut path = path.to_path_buf();
    if path.extension().is_none_or(|extension| extension != suffix) {
        path.as_mut_os_string().push(format!(".{suffix}"));
    }
    path
}

/// Writes an adapter in one of these formats, whole.
///
/// # Errors
/// [`Error::Unsupported`] for tensors of another type than float32 and float16; [`Error::Io`].
pub fn write(path: &Path, adapter: &AdapterFile, format: AdapterFormat) -> Result<()> {
    let mut entries = Vec::new();
    for tensor in &adapter.parameters {
        let dtype = tensor
            .dtype()
            .to_core()
            .filter(|dtype| matches!(dtype, DType::F32 | DType::F16));
        let dtype = dtype.ok_or_else(|| {
            Error::unsupported(
                format!("`{}` of type {}", tensor.name, tensor.dtype()),
                "floats are written",
            )
        })?;
        entries.push(Entry {
            name: tensor.name.clone(),
            dtype,
            shape: tensor.shape().to_vec(),
            bytes: tensor.bytes()?.into_owned(),
        });
    }
    match format {
        AdapterFormat::Safetensors => {
            let tensors: Vec<_> = entries
                .into_iter()
                .map(|entry| {
                    (
                        entry.name,
                        TensorInfo {
                            dtype: entry.dtype,
                            shape: entry.shape,
                        },
                        entry.bytes,
                    )
                })
                .collect();
            write_file(path, &tensors)
        }
        AdapterFormat::Numpy => archive(path, entries.iter().map(|e| (format!("{}.npy", e.name), npy(e)))),
        AdapterFormat::Pt => {
            let meta = [
                ("archive/data.pkl".to_owned(), pickle(&entries)),
                ("archive/byteorder".to_owned(), b"little".to_vec()),
                ("archive/version".to_owned(), b"3\n".to_vec()),
            ];
            let data = entries.iter().enumerate();
            let data = data.map(|(index, entry)| (format!("archive/data/{index}"), entry.bytes.clone()));
            archive(path, meta.into_iter().chain(data))
        }
        AdapterFormat::OnnxAdapter => Err(Error::unsupported("this format here", "the converter writes it")),
    }
}

/// A zip file whose entries are stored as they are.
fn archive(path: &Path, entries: impl Iterator<Item = (String, Vec<u8>)>) -> Result<()> {
    let failed = |error: zip::result::ZipError| Error::stage("adapter file")(error);
    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in entries {
        zip.start_file(name, options).map_err(failed)?;
        zip.write_all(&bytes).map_err(Error::io("write", path))?;
    }
    let bytes = zip.finish().map_err(failed)?.into_inner();
    fsio::write(path, &bytes)
}

/// numpy's format, version 1.0: a header whose length makes the data begin at a multiple of 64.
fn npy(entry: &Entry) -> Vec<u8> {
    const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
    let kind = if entry.dtype == DType::F16 { "<f2" } else { "<f4" };
    let mut shape: Vec<String> = entry.shape.iter().map(usize::to_string).collect();
    if shape.len() == 1 {
        shape.push(String::new());
    }
    let mut header = format!(
        "{{'descr': '{kind}', 'fortran_order': False, 'shape': ({}), }}",
        shape.join(", ")
    );
    let padding =
        (MAGIC.len() + 2 + header.len() + 1).next_multiple_of(64) - (MAGIC.len() + 2 + header.len() + 1);
    header.push_str(&" ".repeat(padding));
    header.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(&entry.bytes);
    bytes
}

/// Python's pickle, protocol 2, of a dictionary of tensors, as `torch.save` writes it: storages are persistent ids that
/// name the files beside it.
fn pickle(entries: &[Entry]) -> Vec<u8> {
    const MARK: u8 = b'(';
    const TUPLE: u8 = b't';
    const REDUCE: u8 = b'R';
    let mut out = vec![0x80, 2, b'}', MARK];
    let text = |out: &mut Vec<u8>, text: &str| {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let whole = |out: &mut Vec<u8>, value: usize| {
        out.push(b'J');
        out.extend((value as i32).to_le_bytes());
    };
    let global = |out: &mut Vec<u8>, module: &str, name: &str| {
        out.extend(format!("c{module}\n{name}\n").as_bytes());
    };
    for (index, entry) in entries.iter().enumerate() {
        text(&mut out, &entry.name);
        global(&mut out, "torch._utils", "_rebuild_tensor_v2");
        out.extend([MARK, MARK]);
        text(&mut out, "storage");
        let storage = if entry.dtype == DType::F16 {
            "HalfStorage"
        } else {
            "FloatStorage"
        };
        global(&mut out, "torch", storage);
        text(&mut out, &index.to_string());
        text(&mut out, "cpu");
        whole(&mut out, entry.shape.iter().product());
        out.extend([TUPLE, b'Q']);
        whole(&mut out, 0);
        out.push(MARK);
        for size in &entry.shape {
            whole(&mut out, *size);
        }
        out.extend([TUPLE, MARK]);
        for dim in 0..entry.shape.len() {
            whole(&mut out, entry.shape[dim + 1..].iter().product());
        }
        out.extend([TUPLE, 0x89]);
        global(&mut out, "collections", "OrderedDict");
        out.extend([b')', REDUCE, TUPLE, REDUCE]);
    }
    out.extend(b"u.");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use olive_onnx::ir::Tensor;

    fn adapter() -> AdapterFile {
        AdapterFile {
            parameters: vec![
                Tensor::floats("a", [2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap(),
                Tensor::floats("b", [2], &[-1.0, 0.5]).unwrap(),
            ],
            ..AdapterFile::default()
        }
    }

    #[test]
    fn numpy_arrays_are_aligned_and_stored() {
        let folder = tempfile::tempdir().unwrap();
        let path = with_suffix(&folder.path().join("x"), AdapterFormat::Numpy);
        write(&path, &adapter(), AdapterFormat::Numpy).unwrap();
        let mut zip = zip::ZipArchive::new(std::fs::File::open(&path).unwrap()).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut zip.by_name("b.npy").unwrap(), &mut bytes).unwrap();
        let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        assert_eq!((10 + length) % 64, 0);
        assert!(String::from_utf8_lossy(&bytes[10..10 + length]).contains("'shape': (2, )"));
        assert_eq!(
            bytes[10 + length..],
            [(-1.0_f32).to_le_bytes(), 0.5_f32.to_le_bytes()].concat()
        );
    }

    #[test]
    fn pickles_name_a_file_for_each_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let path = with_suffix(&folder.path().join("x.pt"), AdapterFormat::Pt);
        write(&path, &adapter(), AdapterFormat::Pt).unwrap();
        let mut zip = zip::ZipArchive::new(std::fs::File::open(&path).unwrap()).unwrap();
        assert_eq!(zip.by_name("archive/data/0").unwrap().size(), 24);
        let mut pickle = Vec::new();
        std::io::Read::read_to_end(&mut zip.by_name("archive/data.pkl").unwrap(), &mut pickle).unwrap();
        assert!(pickle.starts_with(&[0x80, 2]) && pickle.ends_with(b"u."));
    }

    #[test]
    fn suffixes_are_added_once() {
        for (given, wanted) in [
            ("conv/travel", "conv/travel.safetensors"),
            ("a.safetensors", "a.safetensors"),
        ] {
            assert_eq!(
                with_suffix(Path::new(given), AdapterFormat::Safetensors),
                Path::new(wanted)
            );
        }
    }
}
