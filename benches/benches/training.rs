//! The kernels of a training step: the matrix products of its shapes, attention and its gradient, and the cross entropy.
//! Each result is checked against a plain one first.
#![expect(clippy::unwrap_used, reason = "an unwrap that fails stops the benchmark")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use olive_benches::{demo_model, values};
use olive_core::decoder::{Cpu, Head};
use olive_core::kernels::attention::RowAttention;
use olive_core::kernels::{View, product, product_parallel};
use olive_core::{HfModel, ModelHandle};

/// Whether the sides of a product are turned.
#[derive(Clone, Copy, PartialEq)]
enum Turned {
    None,
    Left,
    Right,
}

fn products(c: &mut Criterion) {
    use Turned::{Left, None, Right};
    let shapes = [
        ("forward", [512, 1536, 512], Right),
        ("forward, wide", [512, 3072, 512], Right),
        ("forward, deep", [512, 512, 1536], Right),
        ("one sequence", [128, 3072, 512], Right),
        ("head", [512, 8192, 512], Right),
        ("backward", [512, 512, 3072], None),
        ("low rank, inner", [512, 16, 512], Right),
        ("low rank, outer", [512, 1536, 16], Right),
        ("gradient of A", [16, 512, 512], Left),
        ("gradient of B", [1536, 16, 512], Left),
    ];
    let mut group = c.benchmark_group("product");
    for (name, [m, n, k], turned) in shapes {
        let (a, b) = (values(m * k, 1), values(k * n, 2));
        let lhs = match turned {
            Left => View::new(&a, [k, m], m).transposed(),
            _ => View::new(&a, [m, k], k),
        };
        let rhs = match turned {
            Right => View::new(&b, [n, k], k).transposed(),
            _ => View::new(&b, [k, n], n),
        };
        let mut out = vec![0.0; m * n];
        product_parallel(&mut out, n, false, 1.0, lhs, rhs);
        for index in (0..m * n).step_by(m * n / 97) {
            let (i, j) = (index / n, index % n);
            let wanted: f64 = (0..k)
                .map(|l| {
                    let x = if turned == Left {
                        a[l * m + i]
                    } else {
                        a[i * k + l]
                    };
                    let y = if turned == Right {
                        b[j * k + l]
                    } else {
                        b[l * n + j]
                    };
                    f64::from(x) * f64::from(y)
                })
                .sum();
            assert!((f64::from(out[index]) - wanted).abs() < 1e-3, "{name}");
        }
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        group.bench_function(BenchmarkId::new(name, format!("{m}x{n}x{k}")), |b| {
            b.iter(|| product(&mut out, n, false, 1.0, lhs, rhs))
        });
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    let heads = RowAttention {
        n_heads: 8,
        n_kv_heads: 8,
        head_dim: 64,
        window: usize::MAX,
        scale: 0.125,
    };
    let mut group = c.benchmark_group("attention");
    for lengths in [vec![128; 4], vec![512]] {
        let rows: usize = lengths.iter().sum();
        let qkv = values(rows * heads.width(), 3);
        let out = heads.forward_parallel(&qkv, &lengths);
        // The last query of the first sequence, head 2, plainly.
        let (query, head) = (lengths[0] - 1, 2);
        let at = |row: usize, head: usize, i: usize| f64::from(qkv[row * heads.width() + head * 64 + i]);
        let score = |key: usize| {
            let dot: f64 = (0..64).map(|i| at(query, head, i) * at(key, 8 + head, i)).sum();
            (dot * 0.125).exp()
        };
        let total: f64 = (0..=query).map(score).sum();
        for i in 0..64 {
            let wanted: f64 = (0..=query)
                .map(|key| score(key) / total * at(key, 16 + head, i))
                .sum();
            let found = f64::from(out[query * heads.out_width() + head * 64 + i]);
            assert!((found - wanted).abs() < 1e-5);
        }
        let name = format!("{}x{}", lengths.len(), lengths[0]);
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::new("forward", &name), |b| {
            b.iter(|| heads.forward_parallel(&qkv, &lengths))
        });
        group.bench_function(BenchmarkId::new("backward", &name), |b| {
            b.iter(|| heads.backward_parallel(&qkv, &out, &out, &lengths))
        });
    }
    group.finish();
}

fn cross_entropy(c: &mut Criterion) {
    use burn::tensor::{Tensor, TensorData};
    let model = HfModel::open(demo_model()).unwrap();
    let spec = model.spec();
    let head = Head::<Cpu>::load(model.tensors(), spec, None, &Default::default()).unwrap();
    let (rows, hidden) = (512, spec.hidden_size);
    let x = Tensor::<Cpu, 2>::from_data(
        TensorData::new(values(rows * hidden, 4), [rows, hidden]),
        &Default::default(),
    );
    let labels: Vec<i64> = (0..rows as i64).map(|i| i * 7 % spec.vocab_size as i64).collect();
    let run = || head.cross_entropy(x.clone(), &[&labels], Some(&[1.0])).unwrap();
    let logits: Vec<f32> = head.logits(x.clone().unsqueeze()).into_data().into_vec().unwrap();
    let wanted: f64 = logits
        .chunks_exact(spec.vocab_size)
        .zip(&labels[1..])
        .map(|(row, label)| {
            let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            total.ln() - f64::from(row[*label as usize])
        })
        .sum();
    assert!((run().sums[0] / wanted - 1.0).abs() < 1e-5);
    let mut group = c.benchmark_group("cross entropy");
    group.throughput(Throughput::Elements(rows as u64));
    group.bench_function("loss and gradient", |b| b.iter(run));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = products, attention, cross_entropy
}
criterion_main!(benches);
