//! AdamW over all parameters at once.

use cubecl::prelude::*;
use half::bf16;

use super::unit_per_item;
use crate::cuda::device::Gpu;
use crate::cuda::matrix::Matrix;

/// The numbers of one step of AdamW, in the form in which an element needs them.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Learning rate over the first moment's correction.
    pub step_size: f32,
    /// What weight decay leaves of a parameter.
    pub keep: f32,
    /// `1 - β₁`.
    pub rest1: f32,
    /// `β₂`.
    pub beta2: f32,
    /// `1 - β₂`.
    pub rest2: f32,
    /// Root of the second moment's correction.
    pub correction2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Multiplies the gradient before anything else: clipping.
    pub clip: f32,
}

#[cube(launch_unchecked)]
fn adamw(
    parameters: &mut Array<f32>,
    rounded: &mut Array<bf16>,
    gradients: &Array<f32>,
    first: &mut Array<f32>,
    second: &mut Array<f32>,
    items: u32,
    step_size: f32,
    keep: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    correction2: f32,
    epsilon: f32,
    clip: f32,
) {
    if ABSOLUTE_POS < items as usize {
        let i = ABSOLUTE_POS;
        let g = gradients[i] * clip;
        let m = first[i] + (g - first[i]) * rest1;
        let v = second[i] * beta2 + g * g * rest2;
        let p = parameters[i] * keep - step_size * (m / (v.sqrt() / correction2 + epsilon));
        first[i] = m;
        second[i] = v;
        parameters[i] = p;
        rounded[i] = bf16::cast_from(p);
    }
}

impl Gpu {
    /// One step: changes parameters and moments (single precision) and their copy in bfloat16.
    pub fn adamw(
        &self,
        step: AdamWStep,
        parameters: &Matrix,
        rounded: &Matrix,
        gradients: &Matrix,
        moments: [&Matrix; 2],
    ) {
        let items = parameters.len();
        let (count, dim) = unit_per_item(items);
        let [first, second] = moments;
        // SAFETY: all have the same number of elements.
        unsafe {
            adamw::launch_unchecked(
                &self.client,
                count,
                dim,
                parameters.arg(),
                rounded.arg(),
                gradients.arg(),
                first.arg(),
                second.arg(),
                items as u32,
                step.step_size,
                step.keep,
                step.rest1,
                step.beta2,
                step.rest2,
                step.correction2,
                step.epsilon,
                step.clip,
            );
        }
    }
}
