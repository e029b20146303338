//! One decoder layer on the device, forward and backward: the arithmetic of [`DecoderLayer`](crate::decoder::DecoderLayer)
//! with bfloat16 operands, sums and residual stream in single precision.

use rayon::prelude::*;

use super::attention::{self, HeadLayout};
use super::batch::Batch;
use super::device::Gpu;
use super::kernels::Dropout;
use super::linear::DeviceLinear;
use super::matrix::{Element, Matrix};
use crate::arch::{Activation, LinearRole, ModelSpec};
use crate::checkpoint::TensorSource;
use crate::error::{Error, Result};

/// The linears that read one tensor, in storage order.
const QKV: [LinearRole; 4] = [LinearRole::Qkv, LinearRole::Q, LinearRole::K, LinearRole::V];
const GATE_UP: [LinearRole; 3] = [LinearRole::GateUp, LinearRole::Gate, LinearRole::Up];

/// A decoder layer of a family without norms of heads.
#[derive(Debug, Clone)]
pub struct DeviceLayer {
    /// Which layer of the model.
    pub index: usize,
    /// Weight of the norm before attention, `[1, hidden]`, single precision.
    pub input_norm: Matrix,
    /// Weight of the norm before the MLP, likewise.
    pub post_attention_norm: Matrix,
    /// In the order of the forward pass.
    pub linears: Vec<DeviceLinear>,
    /// Heads and their places.
    pub heads: HeadLayout,
    epsilon: f64,
    activation: Activation,
    intermediate: usize,
}

/// What the backward needs from the forward.
pub struct DeviceTape {
    x: Matrix,
    normed: Option<Matrix>,
    qkv: Matrix,
    attended: Option<Matrix>,
    middle: Matrix,
    middle_normed: Option<Matrix>,
    gate_up: Matrix,
    inner: Option<Matrix>,
    projected: Vec<(LinearRole, Matrix)>,
}

/// What a pass through a layer is given besides its input.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// The sequences.
    pub batch: &'a Batch,
    /// Of this layer.
    pub dropout: Dropout<'a>,
    /// Room for the largest packed weight, see [`DeviceLayer::scratch_len`].
    pub scratch: &'a Matrix,
}

/// Checks that the device can run a model.
///
/// # Errors
/// [`Error::Unsupported`] saying what it does not do.
pub fn check_model(spec: &ModelSpec) -> Result<()> {
    let refuse = |what: &str, reason: &str| {
        Err(Error::unsupported(
            format!("{what} with --device gpu"),
            reason.to_owned(),
        ))
    };
    if spec.qk_norm {
        return refuse("a model with norms of heads", "use --device cpu");
    }
    let sizes = [
        spec.hidden_size,
        spec.intermediate_size,
        spec.head_dim,
        spec.rope.rotary_dim,
    ];
    if sizes.iter().any(|size| !size.is_multiple_of(8)) {
        return refuse(
            &format!("a model of sizes {sizes:?}"),
            "the kernels read eight elements at a time",
        );
    }
    Ok(())
}

impl DeviceLayer {
    /// Reads layer `index` to the device; packed linears stay packed.
    ///
    /// # Errors
    /// Those of [`check_model`], [`DeviceLinear::load`] and of reading the norms.
    pub fn load(gpu: &Gpu, source: &dyn TensorSource, spec: &ModelSpec, index: usize) -> Result<Self> {
        check_model(spec)?;
        let names = spec.layer_names(index);
        let norm = |name: &str| {
            let values = source.read_f32_checked(name, &[spec.hidden_size])?;
            Ok(gpu.upload_f32(&values, 1, values.len()))
        };
        let linears = spec.linears(index);
        let linears = linears
            .par_iter()
            .map(|linear| DeviceLinear::load(gpu, source, spec, linear));
        Ok(Self {
            index,
            input_norm: norm(&names.input_norm)?,
            post_attention_norm: norm(&names.post_attention_norm)?,
            linears: linears.collect::<Result<_>>()?,
            heads: HeadLayout::new(spec),
            epsilon: spec.rms_norm_eps,
            activation: spec.activation,
            intermediate: spec.intermediate_size,
        })
    }

    /// Elements that dequantizing any weight of the layer needs.
    pub fn scratch_len(&self) -> usize {
        self.linears
            .iter()
            .map(DeviceLinear::scratch_len)
            .max()
            .unwrap_or(0)
    }

    /// The linear of this role, if the layer stores one.
    pub fn linear(&self, role: LinearRole) -> Option<&DeviceLinear> {
        self.linears.iter().find(|linear| linear.role == role)
    }

    /// As [`DeviceLayer::linear`], to be changed.
    pub fn linear_mut(&mut self, role: LinearRole) -> Option<&mut DeviceLinear> {
        self.linears.iter_mut().find(|linear| linear.role == role)
    }

    fn of<'a>(&'a self, roles: &'a [LinearRole]) -> impl Iterator<Item = &'a DeviceLinear> {
        self.linears.iter().filter(|linear| roles.contains(&linear.role))
    }

    /// Whether a linear of these roles is trained, so that its backward needs its input.
    fn adapts(&self, roles: &[LinearRole]) -> bool {
        self.of(roles).any(|linear| linear.low_rank.is_some())
    }

    /// The norm before attention, in bfloat16.
    pub fn norm_input(&self, gpu: &Gpu, x: &Matrix) -> Matrix {
        gpu.rms_norm(x, &self.input_norm, self.epsilon)
    }

    /// The norm before the MLP, in bfloat16.
    pub fn norm_middle(&self, gpu: &Gpu, x: &Matrix) -> Matrix {
        gpu.rms_norm(x, &self.post_attention_norm, self.epsilon)
    }

    /// Queries, keys and values of the normalised input, rotated; with `dropout(x) Aᵀ` of each linear.
    fn project(&self, gpu: &Gpu, normed: &Matrix, pass: &Pass<'_>, projected: &mut Projected) -> Matrix {
        let qkv = gpu.empty(normed.rows, self.heads.width(), Element::Bf16);
        self.apply(gpu, &QKV, normed, &qkv, pass, projected);
        let rotated = self.heads.heads + self.heads.kv_heads;
        gpu.rotate(&qkv, &pass.batch.rotation, rotated, self.heads.head_dim, false);
        qkv
    }

    /// Attended values of the normalised input, which the output projection reads.
    pub fn attend(&self, gpu: &Gpu, normed: &Matrix, pass: &Pass<'_>) -> Matrix {
        let qkv = self.project(gpu, normed, pass, &mut Vec::new());
        attention::forward(gpu, &qkv, &self.heads, pass.batch)
    }

    /// The gated activation of the normalised input, which the last projection reads.
    pub fn gate(&self, gpu: &Gpu, normed: &Matrix, pass: &Pass<'_>) -> Matrix {
        let gate_up = gpu.empty(normed.rows, 2 * self.intermediate, Element::Bf16);
        self.apply(gpu, &GATE_UP, normed, &gate_up, pass, &mut Vec::new());
        gpu.gated(self.activation, &gate_up)
    }

    /// `residual + x Wᵀ` in single precision for the one linear of this role; without a residual, the product alone.
    pub fn close(
        &self,
        gpu: &Gpu,
        role: LinearRole,
        x: &Matrix,
        residual: Option<&Matrix>,
        pass: &Pass<'_>,
    ) -> Matrix {
        self.close_taped(gpu, role, x, residual, pass, &mut Vec::new())
    }

    fn close_taped(
        &self,
        gpu: &Gpu,
        role: LinearRole,
        x: &Matrix,
        residual: Option<&Matrix>,
        pass: &Pass<'_>,
        projected: &mut Projected,
    ) -> Matrix {
        let hidden = self.input_norm.cols;
        let out = gpu.empty(x.rows, hidden, Element::F32);
        for linear in self.of(&[role]) {
            let inner = linear.forward(gpu, x, (&out, 0), residual, (&pass.dropout, pass.scratch));
            projected.extend(inner.map(|inner| (role, inner)));
        }
        out
    }

    /// `x [rows, hidden]` in single precision to the same.
    pub fn forward(&self, gpu: &Gpu, x: &Matrix, pass: &Pass<'_>) -> Matrix {
        let normed = self.norm_input(gpu, x);
        let attended = self.attend(gpu, &normed, pass);
        let middle = self.close(gpu, LinearRole::O, &attended, Some(x), pass);
        let normed = self.norm_middle(gpu, &middle);
        let inner = self.gate(gpu, &normed, pass);
        self.close(gpu, LinearRole::Down, &inner, Some(&middle), pass)
    }

    /// As [`DeviceLayer::forward`], with what [`DeviceLayer::backward`] needs.
    pub fn forward_train(&self, gpu: &Gpu, x: &Matrix, pass: &Pass<'_>) -> (Matrix, DeviceTape) {
        let mut tape = self.tape(gpu, x, pass);
        let inner = match tape.inner.take() {
            Some(inner) => inner,
            None => gpu.gated(self.activation, &tape.gate_up),
        };
        let role = LinearRole::Down;
        let y = self.close_taped(gpu, role, &inner, Some(&tape.middle), pass, &mut tape.projected);
        tape.inner = self.adapts(&[role]).then_some(inner);
        (y, tape)
    }

    /// What [`DeviceLayer::backward`] needs, computed again from the layer's input. The layer's output is not.
    pub fn recompute(&self, gpu: &Gpu, x: &Matrix, pass: &Pass<'_>) -> DeviceTape {
        let mut tape = self.tape(gpu, x, pass);
        let role = LinearRole::Down;
        if self.adapts(&[role]) {
            let inner = gpu.gated(self.activation, &tape.gate_up);
            for linear in self.of(&[role]) {
                let inner = linear.project(gpu, &inner, &pass.dropout);
                tape.projected.extend(inner.map(|inner| (role, inner)));
            }
            tape.inner = Some(inner);
        }
        tape
    }

    /// The forward up to the input of the gated activation.
    fn tape(&self, gpu: &Gpu, x: &Matrix, pass: &Pass<'_>) -> DeviceTape {
        let mut projected = Vec::new();
        let normed = self.norm_input(gpu, x);
        let qkv = self.project(gpu, &normed, pass, &mut projected);
        let attended = attention::forward(gpu, &qkv, &self.heads, pass.batch);
        let middle = self.close_taped(gpu, LinearRole::O, &attended, Some(x), pass, &mut projected);
        let middle_normed = self.norm_middle(gpu, &middle);
        let gate_up = gpu.empty(x.rows, 2 * self.intermediate, Element::Bf16);
        self.apply(gpu, &GATE_UP, &middle_normed, &gate_up, pass, &mut projected);
        DeviceTape {
            x: x.clone(),
            normed: self.adapts(&QKV).then_some(normed),
            qkv,
            attended: self.adapts(&[LinearRole::O]).then_some(attended),
            middle,
            middle_normed: self.adapts(&GATE_UP).then_some(middle_normed),
            gate_up,
            inner: None,
            projected,
        }
    }

    /// Turns the gradient `dy [rows, hidden]` of the output (single precision) into that of the input, in place.
    /// `rounded` is `dy` in bfloat16, and so is what is returned for the gradient of the input. Gradients of low-rank
    /// parts are added to theirs.
    pub fn backward(
        &self,
        gpu: &Gpu,
        tape: DeviceTape,
        (dy, rounded): (&Matrix, Matrix),
        pass: &Pass<'_>,
    ) -> Matrix {
        let rows = dy.rows;
        let hidden = dy.cols;
        let d_inner = gpu.empty(rows, self.intermediate, Element::Bf16);
        self.apply_backward(
            gpu,
            &[LinearRole::Down],
            tape.inner.as_ref(),
            &rounded,
            &d_inner,
            &tape,
            pass,
        );
        gpu.gated_backward(self.activation, &tape.gate_up, &d_inner);
        drop(d_inner);
        let d_normed = gpu.empty(rows, hidden, Element::Bf16);
        let input = tape.middle_normed.as_ref();
        self.apply_backward(gpu, &GATE_UP, input, &tape.gate_up, &d_normed, &tape, pass);
        let weight = &self.post_attention_norm;
        let rounded = gpu.rms_norm_backward(&tape.middle, weight, self.epsilon, &d_normed, dy);

        let d_attended = gpu.empty(rows, self.heads.q_size(), Element::Bf16);
        let input = tape.attended.as_ref();
        self.apply_backward(gpu, &[LinearRole::O], input, &rounded, &d_attended, &tape, pass);
        let d_qkv = attention::backward(gpu, &tape.qkv, &d_attended, &self.heads, pass.batch);
        let rotated = self.heads.heads + self.heads.kv_heads;
        gpu.rotate(&d_qkv, &pass.batch.rotation, rotated, self.heads.head_dim, true);
        self.apply_backward(gpu, &QKV, tape.normed.as_ref(), &d_qkv, &d_normed, &tape, pass);
        gpu.rms_norm_backward(&tape.x, &self.input_norm, self.epsilon, &d_normed, dy)
    }

    /// Writes the outputs of the linears of `roles` side by side.
    fn apply(
        &self,
        gpu: &Gpu,
        roles: &[LinearRole],
        x: &Matrix,
        out: &Matrix,
        pass: &Pass<'_>,
        projected: &mut Projected,
    ) {
        let mut first = 0;
        for linear in self.of(roles) {
            let inner = linear.forward(gpu, x, (out, first), None, (&pass.dropout, pass.scratch));
            projected.extend(inner.map(|inner| (linear.role, inner)));
            first += linear.shape[0];
        }
    }

    /// From the gradients of those outputs, side by side, that of their common input.
    #[expect(
        clippy::too_many_arguments,
        reason = "input, two gradients and what they depend on"
    )]
    fn apply_backward(
        &self,
        gpu: &Gpu,
        roles: &[LinearRole],
        x: Option<&Matrix>,
        dy: &Matrix,
        dx: &Matrix,
        tape: &DeviceTape,
        pass: &Pass<'_>,
    ) {
        let mut first = 0;
        for linear in self.of(roles) {
            let inner = tape.projected.iter().find(|(role, _)| *role == linear.role);
            linear.backward(
                gpu,
                (x, inner.map(|(_, inner)| inner)),
                dy.from(0, first),
                (dx, first > 0),
                (&pass.dropout, pass.scratch),
            );
            first += linear.shape[0];
        }
    }
}

/// `dropout(x) Aᵀ` of linears with a low-rank part.
type Projected = Vec<(LinearRole, Matrix)>;
