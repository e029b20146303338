//! Layers and losses against the CPU's, and the perplexities that are known.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};

use super::*;
use olive_core::data::IGNORED_LABEL;
use olive_core::decoder::{Cpu, DecoderLayer, DropoutStream, Embedding, Head, LowRank, SequenceTables};
use olive_core::model::{HfModel, ModelHandle};
use olive_core::progress::{CancelToken, NoProgress};

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(part)
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<Cpu, D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &Default::default())
}

fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f64> {
    f64s(&x.into_data().into_vec::<f32>().unwrap())
}

/// A layer with low-rank parts on all linears, on both sides.
fn both(gpu: &Gpu, model: &HfModel, adapted: bool) -> (DecoderLayer<Cpu>, DeviceLayer) {
    let (spec, source) = (model.spec(), model.tensors());
    let mut host = DecoderLayer::<Cpu>::load(source, spec, 1, &Default::default()).unwrap();
    let mut device = DeviceLayer::load(gpu, source, spec, 1).unwrap();
    let rank = 8;
    for (i, linear) in spec.linears(1).iter().enumerate().filter(|_| adapted) {
        let (out, inputs) = (linear.out_features, linear.in_features);
        let part = |n: usize, seed: u64| -> Vec<f32> {
            let small: Vec<f32> = noise(n, seed).iter().map(|v| v / 4.0).collect();
            rounded(&small)
        };
        let a = part(rank * inputs, 100 + i as u64);
        let b = part(out * rank, 200 + i as u64);
        host.linear_mut(linear.role).unwrap().low_rank = Some(LowRank {
            a: tensor(&a, [rank, inputs]),
            b: tensor(&b, [out, rank]),
            scaling: 0.25,
            magnitude: None,
        });
        device.linear_mut(linear.role).unwrap().low_rank = Some(DeviceLowRank {
            a: gpu.upload_bf16(&a, rank, inputs),
            b: gpu.upload_bf16(&b, out, rank),
            scaling: 0.25,
            gradients: Some([
                gpu.zeros(rank, inputs, Element::F32),
                gpu.zeros(out, rank, Element::F32),
            ]),
        });
    }
    (host, device)
}

fn check_layer(gpu: &Gpu, family: &str, probability: f64, adapted: bool) {
    let model = HfModel::open(golden(family)).unwrap();
    let spec = model.spec();
    let (host, device) = both(gpu, &model, adapted);
    let lengths = [24, 41];
    let total = 41;
    let hidden = spec.hidden_size;
    let rows: usize = lengths.iter().sum();
    let (x, dy) = (noise(rows * hidden, 1), noise(rows * hidden, 2));
    let batch = Batch::new(gpu, spec, &lengths, total);
    let stream = DropoutStream::new(probability, 9, 0);
    let pass = Pass {
        batch: &batch,
        dropout: Dropout::new(&stream, &batch.places),
        scratch: &gpu.empty(1, 8, Element::Bf16),
    };
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    let mut gradients: Vec<(_, [Vec<f64>; 2])> = Vec::new();
    let mut first = 0;
    for (index, length) in lengths.into_iter().enumerate() {
        let tables = SequenceTables::for_part(spec, length, total, &Default::default());
        let part = first * hidden..(first + length) * hidden;
        let own = DropoutStream::new(probability, 9, index * total);
        let shape = [length, hidden];
        let (out, tape) = host.forward_train(tensor(&x[part.clone()], shape), &[&tables], &own);
        y.extend(values(out));
        let mut found = Vec::new();
        dx.extend(values(host.backward(
            tape,
            tensor(&dy[part], shape),
            &[&tables],
            &own,
            &mut found,
        )));
        for (role, gradient) in found {
            let pair = [values(gradient.a), values(gradient.b)];
            match gradients.iter_mut().find(|(known, _)| *known == role) {
                Some((_, sums)) => {
                    for (sums, values) in sums.iter_mut().zip(pair) {
                        sums.iter_mut().zip(values).for_each(|(s, v)| *s += v);
                    }
                }
                None => gradients.push((role, pair)),
            }
        }
        first += length;
    }
    let what = |part: &str| format!("{family}, dropout {probability}: {part}");
    let device_x = gpu.upload_f32(&x, rows, hidden);
    let (found, tape) = device.forward_train(gpu, &device_x, &pass);
    close(&gpu.download_f32(&found).unwrap(), &y, HALF, &what("forward"));
    if probability == 0.0 {
        let plain = device.forward(gpu, &device_x, &pass);
        assert_eq!(
            gpu.download_f32(&plain).unwrap(),
            gpu.download_f32(&found).unwrap()
        );
    }
    // Recomputed activations give the same gradients, so the second run doubles them.
    for (runs, tape) in [(1.0, tape), (2.0, device.recompute(gpu, &device_x, &pass))] {
        let slope = gpu.upload_f32(&dy, rows, hidden);
        let half = gpu.round(&slope);
        device.backward(gpu, tape, (&slope, half), &pass);
        close(
            &gpu.download_f32(&slope).unwrap(),
            &dx,
            HALF,
            &what("input gradient"),
        );
        for (role, want) in &gradients {
            let linear = device.linear(*role).unwrap();
            let found = linear.low_rank.as_ref().unwrap().gradients.as_ref().unwrap();
            for (found, want) in found.iter().zip(want) {
                let want: Vec<f64> = want.iter().map(|v| v * runs).collect();
                close(
                    &gpu.download_f32(found).unwrap(),
                    &want,
                    HALF,
                    &what(&format!("{role:?}")),
                );
            }
        }
    }
    assert_eq!(gradients.is_empty(), !adapted);
}

#[test]
fn layers_of_every_family_do_what_they_do_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for family in [
        "families/mistral",
        "families/qwen2",
        "families/llama3-rope",
        "families/phi3-partial",
        "peft/phi3",
    ] {
        check_layer(&gpu, family, 0.0, true);
        check_layer(&gpu, family, 0.3, true);
        check_layer(&gpu, family, 0.0, false);
    }
}

#[test]
fn norms_of_heads_are_refused() {
    let model = HfModel::open(golden("families/qwen3")).unwrap();
    assert!(
        check_model(model.spec())
            .unwrap_err()
            .to_string()
            .contains("norms of heads")
    );
}

#[test]
fn the_loss_and_its_gradient_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let model = HfModel::open(golden("peft/llama")).unwrap();
    let (spec, source) = (model.spec(), model.tensors());
    let embedding = Embedding::<Cpu>::load(source, spec, &Default::default()).unwrap();
    let host = Head::<Cpu>::load(source, spec, Some(&embedding), &Default::default()).unwrap();
    let device = DeviceHead::load(&gpu, source, spec, None).unwrap();
    let (batch, seq, width) = (2, 19, spec.hidden_size);
    let hidden = noise(batch * seq * width, 1);
    let labels: Vec<Vec<i64>> = (0..batch)
        .map(|b| {
            let label = |i: usize| {
                if i % 5 == 2 {
                    IGNORED_LABEL
                } else {
                    ((i * 37 + b * 11) % spec.vocab_size) as i64
                }
            };
            (0..seq).map(label).collect()
        })
        .collect();
    let want = host
        .cross_entropy(
            tensor(&hidden, [batch * seq, width]),
            &labels,
            Some(&vec![0.125; batch]),
        )
        .unwrap();
    let mut targets = Targets::default();
    for (index, labels) in labels.iter().enumerate() {
        targets.add(index * seq, labels, spec.vocab_size).unwrap();
    }
    assert_eq!(targets.len(), want.tokens);
    let found = device.cross_entropy(
        &gpu,
        &gpu.upload_f32(&hidden, batch * seq, width),
        &targets,
        Some(0.125),
    );
    let sum = found.sum(&gpu).unwrap();
    let all: f64 = want.sums.iter().sum();
    assert!((sum / all - 1.0).abs() < 1e-2, "{sum} {all}");
    let (gradient, _) = found.d_hidden.unwrap();
    let want = values(want.d_hidden.unwrap());
    close(&gpu.download_f32(&gradient).unwrap(), &want, HALF, "gradient");
    assert!(targets.add(0, &[0, 100_000], spec.vocab_size).is_err());
}

#[test]
fn perplexity_of_small_phi3_is_that_of_the_cpu() {
    let Some(_) = gpu() else { return };
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
    let result = evaluate_perplexity(&model, &blocks, None, &NoProgress, &CancelToken::default()).unwrap();
    assert_eq!(result.tokens, 60 * 511);
    // 61.430 in single precision; activations in bfloat16 move it by less than a thousandth.
    assert!((result.perplexity / 61.430 - 1.0).abs() <= 1e-3, "{result:?}");
    eprintln!("perplexity {}", result.perplexity);
}
