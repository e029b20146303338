//! Constant folding of whole numbers and truth values: what shapes are computed from.

use std::collections::{HashMap, HashSet};

use olive_core::Result;

use super::super::rewrite::{constants, output_names};
use crate::ir::{Attribute, Graph, Node, OnnxType, Tensor};

/// Elements beyond which a constant is data, not a shape.
const MAX_ELEMENTS: usize = 4096;

/// A constant of whole numbers.
#[derive(Debug, Clone, PartialEq)]
struct Whole {
    dtype: OnnxType,
    shape: Vec<usize>,
    values: Vec<i64>,
}

/// Replaces nodes whose inputs are small whole-number constants by their results. Whether there was one. Nodes that
/// make a graph output stay.
pub fn fold(graph: &mut Graph) -> Result<bool> {
    let mut known: HashMap<String, Whole> = HashMap::new();
    for (name, tensor) in constants(graph) {
        if let Some(whole) = Whole::of(tensor) {
            known.insert(name.to_owned(), whole);
        }
    }
    let shapes: HashMap<String, Vec<usize>> = {
        let inputs = graph
            .inputs
            .iter()
            .filter_map(|info| Some((info.name.clone(), info.known_shape()?)));
        let tensors = constants(graph)
            .into_iter()
            .map(|(name, tensor)| (name.to_owned(), tensor.shape().to_vec()));
        inputs.chain(tensors).collect()
    };
    let outputs: HashSet<String> = output_names(graph).into_iter().map(str::to_owned).collect();
    let mut made = Vec::new();
    for node in &graph.nodes {
        let [output] = node.outputs.as_slice() else {
            continue;
        };
        if !node.domain.is_empty() || node.op_type == "Constant" || outputs.contains(output) {
            continue;
        }
        if let Some(result) = evaluate(node, &known, &shapes)?
            && let Some(tensor) = result.tensor(output)
        {
            made.push(tensor);
            known.insert(output.clone(), result);
        }
    }
    if made.is_empty() {
        return Ok(false);
    }
    let names: HashSet<&str> = made.iter().map(|tensor| tensor.name.as_str()).collect();
    graph
        .nodes
        .retain(|node| !node.outputs.iter().any(|output| names.contains(output.as_str())));
    graph.initializers.extend(made);
    Ok(true)
}

impl Whole {
    fn of(tensor: &Tensor) -> Option<Self> {
        if tensor.len() > MAX_ELEMENTS {
            return None;
        }
        let bytes = tensor.borrowed()?;
        let values = match tensor.dtype() {
            OnnxType::Int64 | OnnxType::Int32 => tensor.to_i64().ok()?,
            OnnxType::Bool => bytes.iter().map(|byte| i64::from(*byte != 0)).collect(),
            _ => return None,
        };
        Some(Self {
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            values,
        })
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        let bytes: Vec<u8> = match self.dtype {
            OnnxType::Int64 => self.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            OnnxType::Int32 => {
                let narrow: Option<Vec<i32>> = self.values.iter().map(|v| i32::try_from(*v).ok()).collect();
                narrow?.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            OnnxType::Bool => self.values.iter().map(|v| u8::from(*v != 0)).collect(),
            _ => return None,
        };
        Tensor::inline(name, self.dtype, self.shape.clone(), bytes).ok()
    }

    fn vector(values: Vec<i64>) -> Self {
        Self {
            dtype: OnnxType::Int64,
            shape: vec![values.len()],
            values,
        }
    }
}

/// The result of a node, where it is known here; `None` leaves the node.
fn evaluate(
    node: &Node,
    known: &HashMap<String, Whole>,
    shapes: &HashMap<String, Vec<usize>>,
) -> Result<Option<Whole>> {
    if node.op_type == "Shape" {
        let full = node.attribute("start").is_none() && node.attribute("end").is_none();
        let shape = shapes.get(&node.inputs[0]).filter(|_| full);
        return Ok(shape.map(|shape| Whole::vector(shape.iter().map(|size| *size as i64).collect())));
    }
    let inputs: Option<Vec<&Whole>> = node.inputs.iter().map(|name| known.get(name)).collect();
    let Some(inputs) = inputs.filter(|inputs| !inputs.is_empty()) else {
        return Ok(None);
    };
    let axis = node.int("axis")?;
    Ok(match (node.op_type.as_str(), inputs.as_slice()) {
        ("Add", [a, b]) => pointwise(a, b, None, |a, b| a.checked_add(b)),
        ("Sub", [a, b]) => pointwise(a, b, None, |a, b| a.checked_sub(b)),
        ("Mul", [a, b]) => pointwise(a, b, None, |a, b| a.checked_mul(b)),
        ("Div", [a, b]) => pointwise(a, b, None, |a, b| a.checked_div(b)),
        ("Equal", [a, b]) => pointwise(a, b, Some(OnnxType::Bool), |a, b| Some(i64::from(a == b))),
        ("Greater", [a, b]) => pointwise(a, b, Some(OnnxType::Bool), |a, b| Some(i64::from(a > b))),
        ("Less", [a, b]) => pointwise(a, b, Some(OnnxType::Bool), |a, b| Some(i64::from(a < b))),
        ("Cast", [a]) => cast(a, node.int("to")?),
        ("Concat", parts) => concat(parts, axis.unwrap_or(0)),
        ("Gather", [data, indices]) => gather(data, indices, axis.unwrap_or(0)),
        ("Squeeze", [data] | [data, _]) | ("Reshape", [data, _]) | ("Unsqueeze", [data, _]) => {
            reshaped(node, data, inputs.get(1).copied())
        }
        ("Slice", [data, rest @ ..]) => slice(data, rest),
        _ => None,
    })
}

/// Element by element, where the shapes are equal or one side has one element.
fn pointwise(
    a: &Whole,
    b: &Whole,
    dtype: Option<OnnxType>,
    f: impl Fn(i64, i64) -> Option<i64>,
) -> Option<Whole> {
    let wide = a.dtype == b.dtype && (a.dtype != OnnxType::Bool || dtype.is_some());
    let shape = match () {
        () if a.shape == b.shape => &a.shape,
        () if b.values.len() == 1 && b.shape.len() <= a.shape.len() => &a.shape,
        () if a.values.len() == 1 && a.shape.len() <= b.shape.len() => &b.shape,
        () => return None,
    };
    let count: usize = shape.iter().product();
    let pick = |side: &Whole, i: usize| side.values[if side.values.len() == 1 { 0 } else { i }];
    let values: Option<Vec<i64>> = (0..count).map(|i| f(pick(a, i), pick(b, i))).collect();
    wide.then_some(Whole {
        dtype: dtype.unwrap_or(a.dtype),
        shape: shape.clone(),
        values: values?,
    })
}

fn cast(a: &Whole, to: Option<i64>) -> Option<Whole> {
    let dtype = OnnxType::from_code(i32::try_from(to?).ok()?)?;
    let values = match dtype {
        OnnxType::Bool => a.values.iter().map(|v| i64::from(*v != 0)).collect(),
        OnnxType::Int64 | OnnxType::Int32 => a.values.clone(),
        _ => return None,
    };
    Some(Whole {
        dtype,
        shape: a.shape.clone(),
        values,
    })
}

fn concat(parts: &[&Whole], axis: i64) -> Option<Whole> {
    let one_dimensional = parts
        .iter()
        .all(|part| part.shape.len() == 1 && part.dtype == parts[0].dtype);
    let values: Vec<i64> = parts
        .iter()
        .flat_map(|part| part.values.iter().copied())
        .collect();
    (one_dimensional && matches!(axis, 0 | -1)).then(|| Whole {
        dtype: parts[0].dtype,
        ..Whole::vector(values)
    })
}

fn gather(data: &Whole, indices: &Whole, axis: i64) -> Option<Whole> {
    let [size] = data.shape.as_slice() else {
        return None;
    };
    let place = |index: &i64| {
        let index = if *index < 0 { index + *size as i64 } else { *index };
        data.values.get(usize::try_from(index).ok()?).copied()
    };
    let values: Option<Vec<i64>> = indices.values.iter().map(place).collect();
    matches!(axis, 0 | -1).then_some(Whole {
        dtype: data.dtype,
        shape: indices.shape.clone(),
        values: values?,
    })
}

/// The same values in another shape.
fn reshaped(node: &Node, data: &Whole, operand: Option<&Whole>) -> Option<Whole> {
    let count = data.values.len();
    let shape: Vec<usize> = match (node.op_type.as_str(), operand) {
        ("Reshape", Some(shape)) => {
            let allow_zero = matches!(node.attribute("allowzero"), Some(Attribute::Int(1)));
            let size = |(i, size): (usize, &i64)| {
                if *size == 0 && !allow_zero {
                    data.shape.get(i).map(|s| *s as i64)
                } else {
                    Some(*size)
                }
            };
            let sizes: Option<Vec<i64>> = shape.values.iter().enumerate().map(size).collect();
            let sizes = sizes?;
            let fixed: i64 = sizes.iter().filter(|size| **size >= 0).product();
            let free = if fixed > 0 { count as i64 / fixed } else { 0 };
            sizes
                .iter()
                .map(|size| if *size == -1 { free } else { *size })
                .map(|size| usize::try_from(size).ok())
                .collect::<Option<_>>()?
        }
        ("Unsqueeze", Some(axes)) => {
            let rank = data.shape.len() + axes.values.len();
            let axes: Vec<i64> = axes
                .values
                .iter()
                .map(|axis| if *axis < 0 { axis + rank as i64 } else { *axis })
                .collect();
            let mut sizes = data.shape.iter();
            (0..rank)
                .map(|axis| {
                    if axes.contains(&(axis as i64)) {
                        Some(1)
                    } else {
                        sizes.next().copied()
                    }
                })
                .collect::<Option<_>>()?
        }
        ("Squeeze", axes) => {
            let rank = data.shape.len() as i64;
            let axes: Option<Vec<i64>> = axes.map(|axes| {
                axes.values
                    .iter()
                    .map(|axis| if *axis < 0 { axis + rank } else { *axis })
                    .collect()
            });
            let removed = |axis: usize| {
                axes.as_ref()
                    .map_or(data.shape[axis] == 1, |axes| axes.contains(&(axis as i64)))
            };
            (0..data.shape.len())
                .filter(|axis| !removed(*axis))
                .map(|axis| data.shape[axis])
                .collect()
        }
        _ => return None,
    };
    (shape.iter().product::<usize>() == count).then(|| Whole {
        shape,
        ..data.clone()
    })
}

fn slice(data: &Whole, operands: &[&Whole]) -> Option<Whole> {
    let one = |place: usize, default: i64| match operands.get(place) {
        None => Some(default),
        Some(operand) => (operand.values.len() == 1).then(|| operand.values[0]),
    };
    let ([size], start, end, axis, step) = (
        data.shape.as_slice(),
        one(0, 0)?,
        one(1, 0)?,
        one(2, 0)?,
        one(3, 1)?,
    ) else {
        return None;
    };
    if !matches!(axis, 0 | -1) || step != 1 || operands.len() < 2 {
        return None;
    }
    let size = *size as i64;
    let clamp = |at: i64| if at < 0 { (at + size).max(0) } else { at.min(size) } as usize;
    let values = data
        .values
        .get(clamp(start)..clamp(end).max(clamp(start)))?
        .to_vec();
    Some(Whole {
        dtype: data.dtype,
        ..Whole::vector(values)
    })
}
