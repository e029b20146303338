//! The kernels that are no products.

use super::*;
use olive_core::DType;
use olive_core::arch::Activation;
use olive_core::decoder::DropoutStream;
use olive_core::packed::nf4::{self, Nf4Options, QuantType};
use olive_core::packed::{QuantMatrix, awq_gemm};

const ROWS: usize = 37;
const WIDTH: usize = 328;

#[test]
fn the_norm_and_its_gradient_follow_the_formula() {
    let Some(gpu) = gpu() else { return };
    let (x, dy) = (noise(ROWS * WIDTH, 1), rounded(&noise(ROWS * WIDTH, 2)));
    let (weight, before) = (noise(WIDTH, 3), noise(ROWS * WIDTH, 4));
    let epsilon = 1e-5;
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    for row in 0..ROWS {
        let part = row * WIDTH..(row + 1) * WIDTH;
        let x = f64s(&x[part.clone()]);
        let g: Vec<f64> = dy[part.clone()]
            .iter()
            .zip(&weight)
            .map(|(d, w)| f64::from(*d) * f64::from(*w))
            .collect();
        let inverse = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / WIDTH as f64 + epsilon).sqrt();
        let mean = g.iter().zip(&x).map(|(g, x)| g * x).sum::<f64>() / WIDTH as f64;
        for (i, v) in x.iter().enumerate() {
            y.push(v * inverse * f64::from(weight[i]));
            dx.push(f64::from(before[row * WIDTH + i]) + inverse * (g[i] - v * inverse * inverse * mean));
        }
    }
    let device_x = gpu.upload_f32(&x, ROWS, WIDTH);
    let device_weight = gpu.upload_f32(&weight, 1, WIDTH);
    let found = gpu.rms_norm(&device_x, &device_weight, epsilon);
    close(&gpu.download_f32(&found).unwrap(), &y, 4e-3, "norm");
    let slope = gpu.upload_f32(&before, ROWS, WIDTH);
    let device_dy = gpu.upload_bf16(&dy, ROWS, WIDTH);
    let half = gpu.rms_norm_backward(&device_x, &device_weight, epsilon, &device_dy, &slope);
    close(
        &gpu.download_f32(&slope).unwrap(),
        &dx,
        SINGLE,
        "gradient of the norm",
    );
    close(&gpu.download_f32(&half).unwrap(), &dx, 4e-3, "its rounding");
}

#[test]
fn rotation_turns_pairs_and_back() {
    let Some(gpu) = gpu() else { return };
    let (heads, head_dim, half, positions) = (3, 24, 8, 5);
    let width = heads * head_dim + 16;
    let x = rounded(&noise(ROWS * width, 1));
    let angles = noise(positions * half, 2);
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    let places: Vec<u32> = (0..ROWS as u32).map(|row| row * 7 % positions as u32).collect();
    let rotation = Rotation {
        cos: gpu.upload_f32(&cos, positions, half),
        sin: gpu.upload_f32(&sin, positions, half),
        positions: gpu.upload_u32(&places),
    };
    for back in [false, true] {
        let mut want = f64s(&x);
        for (row, place) in places.iter().enumerate() {
            for head in 0..heads {
                for i in 0..half {
                    let at = row * width + head * head_dim + i;
                    let angle = f64::from(angles[*place as usize * half + i]) * if back { -1.0 } else { 1.0 };
                    let (a, b) = (f64::from(x[at]), f64::from(x[at + half]));
                    want[at] = a * angle.cos() - b * angle.sin();
                    want[at + half] = b * angle.cos() + a * angle.sin();
                }
            }
        }
        let device = gpu.upload_bf16(&x, ROWS, width);
        gpu.rotate(&device, &rotation, heads, head_dim, back);
        close(&gpu.download_f32(&device).unwrap(), &want, 4e-3, "rotation");
    }
}

#[test]
fn gates_and_their_gradients_follow_the_formula() {
    let Some(gpu) = gpu() else { return };
    let both: Vec<f32> = rounded(&noise(ROWS * 2 * WIDTH, 1))
        .iter()
        .map(|v| v * 4.0)
        .collect();
    let slopes = rounded(&noise(ROWS * WIDTH, 2));
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let f = |x: f64| match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
            }
        };
        let derivative = |x: f64| (f(x + 1e-6) - f(x - 1e-6)) / 2e-6;
        let (mut inner, mut d_both) = (Vec::new(), vec![0.0; both.len()]);
        for row in 0..ROWS {
            for i in 0..WIDTH {
                let at = row * 2 * WIDTH + i;
                let (gate, up) = (f64::from(both[at]), f64::from(both[at + WIDTH]));
                let slope = f64::from(slopes[row * WIDTH + i]);
                inner.push(f(gate) * up);
                d_both[at] = slope * up * derivative(gate);
                d_both[at + WIDTH] = slope * f(gate);
            }
        }
        let device = gpu.upload_bf16(&both, ROWS, 2 * WIDTH);
        let found = gpu.gated(activation, &device);
        close(&gpu.download_f32(&found).unwrap(), &inner, 4e-3, "gate");
        gpu.gated_backward(activation, &device, &gpu.upload_bf16(&slopes, ROWS, WIDTH));
        close(
            &gpu.download_f32(&device).unwrap(),
            &d_both,
            4e-3,
            "gradient of the gate",
        );
    }
}

#[test]
fn softmax_sees_its_window_and_has_its_gradient() {
    let Some(gpu) = gpu() else { return };
    for (heads, keys, window, stride) in [
        (3, 40, usize::MAX, 43),
        (2, 45, 7, 48),
        (1, 300, 300, 304),
        (2, 512, usize::MAX, 512),
        (1, 700, 90, 704),
        (1, 2100, usize::MAX, 2104),
    ] {
        let rows = heads * keys;
        let scale = 0.37;
        let (scores, slopes) = (noise(rows * stride, 1), noise(rows * stride, 2));
        let (mut p_want, mut d_want, mut p_host) = (Vec::new(), Vec::new(), vec![0.0f32; rows * stride]);
        for row in 0..rows {
            let query = row % keys;
            let seen = |key: usize| key <= query && query - key < window;
            let e = |key: usize| {
                if seen(key) {
                    (scale * f64::from(scores[row * stride + key])).exp()
                } else {
                    0.0
                }
            };
            let sum: f64 = (0..keys).map(e).sum();
            let p: Vec<f64> = (0..keys).map(|key| e(key) / sum).collect();
            for (key, p) in p.iter().enumerate() {
                p_host[row * stride + key] = *p as f32;
            }
            p_want.extend(&p);
            let p: Vec<f64> = f64s(&rounded(&p_host[row * stride..row * stride + keys]));
            let dot: f64 = (0..keys)
                .map(|key| p[key] * f64::from(slopes[row * stride + key]))
                .sum();
            d_want
                .extend((0..keys).map(|key| scale * p[key] * (f64::from(slopes[row * stride + key]) - dot)));
        }
        let inside = |x: Vec<f32>| -> Vec<f32> {
            x.chunks_exact(stride)
                .flat_map(|row| row[..keys].to_vec())
                .collect()
        };
        let out = gpu.empty(rows, stride, Element::Bf16);
        gpu.causal_softmax(&gpu.upload_f32(&scores, rows, stride), keys, scale, window, &out);
        close(&inside(gpu.download_f32(&out).unwrap()), &p_want, 4e-3, "softmax");
        let p = gpu.upload_bf16(&p_host, rows, stride);
        gpu.softmax_backward(&p, &gpu.upload_f32(&slopes, rows, stride), keys, scale);
        close(
            &inside(gpu.download_f32(&p).unwrap()),
            &d_want,
            6e-3,
            "gradient of softmax",
        );
    }
}

#[test]
fn cross_entropy_and_its_gradient_follow_the_formula() {
    let Some(gpu) = gpu() else { return };
    let (vocab, stride, scale) = (1001, 1008, 0.125);
    let logits: Vec<f32> = noise(ROWS * stride, 1).iter().map(|v| v * 9.0).collect();
    let targets: Vec<u32> = (0..ROWS as u32).map(|row| row * 131 % vocab as u32).collect();
    let (mut losses, mut slopes) = (Vec::new(), Vec::new());
    for (row, target) in targets.iter().enumerate() {
        let row = f64s(&logits[row * stride..row * stride + vocab]);
        let sum: f64 = row.iter().map(|v| v.exp()).sum();
        losses.push(sum.ln() - row[*target as usize]);
        let hit = |i: usize| if i == *target as usize { 1.0 } else { 0.0 };
        slopes.extend(
            row.iter()
                .enumerate()
                .map(|(i, v)| scale * (v.exp() / sum - hit(i))),
        );
        slopes.extend(vec![0.0; stride - vocab]);
    }
    let device = gpu.upload_f32(&logits, ROWS, stride);
    let (found, gradient) = gpu.cross_entropy(&device, vocab, &gpu.upload_u32(&targets), Some(scale));
    close(&gpu.download_f32(&found).unwrap(), &losses, SINGLE, "loss");
    close(
        &gpu.download_f32(&gradient.unwrap()).unwrap(),
        &slopes,
        4e-3,
        "gradient of the loss",
    );
    let (found, gradient) = gpu.cross_entropy(&device, vocab, &gpu.upload_u32(&targets), None);
    close(&gpu.download_f32(&found).unwrap(), &losses, SINGLE, "loss alone");
    assert!(gradient.is_none());
}

#[test]
fn masks_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for (width, first) in [(WIDTH, 0), (33, 5), (24, 3), (20, 1)] {
        let x = rounded(&noise(ROWS * width, 1));
        let stream = DropoutStream::new(0.3, 7, first).child(11);
        let mask = stream.mask(ROWS, width);
        let kept: Vec<f64> = f64s(&x)
            .iter()
            .zip(&mask)
            .map(|(x, m)| x * f64::from(*m))
            .collect();
        let places: Vec<u32> = (0..ROWS).map(|row| (first + row) as u32).collect();
        let places = gpu.upload_u32(&places);
        let dropout = Dropout::new(&stream, &places);
        let device = gpu.upload_bf16(&x, ROWS, width);
        let found = gpu.download_f32(&gpu.drop_out(&device, &dropout)).unwrap();
        close(&found, &kept, 4e-3, "dropout");
        assert!(found.iter().zip(&mask).all(|(x, m)| (*x == 0.0) == (*m == 0.0)));
        let sum = gpu.upload_bf16(&x, ROWS, width);
        gpu.drop_out_add(&device, &dropout, &sum);
        let both: Vec<f64> = kept.iter().zip(&x).map(|(k, x)| k + f64::from(*x)).collect();
        close(&gpu.download_f32(&sum).unwrap(), &both, 4e-3, "dropout, added");
    }
}

#[test]
fn adamw_follows_the_formula() {
    let Some(gpu) = gpu() else { return };
    let n = 5000;
    let start = noise(n, 1);
    let device = gpu.upload_f32(&start, 1, n);
    let half = gpu.empty(1, n, Element::Bf16);
    let moments = [gpu.zeros(1, n, Element::F32), gpu.zeros(1, n, Element::F32)];
    let (beta1, beta2, epsilon, decay, rate, clip) = (0.9f64, 0.95f64, 1e-6f64, 0.1f64, 1e-2f64, 0.5f64);
    let mut plain: Vec<[f64; 3]> = start.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
    for step in 1..=5 {
        let gradient = noise(n, 10 + step);
        let corrections = [1.0 - beta1.powi(step as i32), 1.0 - beta2.powi(step as i32)];
        let numbers = AdamWStep {
            step_size: (rate / corrections[0]) as f32,
            keep: (1.0 - rate * decay) as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            correction2: corrections[1].sqrt() as f32,
            epsilon: epsilon as f32,
            clip: clip as f32,
        };
        let [first, second] = &moments;
        gpu.adamw(
            numbers,
            &device,
            &half,
            &gpu.upload_f32(&gradient, 1, n),
            [first, second],
        );
        for ([p, m, v], g) in plain.iter_mut().zip(gradient) {
            let g = f64::from(g) * clip;
            *p *= 1.0 - rate * decay;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *p -= rate * (*m / corrections[0]) / ((*v / corrections[1]).sqrt() + epsilon);
        }
    }
    let want: Vec<f64> = plain.iter().map(|[p, _, _]| *p).collect();
    close(&gpu.download_f32(&device).unwrap(), &want, SINGLE, "parameters");
    close(
        &gpu.download_f32(&half).unwrap(),
        &want,
        4e-3,
        "rounded parameters",
    );
}

#[test]
fn packed_weights_are_dequantized_as_on_the_host() {
    let Some(gpu) = gpu() else { return };
    for (bits, group) in [(4, 32), (4, 128), (8, 64)] {
        let (rows, cols) = (40, 256);
        let most = f32::from((1u16 << bits) - 1);
        let byte = |v: &f32| ((v + 1.0) / 2.0 * most) as u8;
        let values: Vec<u8> = noise(rows * cols, 1).iter().map(byte).collect();
        let groups = rows * cols / group;
        let zeros: Vec<u8> = noise(groups, 2).iter().map(byte).collect();
        let scales = noise(groups, 3);
        for zeros in [Some(&zeros[..]), None] {
            let scales = (scales.clone(), DType::F32);
            let matrix = QuantMatrix::pack([rows, cols], bits, group, &values, scales, zeros).unwrap();
            let packed = gpu.upload_packed("weight", &matrix).unwrap();
            let out = gpu.empty(rows, cols, Element::Bf16);
            gpu.dequantize(&packed, &out);
            assert_eq!(gpu.download_f32(&out).unwrap(), rounded(&matrix.dequantize()));
        }
    }
}

#[test]
fn normal_floats_are_dequantized_as_on_the_host() {
    let Some(gpu) = gpu() else { return };
    let (rows, cols) = (24, 320);
    for (quant_type, double) in [
        (QuantType::Nf4, false),
        (QuantType::Nf4, true),
        (QuantType::Fp4, false),
    ] {
        let options = Nf4Options {
            quant_type,
            double_quant: double,
            ..Nf4Options::default()
        };
        let matrix = nf4::quantize(
            "weight",
            &noise(rows * cols, 5),
            [rows, cols],
            options,
            DType::BF16,
        )
        .unwrap();
        let packed = gpu.upload_nf4("weight", &matrix).unwrap();
        let out = gpu.empty(rows, cols, Element::Bf16);
        gpu.dequantize_nf4(&packed, &out);
        assert_eq!(gpu.download_f32(&out).unwrap(), rounded(&matrix.dequantize()));
    }
}

/// The 4-bit grid of a group and its values on it, as olive-quant's `Affine` rounds.
fn grid(group: &[f32]) -> (f32, f32, Vec<u8>) {
    let low = group.iter().fold(0.0f32, |low, w| low.min(*w));
    let high = group.iter().fold(0.0f32, |high, w| high.max(*w));
    let scale = half::f16::from_f32((high - low).max(1e-5) / 15.0).to_f32();
    let zero = (-(low / scale).round_ties_even()).clamp(0.0, 15.0);
    let level = |w: &f32| ((w / scale).round_ties_even() + zero).clamp(0.0, 15.0) as u8;
    (scale, zero, group.iter().map(level).collect())
}

#[test]
fn weights_are_packed_as_on_the_host() {
    let Some(gpu) = gpu() else { return };
    for (rows, cols, size) in [(40, 256, 128), (8, 96, 32), (200, 320, 64)] {
        let mut weight = noise(rows * cols, 7);
        // Groups on one side of zero, and one that is constant.
        weight[..size].iter_mut().for_each(|w| *w = w.abs() + 0.5);
        weight[size..2 * size].fill(-0.25);
        let (mut values, mut scales, mut zeros, mut error) = (Vec::new(), Vec::new(), Vec::new(), 0.0);
        for group in weight.chunks_exact(size) {
            let (scale, zero, levels) = grid(group);
            for (w, level) in group.iter().zip(&levels) {
                let d = f64::from((f32::from(*level) - zero) * scale) - f64::from(*w);
                error += d * d;
            }
            values.extend(levels);
            scales.push(scale);
            zeros.push(zero as u8);
        }
        let whole: f64 = weight.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
        let scales = (scales, DType::F16);
        let matrix = QuantMatrix::pack([rows, cols], 4, size, &values, scales, Some(&zeros)).unwrap();
        let want = awq_gemm::store(&matrix).unwrap();
        let packed = gpu
            .pack_awq("weight", &gpu.upload_f32(&weight, rows, cols), size)
            .unwrap();
        let (found, relative) = gpu.unload_awq("weight", &packed).unwrap();
        assert_eq!(found, want, "{rows} {cols} {size}");
        assert!((relative / (error / whole).sqrt() - 1.0).abs() < 1e-4);
    }
    let refused = gpu.pack_awq("odd", &gpu.upload_f32(&[0.0; 96], 12, 8), 8);
    assert!(refused.is_err_and(|error| error.to_string().contains("odd")));
}

#[test]
fn clips_have_the_least_error_alone_and_among_the_others() {
    let Some(gpu) = gpu() else { return };
    let (rows, cols, size, steps, tokens) = (19, 96, 32, 20, 200);
    let cubed = |seed| {
        noise(rows * cols, seed)
            .iter()
            .map(|v| v * v * v)
            .collect::<Vec<f32>>()
    };
    let weight = cubed(1);
    let x = f64s(&noise(tokens * cols, 2));
    let gram: Vec<f64> = (0..cols * cols)
        .map(|at| {
            (0..tokens)
                .map(|t| x[t * cols + at / cols] * x[t * cols + at % cols])
                .sum()
        })
        .collect();
    let delta = |group: &[f32], step: usize| -> Vec<f64> {
        let most =
            group.iter().fold(0.0f32, |most, w| most.max(w.abs())) * (1.0 - step as f32 / (2 * steps) as f32);
        let clamped: Vec<f32> = group.iter().map(|w| w.clamp(-most, most)).collect();
        let (scale, zero, levels) = grid(&clamped);
        let values = levels.iter().map(|level| (f32::from(*level) - zero) * scale);
        values
            .zip(group)
            .map(|(q, w)| f64::from(q) - f64::from(*w))
            .collect()
    };
    let grid = ClipGrid {
        group_size: size,
        steps,
        levels: 15.0,
    };
    let groups = cols / size;
    let device = gpu.upload_f32(&weight, rows, cols);
    let device_gram: Vec<f32> = gram.iter().map(|v| *v as f32).collect();
    let device_gram = gpu.upload_f32(&device_gram, cols, cols);
    let deltas = gpu.clip_deltas(&device, grid);
    let products = gpu.empty(deltas.rows, size, Element::F32);
    let apart = rows * steps * size;
    let product = Product::new(
        [rows * steps, size, size],
        deltas.view().every(apart),
        device_gram.view().every(size * (cols + 1)),
        products.view().every(apart),
    );
    gpu.product(product.batch(groups));
    let own = gpu.empty(groups, rows * steps, Element::F32);
    gpu.clip_errors([&deltas, &products], grid, (0, rows), &own);
    // Each group's own error, over its block of the Gram matrix.
    let form = |a: &[f64], first_a: usize, b: &[f64], first_b: usize| -> f64 {
        let row = |i: usize| -> f64 {
            b.iter()
                .enumerate()
                .map(|(j, b)| gram[(first_a + i) * cols + first_b + j] * b)
                .sum()
        };
        a.iter().enumerate().map(|(i, a)| a * row(i)).sum()
    };
    let at = |row: usize, group: usize| &weight[row * cols + group * size..][..size];
    let mut want = Vec::new();
    for group in 0..groups {
        for row in 0..rows {
            for step in 0..steps {
                let d = delta(at(row, group), step);
                want.push(form(&d, group * size, &d, group * size));
            }
        }
    }
    close(&gpu.download_f32(&own).unwrap(), &want, 1e-4, "own errors");
    let [device_delta, chosen] = gpu.choose_alone(&device, &own, grid);
    let alone = gpu.download_f32(&chosen).unwrap();
    let mut current = f64s(&gpu.download_f32(&device_delta).unwrap());
    for (place, errors) in want.chunks_exact(steps).enumerate() {
        let least = errors.iter().fold(f64::INFINITY, |least, e| least.min(*e));
        assert!(errors[alone[place] as usize] <= least * (1.0 + 1e-4), "{place}");
        let (group, row) = (place / rows, place % rows);
        let want = delta(at(row, group), alone[place] as usize);
        let found: Vec<f32> = current[row * cols + group * size..][..size]
            .iter()
            .map(|v| *v as f32)
            .collect();
        close(&found, &want, 1e-4, "delta");
    }
    // One group, given the others.
    let group = 1;
    let others: Vec<f32> = (0..rows)
        .flat_map(|row| {
            let current = &current;
            let gram = &gram;
            (0..size).map(move |i| {
                let outside = (0..cols).filter(|col| col / size != group);
                outside
                    .map(|col| current[row * cols + col] * gram[col * cols + group * size + i])
                    .sum::<f64>() as f32
            })
        })
        .collect();
    let device_others = gpu.upload_f32(&others, rows, size);
    gpu.choose_jointly(
        &device,
        (grid, group),
        &own,
        &device_others,
        [&device_delta, &chosen],
    );
    let jointly = gpu.download_f32(&chosen).unwrap();
    current = f64s(&gpu.download_f32(&device_delta).unwrap());
    let mut differ = 0;
    for row in 0..rows {
        let error = |step: usize| -> f64 {
            let d = delta(at(row, group), step);
            let cross: f64 = d
                .iter()
                .zip(&others[row * size..])
                .map(|(d, o)| d * f64::from(*o))
                .sum();
            form(&d, group * size, &d, group * size) + 2.0 * cross
        };
        let found = jointly[group * rows + row] as usize;
        let errors: Vec<f64> = (0..steps).map(error).collect();
        let least = errors.iter().fold(f64::INFINITY, |least, e| least.min(*e));
        let largest = errors.iter().fold(0.0f64, |most, e| most.max(e.abs()));
        assert!(
            errors[found] <= least + 1e-4 * largest,
            "{row}: {found} {errors:?}"
        );
        differ += usize::from(found != alone[group * rows + row] as usize);
        let found_delta: Vec<f32> = current[row * cols + group * size..][..size]
            .iter()
            .map(|v| *v as f32)
            .collect();
        close(&found_delta, &delta(at(row, group), found), 1e-4, "delta");
    }
    assert!(differ > 0, "judging jointly changed nothing");
    gpu.clamp_groups(&device, grid, &chosen);
    let clamped = gpu.download_f32(&device).unwrap();
    for row in 0..rows {
        for group in 0..groups {
            let most = at(row, group).iter().fold(0.0f32, |most, w| most.max(w.abs()))
                * (1.0 - jointly[group * rows + row] / (2 * steps) as f32);
            for (found, w) in clamped[row * cols + group * size..].iter().zip(at(row, group)) {
                assert!((found - w.clamp(-most, most)).abs() <= 1e-6);
            }
        }
    }
}

#[test]
fn sums_of_columns_and_of_halves_are_sums() {
    let Some(gpu) = gpu() else { return };
    let x = noise(ROWS * WIDTH, 1);
    let device = gpu.upload_f32(&x, ROWS, WIDTH);
    let totals: Vec<f64> = (0..WIDTH)
        .map(|col| (0..ROWS).map(|row| f64::from(x[row * WIDTH + col])).sum())
        .collect();
    let found = gpu.download_f32(&gpu.column_totals(&device)).unwrap();
    close(&found, &totals, SINGLE, "columns");
    let halves = rounded(&noise(ROWS * WIDTH, 2));
    let dot: f64 = halves
        .iter()
        .zip(&x)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum();
    let shares = gpu.empty(1, SHARES, Element::F32);
    gpu.dot_half_shares(&gpu.upload_bf16(&halves, ROWS, WIDTH), &device, &shares);
    assert!((gpu.total(&shares).unwrap() / dot - 1.0).abs() < 1e-4);
    let sum: f64 = x.iter().map(|v| f64::from(*v)).sum();
    assert!((gpu.sum(&device).unwrap() / sum - 1.0).abs() < 1e-4);
}

#[test]
fn rows_are_moved_to_their_places() {
    let Some(gpu) = gpu() else { return };
    let (table, places) = (rounded(&noise(ROWS * WIDTH, 1)), [5u32, 0, 36, 5]);
    let numbers = gpu.upload_u32(&places);
    let want: Vec<f32> = places
        .iter()
        .flat_map(|p| table[*p as usize * WIDTH..(*p as usize + 1) * WIDTH].to_vec())
        .collect();
    let embedded = gpu.embed(&gpu.upload_bf16(&table, ROWS, WIDTH), &numbers);
    assert_eq!(gpu.download_f32(&embedded).unwrap(), want);
    let gathered = gpu.gather(&gpu.upload_f32(&table, ROWS, WIDTH), &numbers);
    assert_eq!(gpu.download_f32(&gathered).unwrap(), want);
    let out = gpu.zeros(ROWS, WIDTH, Element::F32);
    let places = gpu.upload_u32(&[7, 3, 1, 30]);
    gpu.scatter(&gathered, &places, &out);
    let found = gpu.download_f32(&out).unwrap();
    assert_eq!(found[3 * WIDTH..4 * WIDTH], want[WIDTH..2 * WIDTH]);
    assert_eq!(
        found.iter().filter(|v| **v != 0.0).count(),
        want.iter().filter(|v| **v != 0.0).count()
    );
    assert_eq!(gpu.download_f32(&gpu.round(&gathered)).unwrap(), want);
}

#[test]
fn biases_are_added_to_their_columns() {
    let Some(gpu) = gpu() else { return };
    let (x, bias) = (rounded(&noise(ROWS * WIDTH, 1)), noise(40, 2));
    let device = gpu.upload_bf16(&x, ROWS, WIDTH);
    gpu.add_bias(&device, &gpu.upload_f32(&bias, 1, 40), 16);
    let want: Vec<f64> = x
        .iter()
        .enumerate()
        .map(|(i, v)| {
            let col = i % WIDTH;
            f64::from(*v)
                + if (16..56).contains(&col) {
                    f64::from(bias[col - 16])
                } else {
                    0.0
                }
        })
        .collect();
    close(&gpu.download_f32(&device).unwrap(), &want, 4e-3, "bias");
}

#[test]
fn sums_over_everything_are_sums() {
    let Some(gpu) = gpu() else { return };
    let (a, b) = (noise(100_003, 1), noise(100_003, 2));
    let (left, right) = (gpu.upload_f32(&a, 1, a.len()), gpu.upload_f32(&b, 1, b.len()));
    let pairs = || a.iter().zip(&b).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    for (found, want) in [
        (
            gpu.square_sum(&left).unwrap(),
            pairs().map(|(a, _)| a * a).sum::<f64>(),
        ),
        (
            gpu.square_difference(&left, &right).unwrap(),
            pairs().map(|(a, b)| (a - b) * (a - b)).sum(),
        ),
        (gpu.dot(&left, &left).unwrap(), pairs().map(|(a, _)| a * a).sum()),
    ] {
        assert!((found / want - 1.0).abs() < 1e-6, "{found} {want}");
    }
}
