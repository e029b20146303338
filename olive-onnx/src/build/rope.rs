//! Rotary embedding: tables of cosine and sine `[positions, rotary_dim / 2]` that GroupQueryAttention rotates with.
//!
//! Frequencies and angles are rounded to `f32` at the steps where transformers rounds them, because at far positions
//! the rounding of an angle is not small; cosine and sine themselves are rounded correctly.
//!
//! LongRoPE keeps two pairs of tables in the branches of an `If` on the length of the whole sequence; where a provider has
//! no `If`, one below the other in one table: DirectML's positions are moved to the second, WebGPU's captured graphs
//! choose in the kernel.

use std::sync::Arc;

use olive_core::{ModelSpec, Result, RopeScaling};
use rayon::prelude::*;

use super::floats;
use super::graph::Builder;
use crate::ir::{Dim, Graph, MICROSOFT, Node, OnnxType, Tensor, ValueInfo};

/// The names under which attention reads the tables.
pub const TABLES: [&str; 2] = ["cos_cache", "sin_cache"];

/// Which set of frequencies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// Up to the length of the first training, and where there is only one set.
    Short,
    /// Beyond it.
    Long,
}

impl Builder<'_> {
    /// Adds LongRoPE's choice of tables. Other models' tables are added by [`Builder::rope_initializers`].
    pub fn rope_tables(&mut self) -> Result<()> {
        let Some(original) = switch_length(self.spec) else {
            return Ok(());
        };
        if !self.rotates_in_attention() {
            return self.moved_positions(original);
        }
        if self.stacks_tables() {
            return Ok(());
        }
        let prefix = "/model/rope_caches_subgraph";
        let limit = self.scalar(original as i64)?;
        let width = self.mask_width()?;
        let path = format!("{prefix}/Greater");
        let greater = Node::new(
            &path,
            "Greater",
            &[&width, &limit],
            &[&format!("{path}/output_0")],
        );
        let greater = self.node(greater, OnnxType::Bool, []);
        let long = self.branch(Range::Long, self.spec.max_position)?;
        let short = self.branch(Range::Short, original)?;
        let choice = Node::new(format!("{prefix}/If"), "If", &[&greater], &TABLES)
            .with("then_branch", long)
            .with("else_branch", short);
        let shape = [
            "max_sequence_length".into(),
            Dim::Known(self.spec.rope.rotary_dim / 2),
        ];
        for table in TABLES {
            self.declare(table, self.io, shape.clone());
        }
        self.push(choice);
        Ok(())
    }

    /// Adds the tables of a model with one set of frequencies, or with both in one table; for its first attention.
    pub fn rope_initializers(&mut self) -> Result<()> {
        let ranges = match switch_length(self.spec) {
            None => vec![(Range::Short, self.spec.max_position)],
            Some(original) if self.stacks_tables() => {
                vec![(Range::Short, original), (Range::Long, self.spec.max_position)]
            }
            Some(_) => return Ok(()),
        };
        for (part, name) in TABLES.into_iter().enumerate() {
            self.initializer(table(self.spec, name, &ranges, part, self.io)?);
        }
        Ok(())
    }

    /// Whether LongRoPE's tables stand one below the other.
    fn stacks_tables(&self) -> bool {
        !self.rotates_in_attention() || self.is_captured_webgpu()
    }

    /// Positions in a table whose second part begins at `original`: moved there once one of them is beyond it.
    fn moved_positions(&mut self, original: usize) -> Result<()> {
        let prefix = "/model/pos_ids_reformat";
        let step = |op: &str, name: &str, inputs: &[&str]| {
            let name = format!("{prefix}/{name}");
            Node::new(&name, op, inputs, &[&format!("{name}/output_0")])
        };
        let longest = step("ReduceMax", "ReduceMax", &["position_ids"]).with("keepdims", 0);
        let longest = self.node(longest, OnnxType::Int64, []);
        let limit = self.scalar(original as i64)?;
        let beyond = self.node(
            step("GreaterOrEqual", "GreaterOrEqual", &[&longest, &limit]),
            OnnxType::Bool,
            [],
        );
        let cast = step("Cast", "Cast", &[&beyond]).with("to", i64::from(OnnxType::Int64.code()));
        let beyond = self.node(cast, OnnxType::Int64, []);
        let offset = self.node(step("Mul", "Mul", &[&beyond, &limit]), OnnxType::Int64, []);
        let shape: [Dim; 2] = ["batch_size".into(), "sequence_length".into()];
        self.node(
            step("Add", "Add_1", &[&offset, "position_ids"]),
            OnnxType::Int64,
            shape,
        );
        Ok(())
    }

    /// q or k `[batch, sequence, heads · head_dim]`, rotated before attention.
    pub fn rotated(&mut self, path: &str, part: &str, input: &str, heads: usize) -> String {
        let positions = match switch_length(self.spec) {
            Some(_) => "/model/pos_ids_reformat/Add_1/output_0",
            None => "position_ids",
        };
        let name = format!("{path}/{part}_rotary/RotaryEmbedding");
        let [cos, sin] = TABLES;
        let whole = self.spec.rope.rotary_dim == self.spec.head_dim;
        // The operator finds out both by itself where whole heads are rotated.
        let (num_heads, dim) = if whole {
            (0, 0)
        } else {
            (heads, self.spec.rope.rotary_dim)
        };
        let node = Node::new(
            &name,
            "RotaryEmbedding",
            &[input, positions, cos, sin],
            &[&format!("{name}/output_0")],
        )
        .in_domain(MICROSOFT)
        .with("interleaved", 0)
        .with("num_heads", num_heads as i64)
        .with("rotary_embedding_dim", dim as i64);
        self.hidden(node, heads * self.spec.head_dim)
    }

    fn branch(&self, range: Range, positions: usize) -> Result<Graph> {
        let size = match range {
            Range::Short => "small",
            Range::Long => "large",
        };
        let mut graph = Graph {
            name: format!("{size}_rope_caches_graph"),
            ..Graph::default()
        };
        for (part, name) in TABLES.into_iter().enumerate() {
            let value = format!("{name}_{size}");
            let shape = [positions.into(), Dim::Known(self.spec.rope.rotary_dim / 2)];
            graph.outputs.push(ValueInfo::new(&value, self.io, shape));
            let node = Node::new(format!("/{size}/{name}/Constant"), "Constant", &[], &[&value]);
            let table = table(self.spec, "", &[(range, positions)], part, self.io)?;
            graph.nodes.push(node.with("value", table));
        }
        Ok(graph)
    }
}

/// The length above which LongRoPE changes its frequencies; `None` where there is one set only.
fn switch_length(spec: &ModelSpec) -> Option<usize> {
    match &spec.rope.scaling {
        RopeScaling::LongRope {
            original_max_position,
            ..
        } => Some(*original_max_position).filter(|original| *original < spec.max_position),
        _ => None,
    }
}

/// Cosine (`part` 0) or sine (1) of these ranges, one below the other, made when it is written.
fn table(
    spec: &ModelSpec,
    name: &str,
    ranges: &[(Range, usize)],
    part: usize,
    io: OnnxType,
) -> Result<Tensor> {
    let rows = ranges.iter().map(|(_, positions)| positions).sum();
    let shape = [rows, spec.rope.rotary_dim / 2];
    let (spec, ranges) = (spec.clone(), ranges.to_vec());
    let produce = move || {
        let factor = spec.rope.attention_factor() as f32;
        let curve = if part == 0 { f64::cos } else { f64::sin };
        let mut values = Vec::with_capacity(shape[0] * shape[1]);
        for (range, positions) in &ranges {
            let frequencies = frequencies(&spec, *range);
            let start = values.len();
            values.resize(start + positions * frequencies.len(), 0f32);
            values[start..]
                .par_chunks_exact_mut(frequencies.len())
                .enumerate()
                .for_each(|(position, row)| {
                    for (value, frequency) in row.iter_mut().zip(&frequencies) {
                        let angle = position as f32 * frequency;
                        *value = curve(f64::from(angle)) as f32 * factor;
                    }
                });
        }
        Ok(floats::encode(&values, io))
    };
    Tensor::produced(name, io, shape, Arc::new(produce))
}

/// Inverse frequencies `[rotary_dim / 2]`, rounded as transformers rounds them.
pub fn frequencies(spec: &ModelSpec, range: Range) -> Vec<f32> {
    let rope = &spec.rope;
    let power = |i: usize| {
        let exponent = (2 * i) as f32 / rope.rotary_dim as f32;
        rope.theta.powf(f64::from(exponent)) as f32
    };
    let half = 0..rope.rotary_dim / 2;
    match &rope.scaling {
        RopeScaling::None => half.map(|i| 1.0 / power(i)).collect(),
        RopeScaling::Linear { factor } => half.map(|i| 1.0 / power(i) / *factor as f32).collect(),
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            ..
        } => {
            let factors = match range {
                Range::Short => short_factor,
                Range::Long => long_factor,
            };
            half.map(|i| 1.0 / (factors[i] as f32 * power(i))).collect()
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position,
        } => {
            let (factor, original) = (*factor as f32, *original_max_position as f32);
            let (low, high) = (*low_freq_factor as f32, *high_freq_factor as f32);
            let rescale = |frequency: f32| {
                // A number over a tensor is its reciprocal times the number there.
                let wavelength = (1.0 / frequency) * std::f32::consts::TAU;
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor
                } else {
                    let smooth = ((1.0 / wavelength) * original - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            };
            half.map(|i| rescale(1.0 / power(i))).collect()
        }
    }
}
