//! Sizes and arrangements.

use olive_core::Result;

use super::super::context::{BuildContext, OpContext};
use super::super::registry::Op;
use super::super::value::{Tensor, Value};

/// `axis` counted from the front in a rank (or size) of `rank`; `None` if it is outside.
pub fn axis_index(axis: i64, rank: usize) -> Option<usize> {
    let from_front = if axis < 0 {
        axis.checked_add(i64::try_from(rank).ok()?)?
    } else {
        axis
    };
    usize::try_from(from_front).ok().filter(|index| *index < rank)
}

struct Shape {
    start: i64,
    end: Option<i64>,
}

impl Op for Shape {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let shape = ctx.value(0)?.shape();
        let clamp = |at: i64| {
            let at = if at < 0 { at + shape.len() as i64 } else { at };
            at.clamp(0, shape.len() as i64) as usize
        };
        let (start, end) = (clamp(self.start), self.end.map_or(shape.len(), clamp));
        let sizes: Vec<i64> = shape[start..end.max(start)]
            .iter()
            .map(|size| *size as i64)
            .collect();
        ctx.set(0, Value::I64(Tensor::new([sizes.len()], sizes)));
        Ok(())
    }
}

/// `Shape`.
pub fn shape(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let (start, end) = (ctx.node.int("start")?.unwrap_or(0), ctx.node.int("end")?);
    Ok(Box::new(Shape { start, end }))
}

struct Reshape {
    zero_is_zero: bool,
}

impl Op for Reshape {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let wanted = ctx.ints(1)?;
        let old = ctx.value(0)?.shape().to_vec();
        let new = new_shape(&old, &wanted, self.zero_is_zero);
        let new =
            new.ok_or_else(|| ctx.wrong(1, format!("sizes that hold {old:?}"), format!("{wanted:?}")))?;
        let value = ctx.take(0)?.reshaped(new);
        ctx.set(0, value);
        Ok(())
    }
}

fn new_shape(old: &[usize], wanted: &[i64], zero_is_zero: bool) -> Option<Vec<usize>> {
    let total: usize = old.iter().product();
    let mut open = None;
    let mut new = Vec::with_capacity(wanted.len());
    for (i, size) in wanted.iter().enumerate() {
        new.push(match size {
            -1 if open.is_none() => {
                open = Some(i);
                1
            }
            0 if !zero_is_zero => *old.get(i)?,
            size => usize::try_from(*size).ok()?,
        });
    }
    let known = new.iter().try_fold(1usize, |p, s| p.checked_mul(*s))?;
    if let Some(open) = open {
        new[open] = total.checked_div(known)?;
    }
    (new.iter().try_fold(1usize, |p, s| p.checked_mul(*s))? == total).then_some(new)
}

/// `Reshape`.
pub fn reshape(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let zero_is_zero = ctx.node.int("allowzero")?.unwrap_or(0) != 0;
    Ok(Box::new(Reshape { zero_is_zero }))
}

struct Squeeze {
    insert: bool,
    axes: Option<Vec<i64>>,
}

impl Op for Squeeze {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let axes = match &self.axes {
            Some(axes) => Some(axes.clone()),
            None if ctx.has(1) => Some(ctx.ints(1)?),
            None => None,
        };
        let old = ctx.value(0)?.shape().to_vec();
        let new = if self.insert {
            inserted(&old, axes.as_deref())
        } else {
            removed(&old, axes.as_deref())
        };
        let new = new.ok_or_else(|| ctx.wrong(1, format!("axes that fit {old:?}"), format!("{axes:?}")))?;
        let value = ctx.take(0)?.reshaped(new);
        ctx.set(0, value);
        Ok(())
    }
}

fn inserted(old: &[usize], axes: Option<&[i64]>) -> Option<Vec<usize>> {
    let axes = axes?;
    let rank = old.len() + axes.len();
    let mut is_new = vec![false; rank];
    for axis in axes {
        let slot = is_new.get_mut(axis_index(*axis, rank)?)?;
        if std::mem::replace(slot, true) {
            return None;
        }
    }
    let mut rest = old.iter();
    is_new
        .iter()
        .map(|new| if *new { Some(1) } else { rest.next().copied() })
        .collect()
}

fn removed(old: &[usize], axes: Option<&[i64]>) -> Option<Vec<usize>> {
    let mut gone: Vec<bool> = old.iter().map(|size| axes.is_none() && *size == 1).collect();
    for axis in axes.into_iter().flatten() {
        let index = axis_index(*axis, old.len()).filter(|i| old[*i] == 1)?;
        gone[index] = true;
    }
    Some(
        old.iter()
            .zip(gone)
            .filter(|(_, gone)| !gone)
            .map(|(size, _)| *size)
            .collect(),
    )
}

/// `Unsqueeze`.
pub fn unsqueeze(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let axes = ctx.node.ints("axes")?.map(<[i64]>::to_vec);
    Ok(Box::new(Squeeze { insert: true, axes }))
}

/// `Squeeze`.
pub fn squeeze(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let axes = ctx.node.ints("axes")?.map(<[i64]>::to_vec);
    Ok(Box::new(Squeeze { insert: false, axes }))
}

/// Applies a function that works for every element type.
macro_rules! map_value {
    ($value:expr, $t:ident => $body:expr) => {
        match $value {
            Value::F32($t) => Value::F32($body),
            Value::I64($t) => Value::I64($body),
            Value::I32($t) => Value::I32($body),
            Value::U8($t) => Value::U8($body),
            Value::Bool($t) => Value::Bool($body),
        }
    };
}

struct Transpose {
    order: Option<Vec<i64>>,
}

impl Op for Transpose {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let value = ctx.value(0)?;
        let rank = value.shape().len();
        let order: Option<Vec<usize>> = match &self.order {
            None => Some((0..rank).rev().collect()),
            Some(order) => order.iter().map(|axis| axis_index(*axis, rank)).collect(),
        };
        let order = order.filter(|order| order.len() == rank && (0..rank).all(|a| order.contains(&a)));
        let Some(order) = order else {
            return Err(ctx.wrong(
                0,
                format!("a rank for {:?}", self.order),
                format!("{:?}", value.shape()),
            ));
        };
        let out = map_value!(value, t => permuted(t, &order));
        ctx.set(0, out);
        Ok(())
    }
}

fn permuted<T: bytemuck::Pod>(tensor: &Tensor<T>, order: &[usize]) -> Tensor<T> {
    let old = tensor.shape();
    let mut strides = vec![1; old.len()];
    for a in (0..old.len().saturating_sub(1)).rev() {
        strides[a] = strides[a + 1] * old[a + 1];
    }
    let shape: Vec<usize> = order.iter().map(|a| old[*a]).collect();
    let steps: Vec<usize> = order.iter().map(|a| strides[*a]).collect();
    let data = tensor.data();
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0; shape.len()];
    let mut place = 0;
    for _ in 0..data.len() {
        out.push(data[place]);
        for a in (0..shape.len()).rev() {
            index[a] += 1;
            place += steps[a];
            if index[a] < shape[a] {
                break;
            }
            place -= steps[a] * shape[a];
            index[a] = 0;
        }
    }
    Tensor::new(shape, out)
}

/// `Transpose`.
pub fn transpose(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let order = ctx.node.ints("perm")?.map(<[i64]>::to_vec);
    Ok(Box::new(Transpose { order }))
}

struct Concat {
    axis: i64,
}

impl Op for Concat {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let first = ctx.value(0)?;
        let rank = first.shape().len();
        let axis = axis_index(self.axis, rank);
        let axis =
            axis.ok_or_else(|| ctx.wrong(0, format!("a rank above {}", self.axis), rank.to_string()))?;
        let parts: Vec<&Value> = (0..ctx.inputs.len())
            .map(|i| ctx.value(i))
            .collect::<Result<_>>()?;
        for (i, part) in parts.iter().enumerate() {
            let fits = part.type_name() == first.type_name()
                && part.shape().len() == rank
                && (0..rank).all(|a| a == axis || part.shape()[a] == first.shape()[a]);
            if !fits {
                let expected = format!("{}{:?} but for axis {axis}", first.type_name(), first.shape());
                return Err(ctx.wrong(i, expected, format!("{}{:?}", part.type_name(), part.shape())));
            }
        }
        let mut shape = first.shape().to_vec();
        shape[axis] = parts.iter().map(|part| part.shape()[axis]).sum();
        macro_rules! join {
            ($variant:ident) => {{
                let list: Vec<_> = parts
                    .iter()
                    .filter_map(|part| {
                        if let Value::$variant(t) = part {
                            Some(t)
                        } else {
                            None
                        }
                    })
                    .collect();
                Value::$variant(joined(&list, axis, shape))
            }};
        }
        let out = match first {
            Value::F32(_) => join!(F32),
            Value::I64(_) => join!(I64),
            Value::I32(_) => join!(I32),
            Value::U8(_) => join!(U8),
            Value::Bool(_) => join!(Bool),
        };
        ctx.set(0, out);
        Ok(())
    }
}

fn joined<T: bytemuck::Pod>(parts: &[&Tensor<T>], axis: usize, shape: Vec<usize>) -> Tensor<T> {
    let outer: usize = shape[..axis].iter().product();
    let mut out = Vec::with_capacity(shape.iter().product());
    for o in 0..outer {
        for part in parts {
            let row: usize = part.shape()[axis..].iter().product();
            out.extend_from_slice(&part.data()[o * row..(o + 1) * row]);
        }
    }
    Tensor::new(shape, out)
}

/// `Concat`.
pub fn concat(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    match ctx.node.int("axis")? {
        Some(axis) => Ok(Box::new(Concat { axis })),
        None => Err(ctx.unsupported("`axis` is missing")),
    }
}

/// `count` places of `axis` from `start` on, each `step` after the one before.
fn picked<T: bytemuck::Pod>(
    tensor: &Tensor<T>,
    axis: usize,
    start: usize,
    step: isize,
    count: usize,
) -> Tensor<T> {
    let old = tensor.shape();
    let outer: usize = old[..axis].iter().product();
    let inner: usize = old[axis + 1..].iter().product();
    let mut shape = old.to_vec();
    shape[axis] = count;
    let mut out = Vec::with_capacity(outer * count * inner);
    for o in 0..outer {
        for i in 0..count {
            let place = (start as isize + i as isize * step) as usize;
            out.extend_from_slice(&tensor.data()[(o * old[axis] + place) * inner..][..inner]);
        }
    }
    Tensor::new(shape, out)
}

struct Split {
    axis: i64,
    parts: Option<usize>,
}

impl Op for Split {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let shape = ctx.value(0)?.shape().to_vec();
        let axis = axis_index(self.axis, shape.len());
        let axis =
            axis.ok_or_else(|| ctx.wrong(0, format!("a rank above {}", self.axis), format!("{shape:?}")))?;
        let sizes: Vec<usize> = if ctx.has(1) {
            ctx.ints(1)?
                .iter()
                .map(|size| usize::try_from(*size).unwrap_or(usize::MAX))
                .collect()
        } else {
            let parts = self.parts.unwrap_or(ctx.outputs.len()).max(1);
            let size = shape[axis].div_ceil(parts);
            (0..parts)
                .map(|p| size.min(shape[axis].saturating_sub(p * size)))
                .collect()
        };
        let total = sizes.iter().try_fold(0usize, |sum, size| sum.checked_add(*size));
        if total != Some(shape[axis]) {
            return Err(ctx.wrong(
                1,
                format!("sizes that sum to {}", shape[axis]),
                format!("{sizes:?}"),
            ));
        }
        let mut start = 0;
        for (o, size) in sizes.into_iter().enumerate() {
            let part = map_value!(ctx.value(0)?, t => picked(t, axis, start, 1, size));
            start += size;
            ctx.set(o, part);
        }
        Ok(())
    }
}

/// `Split`.
pub fn split(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let parts = ctx.node.int("num_outputs")?.and_then(|n| usize::try_from(n).ok());
    Ok(Box::new(Split {
        axis: ctx.node.int("axis")?.unwrap_or(0),
        parts,
    }))
}

struct Slice;

impl Op for Slice {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let (starts, ends) = (ctx.ints(1)?, ctx.ints(2)?);
        let axes = if ctx.has(3) {
            ctx.ints(3)?
        } else {
            (0..starts.len() as i64).collect()
        };
        let steps = if ctx.has(4) {
            ctx.ints(4)?
        } else {
            vec![1; starts.len()]
        };
        if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
            return Err(ctx.wrong(
                1,
                "as many starts as ends, axes and steps",
                starts.len().to_string(),
            ));
        }
        let mut value = ctx.value(0)?.clone();
        for i in 0..starts.len() {
            let shape = value.shape();
            let axis = axis_index(axes[i], shape.len()).filter(|_| steps[i] != 0);
            let axis =
                axis.ok_or_else(|| ctx.wrong(3, format!("an axis of {shape:?}"), axes[i].to_string()))?;
            let (start, count) = slice_range(starts[i], ends[i], steps[i], shape[axis] as i64);
            value = map_value!(&value, t => picked(t, axis, start, steps[i] as isize, count));
        }
        ctx.set(0, value);
        Ok(())
    }
}

/// First place and number of places of a slice.
fn slice_range(start: i64, end: i64, step: i64, size: i64) -> (usize, usize) {
    let from_front = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
    let (low, high) = if step > 0 { (0, size) } else { (-1, size - 1) };
    let start = from_front(start).clamp(low.max(0), high.max(0));
    let end = from_front(end).clamp(low, high);
    let count = if step > 0 {
        (end - start).max(0).unsigned_abs().div_ceil(step.unsigned_abs())
    } else {
        (start - end).max(0).unsigned_abs().div_ceil(step.unsigned_abs())
    };
    (start as usize, count as usize)
}

/// `Slice`.
pub fn slice(_: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    Ok(Box::new(Slice))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_worked_out_as_onnx_says() {
        assert_eq!(new_shape(&[2, 3, 4], &[0, -1], false), Some(vec![2, 12]));
        assert_eq!(new_shape(&[2, 3], &[7], false), None);
        assert_eq!(new_shape(&[0, 3], &[0, -1], false), None);
        assert_eq!(inserted(&[3], Some(&[0, -1])), Some(vec![1, 3, 1]));
        assert_eq!(inserted(&[3], Some(&[0, 0])), None);
        assert_eq!(removed(&[1, 3, 1], None), Some(vec![3]));
        assert_eq!(removed(&[1, 3, 1], Some(&[1])), None);
        assert_eq!(slice_range(-1, i64::MAX, 1, 5), (4, 1));
        assert_eq!(slice_range(0, -2, 2, 7), (0, 3));
        assert_eq!(slice_range(-1, i64::MIN, -1, 3), (2, 3));
    }

    #[test]
    fn permuting_moves_axes() {
        let t = Tensor::new([2, 3], vec![1i64, 2, 3, 4, 5, 6]);
        assert_eq!(permuted(&t, &[1, 0]).data(), [1, 4, 2, 5, 3, 6]);
        assert_eq!(picked(&t, 1, 2, -1, 2).data(), [3, 2, 6, 5]);
    }
}
