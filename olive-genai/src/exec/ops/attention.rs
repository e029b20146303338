//! Attention with its cache, and rotary embedding on its own.

use olive_core::Result;

use super::super::cache::LayerShape;
use super::super::context::{BuildContext, OpContext, Source};
use super::super::registry::Op;
use super::super::value::{Tensor, Value};
use crate::kernels::attention::{AttentionInput, AttentionSpec, NewTokens, attend, store};
use crate::kernels::rope::RotaryTable;
use crate::kernels::{norm, parallel};

struct GroupQuery {
    heads: usize,
    kv_heads: usize,
    scale: Option<f32>,
    softcap: f32,
    window: Option<usize>,
    causal: bool,
    rotary: bool,
    interleaved: bool,
    norm_epsilon: f32,
    layer: usize,
}

/// Queries, keys and values of a step, as the node was given them.
struct Projected {
    batch: usize,
    steps: usize,
    head_size: usize,
    /// `[batch, heads, steps, head_size]`.
    queries: Vec<f32>,
    /// `[batch, kv_heads, steps, head_size]`.
    keys: Vec<f32>,
    /// `[batch, kv_heads, steps, head_size]`.
    values: Vec<f32>,
}

/// Moves `count` heads from column `first` of rows of `width` to `[batch, heads, steps, head_size]`.
fn split_heads(x: &[f32], sizes: (usize, usize), columns: (usize, usize), head_size: usize, out: &mut [f32]) {
    let ((steps, width), (first, count)) = (sizes, columns);
    parallel::for_pieces(out, steps * head_size, x.len(), |i, out| {
        let (row, head) = (i / count, i % count);
        for (s, out) in out.chunks_exact_mut(head_size).enumerate() {
            let at = (row * steps + s) * width + first + head * head_size;
            out.copy_from_slice(&x[at..at + head_size]);
        }
    });
}

impl GroupQuery {
    fn project(&self, ctx: &mut OpContext<'_, '_>) -> Result<Projected> {
        let q = ctx.f32(0)?;
        let [batch, steps, width] = *q.shape() else {
            return Err(ctx.wrong(0, "[batch, steps, width]", format!("{:?}", q.shape())));
        };
        let packed = !ctx.has(1);
        let heads = if packed {
            self.heads + 2 * self.kv_heads
        } else {
            self.heads
        };
        let head_size = width / heads;
        if width == 0 || width % heads != 0 {
            return Err(ctx.wrong(0, format!("a width of {heads} heads"), width.to_string()));
        }
        let kv_width = self.kv_heads * head_size;
        let mut queries = ctx.buffer(batch * steps * self.heads * head_size);
        let mut keys = ctx.buffer(batch * steps * kv_width);
        let mut values = ctx.buffer(batch * steps * kv_width);
        let q = ctx.f32(0)?.data();
        split_heads(q, (steps, width), (0, self.heads), head_size, &mut queries);
        for (part, (i, out)) in [(1, &mut keys), (2, &mut values)].into_iter().enumerate() {
            if packed {
                let first = self.heads * head_size + part * kv_width;
                split_heads(q, (steps, width), (first, self.kv_heads), head_size, out);
            } else {
                let x = ctx.f32(i)?;
                if x.data().len() != out.len() {
                    let expected = format!("[{batch}, {steps}, {kv_width}]");
                    return Err(ctx.wrong(i, expected, format!("{:?}", x.shape())));
                }
                split_heads(x.data(), (steps, kv_width), (0, self.kv_heads), head_size, out);
            }
        }
        Ok(Projected {
            batch,
            steps,
            head_size,
            queries,
            keys,
            values,
        })
    }

    /// For each row, positions before this step and new ones.
    fn rows(&self, ctx: &OpContext<'_, '_>, batch: usize, steps: usize) -> Result<Vec<(usize, usize)>> {
        let last = ctx.ints(5)?;
        let past = ctx.state.cache.lengths();
        if last.len() != batch || past.len() != batch {
            return Err(ctx.wrong(
                5,
                format!("{batch} lengths"),
                format!("{} and {}", last.len(), past.len()),
            ));
        }
        let rows = last.iter().zip(past).map(|(last, past)| {
            let total = usize::try_from(last.checked_add(1)?).ok()?;
            let new = total.checked_sub(*past).filter(|new| *new <= steps)?;
            Some((*past, new))
        });
        let rows: Option<Vec<_>> = rows.collect();
        rows.ok_or_else(|| {
            ctx.wrong(
                5,
                format!("lengths up to {steps} above {past:?}"),
                format!("{last:?} + 1"),
            )
        })
    }

    fn normalise(&self, ctx: &OpContext<'_, '_>, x: &mut Projected) -> Result<()> {
        for (i, heads) in [(14, &mut x.queries), (15, &mut x.keys)] {
            let weight = ctx.f32(i)?;
            if weight.data().len() != x.head_size {
                return Err(ctx.wrong(
                    i,
                    format!("{} values", x.head_size),
                    format!("{:?}", weight.shape()),
                ));
            }
            let source = heads.clone();
            norm::rms_norm(&source, weight.data(), self.norm_epsilon, heads);
        }
        Ok(())
    }

    fn rotate(&self, ctx: &OpContext<'_, '_>, x: &mut Projected, rows: &[(usize, usize)]) -> Result<()> {
        let (cos, sin) = (ctx.f32(7)?, ctx.f32(8)?);
        let table = rotary_table(ctx, (cos, sin), 7, x.head_size)?;
        let needed = rows.iter().map(|(past, new)| past + new).max().unwrap_or(0);
        if needed > table.positions() {
            let found = format!("a sequence of {needed}");
            return Err(ctx.wrong(7, format!("positions below {}", table.positions()), found));
        }
        for (data, heads) in [(&mut x.queries, self.heads), (&mut x.keys, self.kv_heads)] {
            let work = data.len();
            parallel::for_pieces(data, x.steps * x.head_size, work, |i, head| {
                let (past, new) = rows[i / heads];
                for (s, head) in head.chunks_exact_mut(x.head_size).take(new).enumerate() {
                    table.rotate(head, past + s, self.interleaved);
                }
            });
        }
        Ok(())
    }

    fn attend(
        &self,
        ctx: &mut OpContext<'_, '_>,
        x: &Projected,
        rows: &[(usize, usize)],
    ) -> Result<Vec<f32>> {
        let mut out = ctx.buffer(x.queries.len());
        let shape = LayerShape {
            heads: self.kv_heads,
            head_size: x.head_size,
        };
        let total = rows.iter().map(|(past, new)| past + new).max().unwrap_or(0);
        let (keys, values, capacity) = ctx.state.cache.layer(self.layer, shape, total)?;
        let new = NewTokens {
            keys: &x.keys,
            values: &x.values,
            steps: x.steps,
        };
        store(new, shape, rows, capacity, (&mut *keys, &mut *values));
        let spec = AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_size: x.head_size,
            scale: self.scale.unwrap_or(1.0 / (x.head_size as f32).sqrt()),
            softcap: self.softcap,
            window: self.window,
            causal: self.causal,
        };
        let input = AttentionInput {
            queries: &x.queries,
            keys,
            values,
            capacity,
            steps: x.steps,
            rows,
        };
        attend(&spec, &input, &mut out);
        Ok(out)
    }
}

fn rotary_table<'t>(
    ctx: &OpContext<'_, '_>,
    (cos, sin): (&'t Tensor<f32>, &'t Tensor<f32>),
    index: usize,
    head_size: usize,
) -> Result<RotaryTable<'t>> {
    let half = cos.shape().last().copied().unwrap_or(0);
    if half == 0 || 2 * half > head_size || cos.shape() != sin.shape() || cos.shape().len() != 2 {
        let expected = format!("two tables [positions, n] with n up to {}", head_size / 2);
        return Err(ctx.wrong(
            index,
            expected,
            format!("{:?} and {:?}", cos.shape(), sin.shape()),
        ));
    }
    Ok(RotaryTable {
        cos: cos.data(),
        sin: sin.data(),
        half,
    })
}

impl Op for GroupQuery {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let mut x = self.project(ctx)?;
        let rows = self.rows(ctx, x.batch, x.steps)?;
        if ctx.has(14) {
            self.normalise(ctx, &mut x)?;
        }
        if self.rotary {
            self.rotate(ctx, &mut x, &rows)?;
        }
        let out = self.attend(ctx, &x, &rows)?;
        let Projected {
            batch,
            steps,
            head_size,
            queries,
            keys,
            values,
        } = x;
        for spent in [keys, values] {
            ctx.state.pool.give(Value::F32(Tensor::new([spent.len()], spent)));
        }
        let width = self.heads * head_size;
        let out = if steps == 1 {
            ctx.state
                .pool
                .give(Value::F32(Tensor::new([queries.len()], queries)));
            out
        } else {
            let mut joined = queries;
            parallel::for_pieces(&mut joined, width, out.len(), |i, row| {
                let (b, s) = (i / steps, i % steps);
                for (h, head) in row.chunks_exact_mut(head_size).enumerate() {
                    let at = ((b * self.heads + h) * steps + s) * head_size;
                    head.copy_from_slice(&out[at..at + head_size]);
                }
            });
            ctx.state.pool.give(Value::F32(Tensor::new([out.len()], out)));
            joined
        };
        ctx.set_f32(0, [batch, steps, width], out);
        Ok(())
    }
}

/// `GroupQueryAttention` over the runtime's own cache. A windowed cache (`sliding_window_cache`) is kept whole and the
/// window put on the scores, which gives the same result.
pub fn group_query(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    let node = ctx.node;
    let layer = match (ctx.inputs.get(3), ctx.inputs.get(4)) {
        (Some(Source::Cache(key)), Some(Source::Cache(value))) if key == value => *key,
        _ => return Err(ctx.unsupported("inputs 3 and 4 are not the cache of one layer")),
    };
    ctx.refuse_inputs([9, 10, 11, 12, 13])?;
    if node.output(3).is_some() {
        return Err(ctx.unsupported("the output of the scores is asked for"));
    }
    for name in ["smooth_softmax", "qk_output", "kv_cache_bit_width"] {
        if node.int(name)?.is_some_and(|value| value > 0) {
            return Err(ctx.unsupported(format!("`{name}` is set")));
        }
    }
    for name in ["k_quant_type", "v_quant_type"] {
        if node.text(name)?.is_some_and(|value| value != "NONE") {
            return Err(ctx.unsupported(format!("`{name}` is set")));
        }
    }
    let size = |name: &str| {
        node.int(name)
            .map(|v| v.and_then(|v| usize::try_from(v).ok()).unwrap_or(0))
    };
    let (heads, kv_heads) = (size("num_heads")?, size("kv_num_heads")?);
    if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
        return Err(ctx.unsupported(format!("{heads} heads cannot share {kv_heads}")));
    }
    if ctx.has(1) != ctx.has(2) || ctx.has(14) != ctx.has(15) {
        return Err(ctx.unsupported("only one of keys and values (or of their norms) is given"));
    }
    let window = node.int("local_window_size")?.filter(|window| *window > 0);
    let rotary = node.int("do_rotary")?.unwrap_or(0) != 0;
    if rotary && !(ctx.has(7) && ctx.has(8)) {
        return Err(ctx.unsupported("`do_rotary` is set without tables"));
    }
    Ok(Box::new(GroupQuery {
        heads,
        kv_heads,
        scale: node.float("scale")?.filter(|scale| *scale != 0.0),
        softcap: node.float("softcap")?.unwrap_or(0.0),
        window: window.and_then(|window| usize::try_from(window).ok()),
        causal: node.int("causal")?.unwrap_or(1) != 0,
        rotary,
        interleaved: node.int("rotary_interleaved")?.unwrap_or(0) != 0,
        norm_epsilon: node.float("qk_norm_epsilon")?.unwrap_or(1e-6),
        layer,
    }))
}

struct Rotary {
    heads: usize,
    interleaved: bool,
}

impl Op for Rotary {
    fn run(&self, ctx: &mut OpContext<'_, '_>) -> Result<()> {
        let shape = ctx.f32(0)?.shape().to_vec();
        let positions = ctx.ints(1)?;
        // For each head in memory order: which row of the batch and which step it belongs to.
        let (batch, steps, head_size, by_head) = match shape[..] {
            [batch, steps, width] => (batch, steps, width.checked_div(self.heads).unwrap_or(0), 0),
            [batch, heads, steps, head_size] => (batch, steps, head_size, heads),
            _ => return Err(ctx.wrong(0, "3 or 4 axes", format!("{shape:?}"))),
        };
        let head_size = if head_size == 0 {
            2 * ctx.f32(2)?.shape().last().copied().unwrap_or(0)
        } else {
            head_size
        };
        let position = |row: usize, step: usize| match positions.len() {
            1 => positions[0] + step as i64,
            _ => positions.get(row * steps + step).copied().unwrap_or(-1),
        };
        let mut data = ctx.buffer(shape.iter().product());
        data.copy_from_slice(ctx.f32(0)?.data());
        let (cos, sin) = (ctx.f32(2)?, ctx.f32(3)?);
        let table = rotary_table(ctx, (cos, sin), 2, head_size)?;
        let per_step = data.len() / (batch * steps * head_size).max(1);
        for (i, head) in data.chunks_exact_mut(head_size).enumerate() {
            let (row, step) = match by_head {
                0 => (i / per_step / steps, i / per_step % steps),
                heads => (i / steps / heads, i % steps),
            };
            let at = usize::try_from(position(row, step))
                .ok()
                .filter(|at| *at < table.positions());
            let at = at.ok_or_else(|| {
                ctx.wrong(
                    1,
                    format!("positions below {}", table.positions()),
                    position(row, step).to_string(),
                )
            })?;
            table.rotate(head, at, self.interleaved);
        }
        ctx.set_f32(0, shape, data);
        Ok(())
    }
}

/// `RotaryEmbedding`.
pub fn rotary(ctx: &BuildContext<'_>) -> Result<Box<dyn Op>> {
    if ctx.node.int("is_packed_batching")?.unwrap_or(0) != 0 {
        return Err(ctx.unsupported("`is_packed_batching` is set"));
    }
    if ctx.node.float("scale")?.is_some_and(|scale| scale != 1.0) {
        return Err(ctx.unsupported("`scale` is not 1"));
    }
    Ok(Box::new(Rotary {
        heads: ctx
            .node
            .int("num_heads")?
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0),
        interleaved: ctx.node.int("interleaved")?.unwrap_or(0) != 0,
    }))
}
