//! Draws by weight, as `std::discrete_distribution` of libstdc++.

use super::mersenne::Mt19937;

/// `std::discrete_distribution<>(weights)`.
#[derive(Debug, Clone)]
pub struct DiscreteDistribution {
    /// Sums of the probabilities up to each; empty for fewer than two weights.
    sums: Vec<f64>,
}

impl DiscreteDistribution {
    /// The distribution that gives `i` with a probability that grows with `weights[i]`.
    pub fn new(weights: &[f32]) -> Self {
        if weights.len() < 2 {
            return Self { sums: Vec::new() };
        }
        let total: f64 = weights.iter().fold(0.0, |sum, w| sum + f64::from(*w));
        let mut sum = 0.0;
        let mut sums: Vec<f64> = weights
            .iter()
            .map(|w| {
                sum += f64::from(*w) / total;
                sum
            })
            .collect();
        if let Some(last) = sums.last_mut() {
            *last = 1.0;
        }
        Self { sums }
    }

    /// Draws one. A single candidate costs no draw.
    pub fn sample(&self, rng: &mut Mt19937) -> usize {
        if self.sums.is_empty() {
            return 0;
        }
        let u = rng.canonical();
        self.sums.partition_point(|sum| *sum < u).min(self.sums.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_weights() {
        let weights = [0.5f32, 0.0, 2.0, 1.5];
        let distribution = DiscreteDistribution::new(&weights);
        let mut rng = Mt19937::new(1);
        let mut counts = [0u32; 4];
        for _ in 0..40_000 {
            counts[distribution.sample(&mut rng)] += 1;
        }
        assert_eq!(counts[1], 0);
        for (count, weight) in counts.iter().zip(weights) {
            assert!(
                (f64::from(*count) - 10_000.0 * f64::from(weight)).abs() < 500.0,
                "{counts:?}"
            );
        }
    }

    #[test]
    fn each_draw_is_the_first_sum_that_reaches_the_number() {
        let distribution = DiscreteDistribution::new(&[1.0, 1.0, 1.0, 1.0]);
        let (mut a, mut b) = (Mt19937::new(42), Mt19937::new(42));
        for _ in 0..1000 {
            let u = b.canonical();
            let want = [0.25, 0.5, 0.75, 1.0].iter().position(|sum| u <= *sum).unwrap();
            assert_eq!(distribution.sample(&mut a), want);
        }
    }

    #[test]
    fn one_candidate_takes_no_draw() {
        let (mut a, mut b) = (Mt19937::new(3), Mt19937::new(3));
        assert_eq!(DiscreteDistribution::new(&[0.7]).sample(&mut a), 0);
        assert_eq!(a.next_u32(), b.next_u32());
    }
}
