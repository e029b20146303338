//! From the IR to files: the constants first, one at a time, into one data file; the graph last.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::mpsc;

use olive_core::{CancelToken, Error, Progress, Result, fsio};
use prost::Message;

use super::proto::{
    AttributeProto, Dimension, DimensionValue, EXTERNAL, GraphProto, ModelProto, NodeProto, OperatorSetId,
    StringEntry, TensorProto, TensorShape, TensorType, TypeProto, ValueInfoProto, attribute_type,
};
use crate::ir::{Attribute, Dim, Graph, Model, Node, OnnxType, Tensor, ValueInfo};

/// Bytes beyond which whole numbers are data.
const MAX_SHAPE_BYTES: usize = 1024;

/// How a model is written.
pub struct WriteOptions<'a> {
    /// Name of the graph file; the data file is named after it with `.data` appended.
    pub graph_file: &'a str,
    /// Told about each constant.
    pub progress: &'a dyn Progress,
    /// Asked before each constant.
    pub cancel: &'a CancelToken,
}

/// Writes `graph_file` and its data file into `folder`. Initializers go to the data file, in order and
/// without gaps; empty ones, the small whole numbers that shapes follow from, and constants of nodes stay in the graph
/// file. Both files appear whole, the graph file last.
/// Returns the bytes of both.
///
/// # Errors
/// A rule of the graph that is broken; an error of a tensor's producer; [`Error::Io`]; [`Error::Cancelled`]. Nothing
/// carries a final name then.
pub fn write_model(model: &Model, folder: &Path, options: &WriteOptions<'_>) -> Result<u64> {
    model.graph.check()?;
    fsio::create_dir(folder)?;
    let data_file = format!("{}.data", options.graph_file);
    let path = folder.join(&data_file);
    let temporary = fsio::temporary_name(&path);
    let result = write_data(model, &temporary, &data_file, options).and_then(|(tensors, length)| {
        let mut proto = model_proto(model)?;
        if let Some(graph) = &mut proto.graph {
            graph.initializer = tensors;
        }
        let bytes = proto.encode_to_vec();
        fsio::rename(&temporary, &path)?;
        fsio::write(folder.join(options.graph_file), &bytes)?;
        Ok(length + bytes.len() as u64)
    });
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

/// Pieces that wait for the disk while the next one is made.
const WAITING: usize = 2;

/// Writes the constants of the graph to `path`; the messages that say where each is. One thread writes while the others
/// make what comes next.
fn write_data(
    model: &Model,
    path: &Path,
    location: &str,
    options: &WriteOptions<'_>,
) -> Result<(Vec<TensorProto>, u64)> {
    let tensors = &model.graph.initializers;
    options.progress.start("write weights", tensors.len() as u64);
    let file = File::create(path).map_err(Error::io("create", path))?;
    let (sender, receiver) = mpsc::sync_channel::<Cow<'_, [u8]>>(WAITING);
    let made = std::thread::scope(|scope| {
        let writer = scope.spawn(move || write_pieces(file, path, receiver));
        let made = make_data(tensors, location, options, sender);
        let written = writer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // Where the writer stopped, what was made could not be handed over, and the writer knows why.
        written.and(made)
    })?;
    options.progress.finish();
    Ok(made)
}

/// Writes pieces as they come, then syncs the file.
fn write_pieces(file: File, path: &Path, pieces: mpsc::Receiver<Cow<'_, [u8]>>) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, file);
    for piece in pieces {
        file.write_all(&piece).map_err(Error::io("write", path))?;
    }
    let file = file
        .into_inner()
        .map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// Makes the constants, in order, for the thread that writes them.
fn make_data<'m>(
    tensors: &'m [Tensor],
    location: &str,
    options: &WriteOptions<'_>,
    sender: mpsc::SyncSender<Cow<'m, [u8]>>,
) -> Result<(Vec<TensorProto>, u64)> {
    let mut offset = 0u64;
    let mut protos = Vec::with_capacity(tensors.len());
    for (done, tensor) in tensors.iter().enumerate() {
        options.cancel.check()?;
        if tensor.is_empty() || is_shape(tensor) {
            protos.push(tensor_proto(tensor)?);
        } else {
            protos.push(external_proto(tensor, location, offset));
            tensor.pieces(&mut |bytes| {
                offset += bytes.len() as u64;
                sender.send(bytes).map_err(|_| Error::Cancelled)
            })?;
        }
        options.progress.update(done as u64 + 1, &tensor.name);
    }
    Ok((protos, offset))
}

/// Whether a constant is an operand that sizes follow from (the axes of a reduction, the shape of a `Reshape`): ONNX's
/// shape inference has to find its numbers in the graph file.
fn is_shape(tensor: &Tensor) -> bool {
    tensor.dtype() == OnnxType::Int64 && tensor.byte_len() <= MAX_SHAPE_BYTES
}

/// The model as one ONNX file with everything inside. For small models; ONNX files end at 2 GiB.
///
/// # Errors
/// Those of the tensors' producers; [`Error::Unsupported`] beyond 2 GiB.
pub fn encode_model(model: &Model) -> Result<Vec<u8>> {
    const LIMIT: usize = i32::MAX as usize;
    let mut proto = model_proto(model)?;
    if let Some(graph) = &mut proto.graph {
        graph.initializer = model
            .graph
            .initializers
            .iter()
            .map(tensor_proto)
            .collect::<Result<_>>()?;
    }
    if proto.encoded_len() > LIMIT {
        let what = format!("an ONNX file of {} bytes", proto.encoded_len());
        return Err(Error::unsupported(
            what,
            "it ends at 2 GiB; write the constants to a data file",
        ));
    }
    Ok(proto.encode_to_vec())
}

/// Everything but the initializers of the main graph.
fn model_proto(model: &Model) -> Result<ModelProto> {
    let entry = |key: &str, value: &str| StringEntry {
        key: Some(key.to_owned()),
        value: Some(value.to_owned()),
    };
    let opset = |domain: &str, version| OperatorSetId {
        domain: Some(domain.to_owned()),
        version: Some(version),
    };
    Ok(ModelProto {
        ir_version: Some(model.ir_version),
        producer_name: Some(model.producer_name.clone()),
        producer_version: Some(model.producer_version.clone()),
        domain: None,
        model_version: None,
        doc_string: None,
        graph: Some(graph_proto(&model.graph)?),
        opset_import: model
            .opsets
            .iter()
            .map(|set| opset(&set.domain, set.version))
            .collect(),
        metadata_props: model
            .metadata
            .iter()
            .map(|(key, value)| entry(key, value))
            .collect(),
        functions: Vec::new(),
    })
}

fn graph_proto(graph: &Graph) -> Result<GraphProto> {
    let infos = |infos: &[ValueInfo]| infos.iter().map(value_info_proto).collect();
    Ok(GraphProto {
        node: graph.nodes.iter().map(node_proto).collect::<Result<_>>()?,
        name: Some(graph.name.clone()),
        initializer: Vec::new(),
        doc_string: None,
        input: infos(&graph.inputs),
        output: infos(&graph.outputs),
        value_info: infos(&graph.value_infos),
        sparse_initializer: Vec::new(),
    })
}

fn branch_proto(graph: &Graph) -> Result<GraphProto> {
    Ok(GraphProto {
        initializer: graph
            .initializers
            .iter()
            .map(tensor_proto)
            .collect::<Result<_>>()?,
        ..graph_proto(graph)?
    })
}

fn node_proto(node: &Node) -> Result<NodeProto> {
    let attributes = node.attributes.iter();
    Ok(NodeProto {
        input: node.inputs.clone(),
        output: node.outputs.clone(),
        name: Some(node.name.clone()),
        op_type: Some(node.op_type.clone()),
        attribute: attributes
            .map(|(name, value)| attribute_proto(name, value))
            .collect::<Result<_>>()?,
        doc_string: None,
        domain: Some(node.domain.clone()).filter(|domain| !domain.is_empty()),
    })
}

fn attribute_proto(name: &str, value: &Attribute) -> Result<AttributeProto> {
    let mut proto = AttributeProto {
        name: Some(name.to_owned()),
        ..AttributeProto::default()
    };
    let kind = match value {
        Attribute::Float(number) => {
            proto.f = Some(*number);
            attribute_type::FLOAT
        }
        Attribute::Int(number) => {
            proto.i = Some(*number);
            attribute_type::INT
        }
        Attribute::Text(text) => {
            proto.s = Some(text.clone().into_bytes());
            attribute_type::STRING
        }
        Attribute::Tensor(tensor) => {
            proto.t = Some(tensor_proto(tensor)?);
            attribute_type::TENSOR
        }
        Attribute::Graph(graph) => {
            proto.g = Some(Box::new(branch_proto(graph)?));
            attribute_type::GRAPH
        }
        Attribute::Floats(numbers) => {
            proto.floats.clone_from(numbers);
            attribute_type::FLOATS
        }
        Attribute::Ints(numbers) => {
            proto.ints.clone_from(numbers);
            attribute_type::INTS
        }
        Attribute::Texts(texts) => {
            proto.strings = texts.iter().map(|text| text.clone().into_bytes()).collect();
            attribute_type::STRINGS
        }
    };
    proto.r#type = Some(kind);
    Ok(proto)
}

fn value_info_proto(info: &ValueInfo) -> ValueInfoProto {
    let dim = |dim: &Dim| Dimension {
        value: match dim {
            Dim::Known(size) => Some(DimensionValue::Known(*size as i64)),
            Dim::Symbol(name) => Some(DimensionValue::Symbol(name.clone())),
            Dim::Unknown => None,
        },
    };
    let shape = info.shape.as_ref().map(|dims| TensorShape {
        dim: dims.iter().map(dim).collect(),
    });
    let declared = info.dtype.is_some() || shape.is_some();
    ValueInfoProto {
        name: Some(info.name.clone()),
        r#type: declared.then(|| TypeProto {
            tensor_type: Some(TensorType {
                elem_type: info.dtype.map(|dtype| dtype.code()),
                shape,
            }),
        }),
        doc_string: None,
    }
}

fn tensor_header(tensor: &Tensor) -> TensorProto {
    TensorProto {
        dims: tensor.shape().iter().map(|size| *size as i64).collect(),
        data_type: Some(tensor.dtype().code()),
        name: Some(tensor.name.clone()).filter(|name| !name.is_empty()),
        ..TensorProto::default()
    }
}

fn tensor_proto(tensor: &Tensor) -> Result<TensorProto> {
    Ok(TensorProto {
        raw_data: Some(tensor.bytes()?.into_owned()),
        ..tensor_header(tensor)
    })
}

fn external_proto(tensor: &Tensor, location: &str, offset: u64) -> TensorProto {
    let entry = |key: &str, value: String| StringEntry {
        key: Some(key.to_owned()),
        value: Some(value),
    };
    TensorProto {
        external_data: vec![
            entry("location", location.to_owned()),
            entry("offset", offset.to_string()),
            entry("length", tensor.byte_len().to_string()),
        ],
        data_location: Some(EXTERNAL),
        ..tensor_header(tensor)
    }
}
