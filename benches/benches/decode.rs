//! Kernels of a step of the generate loop beside the packed products (`packed.rs`): attention over a cache for one token
//! and for a prompt, norm, rotary embedding, low-rank factors, the sampler, and the tokenizer. Each result is checked
//! against a plain one first.
#![expect(clippy::unwrap_used, reason = "an unwrap that fails stops the benchmark")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use olive_benches::{demo_model, values};
use olive_core::text::TextTokenizer;
use olive_genai::SearchOptions;
use olive_genai::exec::cache::LayerShape;
use olive_genai::kernels::attention::{AttentionInput, AttentionSpec, NewTokens, attend, store};
use olive_genai::kernels::norm::rms_norm;
use olive_genai::kernels::panels::Panels;
use olive_genai::kernels::rope::RotaryTable;
use olive_genai::search::{Mt19937, pick};

/// Heads of a layer of Qwen2.5-0.5B's shape.
const SPEC: AttentionSpec = AttentionSpec {
    heads: 14,
    kv_heads: 2,
    head_size: 64,
    scale: 0.125,
    softcap: 0.0,
    window: None,
    causal: true,
};

/// What query `step` behind `past` positions gives for `head`, in f64. Keys and values are `[kv_heads, total, width]`.
fn attention_of(
    queries: &[f32],
    (keys, values): (&[f32], &[f32]),
    (past, steps): (usize, usize),
    (head, step): (usize, usize),
) -> Vec<f64> {
    let width = SPEC.head_size;
    let total = past + steps;
    let query = &queries[(head * steps + step) * width..][..width];
    let cache = head / (SPEC.heads / SPEC.kv_heads) * total * width;
    let row = |data: &[f32], j: usize| -> Vec<f64> {
        let row = &data[cache + j * width..][..width];
        row.iter().map(|v| f64::from(*v)).collect()
    };
    let weights: Vec<f64> = (0..=past + step)
        .map(|j| {
            let products = query.iter().zip(row(keys, j)).map(|(q, k)| f64::from(*q) * k);
            (products.sum::<f64>() * f64::from(SPEC.scale)).exp()
        })
        .collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; width];
    for (j, weight) in weights.iter().enumerate() {
        for (out, v) in out.iter_mut().zip(row(values, j)) {
            *out += weight / sum * v;
        }
    }
    out
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    for (name, past, steps) in [
        ("decode", 127usize, 1usize),
        ("decode", 2047, 1),
        ("prefill", 0, 512),
    ] {
        let total = past + steps;
        let (width, kv_heads) = (SPEC.head_size, SPEC.kv_heads);
        let capacity = total.next_multiple_of(16);
        let queries = values(SPEC.heads * steps * width, 1);
        let (new_keys, new_values) = (
            values(kv_heads * total * width, 2),
            values(kv_heads * total * width, 3),
        );
        let mut keys = vec![0.0; kv_heads * capacity * width];
        let mut cached = vec![0.0; kv_heads * capacity * width];
        let shape = LayerShape {
            heads: kv_heads,
            head_size: width,
        };
        let new = NewTokens {
            keys: &new_keys,
            values: &new_values,
            steps: total,
        };
        store(new, shape, &[(0, total)], capacity, (&mut keys, &mut cached));
        let input = AttentionInput {
            queries: &queries,
            keys: &keys,
            values: &cached,
            capacity,
            steps,
            rows: &[(past, steps)],
        };
        let mut out = vec![0.0; queries.len()];
        attend(&SPEC, &input, &mut out);
        for head in 0..SPEC.heads {
            for step in [0, steps / 2, steps - 1] {
                let want = attention_of(&queries, (&new_keys, &new_values), (past, steps), (head, step));
                let found = &out[(head * steps + step) * width..][..width];
                for (found, want) in found.iter().zip(want) {
                    assert!((f64::from(*found) - want).abs() < 1e-5, "{name} {head} {step}");
                }
            }
        }
        // A decoded token reads the cache; a prompt multiplies.
        match steps {
            1 => group.throughput(Throughput::Bytes((2 * kv_heads * total * width * 4) as u64)),
            _ => group.throughput(Throughput::Elements(
                (4 * SPEC.heads * steps * (steps + 1) / 2 * width) as u64,
            )),
        };
        group.bench_function(BenchmarkId::new(name, total), |b| {
            b.iter(|| attend(&SPEC, &input, &mut out));
        });
    }
    group.finish();
}

fn norm(c: &mut Criterion) {
    const WIDTH: usize = 896;
    let mut group = c.benchmark_group("norm");
    for rows in [1, 512] {
        let (x, weight) = (values(rows * WIDTH, 1), values(WIDTH, 2));
        let mut out = vec![0.0; x.len()];
        rms_norm(&x, &weight, 1e-6, &mut out);
        for (x, out) in x.chunks_exact(WIDTH).zip(out.chunks_exact(WIDTH)) {
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / WIDTH as f64;
            for ((x, w), found) in x.iter().zip(&weight).zip(out) {
                let want = f64::from(*x) / (mean + 1e-6).sqrt() * f64::from(*w);
                assert!((f64::from(*found) - want).abs() < 1e-5);
            }
        }
        group.throughput(Throughput::Bytes((2 * x.len() * 4) as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |b| {
            b.iter(|| rms_norm(&x, &weight, 1e-6, &mut out));
        });
    }
    group.finish();
}

fn rope(c: &mut Criterion) {
    const POSITIONS: usize = 512;
    let half = SPEC.head_size / 2;
    let angle = |i: usize| (i / half) as f64 / 1e6f64.powf((i % half) as f64 / half as f64);
    let cos: Vec<f32> = (0..POSITIONS * half).map(|i| angle(i).cos() as f32).collect();
    let sin: Vec<f32> = (0..POSITIONS * half).map(|i| angle(i).sin() as f32).collect();
    let table = RotaryTable {
        cos: &cos,
        sin: &sin,
        half,
    };
    let start = values(POSITIONS * SPEC.head_size, 1);
    let mut group = c.benchmark_group("rope");
    group.throughput(Throughput::Bytes((2 * start.len() * 4) as u64));
    for (name, interleaved) in [("halves", false), ("pairs", true)] {
        let rotate = |heads: &mut [f32]| {
            for (position, head) in heads.chunks_exact_mut(SPEC.head_size).enumerate() {
                table.rotate(head, position, interleaved);
            }
        };
        let mut heads = start.clone();
        rotate(&mut heads);
        for (position, (before, after)) in start
            .chunks_exact(SPEC.head_size)
            .zip(heads.chunks_exact(SPEC.head_size))
            .enumerate()
        {
            for i in 0..half {
                let (a, b) = if interleaved {
                    (2 * i, 2 * i + 1)
                } else {
                    (i, i + half)
                };
                let (sin, cos) = angle(position * half + i).sin_cos();
                let (x, y) = (f64::from(before[a]), f64::from(before[b]));
                assert!((f64::from(after[a]) - (x * cos - y * sin)).abs() < 1e-5);
                assert!((f64::from(after[b]) - (y * cos + x * sin)).abs() < 1e-5);
            }
        }
        group.bench_function(name, |b| b.iter(|| rotate(&mut heads)));
    }
    group.finish();
}

fn low_rank(c: &mut Criterion) {
    const RANK: usize = 64;
    let mut group = c.benchmark_group("low_rank");
    for (name, k, n) in [("inner", 896, RANK), ("outer", RANK, 4864)] {
        for (kind, bytes) in [("f32", 4), ("bf16", 2)] {
            let weight: Vec<f32> = values(k * n, 1)
                .into_iter()
                .map(|v| {
                    if bytes == 2 {
                        f32::from_bits(v.to_bits() & !0xffff)
                    } else {
                        v
                    }
                })
                .collect();
            let panels = Panels::new(&weight, k, n).unwrap();
            let x = values(k, 2);
            let mut out = vec![0.0; n];
            panels.add_product(&x, &mut out);
            for (column, found) in out.iter().enumerate() {
                let products = (0..k).map(|i| f64::from(x[i]) * f64::from(weight[i * n + column]));
                assert!((f64::from(*found) - products.sum::<f64>()).abs() < 1e-4);
            }
            group.throughput(Throughput::Bytes((k * n * bytes) as u64));
            group.bench_function(BenchmarkId::new(name, kind), |b| {
                b.iter(|| panels.add_product(&x, &mut out));
            });
        }
    }
    group.finish();
}

fn sampler(c: &mut Criterion) {
    const VOCABULARY: usize = 151_936;
    let scores: Vec<f32> = values(VOCABULARY, 1).into_iter().map(|v| v * 12.0).collect();
    let mut order: Vec<usize> = (0..VOCABULARY).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    let mut group = c.benchmark_group("sampler");
    group.throughput(Throughput::Elements(VOCABULARY as u64));
    let options = |sample: bool, top_k: usize, top_p: f32| SearchOptions {
        do_sample: sample,
        top_k,
        top_p,
        temperature: 0.8,
        ..SearchOptions::default()
    };
    for (name, options, among) in [
        ("greedy", options(false, 50, 1.0), 1),
        ("top_k 50", options(true, 50, 1.0), 50),
        ("top_p 0.9", options(true, 0, 0.9), VOCABULARY),
    ] {
        let mut rng = Mt19937::new(7);
        for _ in 0..20 {
            let token = pick(&scores, &options, &mut rng);
            assert!(order[..among].contains(&token), "{name}");
        }
        group.bench_function(name, |b| b.iter(|| pick(&scores, &options, &mut rng)));
    }
    group.finish();
}

fn tokenizer(c: &mut Criterion) {
    let tokenizer = TextTokenizer::open(demo_model()).unwrap();
    let text = "The quick brown fox jumps over the lazy dog, and the dog does not mind. ".repeat(40);
    let ids = tokenizer.encode(&text, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    let mut group = c.benchmark_group("tokenizer");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("encode", |b| b.iter(|| tokenizer.encode(&text, false).unwrap()));
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("decode", |b| b.iter(|| tokenizer.decode(&ids, true).unwrap()));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = attention, norm, rope, low_rank, sampler, tokenizer
}
criterion_main!(benches);
