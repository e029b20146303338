//! What the GPU's kernels and products reach beside the ceilings that are measured first: a large copy in GB/s and a
//! large product in TFLOP/s. `cargo run --release --example gpu_kernels --features cuda`.
//!
//! Sizes are those of a step of 4 × 512 tokens of a model of hidden size 3072. Every result is compared with its formula
//! in double precision on some rows before it is timed; operands take turns, so that they do not stay in the cache.

use std::time::Instant;

use olive_core::arch::Activation;
use olive_core::cuda::*;
use olive_core::decoder::DropoutStream;
use olive_core::packed::QuantMatrix;
use olive_core::{DType, Error, Result};

/// Runs of a timing, of which the median counts.
const RUNS: usize = 15;
/// Operands that take turns.
const SETS: usize = 4;
const TOKENS: usize = 2048;
const HIDDEN: usize = 3072;
const INNER: usize = 8192;

fn main() -> Result<()> {
    let gpu = &Gpu::open()?;
    gpu.poison();
    let copied = 1 << 28;
    let (from, to) = (
        gpu.zeros(1, copied, Element::F32),
        gpu.zeros(1, copied, Element::F32),
    );
    let seconds = median(gpu, 1, |_| gpu.add(&to, &from))?;
    let bandwidth = 12.0 * copied as f64 / seconds / 1e9;
    drop((from, to));
    let peak = product(gpu, [8192, 8192, 8192], Element::Bf16)?;
    println!("ceilings: {bandwidth:.0} GB/s (sum of two streams), {peak:.0} TFLOP/s (8192³, bfloat16)\n");
    println!("| product | TFLOP/s | of the ceiling |\n|---|---|---|");
    for (size, out) in [
        ([TOKENS, 3 * HIDDEN, HIDDEN], Element::Bf16),
        ([TOKENS, HIDDEN, HIDDEN], Element::F32),
        ([TOKENS, 2 * INNER, HIDDEN], Element::Bf16),
        ([TOKENS, HIDDEN, INNER], Element::F32),
        ([TOKENS, 64, HIDDEN], Element::Bf16),
        ([HIDDEN, 64, TOKENS], Element::F32),
        ([TOKENS, 32_064, HIDDEN], Element::F32),
    ] {
        let reached = product(gpu, size, out)?;
        println!(
            "| {size:?} to {out:?} | {reached:.0} | {:.0} % |",
            100.0 * reached / peak
        );
    }
    println!("\n| kernel | µs | GB/s | of the ceiling |\n|---|---|---|---|");
    let table = Table { gpu, bandwidth };
    table.norms()?;
    table.gates()?;
    table.softmax()?;
    table.dropout()?;
    table.others()
}

/// Numbers in [-1, 1) that look random.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = olive_core::rng::TorchRng::new(seed);
    (0..n).map(|_| rng.uniform_f32(-1.0, 1.0)).collect()
}

fn half(v: f32) -> f64 {
    f64::from(half::bf16::from_f32(v).to_f32())
}

/// The median seconds of a run of `work`, which is given the number of the operands; `times` calls are one run.
fn median(gpu: &Gpu, times: usize, work: impl Fn(usize)) -> Result<f64> {
    (0..SETS).for_each(&work);
    gpu.sync()?;
    let mut seconds = Vec::with_capacity(RUNS);
    for run in 0..RUNS {
        let started = Instant::now();
        (0..times).for_each(|call| work((run + call) % SETS));
        gpu.sync()?;
        seconds.push(started.elapsed().as_secs_f64() / times as f64);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[RUNS / 2])
}

/// Whether what was found is what the formula gives, by the norm of the difference.
fn check(what: &str, found: &[f32], want: &[f64], tolerance: f64) -> Result<()> {
    let error: f64 = found
        .iter()
        .zip(want)
        .map(|(a, b)| (f64::from(*a) - b).powi(2))
        .sum();
    let whole: f64 = want.iter().map(|b| b * b).sum();
    let relative = (error / whole).sqrt();
    match found.len() == want.len() && relative <= tolerance {
        true => Ok(()),
        false => Err(Error::tensor(
            what,
            format!("an error of at most {tolerance:e}"),
            format!("{relative:e}"),
        )),
    }
}

/// TFLOP/s of `a bᵀ`.
fn product(gpu: &Gpu, [m, n, k]: [usize; 3], out: Element) -> Result<f64> {
    let (a, b) = (noise(m * k, 1), noise(n * k, 2));
    let rights: Vec<Matrix> = (0..SETS).map(|_| gpu.upload_bf16(&b, n, k)).collect();
    let left = gpu.upload_bf16(&a, m, k);
    let result = gpu.empty(m, n, out);
    let run = |set: usize| {
        gpu.product(Product::new(
            [m, n, k],
            left.view(),
            rights[set].t(),
            result.view(),
        ))
    };
    run(0);
    let row = m / 2;
    let found = gpu.download_f32(&result.rows(row, 1))?;
    let dot = |col: usize| -> f64 { (0..k).map(|i| half(a[row * k + i]) * half(b[col * k + i])).sum() };
    check("product", &found, &(0..n).map(dot).collect::<Vec<f64>>(), 4e-3)?;
    let seconds = median(gpu, 10, run)?;
    Ok(2.0 * (m * n * k) as f64 / seconds / 1e12)
}

struct Table<'a> {
    gpu: &'a Gpu,
    bandwidth: f64,
}

impl Table<'_> {
    /// Times a kernel that has to move so many bytes.
    fn row(&self, name: &str, bytes: usize, work: impl Fn(usize)) -> Result<()> {
        let seconds = median(self.gpu, 20, work)?;
        let reached = bytes as f64 / seconds / 1e9;
        let share = 100.0 * reached / self.bandwidth;
        println!("| {name} | {:.1} | {reached:.0} | {share:.0} % |", 1e6 * seconds);
        Ok(())
    }

    fn singles(&self, rows: usize, cols: usize) -> Vec<Matrix> {
        let values = noise(rows * cols, 3);
        (0..SETS)
            .map(|_| self.gpu.upload_f32(&values, rows, cols))
            .collect()
    }

    fn halves(&self, rows: usize, cols: usize) -> Vec<Matrix> {
        let values = noise(rows * cols, 4);
        (0..SETS)
            .map(|_| self.gpu.upload_bf16(&values, rows, cols))
            .collect()
    }

    fn norms(&self) -> Result<()> {
        let (gpu, n) = (self.gpu, TOKENS * HIDDEN);
        let (x, dy) = (self.singles(TOKENS, HIDDEN), self.halves(TOKENS, HIDDEN));
        let values = noise(HIDDEN, 5);
        let weight = gpu.upload_f32(&values, 1, HIDDEN);
        let found = gpu.download_f32(&gpu.rms_norm(&x[0], &weight, 1e-5).rows(7, 1))?;
        let row = gpu.download_f32(&x[0].rows(7, 1))?;
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / HIDDEN as f64;
        let want = row
            .iter()
            .zip(&values)
            .map(|(v, w)| f64::from(*v) * f64::from(*w) / (mean + 1e-5).sqrt());
        check("norm", &found, &want.collect::<Vec<f64>>(), 4e-3)?;
        self.row("RMS norm", 6 * n, |set| {
            drop(gpu.rms_norm(&x[set], &weight, 1e-5))
        })?;
        let dx = self.singles(TOKENS, HIDDEN);
        self.row("RMS norm, backward", 16 * n, |set| {
            drop(gpu.rms_norm_backward(&x[set], &weight, 1e-5, &dy[set], &dx[set]));
        })
    }

    fn gates(&self) -> Result<()> {
        let (gpu, n) = (self.gpu, TOKENS * INNER);
        let (both, d) = (self.halves(TOKENS, 2 * INNER), self.halves(TOKENS, INNER));
        let found = gpu.download_f32(&gpu.gated(Activation::Silu, &both[0]).rows(9, 1))?;
        let row = gpu.download_f32(&both[0].rows(9, 1))?;
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let want = (0..INNER).map(|i| silu(f64::from(row[i])) * f64::from(row[INNER + i]));
        check("gate", &found, &want.collect::<Vec<f64>>(), 4e-3)?;
        self.row("SwiGLU", 6 * n, |set| {
            drop(gpu.gated(Activation::Silu, &both[set]))
        })?;
        self.row("SwiGLU, backward", 10 * n, |set| {
            gpu.gated_backward(Activation::Silu, &both[set], &d[set])
        })
    }

    fn softmax(&self) -> Result<()> {
        let (gpu, keys, heads) = (self.gpu, 512, 32);
        let rows = heads * keys;
        let (scores, out) = (self.singles(rows, keys), self.halves(rows, keys));
        gpu.causal_softmax(&scores[0], keys, 0.1, usize::MAX, &out[0]);
        let query = 300;
        let found = gpu.download_f32(&out[0].rows(query, 1))?;
        let row = gpu.download_f32(&scores[0].rows(query, 1))?;
        let e = |key: usize| {
            if key <= query {
                (0.1 * f64::from(row[key])).exp()
            } else {
                0.0
            }
        };
        let sum: f64 = (0..keys).map(e).sum();
        check(
            "softmax",
            &found,
            &(0..keys).map(|key| e(key) / sum).collect::<Vec<f64>>(),
            4e-3,
        )?;
        // Of the scores only what is seen must be read.
        self.row("causal softmax", rows * keys * 4, |set| {
            gpu.causal_softmax(&scores[set], keys, 0.1, usize::MAX, &out[set]);
        })?;
        self.row("causal softmax, backward", rows * keys * 4, |set| {
            gpu.softmax_backward(&out[set], &scores[set], keys, 0.1);
        })
    }

    fn dropout(&self) -> Result<()> {
        let gpu = self.gpu;
        let x = self.halves(TOKENS, HIDDEN);
        let places: Vec<u32> = (0..TOKENS as u32).collect();
        let places = gpu.upload_u32(&places);
        let stream = DropoutStream::new(0.05, 7, 0);
        let dropout = Dropout::new(&stream, &places);
        let found = gpu.download_f32(&gpu.drop_out(&x[0], &dropout).rows(0, 2))?;
        let rows = gpu.download_f32(&x[0].rows(0, 2))?;
        let mask = stream.mask(2, HIDDEN);
        let want = rows.iter().zip(mask).map(|(x, m)| f64::from(*x) * f64::from(m));
        check("dropout", &found, &want.collect::<Vec<f64>>(), 4e-3)?;
        self.row("dropout", 4 * TOKENS * HIDDEN, |set| {
            drop(gpu.drop_out(&x[set], &dropout))
        })?;
        let sums = self.halves(TOKENS, HIDDEN);
        self.row("dropout, added", 6 * TOKENS * HIDDEN, |set| {
            gpu.drop_out_add(&x[set], &dropout, &sums[set]);
        })
    }

    fn others(&self) -> Result<()> {
        let gpu = self.gpu;
        let (rows, cols, group) = (2 * INNER, HIDDEN, 128);
        let level = |v: &f32| ((v + 1.0) * 7.5) as u8;
        let values: Vec<u8> = noise(rows * cols, 1).iter().map(level).collect();
        let scales = (noise(rows * cols / group, 2), DType::F32);
        let matrix = QuantMatrix::pack([rows, cols], 4, group, &values, scales, None)?;
        let packed = gpu.upload_packed("weight", &matrix)?;
        let outs: Vec<Matrix> = (0..SETS).map(|_| gpu.empty(rows, cols, Element::Bf16)).collect();
        gpu.dequantize(&packed, &outs[0]);
        let found = gpu.download_f32(&outs[0].rows(5, 1))?;
        let dense = matrix.dequantize();
        let want: Vec<f64> = dense[5 * cols..6 * cols].iter().map(|v| f64::from(*v)).collect();
        check("dequantized weight", &found, &want, 4e-3)?;
        self.row("int4 to bfloat16", rows * cols * 5 / 2, |set| {
            gpu.dequantize(&packed, &outs[set])
        })?;
        drop(outs);
        let weights = self.singles(rows, cols);
        let ones = gpu.upload_f32(&vec![1.0; cols], 1, cols);
        self.row("AWQ's rounding error", rows * cols * 6, |set| {
            drop(gpu.rounding_error_half(&weights[set], &ones, group, 15.0));
        })?;
        let grid = ClipGrid {
            group_size: group,
            steps: 20,
            levels: 15.0,
        };
        let own = gpu.zeros(cols / group, rows * 20, Element::F32);
        let others = gpu.zeros(rows, group, Element::F32);
        let [delta, chosen] = gpu.choose_alone(&weights[0], &own, grid);
        self.row("AWQ's joint clip of a group", rows * (group * 12 + 80), |set| {
            gpu.choose_jointly(&weights[set], (grid, set), &own, &others, [&delta, &chosen]);
        })?;
        self.row("AWQ's packing", rows * cols * 9 / 2, |set| {
            drop(gpu.pack_awq("weight", &weights[set], group));
        })
    }
}
