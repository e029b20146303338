//! Every family from checkpoint to logits: the graph, run by our own loop, against transformers; and the same with
//! quantized weights against the decoder that calibrated them.

use std::path::{Path, PathBuf};

use olive_core::decoder::{Cpu, evaluate_perplexity};
use olive_core::{CancelToken, Checkpoint, HfModel, NoProgress, TensorSource};
use olive_genai::{Generator, GeneratorParams, Model, perplexity};
use olive_onnx::build::BuilderOptions;
use olive_onnx::package::build_model_folder;
use olive_quant::{CalibrationSet, QuantizeOptions, quantize};
use olive_tests::workspace;

/// fp32 logits of two implementations that add in different orders.
const LOGITS: f32 = 1e-4;

const FAMILIES: &[&str] = &["llama3-rope", "mistral", "phi3-partial", "qwen2", "qwen3"];

fn family(name: &str) -> PathBuf {
    workspace().join("tests/golden/families").join(name)
}

/// Token ids and logits `[ids, vocab]` that transformers gave.
fn recorded(file: &Path, prefix: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let checkpoint = Checkpoint::open_files(file, vec![file.to_path_buf()]).unwrap();
    let source: &dyn TensorSource = &checkpoint;
    let ids = source.bytes(&format!("{prefix}input_ids")).unwrap();
    let ids = ids
        .chunks_exact(8)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let logits = source.read_f32(&format!("{prefix}logits")).unwrap();
    let vocab = source.info(&format!("{prefix}logits")).unwrap().shape[1];
    (ids, logits.chunks_exact(vocab).map(<[f32]>::to_vec).collect())
}

fn build(checkpoint: &Path, folder: &Path) -> Model {
    let model = HfModel::open(checkpoint).unwrap();
    let options = BuilderOptions::default();
    build_model_folder(
        &model,
        None,
        &options,
        folder,
        &NoProgress,
        &CancelToken::default(),
    )
    .unwrap();
    Model::open(folder).unwrap()
}

/// Feeds `first` tokens at once, then one at a time, comparing the logits after each with the recorded ones.
fn follow(model: &Model, ids: &[u32], logits: &[Vec<f32>], first: usize) -> f32 {
    let mut params = GeneratorParams::new(model);
    params.set("max_length", (ids.len() + 1) as f64).unwrap();
    let mut generator = Generator::new(model, &params).unwrap();
    generator.append_tokens(&ids[..first]).unwrap();
    let mut worst = difference(generator.get_logits().unwrap(), &logits[first - 1]);
    for at in first..ids.len() {
        generator.append_tokens(&ids[at..=at]).unwrap();
        worst = worst.max(difference(generator.get_logits().unwrap(), &logits[at]));
    }
    worst
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_difference_of_different_logits_is_seen() {
    assert_eq!(difference(&[1.0, 2.0], &[1.0, 2.5]), 0.5);
}

#[test]
fn graphs_of_every_family_give_the_logits_of_transformers() {
    for name in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let model = build(&family(name), &folder.path().join("model"));
        let (ids, logits) = recorded(&family(name).join("logits.safetensors"), "");
        for first in [1, ids.len() / 2, ids.len()] {
            let worst = follow(&model, &ids, &logits, first);
            assert!(worst <= LOGITS, "{name} from {first} tokens on: {worst}");
        }
    }
}

#[test]
fn longrope_changes_its_factors_with_the_length_of_the_sequence() {
    let checkpoint = workspace().join("tests/golden/peft/phi3");
    let folder = tempfile::tempdir().unwrap();
    let model = build(&checkpoint, &folder.path().join("model"));
    let file = checkpoint.join("logits.safetensors");
    let (ids, logits) = recorded(&file, "short.");
    assert!(follow(&model, &ids, &logits, 5) <= LOGITS);
    let (ids, logits) = recorded(&file, "long.");
    // The recorded run saw all tokens at once, so only what follows the crossing can be compared.
    for first in [70, ids.len()] {
        let worst = follow(&model, &ids, &logits, first);
        assert!(worst <= LOGITS, "{first}: {worst}");
    }
    let mut params = GeneratorParams::new(&model);
    params.set("max_length", 100.0).unwrap();
    let mut generator = Generator::new(&model, &params).unwrap();
    generator.append_tokens(&ids[..60]).unwrap();
    generator.append_tokens(&ids[60..]).unwrap();
    let worst = difference(generator.get_logits().unwrap(), &logits[ids.len() - 1]);
    assert!(worst <= LOGITS, "grown over the border: {worst}");
}

#[test]
fn quantized_weights_mean_the_same_to_the_decoder_and_to_the_graph() {
    for name in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let (ids, _) = recorded(&family(name).join("logits.safetensors"), "");
        let dense = HfModel::open(family(name)).unwrap();
        let packed = folder.path().join("awq");
        let options = QuantizeOptions {
            group_size: 32,
            ..QuantizeOptions::default()
        };
        let calibration = CalibrationSet::new(vec![ids.clone()]);
        let cancel = CancelToken::default();
        quantize(&dense, &calibration, &options, &packed, &NoProgress, &cancel).unwrap();

        let decoder = HfModel::open(&packed).unwrap();
        let blocks = vec![ids];
        let expected = evaluate_perplexity::<Cpu>(&decoder, &blocks, None, &NoProgress, &cancel).unwrap();
        let graph = build(&packed, &folder.path().join("onnx/model"));
        let found = perplexity(&graph, blocks.iter().map(Vec::as_slice), &cancel, |_| ()).unwrap();
        // The decoder's norms and embedding are the stored halves; the graph's are the same values in f32.
        assert!(
            (found.loss - expected.loss).abs() <= 1e-3,
            "{name}: {} and {}",
            found.loss,
            expected.loss
        );
    }
}
