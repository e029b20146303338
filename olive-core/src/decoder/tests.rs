//! The decoder against transformers' logits, and its backward against Burn's own differentiation.

use std::path::{Path, PathBuf};

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData};

use super::*;
use crate::DType;
use crate::arch::ModelSpec;
use crate::checkpoint::Checkpoint;
use crate::data::IGNORED_LABEL;
use crate::model::{HfModel, ModelHandle};
use crate::packed::QuantMatrix;
use crate::progress::{CancelToken, NoProgress};

/// Single precision through a few layers; the logits are of order one.
const LOGIT_TOLERANCE: f32 = 1e-4;

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(part)
}

fn layers<B: burn::tensor::backend::Backend>(model: &HfModel) -> Vec<DecoderLayer<B>> {
    let device = B::Device::default();
    (0..model.spec().n_layers)
        .map(|i| DecoderLayer::load(model.tensors(), model.spec(), i, &device).unwrap())
        .collect()
}

fn logits(model: &HfModel, ids: &[u32]) -> Vec<f32> {
    let device = Default::default();
    let spec = model.spec();
    let tables = SequenceTables::<Cpu>::new(spec, ids.len(), &device);
    let embedding = Embedding::<Cpu>::load(model.tensors(), spec, &device).unwrap();
    let mut x = embedding.forward(&[ids]).unwrap();
    for layer in layers(model) {
        x = layer.forward(x, &tables);
    }
    let head = Head::load(model.tensors(), spec, Some(&embedding), &device).unwrap();
    head.logits(x).into_data().into_vec().unwrap()
}

fn ids(tensors: &Checkpoint, name: &str) -> Vec<u32> {
    use crate::checkpoint::TensorSource;
    let bytes = tensors.bytes(name).unwrap();
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b) as u32)
        .collect()
}

fn check_logits(folder: &Path, prefix: &str) {
    use crate::checkpoint::TensorSource;
    let model = HfModel::open(folder).unwrap();
    let golden = Checkpoint::open_files(folder, vec![folder.join("logits.safetensors")]).unwrap();
    let ids = ids(&golden, &format!("{prefix}input_ids"));
    let source: &dyn TensorSource = &golden;
    let expected = source.read_f32(&format!("{prefix}logits")).unwrap();
    let found = logits(&model, &ids);
    assert_eq!(found.len(), expected.len());
    let worst = found
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst <= LOGIT_TOLERANCE, "{}: {worst}", folder.display());
}

#[test]
fn logits_of_every_family_are_those_of_transformers() {
    for family in ["mistral", "qwen2", "qwen3", "phi3-partial", "llama3-rope"] {
        check_logits(&golden("families").join(family), "");
    }
    for checkpoint in ["llama", "phi3"] {
        // For phi3 the long prompt passes the length at which the other rotation factors apply.
        for prompt in ["short.", "long."] {
            check_logits(&golden("peft").join(checkpoint), prompt);
        }
    }
}

/// Numbers in [-0.5, 0.5) that look random.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mask = DropoutStream::new(0.5, seed, 0);
    let mut state = seed.wrapping_add(u64::from(mask.is_none()));
    (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .collect()
}

fn tensor<B: burn::tensor::backend::Backend, const D: usize>(shape: [usize; D], seed: u64) -> Tensor<B, D> {
    let values = noise(shape.iter().product(), seed);
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

fn give_low_rank<B: burn::tensor::backend::Backend>(layer: &mut DecoderLayer<B>, rank: usize) {
    let roles: Vec<_> = layer.linears().map(|(role, _)| role).collect();
    for (i, role) in roles.into_iter().enumerate() {
        let linear = layer.linear_mut(role).unwrap();
        let [out, inputs] = linear.shape();
        linear.low_rank = Some(LowRank {
            a: tensor([rank, inputs], 100 + i as u64).require_grad(),
            b: tensor([out, rank], 200 + i as u64).require_grad(),
            scaling: 0.5,
            magnitude: None,
        });
    }
}

fn close(a: &[f32], b: &[f32], relative: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let size = b.iter().fold(0.0f32, |m, v| m.max(v.abs())).max(1e-6);
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst <= relative * size, "{what}: {worst} of {size}");
}

fn values<B: burn::tensor::backend::Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
    x.into_data().into_vec().unwrap()
}

/// The hand-written backward of a layer against automatic differentiation of the same forward.
fn check_backward(folder: &Path) {
    type Tracked = Autodiff<Cpu>;
    let model = HfModel::open(folder).unwrap();
    let (spec, tensors) = (model.spec(), model.tensors());
    let shape = [80, spec.hidden_size];
    let dropout = DropoutStream::new(0.3, 9, 0);
    let dy = noise(shape.iter().product(), 3);
    let data = || TensorData::new(dy.clone(), shape);

    let mut layer = DecoderLayer::<Cpu>::load(tensors, spec, 1, &Default::default()).unwrap();
    give_low_rank(&mut layer, 3);
    let tables = SequenceTables::new(spec, 40, &Default::default());
    let short = SequenceTables::new(spec, 20, &Default::default());
    let sequences = [&tables, &short, &short];
    let (y, tape) = layer.forward_train(tensor(shape, 1), &sequences, &dropout);
    let mut gradients = Vec::new();
    let dx = layer.backward(
        tape,
        Tensor::from_data(data(), &Default::default()),
        &sequences,
        &dropout,
        &mut gradients,
    );

    let mut oracle = DecoderLayer::<Tracked>::load(tensors, spec, 1, &Default::default()).unwrap();
    give_low_rank(&mut oracle, 3);
    let tables = SequenceTables::new(spec, 40, &Default::default());
    let short = SequenceTables::new(spec, 20, &Default::default());
    let x = tensor::<Tracked, 2>(shape, 1).require_grad();
    let (oracle_y, _) = oracle.forward_train(x.clone(), &[&tables, &short, &short], &dropout);
    let weighted = oracle_y.clone() * Tensor::from_data(data(), &Default::default());
    let tracked = weighted.sum().backward();
    close(&values(y), &values(oracle_y), 1e-6, "forward");
    close(
        &values(dx),
        &values(x.grad(&tracked).unwrap()),
        2e-5,
        "input gradient",
    );
    assert_eq!(gradients.len(), spec.linears(1).len());
    for (role, gradient) in gradients {
        let low_rank = oracle.linear(role).unwrap().low_rank.as_ref().unwrap();
        let (a, b) = (low_rank.a.grad(&tracked), low_rank.b.grad(&tracked));
        close(
            &values(gradient.a),
            &values(a.unwrap()),
            2e-5,
            &format!("{role:?} A"),
        );
        close(
            &values(gradient.b),
            &values(b.unwrap()),
            2e-5,
            &format!("{role:?} B"),
        );
    }
}

#[test]
fn the_backward_of_a_layer_is_the_derivative_of_its_forward() {
    for family in ["mistral", "qwen2", "qwen3", "phi3-partial", "llama3-rope"] {
        check_backward(&golden("families").join(family));
    }
}

#[test]
fn both_activations_have_their_derivative() {
    use crate::arch::Activation;
    for kind in [Activation::Silu, Activation::GeluTanh] {
        let x = tensor::<Autodiff<Cpu>, 2>([7, 9], 5)
            .mul_scalar(6.0)
            .require_grad();
        let tracked = activation::forward(kind, x.clone()).sum().backward();
        let derivative = activation::derivative(kind, x.clone().inner());
        close(
            &values(derivative),
            &values(x.grad(&tracked).unwrap()),
            1e-5,
            &format!("{kind:?}"),
        );
    }
}

#[test]
fn gating_on_the_host_is_that_of_any_backend() {
    use crate::arch::Activation;
    type Tracked = Autodiff<Cpu>;
    for kind in [Activation::Silu, Activation::GeluTanh] {
        let both = tensor::<Tracked, 2>([5, 14], 5).mul_scalar(9.0).require_grad();
        let d_inner = tensor::<Cpu, 2>([5, 7], 6);
        let inner = activation::gated(kind, &both);
        let host = activation::gated(kind, &both.clone().inner());
        close(&values(host), &values(inner.clone()), 1e-6, "forward");
        let tracked = (inner * Tensor::from_inner(d_inner.clone())).sum().backward();
        let host = activation::gated_backward(kind, &both.clone().inner(), d_inner);
        close(
            &values(host),
            &values(both.grad(&tracked).unwrap()),
            2e-6,
            "backward",
        );
    }
}

fn packed(rows: usize, cols: usize, group: usize) -> QuantMatrix {
    let ints: Vec<u8> = noise(rows * cols, 11)
        .iter()
        .map(|v| ((v + 0.5) * 16.0) as u8)
        .collect();
    let groups = rows * cols / group;
    let scales = noise(groups, 12).iter().map(|v| 0.05 + v * 0.02).collect();
    let zeros: Vec<u8> = noise(groups, 13)
        .iter()
        .map(|v| ((v + 0.5) * 16.0) as u8)
        .collect();
    QuantMatrix::pack([rows, cols], 4, group, &ints, (scales, DType::F32), Some(&zeros)).unwrap()
}

#[test]
fn a_packed_linear_is_the_dense_one_in_both_directions() {
    // More elements than one block holds, and a last block that is not full.
    let (rows, cols) = (1100, 1024);
    let matrix = packed(rows, cols, 128);
    let dense = Tensor::<Cpu, 2>::from_data(
        TensorData::new(matrix.dequantize(), [rows, cols]),
        &Default::default(),
    );
    let dense = BaseWeight::Dense(dense);
    let packed = BaseWeight::<Cpu>::Packed(std::sync::Arc::new(matrix));
    let (x, dy) = (tensor([5, cols], 1), tensor([5, rows], 2));
    close(
        &values(packed.forward(x.clone())),
        &values(dense.forward(x)),
        1e-6,
        "forward",
    );
    close(
        &values(packed.backward(dy.clone())),
        &values(dense.backward(dy)),
        1e-5,
        "backward",
    );
}

/// `Σ w ∘ linear(x)` in double precision, straight from the formula.
fn linear_reference(
    x: &[f64],
    parts: [&[f64]; 3],
    mask: &[f32],
    scaling: f64,
    w: &[f32],
    rank: usize,
) -> f64 {
    let [weight, a, b] = parts;
    let n = mask.len() * a.len() / rank / (a.len() / rank) / (a.len() / rank);
    let inputs = a.len() / rank;
    let outputs = b.len() / rank;
    let mut total = 0.0;
    for row in 0..n {
        let x = &x[row * inputs..(row + 1) * inputs];
        let m = &mask[row * inputs..(row + 1) * inputs];
        let inner: Vec<f64> = (0..rank)
            .map(|r| {
                (0..inputs)
                    .map(|i| x[i] * f64::from(m[i]) * a[r * inputs + i])
                    .sum()
            })
            .collect();
        for out in 0..outputs {
            let base: f64 = (0..inputs).map(|i| x[i] * weight[out * inputs + i]).sum();
            let low: f64 = (0..rank).map(|r| inner[r] * b[out * rank + r]).sum();
            total += f64::from(w[row * outputs + out]) * (base + scaling * low);
        }
    }
    total
}

#[test]
fn the_backward_of_a_linear_agrees_with_finite_differences() {
    let (n, inputs, outputs, rank, scaling) = (6, 32, 24, 3, 0.75);
    let to_f64 = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
    let matrix = packed(outputs, inputs, 32);
    let weight = to_f64(&matrix.dequantize());
    let dense = matrix.dequantize();
    let bases = [
        BaseWeight::Packed(std::sync::Arc::new(matrix)),
        BaseWeight::Dense(Tensor::from_data(
            TensorData::new(dense, [outputs, inputs]),
            &Default::default(),
        )),
    ];
    for base in bases {
        for probability in [0.0, 0.4] {
            let low_rank = LowRank {
                a: tensor::<Cpu, 2>([rank, inputs], 1),
                b: tensor([outputs, rank], 2),
                scaling,
                magnitude: None,
            };
            let linear = Linear {
                weight: base.clone(),
                bias: None,
                low_rank: Some(low_rank.clone()),
            };
            let dropout = DropoutStream::new(probability, 4, 0);
            let (x, w) = (tensor([n, inputs], 3), noise(n * outputs, 4));
            let (_, tape) = linear.forward_rows(x.clone(), &dropout);
            let dy = Tensor::from_data(TensorData::new(w.clone(), [n, outputs]), &Default::default());
            let (dx, gradient) = linear.backward_rows(&x, tape, dy, &dropout);
            let gradient = gradient.unwrap();
            let mask = dropout.mask(n, inputs);
            let points = [
                to_f64(&values(x)),
                to_f64(&values(low_rank.a)),
                to_f64(&values(low_rank.b)),
            ];
            let value = |points: &[Vec<f64>; 3]| {
                let [x, a, b] = points;
                linear_reference(x, [&weight, a, b], &mask, scaling, &w, rank)
            };
            for (which, found) in [values(dx), values(gradient.a), values(gradient.b)]
                .iter()
                .enumerate()
            {
                let expected: Vec<f32> = (0..found.len())
                    .map(|i| {
                        let step = 1e-4;
                        let (mut up, mut down) = (points.clone(), points.clone());
                        up[which][i] += step;
                        down[which][i] -= step;
                        ((value(&up) - value(&down)) / (2.0 * step)) as f32
                    })
                    .collect();
                close(
                    found,
                    &expected,
                    1e-5,
                    &format!("argument {which}, p {probability}"),
                );
            }
        }
    }
}

#[test]
fn the_gradient_of_the_cross_entropy_is_its_derivative() {
    let model = HfModel::open(golden("families/qwen3")).unwrap();
    let spec: &ModelSpec = model.spec();
    let head = Head::<Cpu>::load(model.tensors(), spec, None, &Default::default()).unwrap();
    let shape = [10, spec.hidden_size];
    let scales = [0.25, 0.5];
    let labels = [
        [1, 4, IGNORED_LABEL, 6, 7],
        [IGNORED_LABEL, 2, 2, 9, IGNORED_LABEL],
    ]
    .map(Vec::from);
    let x = tensor::<Cpu, 2>(shape, 1);
    let result = head.cross_entropy(x.clone(), &labels, Some(&scales)).unwrap();
    assert_eq!(result.tokens, 6);
    let found = values(result.d_hidden.unwrap());
    let point = values(x);
    for i in (0..point.len()).step_by(7) {
        let at = |delta: f32| {
            let mut moved = point.clone();
            moved[i] += delta;
            let x = Tensor::from_data(TensorData::new(moved, shape), &Default::default());
            let sums = head.cross_entropy(x, &labels, None).unwrap().sums;
            sums[0] * scales[0] + sums[1] * scales[1]
        };
        let expected = (at(1e-2) - at(-1e-2)) / 2e-2;
        assert!(
            (f64::from(found[i]) - expected).abs() < 2e-4,
            "{i}: {} {expected}",
            found[i]
        );
    }
    // The same in the backend's own operations.
    let oracle = Head::<Autodiff<Cpu>>::load(model.tensors(), spec, None, &Default::default()).unwrap();
    let plain = oracle
        .cross_entropy(tensor(shape, 1), &labels, Some(&scales))
        .unwrap();
    close(&found, &values(plain.d_hidden.unwrap()), 1e-5, "gradient");
    for (a, b) in plain.sums.iter().zip(&result.sums) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    let bad = head.cross_entropy(tensor(shape, 1), &[vec![1; 5], vec![100_000; 5]], None);
    assert!(bad.err().unwrap().to_string().contains("100000"));
}

#[test]
fn perplexity_of_small_phi3_is_the_one_measured_with_transformers() {
    let shared = std::env::var_os("OLIVE_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared"),
        PathBuf::from,
    );
    let folder = shared.join("models/small-phi3");
    if !folder.is_dir() {
        eprintln!("SKIPPED: `{}` is not there", folder.display());
        return;
    }
    let model = HfModel::open(&folder).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let text = std::fs::read_to_string(shared.join("data/wikitext2-test.txt")).unwrap();
    let encoding = tokenizer.encode(text, false).unwrap();
    let blocks: Vec<Vec<u32>> = encoding
        .get_ids()
        .chunks_exact(512)
        .take(60)
        .map(Vec::from)
        .collect();
    let result =
        evaluate_perplexity::<Cpu>(&model, &blocks, None, &NoProgress, &CancelToken::default()).unwrap();
    assert_eq!(result.tokens, 60 * 511);
    assert!((result.perplexity - 61.430).abs() <= 0.01, "{result:?}");
}
