//! Matrix products.

use olive_core::Result;

use super::super::context::{BuildContext, OpContext};
use super::super::registry::Op;
use super::super::value::{Tensor, Value};
use crate::kernels::nbits::NBitsShape;
use crate::kernels::{NBitsWeight, ZeroPoints, dense as product, isa};

struct Dense;

impl Op for Dense {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let (x, weight) = (ctx.f32(0)?, ctx.f32(1)?);
        let (k, n) = product_sizes(ctx, x, weight, 1)?;
        let rows = x.shape()[..x.shape().len() - 1].iter().product::<usize>();
        let mut shape = x.shape().to_vec();
        shape.pop();
        shape.push(n);
        let mut out = ctx.buffer(rows * n);
        let (x, weight) = (ctx.f32(0)?, ctx.f32(1)?);
        product::matmul(x.data(), weight.data(), rows, k, n, &mut out);
        ctx.set_f32(0, shape, out);
        Ok(())
    }
}

/// `k` and `n` of `[…, k] · [k, n]`.
fn product_sizes(
    ctx: &OpContext<'_, '_>,
    x: &Tensor<f32>,
    weight: &Tensor<f32>,
    index: usize,
) -> Result<(usize, usize)> {
    match (x.shape().last(), weight.shape()) {
        (Some(width), [k, n]) if width == k => Ok((*k, *n)),
        (width, found) => {
            let expected = format!("[{}, n]", width.copied().unwrap_or(0));
            Err(ctx.wrong(index, expected, format!("{found:?}")))
        }
    }
}

/// `MatMul` with a matrix on the right.
pub fn dense(_: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    Ok(Box::new(Dense))
}

struct NBits {
    weight: NBitsWeight,
    quantize_activations: bool,
    bias: Option<Value>,
}

impl Op for NBits {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let x = ctx.f32(0)?;
        if x.shape().last() != Some(&self.weight.k) {
            let expected = format!("[…, {}]", self.weight.k);
            return Err(ctx.wrong(0, expected, format!("{:?}", x.shape())));
        }
        let mut shape = x.shape().to_vec();
        shape.pop();
        shape.push(self.weight.n);
        let mut out = ctx.buffer(shape.iter().product());
        if self.quantize_activations {
            ctx.round_input(self.weight.bits, self.weight.block)?;
            self.weight
                .matmul_quantized(isa(), &ctx.state.rounded.values, &mut out);
        } else {
            self.weight.matmul(ctx.f32(0)?.data(), false, &mut out);
        }
        if let Some(Value::F32(bias)) = &self.bias {
            for row in out.chunks_exact_mut(self.weight.n) {
                row.iter_mut().zip(bias.data()).for_each(|(y, b)| *y += b);
            }
        }
        ctx.set_f32(0, shape, out);
        Ok(())
    }
}

/// `MatMulNBits`. `accuracy_level` 4 rounds activations to 8 bits; every other level computes with floats.
pub fn n_bits(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let node = ctx.node;
    let size = |name: &str, default: Option<i64>| {
        let value = node.int(name)?.or(default);
        let value = value
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| *v < 1 << 31);
        value.ok_or_else(|| ctx.unsupported(format!("attribute `{name}` is missing or out of range")))
    };
    let shape = NBitsShape {
        n: size("N", None)?,
        k: size("K", None)?,
        bits: size("bits", Some(4))?,
        block: size("block_size", None)?,
    };
    if node.int("weight_prepacked")?.unwrap_or(0) != 0 {
        return Err(ctx.unsupported("the weight is prepacked for another device"));
    }
    ctx.refuse_inputs([4])?;
    if !matches!(shape.bits, 4 | 8) {
        return Err(ctx.unsupported(format!("`bits` is {}, packed weights have 4 or 8", shape.bits)));
    }
    let floats = |i: usize| match ctx.constant(i) {
        Some(Value::F32(tensor)) => Ok(tensor.clone()),
        _ => Err(ctx.unsupported(format!("input {i} is not a float constant"))),
    };
    let zero_points = match ctx.constant(3) {
        None if !ctx.has(3) => ZeroPoints::Constant(1 << (shape.bits - 1)),
        Some(Value::U8(bytes)) => {
            NBitsWeight::unpack_zero_points(node.input(3).unwrap_or_default(), bytes.data(), shape)?
        }
        Some(Value::F32(points)) => ZeroPoints::Floats(points.data().to_vec()),
        _ => return Err(ctx.unsupported("the zero points are neither bytes nor floats of the file")),
    };
    let bias = match ctx.has(5) {
        true => Some(floats(5)?),
        false => None,
    };
    if bias.as_ref().is_some_and(|bias| bias.data().len() != shape.n) {
        return Err(ctx.unsupported(format!("the bias does not have {} values", shape.n)));
    }
    let scales = floats(2)?;
    let weight = NBitsWeight::new(shape, ctx.initializer(1)?.clone(), scales.data(), zero_points)?;
    let quantize_activations = node.int("accuracy_level")?.unwrap_or(0) == 4 && weight.takes_integers();
    let bias = bias.map(Value::F32);
    Ok(Box::new(NBits {
        weight,
        quantize_activations,
        bias,
    }))
}

struct LoraAdd;

impl Op for LoraAdd {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let (x, a, b) = (ctx.f32(1)?, ctx.f32(2)?, ctx.f32(3)?);
        let (k, rank) = product_sizes(ctx, x, a, 2)?;
        if b.shape().len() != 2 || b.shape()[0] != rank {
            return Err(ctx.wrong(3, format!("[{rank}, n]"), format!("{:?}", b.shape())));
        }
        let n = b.shape()[1];
        if rank == 0 {
            let base = ctx.take(0)?;
            ctx.set(0, base);
            return Ok(());
        }
        let rows = x.data().len() / k.max(1);
        let found = ctx.f32(0)?.shape().to_vec();
        if found.iter().product::<usize>() != rows * n {
            return Err(ctx.wrong(0, format!("{rows} rows of {n}"), format!("{found:?}")));
        }
        let mut low = ctx.buffer(rows * rank);
        let mut sum = match ctx.take_f32(0) {
            Some(base) => base.into_vec(),
            None => {
                let mut sum = ctx.buffer(rows * n);
                sum.copy_from_slice(ctx.f32(0)?.data());
                sum
            }
        };
        let (x, a, b) = (ctx.f32(1)?, ctx.f32(2)?, ctx.f32(3)?);
        if let (Some(a), Some(b)) = (a.panels(), b.panels()) {
            low.fill(0.0);
            a.add_product(x.data(), &mut low);
            b.add_product(&low, &mut sum);
        } else {
            let mut delta = vec![0.0; rows * n];
            product::matmul(x.data(), a.data(), rows, k, rank, &mut low);
            product::matmul(&low, b.data(), rows, rank, n, &mut delta);
            sum.iter_mut().zip(&delta).for_each(|(s, d)| *s += d);
        }
        ctx.set_f32(0, found, sum);
        ctx.state.pool.give(Value::F32(Tensor::new([low.len()], low)));
        Ok(())
    }
}

/// `base + (x · a) · b`; with a rank of zero the base is passed on untouched.
pub fn lora_add(_: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    Ok(Box::new(LoraAdd))
}
