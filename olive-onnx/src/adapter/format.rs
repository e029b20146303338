//! The `.onnx_adapter` file of ONNX Runtime: a FlatBuffer with identifier `TORT`.
//!
//! ```text
//! table Parameter { name:string; dims:[int64]; data_type:int32; raw_data:[uint8] (aligned to 8); }
//! table Adapter   { format_version:int; adapter_version:int; model_version:int; parameters:[Parameter]; }
//! ```
//! `data_type` has the numbers of ONNX. Files end at 2 GiB, as all FlatBuffers do.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use olive_core::{Error, Result, fsio};

use super::flat::{Flat, Table};
use crate::ir::{OnnxType, Tensor};
use crate::mmap::MappedFile;

/// The version of the format; the only one there is.
const FORMAT_VERSION: i32 = 1;
const IDENTIFIER: &[u8; 4] = b"TORT";
/// Longest name and highest rank that are believed.
const MAX_NAME: usize = 4096;
const MAX_RANK: usize = 8;

/// Named tensors that are given to a graph's optional inputs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterFile {
    /// The adapter's own version; free to use.
    pub adapter_version: i32,
    /// The version of the model it was made for; free to use.
    pub model_version: i32,
    /// The tensors, in the file's order. Names are unique.
    pub parameters: Vec<Tensor>,
}

impl AdapterFile {
    /// The tensor of this name.
    pub fn parameter(&self, name: &str) -> Option<&Tensor> {
        self.parameters.iter().find(|tensor| tensor.name == name)
    }
}

/// Reads an adapter; its tensors are mapped, not copied.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] if it is not an adapter, is truncated, has another format version or a name twice;
/// [`Error::Tensor`] if a tensor's bytes do not fit its type and shape.
pub fn read_adapter(path: &Path) -> Result<AdapterFile> {
    let file = Arc::new(MappedFile::open(path)?);
    let flat = Flat(&file);
    let broken = |what: &str| Error::file(path, "an ONNX adapter", format!("{what} ({} bytes)", file.len()));
    if flat.identifier().as_ref() != Some(IDENTIFIER) {
        return Err(broken("a file without the identifier `TORT`"));
    }
    let root = flat.root().ok_or_else(|| broken("a broken root table"))?;
    let version = |index| {
        flat.int_field(root, index)
            .ok_or_else(|| broken("a broken version field"))
    };
    let format_version = version(0)?;
    if format_version != FORMAT_VERSION {
        let expected = format!("format version {FORMAT_VERSION}");
        return Err(Error::file(path, expected, format_version.to_string()));
    }
    let (count, first) = flat
        .tables_field(root, 3)
        .ok_or_else(|| broken("a broken list of parameters"))?;
    let mut names = HashSet::new();
    let mut parameters = Vec::new();
    for index in 0..count {
        let table = flat.table_at(first, index);
        let parameter = table.and_then(|table| read_parameter(flat, table));
        let parameter = parameter.ok_or_else(|| broken(&format!("a broken parameter {index}")))?;
        let tensor = parameter.into_tensor(path, &file)?;
        if !names.insert(tensor.name.clone()) {
            return Err(broken(&format!("parameter `{}` twice", tensor.name)));
        }
        parameters.push(tensor);
    }
    Ok(AdapterFile {
        adapter_version: version(1)?,
        model_version: version(2)?,
        parameters,
    })
}

struct RawParameter {
    name: String,
    dims: Vec<i64>,
    data_type: i32,
    data: std::ops::Range<usize>,
}

fn read_parameter(flat: Flat<'_>, table: Table) -> Option<RawParameter> {
    let name = flat
        .text_field(table, 0)
        .filter(|name| !name.is_empty() && name.len() <= MAX_NAME)?;
    Some(RawParameter {
        name: name.to_owned(),
        dims: flat.longs_field(table, 1, MAX_RANK)?,
        data_type: flat.int_field(table, 2)?,
        data: flat.bytes_field(table, 3)?,
    })
}

impl RawParameter {
    fn into_tensor(self, path: &Path, file: &Arc<MappedFile>) -> Result<Tensor> {
        let dtype = OnnxType::from_code(self.data_type).ok_or_else(|| {
            let found = format!("number {} for `{}`", self.data_type, self.name);
            Error::file(path, "element types that olive reads", found)
        })?;
        let shape: Option<Vec<usize>> = self.dims.iter().map(|size| usize::try_from(*size).ok()).collect();
        let shape = shape.ok_or_else(|| {
            Error::tensor(
                &self.name,
                "sizes that are not negative",
                format!("{:?}", self.dims),
            )
        })?;
        Tensor::mapped(self.name, dtype, shape, file.clone(), self.data)
    }
}

/// Where the parts of a parameter go.
struct Place {
    name: usize,
    dims: usize,
    data: usize,
}

/// Bytes of the list of fields that both tables share in size: its own length, the table's, four fields.
const FIELDS_LEN: usize = 12;
/// Bytes of a table: the way back to its fields, and four fields of four bytes.
const TABLE_LEN: usize = 20;

/// Writes an adapter, whole; tensors are asked for one at a time. Returns its bytes.
///
/// # Errors
/// [`Error::Io`]; [`Error::Unsupported`] beyond 2 GiB; errors of the tensors' producers.
pub fn write_adapter(path: &Path, adapter: &AdapterFile) -> Result<u64> {
    let count = adapter.parameters.len();
    // Identifier, list of fields, table, and list of parameters come first; the parameter tables follow.
    let fields = 8;
    let root = fields + FIELDS_LEN;
    let list = root + TABLE_LEN;
    let tables = list + 4 + 4 * count;
    let mut end = tables + TABLE_LEN * count;
    let mut places = Vec::with_capacity(count);
    for tensor in &adapter.parameters {
        let name = end;
        let dims = vector_start(name + 4 + tensor.name.len() + 1);
        let data = vector_start(dims + 4 + 8 * tensor.shape().len());
        end = (data + 4 + tensor.byte_len()).next_multiple_of(4);
        places.push(Place { name, dims, data });
    }
    if i32::try_from(end).is_err() {
        let what = format!("an adapter of {end} bytes");
        return Err(Error::unsupported(what, "adapter files end at 2 GiB"));
    }
    let mut head = Vec::with_capacity(tables + TABLE_LEN * count);
    offset(&mut head, root);
    head.extend_from_slice(IDENTIFIER);
    for number in [FIELDS_LEN, TABLE_LEN, 4, 8, 12, 16] {
        head.extend_from_slice(&(number as u16).to_le_bytes());
    }
    let back = (head.len() - fields) as i32;
    for number in [
        back,
        FORMAT_VERSION,
        adapter.adapter_version,
        adapter.model_version,
    ] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    offset(&mut head, list);
    head.extend_from_slice(&(count as u32).to_le_bytes());
    for index in 0..count {
        offset(&mut head, tables + TABLE_LEN * index);
    }
    for (tensor, place) in adapter.parameters.iter().zip(&places) {
        let back = (head.len() - fields) as i32;
        head.extend_from_slice(&back.to_le_bytes());
        offset(&mut head, place.name);
        offset(&mut head, place.dims);
        head.extend_from_slice(&tensor.dtype().code().to_le_bytes());
        offset(&mut head, place.data);
    }
    let temporary = fsio::temporary_name(path);
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fsio::create_dir(parent)?;
    }
    let result = write_body(&temporary, &head, &adapter.parameters, &places, end)
        .and_then(|()| fsio::rename(&temporary, path));
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    result.map(|()| end as u64)
}

fn write_body(path: &Path, head: &[u8], tensors: &[Tensor], places: &[Place], end: usize) -> Result<()> {
    let mut out = Out {
        path,
        file: BufWriter::new(File::create(path).map_err(Error::io("create", path))?),
        position: 0,
    };
    out.write(head)?;
    for (tensor, place) in tensors.iter().zip(places) {
        out.vector(place.name, tensor.name.len(), tensor.name.as_bytes())?;
        let dims: Vec<u8> = tensor
            .shape()
            .iter()
            .flat_map(|size| (*size as i64).to_le_bytes())
            .collect();
        out.vector(place.dims, tensor.shape().len(), &dims)?;
        let bytes = tensor.bytes()?;
        out.vector(place.data, bytes.len(), &bytes)?;
    }
    out.pad_to(end)?;
    let file = out
        .file
        .into_inner()
        .map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("sync", path))
}

struct Out<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    position: usize,
}

impl Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.position += bytes.len();
        self.file.write_all(bytes).map_err(Error::io("write", self.path))
    }

    fn pad_to(&mut self, position: usize) -> Result<()> {
        let gap = position.saturating_sub(self.position);
        self.write(&[0; 16][..gap.min(16)])
    }

    fn vector(&mut self, position: usize, count: usize, bytes: &[u8]) -> Result<()> {
        self.pad_to(position)?;
        self.write(&(count as u32).to_le_bytes())?;
        self.write(bytes)
    }
}

/// The first place from `position` on whose elements, after the count of four bytes, begin at a multiple of 8.
fn vector_start(position: usize) -> usize {
    (position + 4).next_multiple_of(8) - 4
}

/// Appends the distance from here to `target`.
fn offset(bytes: &mut Vec<u8>, target: usize) {
    let distance = target - bytes.len();
    bytes.extend_from_slice(&(distance as u32).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> AdapterFile {
        let tensor = |name: &str, shape: [usize; 2]| {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| i as f32 - 3.5).collect();
            Tensor::floats(name, shape, &values).unwrap()
        };
        AdapterFile {
            adapter_version: 3,
            model_version: -1,
            parameters: vec![
                tensor("a.lora_A", [3, 2]),
                tensor("a.lora_B.w", [2, 5]),
                tensor("é", [0, 7]),
            ],
        }
    }

    fn write(adapter: &AdapterFile) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.onnx_adapter");
        let length = write_adapter(&path, adapter).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(length, bytes.len() as u64);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<AdapterFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.onnx_adapter");
        std::fs::write(&path, bytes).unwrap();
        read_adapter(&path)
    }

    #[test]
    fn what_is_written_is_read() {
        for adapter in [sample(), AdapterFile::default()] {
            assert_eq!(read(&write(&adapter)).unwrap(), adapter);
        }
    }

    #[test]
    fn data_begin_at_multiples_of_eight() {
        let bytes = write(&sample());
        let data = (-3.5f32).to_le_bytes().to_vec();
        let places: Vec<usize> = (0..bytes.len() - 4)
            .filter(|i| bytes[*i..*i + 4] == data)
            .collect();
        assert_eq!(places.len(), 2);
        assert!(places.iter().all(|place| place.is_multiple_of(8)));
    }

    #[test]
    fn every_truncation_and_a_repeated_name_are_refused() {
        let bytes = write(&sample());
        for keep in 0..bytes.len() - 4 {
            assert!(read(&bytes[..keep]).is_err(), "{keep} bytes");
        }
        let mut twice = sample();
        twice.parameters.push(twice.parameters[0].clone());
        assert!(read(&write(&twice)).unwrap_err().to_string().contains("twice"));
    }

    proptest! {
        #[test]
        fn changed_bytes_never_panic(place in 0usize..400, value in any::<u8>()) {
            let mut bytes = write(&sample());
            let place = place % bytes.len();
            bytes[place] = value;
            let _ = read(&bytes);
        }
    }
}
