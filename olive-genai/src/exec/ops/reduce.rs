//! Sums and maxima along axes.

use olive_core::Result;

use super::super::context::{BuildContext, OpContext};
use super::super::registry::Op;
use super::super::value::{Tensor, Value};
use super::shape::axis_index;

struct Reduce {
    keep: bool,
    noop_with_empty_axes: bool,
    axes: Option<Vec<i64>>,
    maximum: bool,
}

impl Op for Reduce {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let value = ctx.value(0)?;
        let shape = value.shape().to_vec();
        let given = match (&self.axes, ctx.has(1)) {
            (Some(axes), _) => axes.clone(),
            (None, true) => ctx.ints(1)?,
            (None, false) => Vec::new(),
        };
        if given.is_empty() && self.noop_with_empty_axes {
            let value = ctx.take(0)?;
            ctx.set(0, value);
            return Ok(());
        }
        let mut reduced = vec![given.is_empty(); shape.len()];
        for axis in given {
            let index = axis_index(axis, shape.len());
            let index =
                index.ok_or_else(|| ctx.wrong(1, format!("an axis of {shape:?}"), axis.to_string()))?;
            reduced[index] = true;
        }
        let out = match value {
            Value::F32(t) if self.maximum => Value::F32(fold(t, &reduced, f32::NEG_INFINITY, f32::max)),
            Value::F32(t) => Value::F32(fold(t, &reduced, 0.0, |a, b| a + b)),
            Value::I64(t) if self.maximum => Value::I64(fold(t, &reduced, i64::MIN, i64::max)),
            Value::I64(t) => Value::I64(fold(t, &reduced, 0, i64::wrapping_add)),
            Value::I32(t) if self.maximum => Value::I32(fold(t, &reduced, i32::MIN, i32::max)),
            Value::I32(t) => Value::I32(fold(t, &reduced, 0, i32::wrapping_add)),
            other => return Err(ctx.wrong(0, "floats or integers", other.type_name())),
        };
        let kept = shape.iter().zip(&reduced);
        let shape: Vec<usize> = if self.keep {
            kept.map(|(size, gone)| if *gone { 1 } else { *size }).collect()
        } else {
            kept.filter(|(_, gone)| !**gone).map(|(size, _)| *size).collect()
        };
        ctx.set(0, out.reshaped(shape));
        Ok(())
    }
}

fn fold<T: bytemuck::Pod>(
    tensor: &Tensor<T>,
    reduced: &[bool],
    start: T,
    join: impl Fn(T, T) -> T,
) -> Tensor<T> {
    let shape = tensor.shape();
    let len: usize = shape
        .iter()
        .zip(reduced)
        .filter(|(_, gone)| !**gone)
        .map(|(size, _)| *size)
        .product();
    let mut out = vec![start; len];
    let mut index = vec![0; shape.len()];
    for v in tensor.data() {
        let place = (0..shape.len())
            .filter(|a| !reduced[*a])
            .fold(0, |p, a| p * shape[a] + index[a]);
        out[place] = join(out[place], *v);
        for a in (0..shape.len()).rev() {
            index[a] += 1;
            if index[a] < shape[a] {
                break;
            }
            index[a] = 0;
        }
    }
    Tensor::new([len], out)
}

fn build(ctx: &BuildContext<'_>, maximum: bool) -> Result<Box<dyn Op>> {
    Ok(Box::new(Reduce {
        keep: ctx.node.int("keepdims")?.unwrap_or(1) != 0,
        noop_with_empty_axes: ctx.node.int("noop_with_empty_axes")?.unwrap_or(0) != 0,
        axes: ctx.node.ints("axes")?.map(<[i64]>::to_vec),
        maximum,
    }))
}

/// `ReduceSum`.
pub fn sum(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    build(ctx, false)
}

/// `ReduceMax`.
pub fn max(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    build(ctx, true)
}
