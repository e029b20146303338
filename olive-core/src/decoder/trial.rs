//! Half layers whose weights are tried out on many tokens: weights packed once in the kernels' order, one sequence a
//! thread, buffers used again.

use std::cell::RefCell;

use burn::tensor::backend::Backend;

use super::host::{self, HostTensor, Rotation};
use super::layer::DecoderLayer;
use super::linear::BaseWeight;
use super::sequence::SequenceTables;
use crate::arch::{Activation, LinearRole};
use crate::kernels::attention::RowAttention;
use crate::kernels::{Packed, View, product_packed, wide};

thread_local! {
    /// Outputs of the first linears, and inputs of the last.
    static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Linears that read one input, side by side.
struct PackedLinears {
    parts: Vec<(Packed, Option<Vec<f32>>)>,
    outputs: usize,
}

impl PackedLinears {
    /// The linears of `roles`, if their weights are dense and in host memory and nothing is added to them.
    fn new<B: Backend>(layer: &DecoderLayer<B>, roles: &[LinearRole]) -> Option<Self> {
        let mut own = Self {
            parts: Vec::new(),
            outputs: 0,
        };
        for (_, linear) in layer.linears().filter(|(role, _)| roles.contains(role)) {
            let BaseWeight::Dense(weight) = &linear.weight else {
                return None;
            };
            if linear.low_rank.is_some() {
                return None;
            }
            let [outputs, inputs] = linear.shape();
            let values = HostTensor::of(weight)?;
            let packed = Packed::new(View::new(values.values(), [outputs, inputs], inputs).transposed());
            let bias = match &linear.bias {
                Some(bias) => Some(HostTensor::of(bias)?.values().to_vec()),
                None => None,
            };
            own.parts.push((packed, bias));
            own.outputs += outputs;
        }
        Some(own)
    }

    /// `[rows, in]` to `[rows, out]`, on this thread.
    fn forward(&self, x: &[f32], y: &mut [f32]) {
        let rows = y.len() / self.outputs;
        let mut first = 0;
        for (packed, bias) in &self.parts {
            let [inputs, outputs] = packed.shape();
            let x = View::new(x, [rows, inputs], inputs);
            product_packed(&mut y[first..], self.outputs, false, 1.0, x, packed);
            if let Some(bias) = bias {
                for row in y.chunks_exact_mut(self.outputs) {
                    for (y, bias) in row[first..first + outputs].iter_mut().zip(bias) {
                        *y += bias;
                    }
                }
            }
            first += outputs;
        }
    }
}

/// Norm of heads: weight, epsilon, first column and number of heads.
type HeadNorm = (Vec<f32>, f32, (usize, usize));

enum Middle {
    Attention(RowAttention, Vec<HeadNorm>),
    Mlp(Activation),
}

/// Attention or MLP of a layer, from its normalised input to what it adds to the residual stream.
pub struct PackedHalf {
    first: PackedLinears,
    middle: Middle,
    last: PackedLinears,
}

impl PackedHalf {
    /// Attention; `None` if the weights are not plain matrices in host memory.
    pub fn attention<B: Backend>(layer: &DecoderLayer<B>, window: usize) -> Option<Self> {
        use LinearRole::{K, O, Q, Qkv, V};
        let heads = layer.attend().heads(window);
        let mut norms = Vec::new();
        for (norm, columns) in layer.attend().norms() {
            let weight = HostTensor::of(&norm.weight)?.values().to_vec();
            norms.push((weight, norm.epsilon as f32, columns));
        }
        Some(Self {
            first: PackedLinears::new(layer, &[Qkv, Q, K, V])?,
            middle: Middle::Attention(heads, norms),
            last: PackedLinears::new(layer, &[O])?,
        })
    }

    /// The MLP; `None` if the weights are not plain matrices in host memory.
    pub fn mlp<B: Backend>(layer: &DecoderLayer<B>) -> Option<Self> {
        use LinearRole::{Down, Gate, GateUp, Up};
        Some(Self {
            first: PackedLinears::new(layer, &[GateUp, Gate, Up])?,
            middle: Middle::Mlp(layer.activation()),
            last: PackedLinears::new(layer, &[Down])?,
        })
    }

    /// `normed [rows, hidden]` to `out [rows, hidden]`, on this thread. For attention the rows are one sequence, with
    /// the tables of its length.
    pub fn forward<B: Backend>(&self, normed: &[f32], tables: &SequenceTables<B>, out: &mut [f32]) {
        let rows = out.len() / self.last.outputs;
        let width = self.first.outputs;
        SCRATCH.with_borrow_mut(|[both, inner]| {
            both.resize(rows * width, 0.0);
            self.first.forward(normed, both);
            match &self.middle {
                Middle::Attention(heads, norms) => {
                    for (weight, epsilon, columns) in norms {
                        let norm = (width, *columns, weight.as_slice(), *epsilon);
                        wide(host::norm_head_rows, (norm, 0, both.as_mut_slice()));
                    }
                    let (cos, sin) = (HostTensor::of(&tables.cos), HostTensor::of(&tables.sin));
                    let (cos, sin) = (
                        cos.expect("invariant: tensors are in host memory"),
                        sin.expect("invariant: tensors are in host memory"),
                    );
                    let rotation = Rotation {
                        cos: cos.values(),
                        sin: sin.values(),
                        half: tables.cos.dims()[3],
                        sign: 1.0,
                        heads: heads.n_heads + heads.n_kv_heads,
                        head_dim: heads.head_dim,
                    };
                    wide(host::turn, ((rotation, width), 0, both.as_mut_slice()));
                    inner.resize(rows * heads.out_width(), 0.0);
                    heads.forward(both, inner);
                }
                Middle::Mlp(activation) => {
                    inner.resize(rows * width / 2, 0.0);
                    let gate = (*activation, both.as_slice(), inner.as_mut_slice(), width / 2);
                    wide(host::gated_rows, gate);
                }
            }
            self.last.forward(inner, out);
        });
    }
}
