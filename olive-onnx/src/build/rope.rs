//! Rotary embedding: tables of cosine and sine `[positions, rotary_dim / 2]` that GroupQueryAttention rotates with.
//!
//! Frequencies and angles are rounded to `f32` at the steps where transformers rounds them, because at far positions
//! the rounding of an angle is not small; cosine and sine themselves are rounded correctly.
//!
//! LongRoPE keeps two pairs of tables in the branches of an `If` on the length of the whole sequence.

use std::sync::Arc;

use olive_core::{ModelSpec, Result, RopeScaling};

use super::graph::Builder;
use crate::ir::{Dim, Graph, Node, OnnxType, Tensor, ValueInfo};

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
        let long = branch(self.spec, Range::Long, self.spec.max_position)?;
        let short = branch(self.spec, Range::Short, original)?;
        let choice = Node::new(format!("{prefix}/If"), "If", &[&greater], &TABLES)
            .with("then_branch", long)
            .with("else_branch", short);
        let shape = [
            "max_sequence_length".into(),
            Dim::Known(self.spec.rope.rotary_dim / 2),
        ];
        for table in TABLES {
            self.declare(table, OnnxType::Float, shape.clone());
        }
        self.push(choice);
        Ok(())
    }

    /// Adds the tables of a model with one set of frequencies; for its first attention.
    pub fn rope_initializers(&mut self) -> Result<()> {
        if switch_length(self.spec).is_none() {
            for (part, name) in TABLES.into_iter().enumerate() {
                self.initializer(table(
                    self.spec,
                    name,
                    Range::Short,
                    self.spec.max_position,
                    part,
                )?);
            }
        }
        Ok(())
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

fn branch(spec: &ModelSpec, range: Range, positions: usize) -> Result<Graph> {
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
        let shape = [positions.into(), Dim::Known(spec.rope.rotary_dim / 2)];
        graph.outputs.push(ValueInfo::new(&value, OnnxType::Float, shape));
        let node = Node::new(format!("/{size}/{name}/Constant"), "Constant", &[], &[&value]);
        graph
            .nodes
            .push(node.with("value", table(spec, "", range, positions, part)?));
    }
    Ok(graph)
}

/// Cosine (`part` 0) or sine (1), made when it is written.
fn table(spec: &ModelSpec, name: &str, range: Range, positions: usize, part: usize) -> Result<Tensor> {
    let shape = [positions, spec.rope.rotary_dim / 2];
    let spec = spec.clone();
    let produce = move || {
        let frequencies = frequencies(&spec, range);
        let factor = spec.rope.attention_factor() as f32;
        let curve = if part == 0 { f64::cos } else { f64::sin };
        let mut bytes = Vec::with_capacity(positions * frequencies.len() * 4);
        for position in 0..positions {
            for frequency in &frequencies {
                let angle = position as f32 * frequency;
                bytes.extend_from_slice(&(curve(f64::from(angle)) as f32 * factor).to_le_bytes());
            }
        }
        Ok(bytes)
    };
    Tensor::produced(name, OnnxType::Float, shape, Arc::new(produce))
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
