//! GPTQ against its plain form in double precision, and against rounding to nearest.

use super::*;
use ndarray::{Array1, s};
use olive_core::DType;

const OPTIONS: GptqOptions = GptqOptions {
    damp_percent: 0.01,
    act_order: false,
};

fn noise(i: usize) -> f64 {
    f64::from((i as u32).wrapping_mul(2_654_435_761).rotate_left(7) >> 8) / 8_388_608.0 - 1.0
}

/// Correlated inputs, one channel of which is never on.
fn gram(tokens: usize, cols: usize) -> Vec<f32> {
    let x = Array2::from_shape_fn((tokens, cols), |(t, c)| {
        let shared = noise(t * 3 + c % 3);
        if c == 5 {
            0.0
        } else {
            (noise(t * cols + c) + shared) * (1.0 + (c % 17) as f64)
        }
    });
    x.t().dot(&x).iter().map(|v| *v as f32).collect()
}

fn weights(rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| (noise(i) + noise(i + 77) + noise(i * 5 + 1)) as f32 * 0.03)
        .collect()
}

/// The textbook: full inverse by elimination, its Cholesky factor, one column after the other.
fn reference(
    w: &[f32],
    gram: &[f32],
    [rows, cols]: [usize; 2],
    group_size: usize,
    grids: &MinMax,
) -> Vec<f64> {
    let mut h = Array2::from_shape_fn((cols, cols), |(i, j)| f64::from(gram[i * cols + j]));
    let mut w = Array2::from_shape_fn((rows, cols), |(r, c)| f64::from(w[r * cols + c]));
    for d in 0..cols {
        if h[[d, d]] == 0.0 {
            h[[d, d]] = 1.0;
            w.column_mut(d).fill(0.0);
        }
    }
    let damp = 0.01 * h.diag().mean().unwrap();
    h = h + Array2::<f64>::eye(cols) * damp;
    let inverse = invert(h);
    let mut u = Array2::<f64>::zeros((cols, cols));
    for i in 0..cols {
        for j in i..cols {
            let known: f64 = (0..i).map(|k| u[[k, i]] * u[[k, j]]).sum();
            u[[i, j]] = if i == j {
                (inverse[[i, i]] - known).sqrt()
            } else {
                (inverse[[i, j]] - known) / u[[i, i]]
            };
        }
    }
    let mut q = Array2::<f64>::zeros((rows, cols));
    let mut at_block = w.clone();
    for r in 0..rows {
        let mut grid = Grid::default();
        for c in 0..cols {
            if c % BLOCK == 0 {
                at_block.row_mut(r).assign(&w.row(r));
            }
            if c % group_size == 0 {
                let group: Vec<f32> = at_block
                    .slice(s![r, c..c + group_size])
                    .iter()
                    .map(|v| *v as f32)
                    .collect();
                grid = grids.grid(&group);
            }
            q[[r, c]] = f64::from(grids.nearest(grid, w[[r, c]] as f32));
            let error = (w[[r, c]] - q[[r, c]]) / u[[c, c]];
            let update: Array1<f64> = u.slice(s![c, c..]).to_owned() * error;
            let mut rest = w.slice_mut(s![r, c..]);
            rest -= &update;
        }
    }
    q.into_raw_vec_and_offset().0
}

fn invert(mut a: Array2<f64>) -> Array2<f64> {
    let n = a.nrows();
    let mut inverse = Array2::<f64>::eye(n);
    for i in 0..n {
        let pivot = a[[i, i]];
        a.row_mut(i).mapv_inplace(|v| v / pivot);
        inverse.row_mut(i).mapv_inplace(|v| v / pivot);
        for j in (0..n).filter(|j| *j != i) {
            let factor = a[[j, i]];
            let (own, other) = (a.row(i).to_owned(), inverse.row(i).to_owned());
            a.row_mut(j).scaled_add(-factor, &own);
            inverse.row_mut(j).scaled_add(-factor, &other);
        }
    }
    inverse
}

fn weight(values: &[f32], shape: [usize; 2], group_size: usize) -> Weight<'_> {
    Weight {
        name: "w",
        values,
        shape,
        group_size,
    }
}

#[test]
fn the_sweep_equals_the_textbook() {
    for (shape, group_size) in [([7, 96], 32), ([5, 192], 64), ([3, 256], 128), ([4, 200], 200)] {
        let [rows, cols] = shape;
        let (w, gram) = (weights(rows, cols), gram(3 * cols, cols));
        for symmetric in [false, true] {
            let grids = MinMax::single(4, symmetric, DType::F32);
            let ours = quantize(weight(&w, shape, group_size), &gram, &grids, OPTIONS).unwrap();
            let want = reference(&w, &gram, shape, group_size, &grids);
            let dense = ours.matrix.dequantize();
            let same = dense
                .iter()
                .zip(&want)
                .filter(|(a, b)| (f64::from(**a) - **b).abs() < 1e-4);
            // A value halfway between two integers may fall either way in another precision, and moves those after it.
            let share = same.count() as f64 / want.len() as f64;
            assert!(share > 0.97, "{shape:?}: {share}");
        }
    }
}

#[test]
fn the_loss_is_below_that_of_rounding() {
    for (bits, group_size) in [(4, 32), (4, 128), (8, 64), (4, 256)] {
        let (shape, grids) = ([70, 256], MinMax::single(bits, false, DType::BF16));
        let (w, gram) = (weights(70, 256), gram(600, 256));
        let ours = quantize(weight(&w, shape, group_size), &gram, &grids, OPTIONS).unwrap();
        assert!(
            ours.loss < 0.8 * ours.loss_rtn,
            "{bits} {group_size}: {} {}",
            ours.loss,
            ours.loss_rtn
        );
        assert!((weighted_loss(&ours.matrix, &w, &gram) - ours.loss).abs() <= 1e-6 * ours.loss);
        let scales = &ours.matrix.scales;
        assert!(scales.iter().all(|scale| DType::BF16.round(*scale) == *scale));
    }
}

#[test]
fn reordered_columns_are_put_back() {
    let (shape, grids) = ([6, 160], MinMax::single(4, false, DType::F32));
    let (w, gram) = (weights(6, 160), gram(500, 160));
    let options = GptqOptions {
        act_order: true,
        ..OPTIONS
    };
    let ours = quantize(weight(&w, shape, 160), &gram, &grids, options).unwrap();
    assert!(ours.loss < ours.loss_rtn);
    let far = ours
        .matrix
        .dequantize()
        .iter()
        .zip(&w)
        .filter(|(a, b)| (*a - *b).abs() > 0.1)
        .count();
    assert_eq!(far, 0);
    assert!(quantize(weight(&w, shape, 32), &gram, &grids, options).is_err());
}

#[test]
fn singular_gram_matrices_are_damped_more_and_never_worse_than_rounding() {
    // Two tokens for 64 channels, and one with a negative square by rounding.
    let (shape, grids) = ([8, 64], MinMax::single(4, false, DType::F32));
    let (w, mut gram) = (weights(8, 64), gram(2, 64));
    gram[9 * 64 + 9] *= 0.9;
    let options = GptqOptions {
        damp_percent: 0.0,
        ..OPTIONS
    };
    let ours = quantize(weight(&w, shape, 32), &gram, &grids, options).unwrap();
    assert!(ours.damp_percent > 0.0 && ours.loss <= ours.loss_rtn);
    gram[0] = f32::NAN;
    assert!(
        quantize(weight(&w, shape, 32), &gram, &grids, options)
            .unwrap_err()
            .to_string()
            .contains("`w`")
    );
}
