//! Root-mean-square norms.

use olive_core::Result;

use super::super::context::{BuildContext, OpContext};
use super::super::registry::Op;
use crate::kernels::{norm, parallel};

struct Simplified {
    epsilon: f32,
}

impl Op for Simplified {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let mut out = ctx.buffer(ctx.f32(0)?.data().len());
        let (x, weight) = (ctx.f32(0)?, ctx.f32(1)?);
        let width = x.shape().last().copied().unwrap_or(0);
        if weight.data().len() != width || width == 0 {
            return Err(ctx.wrong(1, format!("{width} values"), format!("{:?}", weight.shape())));
        }
        norm::rms_norm(x.data(), weight.data(), self.epsilon, &mut out);
        let shape = x.shape().to_vec();
        ctx.set_f32(0, shape, out);
        Ok(())
    }
}

/// `SimplifiedLayerNormalization` over the last axis.
pub fn simplified(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let axis = ctx.node.int("axis")?.unwrap_or(-1);
    if axis != -1 && axis != 2 {
        return Err(ctx.unsupported(format!("`axis` is {axis}, only the last is normalised")));
    }
    ctx.refuse_inputs(2..ctx.node.inputs.len())?;
    let epsilon = ctx.node.float("epsilon")?.unwrap_or(1e-5);
    Ok(Box::new(Simplified { epsilon }))
}

struct SkipSimplified {
    epsilon: f32,
}

impl Op for SkipSimplified {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let sum = match ctx.take_f32(0) {
            Some(mut x) => {
                let shape = x.shape().to_vec();
                let mut data =
                    std::mem::replace(&mut x, super::super::value::Tensor::new([0], Vec::new())).into_vec();
                let skip = ctx.f32(1)?;
                if skip.data().len() != data.len() {
                    return Err(ctx.wrong(1, format!("{shape:?}"), format!("{:?}", skip.shape())));
                }
                let skip = skip.data();
                parallel::for_pieces(&mut data, 1 << 14, skip.len(), |i, part| {
                    part.iter_mut().zip(&skip[i << 14..]).for_each(|(x, s)| *x += s);
                });
                (shape, data)
            }
            None => {
                let mut data = ctx.buffer(ctx.f32(0)?.data().len());
                let (x, skip) = (ctx.f32(0)?, ctx.f32(1)?);
                if skip.data().len() != data.len() {
                    return Err(ctx.wrong(1, format!("{:?}", x.shape()), format!("{:?}", skip.shape())));
                }
                for ((out, x), skip) in data.iter_mut().zip(x.data()).zip(skip.data()) {
                    *out = x + skip;
                }
                (x.shape().to_vec(), data)
            }
        };
        let (shape, mut sum) = sum;
        if ctx.has(3) {
            let bias = ctx.f32(3)?.data();
            sum.chunks_exact_mut(bias.len().max(1))
                .for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
        }
        let mut out = ctx.buffer(sum.len());
        let weight = ctx.f32(2)?;
        let width = shape.last().copied().unwrap_or(0);
        if weight.data().len() != width || width == 0 {
            return Err(ctx.wrong(2, format!("{width} values"), format!("{:?}", weight.shape())));
        }
        norm::rms_norm(&sum, weight.data(), self.epsilon, &mut out);
        ctx.set_f32(0, shape.clone(), out);
        ctx.set_f32(3, shape, sum);
        Ok(())
    }
}

/// `SkipSimplifiedLayerNormalization`: the norm of `input + skip (+ bias)`, and that sum.
pub fn skip_simplified(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    if ctx.node.output(1).is_some() || ctx.node.output(2).is_some() {
        return Err(ctx.unsupported("the outputs `mean` and `inv_std_var` are not computed"));
    }
    let epsilon = ctx.node.float("epsilon")?.unwrap_or(1e-12);
    Ok(Box::new(SkipSimplified { epsilon }))
}
