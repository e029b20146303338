//! From bytes to the IR. Everything that the IR cannot hold is refused by name.

use std::path::Path;

use olive_core::{Error, Result, fsio};
use prost::Message;

use super::external::ExternalFiles;
use super::proto::{
    AttributeProto, Dimension, DimensionValue, EXTERNAL, GraphProto, ModelProto, NodeProto, TensorProto,
    TensorType, ValueInfoProto, attribute_type,
};
use crate::ir::{Attribute, Dim, Graph, Model, Node, OnnxType, Opset, Tensor, ValueInfo, element_count};

/// Reads an ONNX file; external data are mapped from its folder, not read.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] if the file is not a model or uses what olive does not read; [`Error::Tensor`] for
/// a constant whose data are truncated, outside their file or outside the folder.
pub fn read_model(path: &Path) -> Result<Model> {
    let bytes = fsio::read(path)?;
    decode_model(&bytes, path, path.parent())
}

/// Reads an ONNX model from memory. `origin` is named in messages; external data are looked for in `folder`, and
/// refused if there is none.
///
/// # Errors
/// As [`read_model`].
pub fn decode_model(bytes: &[u8], origin: &Path, folder: Option<&Path>) -> Result<Model> {
    let proto = ModelProto::decode(bytes).map_err(|source| {
        Error::file(
            origin,
            "an ONNX model",
            format!("{source} ({} bytes)", bytes.len()),
        )
    })?;
    let mut reader = Reader {
        origin,
        files: ExternalFiles::new(folder),
    };
    reader.model(proto)
}

struct Reader<'a> {
    origin: &'a Path,
    files: ExternalFiles,
}

impl Reader<'_> {
    fn refuse(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::file(self.origin, expected, found)
    }

    fn model(&mut self, proto: ModelProto) -> Result<Model> {
        if !proto.functions.is_empty() {
            let found = format!("{} of them", proto.functions.len());
            return Err(self.refuse("a model without functions of its own", found));
        }
        let graph = proto
            .graph
            .ok_or_else(|| self.refuse("a model with a graph", "none"))?;
        let opsets = proto.opset_import.into_iter().map(|set| Opset {
            domain: set.domain.unwrap_or_default(),
            version: set.version.unwrap_or_default(),
        });
        let metadata = proto.metadata_props.into_iter();
        Ok(Model {
            ir_version: proto.ir_version.unwrap_or_default(),
            opsets: opsets.collect(),
            producer_name: proto.producer_name.unwrap_or_default(),
            producer_version: proto.producer_version.unwrap_or_default(),
            metadata: metadata
                .map(|entry| (entry.key.unwrap_or_default(), entry.value.unwrap_or_default()))
                .collect(),
            graph: self.graph(graph)?,
        })
    }

    fn graph(&mut self, proto: GraphProto) -> Result<Graph> {
        if !proto.sparse_initializer.is_empty() {
            let found = format!("{} sparse ones", proto.sparse_initializer.len());
            return Err(self.refuse("dense initializers", found));
        }
        let initializers = proto.initializer.into_iter().map(|tensor| self.tensor(tensor));
        let initializers = initializers.collect::<Result<_>>()?;
        let nodes = proto.node.into_iter().map(|node| self.node(node));
        let nodes = nodes.collect::<Result<_>>()?;
        let infos = |list: Vec<ValueInfoProto>| -> Result<Vec<ValueInfo>> {
            list.into_iter().map(|info| self.value_info(info)).collect()
        };
        Ok(Graph {
            name: proto.name.unwrap_or_default(),
            inputs: infos(proto.input)?,
            outputs: infos(proto.output)?,
            nodes,
            initializers,
            value_infos: infos(proto.value_info)?,
        })
    }

    fn node(&mut self, proto: NodeProto) -> Result<Node> {
        let name = proto.name.unwrap_or_default();
        let op_type = proto.op_type.unwrap_or_default();
        if op_type.is_empty() {
            return Err(self.refuse("an operator for every node", format!("node `{name}` without one")));
        }
        let mut attributes = Vec::with_capacity(proto.attribute.len());
        for attribute in proto.attribute {
            attributes.push(self.attribute(&name, attribute)?);
        }
        let domain = proto.domain.filter(|domain| domain != "ai.onnx");
        Ok(Node {
            name,
            domain: domain.unwrap_or_default(),
            op_type,
            inputs: proto.input,
            outputs: proto.output,
            attributes,
        })
    }

    fn attribute(&mut self, node: &str, proto: AttributeProto) -> Result<(String, Attribute)> {
        let name = proto.name.unwrap_or_default();
        let text = |bytes: Vec<u8>| {
            String::from_utf8(bytes).map_err(|_| {
                let found = format!("other bytes in `{name}` of node `{node}`");
                self.refuse("UTF-8 text in string attributes", found)
            })
        };
        let kind = proto.r#type.unwrap_or_default();
        let value = match kind {
            attribute_type::FLOAT => Attribute::Float(proto.f.unwrap_or_default()),
            attribute_type::INT => Attribute::Int(proto.i.unwrap_or_default()),
            attribute_type::STRING => Attribute::Text(text(proto.s.unwrap_or_default())?),
            attribute_type::FLOATS => Attribute::Floats(proto.floats),
            attribute_type::INTS => Attribute::Ints(proto.ints),
            attribute_type::STRINGS => {
                Attribute::Texts(proto.strings.into_iter().map(text).collect::<Result<_>>()?)
            }
            attribute_type::TENSOR if proto.t.is_some() => {
                Attribute::Tensor(self.tensor(proto.t.unwrap_or_default())?)
            }
            attribute_type::GRAPH if proto.g.is_some() => {
                Attribute::Graph(Box::new(self.graph(*proto.g.unwrap_or_default())?))
            }
            _ => {
                let found = format!("type {kind} for `{name}` of node `{node}`");
                return Err(self.refuse("an attribute type that olive reads, with its value", found));
            }
        };
        Ok((name, value))
    }

    fn value_info(&self, proto: ValueInfoProto) -> Result<ValueInfo> {
        let name = proto.name.unwrap_or_default();
        let Some(declared) = proto.r#type else {
            return Ok(ValueInfo {
                name,
                dtype: None,
                shape: None,
            });
        };
        let Some(TensorType { elem_type, shape }) = declared.tensor_type else {
            return Err(self.refuse("tensors only", format!("`{name}` of another type")));
        };
        let dtype = match elem_type.unwrap_or_default() {
            0 => None,
            code => Some(self.dtype(&name, code)?),
        };
        let dims = |dims: Vec<Dimension>| dims.into_iter().map(|dim| self.dim(&name, dim)).collect();
        let shape: Option<Result<Vec<Dim>>> = shape.map(|shape| dims(shape.dim));
        let shape = shape.transpose()?;
        Ok(ValueInfo { name, dtype, shape })
    }

    fn dim(&self, name: &str, proto: Dimension) -> Result<Dim> {
        match proto.value {
            None => Ok(Dim::Unknown),
            Some(DimensionValue::Symbol(symbol)) if symbol.is_empty() => Ok(Dim::Unknown),
            Some(DimensionValue::Symbol(symbol)) => Ok(Dim::Symbol(symbol)),
            Some(DimensionValue::Known(size)) => usize::try_from(size)
                .map(Dim::Known)
                .map_err(|_| Error::tensor(name, "sizes that are not negative", size.to_string())),
        }
    }

    fn dtype(&self, name: &str, code: i32) -> Result<OnnxType> {
        OnnxType::from_code(code)
            .ok_or_else(|| Error::tensor(name, "an element type that olive reads", format!("number {code}")))
    }

    fn tensor(&mut self, proto: TensorProto) -> Result<Tensor> {
        let name = proto.name.clone().unwrap_or_default();
        let dtype = self.dtype(&name, proto.data_type.unwrap_or_default())?;
        if proto.segment.is_some() {
            return Err(Error::tensor(name, "a whole tensor", "a segment"));
        }
        let sizes = proto.dims.iter().map(|size| usize::try_from(*size).ok());
        let shape: Option<Vec<usize>> = sizes.collect();
        let shape = shape.ok_or_else(|| {
            Error::tensor(&name, "sizes that are not negative", format!("{:?}", proto.dims))
        })?;
        if proto.data_location == Some(EXTERNAL) {
            let wanted = element_count(&shape).and_then(|n| dtype.byte_len(n));
            let wanted = wanted.ok_or_else(|| {
                Error::tensor(&name, "a size that fits in memory", format!("{dtype}{shape:?}"))
            })?;
            let (file, range) = self.files.locate(&name, &proto.external_data, wanted)?;
            return Tensor::mapped(name, dtype, shape, file, range);
        }
        let bytes = match proto.raw_data {
            Some(bytes) => bytes,
            None => typed_bytes(&proto, dtype),
        };
        Tensor::inline(name, dtype, shape, bytes)
    }
}

/// The little-endian bytes of a tensor that holds numbers instead of raw data. `int32_data` carries every type of at
/// most 32 bits that is not `FLOAT`, 4-bit types two to a number.
fn typed_bytes(proto: &TensorProto, dtype: OnnxType) -> Vec<u8> {
    match dtype {
        OnnxType::Float => proto.float_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        OnnxType::Double => proto.double_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        OnnxType::Int64 => proto.int64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        OnnxType::Uint64 => proto.uint64_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        OnnxType::Uint32 => proto
            .uint64_data
            .iter()
            .flat_map(|v| (*v as u32).to_le_bytes())
            .collect(),
        OnnxType::Int32 => proto.int32_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        OnnxType::Int16 | OnnxType::Uint16 | OnnxType::Float16 | OnnxType::Bfloat16 => proto
            .int32_data
            .iter()
            .flat_map(|v| (*v as u16).to_le_bytes())
            .collect(),
        OnnxType::Int8 | OnnxType::Uint8 | OnnxType::Bool | OnnxType::Int4 | OnnxType::Uint4 => {
            proto.int32_data.iter().map(|v| *v as u8).collect()
        }
    }
}
