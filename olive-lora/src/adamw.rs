//! AdamW (Loshchilov and Hutter, 2019) as `torch.optim.AdamW` computes it, and clipping by the global norm.

use rayon::prelude::*;

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Both moments of one parameter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Vec<f32>,
    /// Running mean of its square.
    pub second: Vec<f32>,
}

impl Moments {
    /// Zeros for a parameter of `n` elements.
    pub fn zeros(n: usize) -> Self {
        Self {
            first: vec![0.0; n],
            second: vec![0.0; n],
        }
    }
}

impl AdamW {
    /// Optimizer step number `step` (from 1) with rate `rate`: changes the parameters and their moments in place.
    pub fn step(
        &self,
        step: usize,
        rate: f64,
        parameters: &mut [&mut Vec<f32>],
        gradients: &[Vec<f32>],
        moments: &mut [Moments],
    ) {
        let correction1 = 1.0 - self.beta1.powi(step as i32);
        let correction2 = (1.0 - self.beta2.powi(step as i32)).sqrt() as f32;
        let step_size = (rate / correction1) as f32;
        let keep = (1.0 - rate * self.weight_decay) as f32;
        let (beta2, epsilon) = (self.beta2 as f32, self.epsilon as f32);
        let (rest1, rest2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        parameters
            .par_iter_mut()
            .zip(gradients)
            .zip(moments)
            .for_each(|((parameter, gradient), moments)| {
                let state = moments.first.iter_mut().zip(&mut moments.second);
                for ((p, g), (m, v)) in parameter.iter_mut().zip(gradient).zip(state) {
                    *p *= keep;
                    *m += (g - *m) * rest1;
                    *v = *v * beta2 + g * g * rest2;
                    *p -= step_size * (*m / (v.sqrt() / correction2 + epsilon));
                }
            });
    }
}

/// The L2 norm of all gradients together.
pub fn global_norm(gradients: &[Vec<f32>]) -> f64 {
    let squares: Vec<f64> = gradients
        .par_iter()
        .map(|gradient| gradient.iter().map(|g| f64::from(*g) * f64::from(*g)).sum())
        .collect();
    squares.iter().sum::<f64>().sqrt()
}

/// Scales the gradients so that their global norm, which is `norm`, is at most `limit`.
pub fn clip(gradients: &mut [Vec<f32>], norm: f64, limit: f64) {
    let coefficient = (limit / (norm + 1e-6)).min(1.0) as f32;
    if coefficient < 1.0 {
        gradients
            .par_iter_mut()
            .for_each(|gradient| gradient.iter_mut().for_each(|g| *g *= coefficient));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_the_formula_in_double_precision() {
        let adamw = AdamW {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-6,
            weight_decay: 0.1,
        };
        let mut parameter = vec![0.5f32, -1.0, 0.0];
        let mut moments = vec![Moments::zeros(3)];
        let mut plain = [(0.5f64, 0.0f64, 0.0f64), (-1.0, 0.0, 0.0), (0.0, 0.0, 0.0)];
        for step in 1..=20 {
            let gradient: Vec<f32> = (0..3).map(|i| ((step * (i + 2)) as f32).sin()).collect();
            adamw.step(
                step,
                1e-2,
                &mut [&mut parameter],
                std::slice::from_ref(&gradient),
                &mut moments,
            );
            for ((p, m, v), g) in plain.iter_mut().zip(gradient) {
                let g = f64::from(g);
                *p *= 1.0 - 1e-2 * 0.1;
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.95 * *v + 0.05 * g * g;
                let (mean, square) = (
                    *m / (1.0 - 0.9f64.powi(step as i32)),
                    *v / (1.0 - 0.95f64.powi(step as i32)),
                );
                *p -= 1e-2 * mean / (square.sqrt() + 1e-6);
            }
        }
        for (found, (expected, _, _)) in parameter.iter().zip(plain) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn clipping_gives_the_limit_and_leaves_small_gradients() {
        let mut gradients = vec![vec![3.0f32, 0.0], vec![4.0]];
        assert!((global_norm(&gradients) - 5.0).abs() < 1e-12);
        clip(&mut gradients, 5.0, 1.0);
        assert!((global_norm(&gradients) - 1.0).abs() < 1e-6);
        let before = gradients.clone();
        clip(&mut gradients, 1.0 - 1e-3, 1.0);
        assert_eq!(before, gradients);
    }
}
