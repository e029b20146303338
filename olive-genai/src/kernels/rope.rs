//! Rotary position embedding.

/// Cosines and sines, `[positions, half]` each.
#[derive(Clone, Copy)]
pub struct RotaryTable<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Rotated pairs of a head.
    pub half: usize,
}

impl RotaryTable<'_> {
    /// How many positions the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// Rotates the first `2 · half` values of one head, in place. Pairs are `(i, i + half)`, or neighbours if
    /// `interleaved`.
    pub fn rotate(&self, head: &mut [f32], position: usize, interleaved: bool) {
        let cos = &self.cos[position * self.half..][..self.half];
        let sin = &self.sin[position * self.half..][..self.half];
        if interleaved {
            for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                let (a, b) = (pair[0], pair[1]);
                pair[0] = a * cos - b * sin;
                pair[1] = b * cos + a * sin;
            }
        } else {
            let (first, rest) = head.split_at_mut(self.half);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(rest).zip(cos.iter().zip(sin)) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_the_length_and_leaves_the_rest_alone() {
        let angles = [0.0f32, 0.0, 0.5, 1.25];
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let table = RotaryTable {
            cos: &cos,
            sin: &sin,
            half: 2,
        };
        assert_eq!(table.positions(), 2);
        let start = [1.0f32, 2.0, 3.0, 4.0, 9.0];
        let mut halves = start;
        table.rotate(&mut halves, 1, false);
        assert!((halves[0] - (0.5f32.cos() - 3.0 * 0.5f32.sin())).abs() < 1e-6);
        assert!((halves[3] - (4.0 * 1.25f32.cos() + 2.0 * 1.25f32.sin())).abs() < 1e-6);
        let mut pairs = start;
        table.rotate(&mut pairs, 1, true);
        assert!((pairs[1] - (2.0 * 0.5f32.cos() + 0.5f32.sin())).abs() < 1e-6);
        for rotated in [halves, pairs] {
            let length = |v: &[f32]| v[..4].iter().map(|x| x * x).sum::<f32>();
            assert!((length(&rotated) - length(&start)).abs() < 1e-4);
            assert_eq!(rotated[4], 9.0);
        }
    }
}
