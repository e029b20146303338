//! One decoder layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with its backward.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::activation;
use super::attention::{self, Heads};
use super::dropout::DropoutStream;
use super::host::{self, HeadColumns, HostTensor};
use super::linear::{Linear, LinearTape, LowRankGradient};
use super::norm::RmsNorm;
use super::sequence::SequenceTables;
use crate::arch::{Activation, LinearRole, ModelSpec};
use crate::checkpoint::TensorSource;
use crate::error::Result;
use crate::weight::LinearWeight;

/// Is shown the input `[batch, seq, in]` of every linear, in the order of the forward pass. Linears that read the
/// same tensor (q, k, v; gate, up) are shown it each.
pub type Observer<'a, B> = dyn FnMut(LinearRole, &Tensor<B, 3>) + 'a;

/// Gradients of the low-rank parts of one layer.
pub type LayerGradients<B> = Vec<(LinearRole, LowRankGradient<B>)>;

/// The layer's linears that read one tensor, in storage order.
const QKV: [LinearRole; 4] = [LinearRole::Qkv, LinearRole::Q, LinearRole::K, LinearRole::V];
const GATE_UP: [LinearRole; 3] = [LinearRole::GateUp, LinearRole::Gate, LinearRole::Up];

/// A decoder layer of any family, on the device of backend `B`.
#[derive(Debug, Clone)]
pub struct DecoderLayer<B: Backend> {
    /// Which layer of the model.
    pub index: usize,
    /// Before attention.
    pub input_norm: RmsNorm<B>,
    /// Before the MLP.
    pub post_attention_norm: RmsNorm<B>,
    /// Of each query head.
    pub q_norm: Option<RmsNorm<B>>,
    /// Of each key head.
    pub k_norm: Option<RmsNorm<B>>,
    linears: Vec<(LinearRole, Linear<B>)>,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    scale: f64,
    activation: Activation,
}

/// What the backward needs from the forward; `[rows, features]` with the batch's tokens as rows.
pub struct LayerTape<B: Backend> {
    batch: usize,
    x: Tensor<B, 2>,
    normed: Tensor<B, 2>,
    /// Queries and keys before their norms, where there are any.
    unnormed: Option<(Tensor<B, 4>, Tensor<B, 4>)>,
    heads: Heads<B>,
    attended: Tensor<B, 4>,
    attended_rows: Tensor<B, 2>,
    middle: Tensor<B, 2>,
    middle_normed: Tensor<B, 2>,
    gate_up: Tensor<B, 2>,
    inner: Tensor<B, 2>,
    linears: Vec<(LinearRole, LinearTape<B>)>,
}

impl<B: Backend> DecoderLayer<B> {
    /// Reads layer `index` to `device`; packed linears stay packed in host memory.
    ///
    /// # Errors
    /// Those of [`LinearWeight::read`] and of reading the norms.
    pub fn load(
        source: &dyn TensorSource,
        spec: &ModelSpec,
        index: usize,
        device: &B::Device,
    ) -> Result<Self> {
        let names = spec.layer_names(index);
        let norm = |name: &str, features| RmsNorm::load(source, name, features, spec.rms_norm_eps, device);
        let head_norm =
            |name: &Option<String>| name.as_deref().map(|name| norm(name, spec.head_dim)).transpose();
        let linears = spec
            .linears(index)
            .into_iter()
            .map(|linear| {
                let stored = LinearWeight::read(source, spec, &linear)?;
                let shape = [linear.out_features, linear.in_features];
                Ok((linear.role, Linear::new(stored, shape, device)))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            index,
            input_norm: norm(&names.input_norm, spec.hidden_size)?,
            post_attention_norm: norm(&names.post_attention_norm, spec.hidden_size)?,
            q_norm: head_norm(&names.q_norm)?,
            k_norm: head_norm(&names.k_norm)?,
            linears,
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            head_dim: spec.head_dim,
            scale: spec.attention_scale(),
            activation: spec.activation,
        })
    }

    /// The linear of this role, if the layer stores one.
    pub fn linear(&self, role: LinearRole) -> Option<&Linear<B>> {
        self.linears
            .iter()
            .find(|(own, _)| *own == role)
            .map(|(_, linear)| linear)
    }

    /// The linear of this role, to be replaced or given a low-rank part.
    pub fn linear_mut(&mut self, role: LinearRole) -> Option<&mut Linear<B>> {
        self.linears
            .iter_mut()
            .find(|(own, _)| *own == role)
            .map(|(_, linear)| linear)
    }

    /// The linears in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = (LinearRole, &Linear<B>)> {
        self.linears.iter().map(|(role, linear)| (*role, linear))
    }

    /// `[batch, seq, hidden]` to the same.
    pub fn forward(&self, x: Tensor<B, 3>, tables: &SequenceTables<B>) -> Tensor<B, 3> {
        self.forward_observed(x, tables, &mut |_, _| ())
    }

    /// As [`DecoderLayer::forward`], and shows the input of every linear.
    pub fn forward_observed(
        &self,
        x: Tensor<B, 3>,
        tables: &SequenceTables<B>,
        observe: &mut Observer<'_, B>,
    ) -> Tensor<B, 3> {
        let normed = self.input_norm.forward(x.clone());
        let x = x + self.attention_observed(normed, tables, observe);
        let normed = self.post_attention_norm.forward(x.clone());
        x + self.mlp_observed(normed, observe)
    }

    /// Attention of the normalised `[batch, seq, hidden]`, output projection included, residual not.
    pub fn attention(&self, normed: Tensor<B, 3>, tables: &SequenceTables<B>) -> Tensor<B, 3> {
        self.attention_observed(normed, tables, &mut |_, _| ())
    }

    /// The MLP of the normalised `[batch, seq, hidden]`, residual not included.
    pub fn mlp(&self, normed: Tensor<B, 3>) -> Tensor<B, 3> {
        self.mlp_observed(normed, &mut |_, _| ())
    }

    /// As [`DecoderLayer::attention`], and shows the input of every linear.
    pub fn attention_observed(
        &self,
        normed: Tensor<B, 3>,
        tables: &SequenceTables<B>,
        observe: &mut Observer<'_, B>,
    ) -> Tensor<B, 3> {
        let [batch, seq, hidden] = normed.dims();
        self.show(&QKV, &normed, observe);
        let mut tape = Vec::new();
        let none = DropoutStream::none();
        let rows = normed.reshape([batch * seq, hidden]);
        let (heads, _) = self.project_heads(rows, batch, tables, &none, &mut tape);
        let attended = self.merge_heads(attention::forward(&heads, tables, self.scale));
        let attended = attended.reshape([batch, seq, self.n_heads * self.head_dim]);
        self.show(&[LinearRole::O], &attended, observe);
        let rows = attended.reshape([batch * seq, self.n_heads * self.head_dim]);
        let output = self.apply(&[LinearRole::O], rows, &none, &mut tape);
        output.reshape([batch, seq, hidden])
    }

    /// As [`DecoderLayer::mlp`], and shows the input of every linear.
    pub fn mlp_observed(&self, normed: Tensor<B, 3>, observe: &mut Observer<'_, B>) -> Tensor<B, 3> {
        let [batch, seq, hidden] = normed.dims();
        self.show(&GATE_UP, &normed, observe);
        let mut tape = Vec::new();
        let none = DropoutStream::none();
        let both = self.apply(&GATE_UP, normed.reshape([batch * seq, hidden]), &none, &mut tape);
        let inner = activation::gated(self.activation, &both);
        let [_, width] = inner.dims();
        let inner = inner.reshape([batch, seq, width]);
        self.show(&[LinearRole::Down], &inner, observe);
        let rows = inner.reshape([batch * seq, width]);
        self.apply(&[LinearRole::Down], rows, &none, &mut tape)
            .reshape([batch, seq, hidden])
    }

    /// As [`DecoderLayer::forward`] with dropout on the inputs of the low-rank parts, and what
    /// [`DecoderLayer::backward`] needs. `dropout` is this layer's own stream.
    pub fn forward_train(
        &self,
        x: Tensor<B, 3>,
        tables: &SequenceTables<B>,
        dropout: &DropoutStream,
    ) -> (Tensor<B, 3>, LayerTape<B>) {
        let [batch, seq, hidden] = x.dims();
        let mut linears = Vec::new();
        let x = x.reshape([batch * seq, hidden]);
        let normed = self.input_norm.forward(x.clone());
        let (heads, unnormed) = self.project_heads(normed.clone(), batch, tables, dropout, &mut linears);
        let attended = attention::forward(&heads, tables, self.scale);
        let attended_rows = self.merge_heads(attended.clone());
        let middle = x.clone() + self.apply(&[LinearRole::O], attended_rows.clone(), dropout, &mut linears);
        let middle_normed = self.post_attention_norm.forward(middle.clone());
        let gate_up = self.apply(&GATE_UP, middle_normed.clone(), dropout, &mut linears);
        let inner = activation::gated(self.activation, &gate_up);
        let y = middle.clone() + self.apply(&[LinearRole::Down], inner.clone(), dropout, &mut linears);
        let tape = LayerTape {
            batch,
            x,
            normed,
            unnormed,
            heads,
            attended,
            attended_rows,
            middle,
            middle_normed,
            gate_up,
            inner,
            linears,
        };
        (y.reshape([batch, seq, hidden]), tape)
    }

    /// From the gradient of the output that of the input, both `[batch, seq, hidden]`; gradients of low-rank parts
    /// are appended to `gradients`. `tables` and `dropout` are those of the forward.
    pub fn backward(
        &self,
        tape: LayerTape<B>,
        dy: Tensor<B, 3>,
        tables: &SequenceTables<B>,
        dropout: &DropoutStream,
        gradients: &mut LayerGradients<B>,
    ) -> Tensor<B, 3> {
        let [batch, seq, hidden] = dy.dims();
        let mut tapes = tape.linears;
        let mut back = |roles: &[LinearRole], x: &Tensor<B, 2>, dy: Tensor<B, 2>| {
            self.apply_backward(roles, x, dy, dropout, (&mut tapes, gradients))
        };
        let dy = dy.reshape([batch * seq, hidden]);

        let d_inner = back(&[LinearRole::Down], &tape.inner, dy.clone());
        let d_gate_up = activation::gated_backward(self.activation, &tape.gate_up, d_inner);
        let d_normed = back(&GATE_UP, &tape.middle_normed, d_gate_up);
        let d_middle = dy + self.post_attention_norm.backward(&tape.middle, d_normed);

        let d_rows = back(&[LinearRole::O], &tape.attended_rows, d_middle.clone());
        let d_attended = self.split_heads(d_rows, tape.batch, self.n_heads);
        let d_heads = attention::backward(&tape.heads, &tape.attended, d_attended, tables, self.scale);
        let mut dq = tables.rotate_back(d_heads.q);
        let mut dk = tables.rotate_back(d_heads.k);
        if let Some((q, k)) = &tape.unnormed {
            dq = backward_norm(self.q_norm.as_ref(), q, dq);
            dk = backward_norm(self.k_norm.as_ref(), k, dk);
        }
        let d_qkv = self.join_heads(Heads {
            q: dq,
            k: dk,
            v: d_heads.v,
        });
        let d_normed = back(&QKV, &tape.normed, d_qkv);
        let dx = d_middle + self.input_norm.backward(&tape.x, d_normed);
        dx.reshape([batch, seq, hidden])
    }

    /// Heads after norm and rotation, and queries and keys before their norm if they have one.
    #[expect(
        clippy::type_complexity,
        reason = "a pair of head tensors, named where it is stored"
    )]
    fn project_heads(
        &self,
        rows: Tensor<B, 2>,
        batch: usize,
        tables: &SequenceTables<B>,
        dropout: &DropoutStream,
        tape: &mut Vec<(LinearRole, LinearTape<B>)>,
    ) -> (Heads<B>, Option<(Tensor<B, 4>, Tensor<B, 4>)>) {
        let qkv = self.apply(&QKV, rows, dropout, tape);
        let [n, _] = qkv.dims();
        let (q_size, kv_size) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let on_host = HostTensor::of(&qkv);
        let part = |from: usize, size: usize, heads| match &on_host {
            Some(rows) => {
                let columns = self.columns(q_size + 2 * kv_size, from, heads);
                let values = host::split_heads(rows.values(), batch, columns);
                host::tensor(values, [batch, heads, n / batch, self.head_dim], &qkv.device())
            }
            None => self.split_heads(qkv.clone().slice([0..n, from..from + size]), batch, heads),
        };
        let q = part(0, q_size, self.n_heads);
        let k = part(q_size, kv_size, self.n_kv_heads);
        let v = part(q_size + kv_size, kv_size, self.n_kv_heads);
        let normed = self.q_norm.is_some() || self.k_norm.is_some();
        let unnormed = normed.then(|| (q.clone(), k.clone()));
        let norm = |norm: Option<&RmsNorm<B>>, x: Tensor<B, 4>| match norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        let heads = Heads {
            q: tables.rotate(norm(self.q_norm.as_ref(), q)),
            k: tables.rotate(norm(self.k_norm.as_ref(), k)),
            v,
        };
        (heads, unnormed)
    }

    /// The outputs of the linears of `roles` that the layer has, side by side.
    fn apply(
        &self,
        roles: &[LinearRole],
        x: Tensor<B, 2>,
        dropout: &DropoutStream,
        tape: &mut Vec<(LinearRole, LinearTape<B>)>,
    ) -> Tensor<B, 2> {
        let mut outputs = Vec::new();
        for (role, linear) in self.of(roles) {
            let (y, linear_tape) = linear.forward_rows(x.clone(), &dropout.child(*role as u64));
            tape.push((*role, linear_tape));
            outputs.push(y);
        }
        join(outputs)
    }

    /// From the gradients of those outputs, side by side, that of their common input.
    fn apply_backward(
        &self,
        roles: &[LinearRole],
        x: &Tensor<B, 2>,
        dy: Tensor<B, 2>,
        dropout: &DropoutStream,
        (tapes, gradients): (&mut Vec<(LinearRole, LinearTape<B>)>, &mut LayerGradients<B>),
    ) -> Tensor<B, 2> {
        let [n, width] = dy.dims();
        let mut first = 0;
        let mut sum: Option<Tensor<B, 2>> = None;
        for (role, linear) in self.of(roles) {
            let [outputs, _] = linear.shape();
            let own = match outputs == width {
                true => dy.clone(),
                false => dy.clone().slice([0..n, first..first + outputs]),
            };
            first += outputs;
            let at = tapes.iter().position(|(taped, _)| taped == role);
            let (_, tape) = tapes.swap_remove(at.expect("invariant: the forward taped every linear"));
            let (dx, gradient) = linear.backward_rows(x, tape, own, &dropout.child(*role as u64));
            gradients.extend(gradient.map(|gradient| (*role, gradient)));
            sum = Some(match sum {
                Some(sum) => sum + dx,
                None => dx,
            });
        }
        sum.expect("invariant: every layer has a linear of each group")
    }

    fn of<'a>(&'a self, roles: &'a [LinearRole]) -> impl Iterator<Item = &'a (LinearRole, Linear<B>)> {
        self.linears.iter().filter(|(role, _)| roles.contains(role))
    }

    fn show(&self, roles: &[LinearRole], x: &Tensor<B, 3>, observe: &mut Observer<'_, B>) {
        for (role, _) in self.of(roles) {
            observe(*role, x);
        }
    }

    fn columns(&self, width: usize, first: usize, heads: usize) -> HeadColumns {
        HeadColumns {
            width,
            first,
            heads,
            head_dim: self.head_dim,
        }
    }

    /// The gradients of q, k and v, side by side as rows `[batch * seq, q + 2 kv]`.
    fn join_heads(&self, heads: Heads<B>) -> Tensor<B, 2> {
        let (q, k, v) = (
            HostTensor::of(&heads.q),
            HostTensor::of(&heads.k),
            HostTensor::of(&heads.v),
        );
        let (Some(q), Some(k), Some(v)) = (q, k, v) else {
            let parts = [heads.q, heads.k, heads.v].map(|heads| self.merge_heads(heads));
            return Tensor::cat(parts.to_vec(), 1);
        };
        let [batch, _, seq, _] = heads.q.dims();
        let width = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim;
        let mut rows = vec![0.0; batch * seq * width];
        let mut first = 0;
        for (values, n_heads) in [(q, self.n_heads), (k, self.n_kv_heads), (v, self.n_kv_heads)] {
            let columns = self.columns(width, first, n_heads);
            host::merge_heads(values.values(), &mut rows, batch, columns);
            first += n_heads * self.head_dim;
        }
        host::tensor(rows, [batch * seq, width], &heads.q.device())
    }

    /// `[batch * seq, heads * head_dim]` to `[batch, heads, seq, head_dim]`.
    fn split_heads(&self, rows: Tensor<B, 2>, batch: usize, heads: usize) -> Tensor<B, 4> {
        let [n, width] = rows.dims();
        if let Some(values) = HostTensor::of(&rows) {
            let values = host::split_heads(values.values(), batch, self.columns(width, 0, heads));
            return host::tensor(values, [batch, heads, n / batch, self.head_dim], &rows.device());
        }
        rows.reshape([batch, n / batch, heads, self.head_dim])
            .swap_dims(1, 2)
    }

    /// The inverse of [`DecoderLayer::split_heads`].
    fn merge_heads(&self, heads: Tensor<B, 4>) -> Tensor<B, 2> {
        let [batch, n_heads, seq, head_dim] = heads.dims();
        heads.swap_dims(1, 2).reshape([batch * seq, n_heads * head_dim])
    }
}

fn backward_norm<B: Backend>(norm: Option<&RmsNorm<B>>, x: &Tensor<B, 4>, dy: Tensor<B, 4>) -> Tensor<B, 4> {
    match norm {
        Some(norm) => norm.backward(x, dy),
        None => dy,
    }
}

fn join<B: Backend>(mut parts: Vec<Tensor<B, 2>>) -> Tensor<B, 2> {
    match parts.len() {
        1 => parts.swap_remove(0),
        _ => Tensor::cat(parts, 1),
    }
}
