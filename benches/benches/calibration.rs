//! The kernels of calibration: rounding to a grid, the Gram matrix, the search for scales and for clips. Each result is
//! checked against a plain one first.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use olive_benches::values;
use olive_core::kernels::wide;
use olive_core::{DType, LinearRole, LinearSpec};
use olive_quant::QuantizeOptions;
use olive_quant::layer::{LayerLinear, LayerWeights};
use olive_quant::quantizer::affine::{Affine, Arithmetic};
use olive_quant::quantizer::awq::clip::{self, ClipSearch};
use olive_quant::quantizer::awq::mapping::{HeadSharing, LinearInput, Mapping, Producer};
use olive_quant::quantizer::awq::search::ScaleSearch;
use olive_quant::quantizer::awq::statistics::InputStatistics;
use olive_quant::quantizer::minmax::{MinMax, RoundedRows};

const ROWS: usize = 512;
const COLS: usize = 1536;
const GROUP: usize = 128;
const TOKENS: usize = 512;

fn affine() -> Affine {
    Affine::new(4, Arithmetic::Single)
}

fn statistics(x: &[f32]) -> InputStatistics {
    let mut statistics = InputStatistics::new(COLS);
    statistics.add(x);
    statistics.finish();
    statistics
}

/// `Σ (X (Q - W)ᵀ)²` over the tokens.
fn token_error(x: &[f32], weight: &[f32], rounded: &[f32]) -> f64 {
    let delta: Vec<f32> = rounded.iter().zip(weight).map(|(q, w)| q - w).collect();
    let mut sum = 0.0;
    for x in x.chunks_exact(COLS) {
        for delta in delta.chunks_exact(COLS) {
            let y: f64 = x
                .iter()
                .zip(delta)
                .map(|(x, d)| f64::from(*x) * f64::from(*d))
                .sum();
            sum += y * y;
        }
    }
    sum
}

#[inline(always)]
fn fake_quantize_row(row: &mut [f32], affine: Affine) {
    affine.fake_quantize(row, GROUP);
}

fn rounded(weight: &[f32]) -> Vec<f32> {
    let mut rounded = weight.to_vec();
    for row in rounded.chunks_exact_mut(COLS) {
        wide(fake_quantize_row, (row, affine()));
    }
    rounded
}

fn fake_quantize(c: &mut Criterion) {
    let weight = values(ROWS * COLS, 1);
    let found = rounded(&weight);
    for (group, found) in weight.chunks_exact(GROUP).zip(found.chunks_exact(GROUP)) {
        let grid = affine().grid(group);
        for (w, found) in group.iter().zip(found) {
            let level = (f64::from(*w) / f64::from(grid.scale)).round_ties_even() + f64::from(grid.zero);
            let wanted = (level.clamp(0.0, 15.0) - f64::from(grid.zero)) * f64::from(grid.scale);
            assert!((f64::from(*found) - wanted).abs() < 1e-6);
        }
    }
    let mut group = c.benchmark_group("awq");
    group.throughput(Throughput::Elements((ROWS * COLS) as u64));
    group.bench_function("fake-quantize", |b| b.iter(|| rounded(&weight)));
    group.finish();
}

/// Rounding to Olive's layout, in each type of weights.
fn round_rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("round to nearest");
    group.throughput(Throughput::Elements((ROWS * COLS) as u64));
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let weight: Vec<f32> = values(ROWS * COLS, 4)
            .into_iter()
            .map(|w| dtype.round(w))
            .collect();
        let grids = MinMax::of_weight(4, false, dtype);
        let mut rows = RoundedRows::default();
        grids.round_rows(&weight, GROUP, None, &mut rows);
        for ((own, levels), grid) in weight
            .chunks(GROUP)
            .zip(rows.levels.chunks(GROUP))
            .zip(&rows.grids)
        {
            assert_eq!(*grid, grids.grid(own));
            for (w, level) in own.iter().zip(levels) {
                assert_eq!(f32::from(*level), grids.level(*grid, *w));
            }
        }
        group.bench_function(dtype.to_string(), |b| {
            b.iter(|| grids.round_rows(&weight, GROUP, None, &mut rows));
        });
    }
    group.finish();
}

fn gram(c: &mut Criterion) {
    let x = values(TOKENS * COLS, 2);
    let found = statistics(&x);
    for (i, j) in [(0, 0), (3, 1500), (1535, 700)] {
        let column = |c: usize| x.iter().skip(c).step_by(COLS).map(|v| f64::from(*v));
        let wanted: f64 = column(i).zip(column(j)).map(|(a, b)| a * b).sum();
        assert!((f64::from(found.gram()[i * COLS + j]) - wanted).abs() < 1e-2);
    }
    let mut group = c.benchmark_group("awq");
    group.throughput(Throughput::Elements((TOKENS * COLS * COLS) as u64));
    group.bench_function("gram matrix", |b| b.iter(|| statistics(&x)));
    group.finish();
}

fn clip_search(c: &mut Criterion) {
    let (x, weight) = (values(TOKENS * COLS, 2), values(ROWS * COLS, 1));
    let statistics = statistics(&x);
    let search = ClipSearch {
        cols: COLS,
        group_size: GROUP,
        gram: statistics.gram(),
        affine: affine(),
        jointly: true,
    };
    let found = search.run(&weight);
    let mut clipped = weight.clone();
    clip::apply(&mut clipped, COLS, &found.limits);
    let wanted = token_error(&x, &weight, &rounded(&clipped));
    assert!((found.after / wanted - 1.0).abs() < 1e-4 && found.after < found.before);
    let mut group = c.benchmark_group("awq");
    group.throughput(Throughput::Elements((ROWS * COLS) as u64));
    group.bench_function("clip search", |b| b.iter(|| search.run(&weight)));
    group.finish();
}

fn scale_search(c: &mut Criterion) {
    let (x, weight) = (values(TOKENS * COLS, 2), values(ROWS * COLS, 1));
    let statistics = statistics(&x);
    let linear = LayerLinear {
        spec: LinearSpec {
            name: "model.layers.0.mlp.down_proj".to_owned(),
            role: LinearRole::Down,
            out_features: ROWS,
            in_features: COLS,
            bias: false,
        },
        weight: weight.clone(),
        bias: None,
        converts: true,
    };
    let layer = LayerWeights {
        index: 0,
        linears: vec![linear],
        input_norm: Vec::new(),
        post_attention_norm: Vec::new(),
        head_norms: Vec::new(),
    };
    let mapping = Mapping {
        name: "up -> down",
        producer: Producer::LastRows(LinearRole::Up),
        input: LinearInput::Down,
        roles: vec![LinearRole::Down],
        sharing: HeadSharing {
            head_dim: 1,
            repeats: 1,
        },
    };
    let options = QuantizeOptions::default();
    let search = ScaleSearch::new(&mapping, &layer, &statistics, affine(), &options);
    let candidates = search.candidates();
    let losses = search.gram_losses(candidates.iter().map(|(_, scales)| scales.as_slice()));
    for index in [0, 7] {
        let (_, acting) = &search.rounded(&candidates[index].1)[0];
        let wanted = token_error(&x, &weight, acting) / (TOKENS * ROWS) as f64;
        assert!((losses[index] / wanted - 1.0).abs() < 1e-4);
    }
    let mut group = c.benchmark_group("awq");
    group.throughput(Throughput::Elements((candidates.len() * ROWS * COLS) as u64));
    group.bench_function("scale search", |b| {
        b.iter(|| search.gram_losses(candidates.iter().map(|(_, scales)| scales.as_slice())))
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = fake_quantize, round_rows, gram, clip_search, scale_search
}
criterion_main!(benches);
