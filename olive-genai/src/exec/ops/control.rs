//! Constants and values passed on. (`If` is part of the plan: its branches are lists of steps.)

use olive_core::Result;

use super::super::context::{BuildContext, OpContext};
use super::super::registry::Op;
use super::super::value::{Tensor, Value};

struct Identity;

impl Op for Identity {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let value = ctx.take(0)?;
        ctx.set(0, value);
        Ok(())
    }
}

/// `Identity`.
pub fn identity(_: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    Ok(Box::new(Identity))
}

struct Constant(Value);

impl Op for Constant {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        ctx.set(0, self.0.clone());
        Ok(())
    }
}

/// `Constant`.
pub fn constant(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let node = ctx.node;
    let value = if let Some(tensor) = node.tensor("value")? {
        Value::from_ir(tensor)?
    } else if let Some(number) = node.int("value_int")? {
        Value::I64(Tensor::shared([], vec![number]))
    } else if let Some(numbers) = node.ints("value_ints")? {
        Value::I64(Tensor::shared([numbers.len()], numbers.to_vec()))
    } else if let Some(number) = node.float("value_float")? {
        Value::F32(Tensor::shared([], vec![number]))
    } else {
        return Err(ctx.unsupported("has none of `value`, `value_int`, `value_ints`, `value_float`"));
    };
    Ok(Box::new(Constant(value)))
}
