//! Rows of tables.

use olive_core::Result;

use super::super::context::{BuildContext, OpContext};
use super::super::registry::Op;
use super::super::value::{Tensor, Value};
use super::shape::axis_index;

struct Gather {
    axis: i64,
}

impl Op for Gather {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let (table, indices) = (ctx.value(0)?, ctx.value(1)?);
        let sizes = table.shape();
        let axis = axis_index(self.axis, sizes.len());
        let axis =
            axis.ok_or_else(|| ctx.wrong(0, format!("a rank above {}", self.axis), format!("{sizes:?}")))?;
        let rows = rows_of(ctx, sizes[axis])?;
        let mut shape = sizes[..axis].to_vec();
        shape.extend(indices.shape());
        shape.extend(&sizes[axis + 1..]);
        let out = match table {
            Value::F32(t) => Value::F32(take(t, axis, &rows, shape)),
            Value::I64(t) => Value::I64(take(t, axis, &rows, shape)),
            Value::I32(t) => Value::I32(take(t, axis, &rows, shape)),
            Value::U8(t) => Value::U8(take(t, axis, &rows, shape)),
            Value::Bool(t) => Value::Bool(take(t, axis, &rows, shape)),
        };
        ctx.set(0, out);
        Ok(())
    }
}

/// Input 1 as places in an axis of `size`; negative ones count from the end.
fn rows_of(ctx: &OpContext<'_, '_>, size: usize) -> Result<Vec<usize>> {
    let indices = ctx.ints(1)?;
    let place = |i: &i64| {
        axis_index(*i, size).ok_or_else(|| ctx.wrong(1, format!("indices below {size}"), i.to_string()))
    };
    indices.iter().map(place).collect()
}

fn take<T: bytemuck::Pod>(table: &Tensor<T>, axis: usize, rows: &[usize], shape: Vec<usize>) -> Tensor<T> {
    let sizes = table.shape();
    let inner: usize = sizes[axis + 1..].iter().product();
    let outer: usize = sizes[..axis].iter().product();
    let mut out = Vec::with_capacity(outer * rows.len() * inner);
    for o in 0..outer {
        for row in rows {
            out.extend_from_slice(&table.data()[(o * sizes[axis] + row) * inner..][..inner]);
        }
    }
    Tensor::new(shape, out)
}

/// `Gather`.
pub fn gather(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let axis = ctx.node.int("axis")?.unwrap_or(0);
    Ok(Box::new(Gather { axis }))
}

struct Columns;

impl Op for Columns {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let table = ctx.f32(0)?;
        let [height, width] = *table.shape() else {
            return Err(ctx.wrong(0, "a matrix", format!("{:?}", table.shape())));
        };
        let columns = rows_of(ctx, width)?;
        let mut shape = ctx.value(1)?.shape().to_vec();
        shape.push(height);
        let data = table.data();
        let column = |c: &usize| (0..height).map(|r| data[r * width + c]).collect::<Vec<f32>>();
        let out: Vec<f32> = columns.iter().flat_map(column).collect();
        ctx.set_f32(0, shape, out);
        Ok(())
    }
}

/// Rows of the transpose of a matrix: a head's weight read as an embedding.
pub fn columns(_: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    Ok(Box::new(Columns))
}

struct BlockQuantized {
    table: Tensor<u8>,
    scales: Tensor<f32>,
    zero_points: Option<Tensor<u8>>,
    bits: usize,
    block: usize,
    rows: usize,
    width: usize,
}

impl Op for BlockQuantized {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let indices = ctx.ints(1)?;
        let mut shape = ctx.value(1)?.shape().to_vec();
        shape.push(self.width);
        let mut out = ctx.buffer(indices.len() * self.width);
        for (index, out) in indices.iter().zip(out.chunks_exact_mut(self.width)) {
            match axis_index(*index, self.rows) {
                Some(row) => self.row(row, out),
                None => out.fill(0.0),
            }
        }
        ctx.set_f32(0, shape, out);
        Ok(())
    }
}

impl BlockQuantized {
    fn element(&self, bytes: &[u8], i: usize) -> f32 {
        let per_byte = 8 / self.bits;
        let mask = ((1u16 << self.bits) - 1) as u8;
        f32::from(bytes[i / per_byte] >> (i % per_byte * self.bits) & mask)
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        let blocks = self.width.div_ceil(self.block);
        let bytes = &self.table.data()[row * self.width * self.bits / 8..];
        let scales = &self.scales.data()[row * blocks..][..blocks];
        let point_row = (blocks * self.bits).div_ceil(8);
        for (i, v) in out.iter_mut().enumerate() {
            let block = i / self.block;
            let zero = match &self.zero_points {
                None => f32::from(1u8 << (self.bits - 1)),
                Some(points) => self.element(&points.data()[row * point_row..], block),
            };
            *v = (self.element(bytes, i) - zero) * scales[block];
        }
    }
}

/// `GatherBlockQuantized` of bytes, rows of a table with blocks along a row.
pub fn block_quantized(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let node = ctx.node;
    let bits = usize::try_from(node.int("bits")?.unwrap_or(4)).unwrap_or(0);
    let block = usize::try_from(node.int("block_size")?.unwrap_or(128)).unwrap_or(0);
    let Some(Value::U8(table)) = ctx.constant(0) else {
        return Err(ctx.unsupported("the table is not a constant of bytes"));
    };
    let Some(Value::F32(scales)) = ctx.constant(2) else {
        return Err(ctx.unsupported("the scales are not a float constant"));
    };
    let zero_points = match ctx.constant(3) {
        None if !ctx.has(3) => None,
        Some(Value::U8(points)) => Some(points.clone()),
        _ => return Err(ctx.unsupported("the zero points are not a constant of bytes")),
    };
    let rank = table.shape().len();
    let gather = axis_index(node.int("gather_axis")?.unwrap_or(0), rank);
    let quantize = axis_index(node.int("quantize_axis")?.unwrap_or(1), rank);
    let plain = rank == 2 && gather == Some(0) && quantize == Some(1);
    if !plain || !matches!(bits, 2 | 4 | 8) || !block.is_power_of_two() || block < 16 {
        let shape = table.shape();
        return Err(ctx.unsupported(format!(
            "{bits} bits in blocks of {block} of {shape:?}, gathered along {gather:?}, quantized along {quantize:?}"
        )));
    }
    let (rows, width) = (table.shape()[0], table.shape()[1] * 8 / bits);
    let blocks = width.div_ceil(block);
    let points = zero_points
        .as_ref()
        .map_or(rows * (blocks * bits).div_ceil(8), |z| z.data().len());
    if scales.data().len() != rows * blocks || points != rows * (blocks * bits).div_ceil(8) {
        return Err(ctx.unsupported(format!("scales or zero points do not fit [{rows}, {blocks}]")));
    }
    Ok(Box::new(BlockQuantized {
        table: table.clone(),
        scales: scales.clone(),
        zero_points,
        bits,
        block,
        rows,
        width,
    }))
}
