//! One decoder layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`, with its backward.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::activation;
use super::attend::{Attend, AttendTape, join};
use super::dropout::DropoutStream;
use super::linear::{Linear, LinearTape, LowRankGradient};
use super::matmul;
use super::norm::RmsNorm;
use super::sequence::SequenceTables;
use crate::arch::{Activation, LinearRole, ModelSpec};
use crate::checkpoint::TensorSource;
use crate::error::Result;
use crate::weight::LinearWeight;

/// Is shown the input `[batch, seq, in]` of every linear, in the order of the forward pass. Linears that read the
/// same tensor (q, k, v; gate, up) are shown it each.
pub type Observer<'a, B> = dyn FnMut(LinearRole, &Tensor<B, 3>) + 'a;

/// Is shown the input `[n, in]` of every linear and the gradient of its output `[n, out]`, in the order of the backward.
pub type GradientObserver<'a, B> = dyn FnMut(LinearRole, &Tensor<B, 2>, &Tensor<B, 2>) + 'a;

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
    x: Tensor<B, 2>,
    /// Inputs of linears are kept where a low-rank part reads them.
    normed: Option<Tensor<B, 2>>,
    attend: AttendTape<B>,
    attended: Tensor<B, 2>,
    middle: Tensor<B, 2>,
    middle_normed: Option<Tensor<B, 2>>,
    gate_up: Tensor<B, 2>,
    inner: Option<Tensor<B, 2>>,
    linears: Vec<(LinearRole, LinearTape<B>)>,
}

/// Where the backward takes the tapes of linears from, and where it leaves what it finds.
type Sinks<'a, 'b, B> = (
    &'a mut Vec<(LinearRole, LinearTape<B>)>,
    &'a mut LayerGradients<B>,
    &'a mut GradientObserver<'b, B>,
);

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
        let qkv = self.apply(&QKV, normed.reshape([batch * seq, hidden]), &none, &mut tape);
        let (rows, _) = self.attend().forward(qkv, &vec![tables; batch]);
        let width = self.n_heads * self.head_dim;
        let attended = rows.reshape([batch, seq, width]);
        self.show(&[LinearRole::O], &attended, observe);
        let rows = attended.reshape([batch * seq, width]);
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

    /// As [`DecoderLayer::forward`] for rows `[n, hidden]` of `sequences` that follow one another, each with the
    /// tables of its length, with dropout on the inputs of the low-rank parts; and what [`DecoderLayer::backward`]
    /// needs. `dropout` is this layer's own stream.
    pub fn forward_train(
        &self,
        x: Tensor<B, 2>,
        sequences: &[&SequenceTables<B>],
        dropout: &DropoutStream,
    ) -> (Tensor<B, 2>, LayerTape<B>) {
        self.forward_taped(x, sequences, dropout, false)
    }

    /// As [`DecoderLayer::forward_train`]; `keep_inputs` says whether the inputs of all linears are kept.
    fn forward_taped(
        &self,
        x: Tensor<B, 2>,
        sequences: &[&SequenceTables<B>],
        dropout: &DropoutStream,
        keep_inputs: bool,
    ) -> (Tensor<B, 2>, LayerTape<B>) {
        let mut linears = Vec::new();
        let normed = self.input_norm.forward(x.clone());
        let qkv = self.apply(&QKV, normed.clone(), dropout, &mut linears);
        let (attended, attend) = self.attend().forward(qkv, sequences);
        let output = self.apply(&[LinearRole::O], attended.clone(), dropout, &mut linears);
        let middle = matmul::add(x.clone(), output);
        let middle_normed = self.post_attention_norm.forward(middle.clone());
        let gate_up = self.apply(&GATE_UP, middle_normed.clone(), dropout, &mut linears);
        let inner = activation::gated(self.activation, &gate_up);
        let output = self.apply(&[LinearRole::Down], inner.clone(), dropout, &mut linears);
        let y = matmul::add(middle.clone(), output);
        let read = |roles: &[LinearRole]| self.of(roles).any(|(_, linear)| linear.low_rank.is_some());
        let kept = |roles: &[LinearRole], x| (keep_inputs || read(roles)).then_some(x);
        let tape = LayerTape {
            x,
            normed: kept(&QKV, normed),
            attend,
            attended,
            middle,
            middle_normed: kept(&GATE_UP, middle_normed),
            gate_up,
            inner: kept(&[LinearRole::Down], inner),
            linears,
        };
        (y, tape)
    }

    /// From the gradient of the output that of the input, both `[n, hidden]`; gradients of low-rank parts are appended
    /// to `gradients`. `sequences` and `dropout` are those of the forward.
    pub fn backward(
        &self,
        tape: LayerTape<B>,
        dy: Tensor<B, 2>,
        sequences: &[&SequenceTables<B>],
        dropout: &DropoutStream,
        gradients: &mut LayerGradients<B>,
    ) -> Tensor<B, 2> {
        self.backward_observed(tape, dy, (sequences, dropout), gradients, &mut |_, _, _| ())
    }

    /// Computes the layer again on its input `x [n, hidden]` without dropout, and from the gradient of its output that
    /// of `x`; shows what the gradient of each linear's weight is made of.
    pub fn observe_gradients(
        &self,
        x: Tensor<B, 2>,
        dy: Tensor<B, 2>,
        sequences: &[&SequenceTables<B>],
        observe: &mut GradientObserver<'_, B>,
    ) -> Tensor<B, 2> {
        let none = DropoutStream::none();
        let (_, tape) = self.forward_taped(x, sequences, &none, true);
        self.backward_observed(tape, dy, (sequences, &none), &mut Vec::new(), observe)
    }

    fn backward_observed(
        &self,
        tape: LayerTape<B>,
        dy: Tensor<B, 2>,
        (sequences, dropout): (&[&SequenceTables<B>], &DropoutStream),
        gradients: &mut LayerGradients<B>,
        observe: &mut GradientObserver<'_, B>,
    ) -> Tensor<B, 2> {
        let mut tapes = tape.linears;
        // An input that was not kept is not read either.
        let unread = tape.x.clone();
        let mut back = |roles: &[LinearRole], x: Option<&Tensor<B, 2>>, dy: Tensor<B, 2>| {
            let x = x.unwrap_or(&unread);
            self.apply_backward(roles, x, dy, dropout, (&mut tapes, gradients, observe))
        };
        let d_inner = back(&[LinearRole::Down], tape.inner.as_ref(), dy.clone());
        let d_gate_up = activation::gated_backward(self.activation, &tape.gate_up, d_inner);
        drop((tape.gate_up, tape.inner));
        let d_normed = back(&GATE_UP, tape.middle_normed.as_ref(), d_gate_up);
        let d_middle = matmul::add(dy, self.post_attention_norm.backward(&tape.middle, d_normed));

        let d_rows = back(&[LinearRole::O], Some(&tape.attended), d_middle.clone());
        let d_qkv = self
            .attend()
            .backward(tape.attend, &tape.attended, d_rows, sequences);
        let d_normed = back(&QKV, tape.normed.as_ref(), d_qkv);
        matmul::add(d_middle, self.input_norm.backward(&tape.x, d_normed))
    }

    pub(super) fn activation(&self) -> Activation {
        self.activation
    }

    pub(super) fn attend(&self) -> Attend<'_, B> {
        Attend {
            q_norm: self.q_norm.as_ref(),
            k_norm: self.k_norm.as_ref(),
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
        }
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
        join(outputs, 1)
    }

    /// From the gradients of those outputs, side by side, that of their common input.
    fn apply_backward(
        &self,
        roles: &[LinearRole],
        x: &Tensor<B, 2>,
        dy: Tensor<B, 2>,
        dropout: &DropoutStream,
        (tapes, gradients, observe): Sinks<'_, '_, B>,
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
            observe(*role, x, &own);
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
}
