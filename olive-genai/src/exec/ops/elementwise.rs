//! Operators that work on one element at a time, with ONNX's broadcasting.

use olive_core::Result;

use super::super::context::{BuildContext, OpContext};
use super::super::registry::Op;
use super::super::value::{Tensor, Value};
use crate::kernels::isa::{isa, multiversion};
use crate::kernels::{exp, parallel};

const PIECE: usize = 1 << 14;

#[derive(Clone, Copy)]
enum Arithmetic {
    Add,
    Sub,
    Mul,
    Div,
}

/// The sizes of the result of two broadcast inputs.
fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let size = |shape: &[usize], i: usize| (i + shape.len()).checked_sub(rank).map_or(1, |at| shape[at]);
    (0..rank)
        .map(|i| match (size(a, i), size(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

/// How far to step in an input for each axis of the result.
fn strides(shape: &[usize], result: &[usize]) -> Vec<usize> {
    let mut strides = vec![0; result.len()];
    let mut step = 1;
    for (i, size) in shape.iter().enumerate().rev() {
        let at = i + result.len() - shape.len();
        strides[at] = if *size == 1 { 0 } else { step };
        step *= size;
    }
    strides
}

fn zip_with<T: bytemuck::Pod, U>(
    a: &Tensor<T>,
    b: &Tensor<T>,
    shape: &[usize],
    f: impl Fn(T, T) -> U,
) -> Vec<U> {
    let (x, y) = (a.data(), b.data());
    if a.shape() == b.shape() {
        return x.iter().zip(y).map(|(x, y)| f(*x, *y)).collect();
    }
    if let [y] = y
        && x.len() == shape.iter().product::<usize>()
    {
        return x.iter().map(|x| f(*x, *y)).collect();
    }
    let (sa, sb) = (strides(a.shape(), shape), strides(b.shape(), shape));
    let total: usize = shape.iter().product();
    let mut out = Vec::with_capacity(total);
    let mut index = vec![0; shape.len()];
    let (mut pa, mut pb) = (0, 0);
    for _ in 0..total {
        out.push(f(x[pa], y[pb]));
        for d in (0..shape.len()).rev() {
            index[d] += 1;
            pa += sa[d];
            pb += sb[d];
            if index[d] < shape[d] {
                break;
            }
            pa -= sa[d] * shape[d];
            pb -= sb[d] * shape[d];
            index[d] = 0;
        }
    }
    out
}

struct Binary(Arithmetic);

impl Op for Binary {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let (a, b) = (ctx.value(0)?, ctx.value(1)?);
        let shape = broadcast(a.shape(), b.shape());
        let shape = shape.ok_or_else(|| {
            ctx.wrong(
                1,
                format!("sizes that go with {:?}", a.shape()),
                format!("{:?}", b.shape()),
            )
        })?;
        if self.in_place(ctx, &shape)? {
            return Ok(());
        }
        let (a, b) = (ctx.value(0)?, ctx.value(1)?);
        let out = match (a, b) {
            (Value::F32(a), Value::F32(b)) => {
                let data = match self.0 {
                    Arithmetic::Add => zip_with(a, b, &shape, |x, y| x + y),
                    Arithmetic::Sub => zip_with(a, b, &shape, |x, y| x - y),
                    Arithmetic::Mul => zip_with(a, b, &shape, |x, y| x * y),
                    Arithmetic::Div => zip_with(a, b, &shape, |x, y| x / y),
                };
                Value::F32(Tensor::new(shape, data))
            }
            (Value::I64(a), Value::I64(b)) => {
                let data = zip_with(a, b, &shape, |x, y| self.integers(x, y));
                let data: Option<Vec<i64>> = data.into_iter().collect();
                let data = data.ok_or_else(|| ctx.wrong(1, "a divisor other than 0", "0"))?;
                Value::I64(Tensor::new(shape, data))
            }
            (Value::I32(a), Value::I32(b)) => {
                let data = zip_with(a, b, &shape, |x, y| self.integers(i64::from(x), i64::from(y)));
                let data: Option<Vec<i32>> = data.into_iter().map(|v| v.map(|v| v as i32)).collect();
                let data = data.ok_or_else(|| ctx.wrong(1, "a divisor other than 0", "0"))?;
                Value::I32(Tensor::new(shape, data))
            }
            (a, b) => return Err(ctx.wrong(1, a.type_name(), b.type_name())),
        };
        ctx.set(0, out);
        Ok(())
    }
}

impl Binary {
    fn integers(&self, x: i64, y: i64) -> Option<i64> {
        match self.0 {
            Arithmetic::Add => Some(x.wrapping_add(y)),
            Arithmetic::Sub => Some(x.wrapping_sub(y)),
            Arithmetic::Mul => Some(x.wrapping_mul(y)),
            Arithmetic::Div => x.checked_div(y),
        }
    }

    /// Writes over input 0 where its buffer is free and input 1 has the same sizes, is one number or one row.
    fn in_place(&self, ctx: &mut OpContext<'_, '_>, shape: &[usize]) -> Result<bool> {
        let (Value::F32(a), Value::F32(b)) = (ctx.value(0)?, ctx.value(1)?) else {
            return Ok(false);
        };
        let row = b.data().len();
        let is_row = b.shape().len() == 1 && shape.last() == Some(&row);
        if a.shape() != shape || row == 0 || !(b.shape() == shape || row == 1 || is_row) {
            return Ok(false);
        }
        let Some(a) = ctx.take_f32(0) else {
            return Ok(false);
        };
        let mut data = a.into_vec();
        let b = ctx.f32(1)?.data();
        let (kind, isa, total) = (self.0, isa(), data.len());
        if b.len() == total {
            parallel::for_pieces(&mut data, PIECE, total, |i, out| {
                combine(isa, kind, out, &b[i * PIECE..][..out.len()]);
            });
        } else if let [b] = b {
            data.iter_mut().for_each(|x| *x = kind.apply(*x, *b));
        } else {
            data.chunks_exact_mut(b.len())
                .for_each(|out| combine(isa, kind, out, b));
        }
        ctx.set_f32(0, shape, data);
        Ok(true)
    }
}

impl Arithmetic {
    #[inline(always)]
    fn apply(self, x: f32, y: f32) -> f32 {
        match self {
            Self::Add => x + y,
            Self::Sub => x - y,
            Self::Mul => x * y,
            Self::Div => x / y,
        }
    }
}

multiversion! {
    fn combine(isa; kind: Arithmetic, x: &mut [f32], y: &[f32]) = combine_plain
}

#[inline(always)]
fn combine_plain(kind: Arithmetic, x: &mut [f32], y: &[f32]) {
    match kind {
        Arithmetic::Add => x.iter_mut().zip(y).for_each(|(x, y)| *x += y),
        Arithmetic::Sub => x.iter_mut().zip(y).for_each(|(x, y)| *x -= y),
        Arithmetic::Mul => x.iter_mut().zip(y).for_each(|(x, y)| *x *= y),
        Arithmetic::Div => x.iter_mut().zip(y).for_each(|(x, y)| *x /= y),
    }
}

/// `Add`, `Sub`, `Mul`, `Div`.
pub fn arithmetic(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let kind = match ctx.node.op_type.as_str() {
        "Add" => Arithmetic::Add,
        "Sub" => Arithmetic::Sub,
        "Mul" => Arithmetic::Mul,
        _ => Arithmetic::Div,
    };
    Ok(Box::new(Binary(kind)))
}

struct Comparison(fn(f64, f64) -> bool);

impl Op for Comparison {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let (a, b) = (ctx.value(0)?, ctx.value(1)?);
        let shape = broadcast(a.shape(), b.shape());
        let shape = shape.ok_or_else(|| {
            ctx.wrong(
                1,
                format!("sizes that go with {:?}", a.shape()),
                format!("{:?}", b.shape()),
            )
        })?;
        let f = |x: f64, y: f64| u8::from((self.0)(x, y));
        let data = match (a, b) {
            (Value::F32(a), Value::F32(b)) => zip_with(a, b, &shape, |x, y| f(f64::from(x), f64::from(y))),
            (Value::I64(a), Value::I64(b)) => zip_with(a, b, &shape, |x, y| f(x as f64, y as f64)),
            (Value::I32(a), Value::I32(b)) => zip_with(a, b, &shape, |x, y| f(f64::from(x), f64::from(y))),
            (a, b) => return Err(ctx.wrong(1, a.type_name(), b.type_name())),
        };
        ctx.set(0, Value::Bool(Tensor::new(shape, data)));
        Ok(())
    }
}

/// `Greater`, `GreaterOrEqual`, `Less`, `LessOrEqual`, `Equal`.
pub fn comparison(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let test: fn(f64, f64) -> bool = match ctx.node.op_type.as_str() {
        "Greater" => |a, b| a > b,
        "GreaterOrEqual" => |a, b| a >= b,
        "Less" => |a, b| a < b,
        "LessOrEqual" => |a, b| a <= b,
        _ => |a, b| a == b,
    };
    Ok(Box::new(Comparison(test)))
}

#[derive(Clone, Copy)]
enum Function {
    Sigmoid,
    Tanh,
    Relu,
    Exp,
    Sqrt,
    Neg,
    Gelu,
    FastGelu,
}

multiversion! {
    fn apply(isa; function: Function, values: &mut [f32]) = apply_plain
}

#[inline(always)]
fn apply_plain(function: Function, values: &mut [f32]) {
    match function {
        Function::Sigmoid => values.iter_mut().for_each(|x| *x = 1.0 / (1.0 + exp::exp(-*x))),
        Function::Tanh => values.iter_mut().for_each(|x| *x = x.tanh()),
        Function::Relu => values.iter_mut().for_each(|x| *x = x.max(0.0)),
        Function::Exp => values.iter_mut().for_each(|x| *x = x.exp()),
        Function::Sqrt => values.iter_mut().for_each(|x| *x = x.sqrt()),
        Function::Neg => values.iter_mut().for_each(|x| *x = -*x),
        Function::Gelu => values.iter_mut().for_each(|x| *x = gelu_exact(*x)),
        Function::FastGelu => values.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
    }
}

/// `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`, written with a sigmoid.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const FACTOR: f32 = 1.595_769_2;
    let inner = FACTOR * (x + 0.044_715 * x * x * x);
    x / (1.0 + exp::exp(-inner))
}

/// `x / 2 · (1 + erf(x / √2))`.
fn gelu_exact(x: f32) -> f32 {
    let x = f64::from(x);
    (x * 0.5 * erfc(-x / std::f64::consts::SQRT_2)) as f32
}

/// The complementary error function, by its series near zero and its continued fraction elsewhere.
fn erfc(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 2.5 {
        let (mut term, mut sum) = (a, a);
        for n in 1..60 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let tail = (1..60).rev().fold(0.0, |t, n| f64::from(n) * 0.5 / (a + t));
        (-a * a).exp() / ((a + tail) * std::f64::consts::PI.sqrt())
    };
    if x < 0.0 { 2.0 - value } else { value }
}

struct Unary(Function);

impl Op for Unary {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let shape = ctx.f32(0)?.shape().to_vec();
        let mut data = match ctx.take_f32(0) {
            Some(tensor) => tensor.into_vec(),
            None => {
                let mut data = ctx.buffer(shape.iter().product());
                data.copy_from_slice(ctx.f32(0)?.data());
                data
            }
        };
        let (function, isa) = (self.0, isa());
        let work = data.len() * 8;
        parallel::for_pieces(&mut data, PIECE, work, |_, part| apply(isa, function, part));
        ctx.set_f32(0, shape, data);
        Ok(())
    }
}

/// `Sigmoid`, `Tanh`, `Relu`, `Exp`, `Sqrt`, `Neg`.
pub fn unary(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    Ok(Box::new(Unary(match ctx.node.op_type.as_str() {
        "Sigmoid" => Function::Sigmoid,
        "Tanh" => Function::Tanh,
        "Relu" => Function::Relu,
        "Exp" => Function::Exp,
        "Sqrt" => Function::Sqrt,
        _ => Function::Neg,
    })))
}

/// `Gelu`, exact or `approximate="tanh"`.
pub fn gelu(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    match ctx.node.text("approximate")?.unwrap_or("none") {
        "none" => Ok(Box::new(Unary(Function::Gelu))),
        "tanh" => Ok(Box::new(Unary(Function::FastGelu))),
        other => Err(ctx.unsupported(format!("`approximate` is `{other}`"))),
    }
}

/// `FastGelu` without a bias.
pub fn fast_gelu(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    ctx.refuse_inputs([1])?;
    Ok(Box::new(Unary(Function::FastGelu)))
}

#[derive(Clone, Copy)]
enum Target {
    F32,
    I64,
    I32,
    Bool,
}

struct Cast(Target);

impl Op for Cast {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let value = ctx.take(0)?;
        let shape = value.shape().to_vec();
        let out = match (self.0, value) {
            (Target::F32, value @ Value::F32(_)) | (Target::I64, value @ Value::I64(_)) => value,
            (Target::I32, value @ Value::I32(_)) | (Target::Bool, value @ Value::Bool(_)) => value,
            (target, Value::F32(t)) => {
                let data = t.data();
                match target {
                    Target::I64 => Value::I64(Tensor::new(shape, data.iter().map(|v| *v as i64).collect())),
                    Target::I32 => Value::I32(Tensor::new(shape, data.iter().map(|v| *v as i32).collect())),
                    _ => Value::Bool(Tensor::new(
                        shape,
                        data.iter().map(|v| u8::from(*v != 0.0)).collect(),
                    )),
                }
            }
            (target, value) => {
                let data = value.to_i64().unwrap_or_default();
                match target {
                    Target::F32 => Value::F32(Tensor::new(shape, data.iter().map(|v| *v as f32).collect())),
                    Target::I64 => Value::I64(Tensor::new(shape, data)),
                    Target::I32 => Value::I32(Tensor::new(shape, data.iter().map(|v| *v as i32).collect())),
                    Target::Bool => Value::Bool(Tensor::new(
                        shape,
                        data.iter().map(|v| u8::from(*v != 0)).collect(),
                    )),
                }
            }
        };
        ctx.set(0, out);
        Ok(())
    }
}

/// `Cast` between floats, 32- and 64-bit integers and booleans. All floats are computed with 32 bits.
pub fn cast(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    Ok(Box::new(Cast(match ctx.node.int("to")? {
        Some(1 | 10 | 11 | 16) => Target::F32,
        Some(7) => Target::I64,
        Some(6) => Target::I32,
        Some(9) => Target::Bool,
        other => return Err(ctx.unsupported(format!("`to` is {other:?}"))),
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting_follows_numpy() {
        assert_eq!(broadcast(&[2, 1, 4], &[3, 1]), Some(vec![2, 3, 4]));
        assert_eq!(broadcast(&[2], &[3]), None);
        let a = Tensor::new([2, 1], vec![10i64, 20]);
        let b = Tensor::new([3], vec![1i64, 2, 3]);
        assert_eq!(zip_with(&a, &b, &[2, 3], |x, y| x + y), [11, 12, 13, 21, 22, 23]);
    }

    #[test]
    fn gelu_equals_known_values() {
        for (x, exact, tanh) in [
            (1.0, 0.841_344_7, 0.841_192),
            (-2.0, -0.045_500_26, -0.045_402_3),
            (3.5, 3.499_186, 3.499_313),
        ] {
            assert!((gelu_exact(x) - exact).abs() < 1e-5, "{x}");
            assert!((gelu_tanh(x) - tanh).abs() < 1e-4, "{x}");
        }
        assert!((erfc(0.5) - 0.479_500_122_186_953_5).abs() < 1e-14);
        assert!((erfc(3.0) - 2.209_049_699_858_544e-5).abs() < 1e-15);
    }
}
