//! Against a recorded run of AutoAWQ 0.2.9 (with its CPU fault repaired): a one-layer Llama in half precision, 8
//! sequences of 128 tokens, group 128.

use std::path::{Path, PathBuf};

use half::f16;
use olive_core::decoder::{Cpu, DecoderLayer};
use olive_core::{CancelToken, Checkpoint, HfModel, LinearRole, ModelHandle, TensorSource};

use crate::calibrate::{Half, HiddenStates};
use crate::calibration::CalibrationSet;
use crate::encode;
use crate::layer::{LayerLinear, LayerWeights};
use crate::options::QuantizeOptions;
use crate::quantizer::affine::{Affine, Arithmetic};
use crate::quantizer::awq::clip::{self, ClipSearch};
use crate::quantizer::awq::mapping::{Mapping, mappings};
use crate::quantizer::awq::scale::{self, Candidate};
use crate::quantizer::awq::search::{BlockProbe, ScaleSearch};
use crate::quantizer::awq::statistics::InputStatistics;
use crate::quantizer::rtn;

const GROUP: usize = 128;
/// AutoAWQ's clip search looks at every second of the 1024 tokens.
const CLIP_STRIDE: usize = 2;
/// Names of the linears in the order of the recorded clips; queries and keys are not clipped.
const CLIPPED: [LinearRole; 5] = [
    LinearRole::V,
    LinearRole::O,
    LinearRole::Gate,
    LinearRole::Up,
    LinearRole::Down,
];

struct Golden {
    model: HfModel,
    recorded: Checkpoint,
    quantized: Checkpoint,
    losses: Vec<Vec<f64>>,
    ids: Vec<Vec<u32>>,
}

fn shared() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    std::env::var_os("OLIVE_SHARED").map_or_else(beside, PathBuf::from)
}

/// The recorded run, or nothing where the shared data is not there.
fn golden() -> Option<Golden> {
    let folder = shared().join("golden/autoawq");
    if !folder.is_dir() {
        eprintln!("SKIPPED: `{}` is not there", folder.display());
        return None;
    }
    let record: serde_json::Value = olive_core::fsio::read_json(folder.join("record.json")).unwrap();
    let searches = record["search"].as_array().unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_f64().unwrap())
            .collect()
    };
    let file = folder.join("intermediates.safetensors");
    Some(Golden {
        model: HfModel::open(folder.join("model")).unwrap(),
        recorded: Checkpoint::open_files(&folder, vec![file]).unwrap(),
        quantized: Checkpoint::open(folder.join("quantized")).unwrap(),
        losses: searches.iter().map(|search| numbers(&search["losses"])).collect(),
        ids: serde_json::from_value(record["ids"].clone()).unwrap(),
    })
}

impl Golden {
    fn tensor(&self, name: &str) -> Vec<f32> {
        let source: &dyn TensorSource = &self.recorded;
        source.read_f32(name).unwrap()
    }

    fn layer(&self) -> LayerWeights {
        let options = QuantizeOptions::default();
        LayerWeights::read(self.model.tensors(), self.model.spec(), 0, &options).unwrap()
    }

    /// The layer with the recorded scales, rounded to half precision after each mapping as AutoAWQ does.
    fn scaled(&self) -> LayerWeights {
        let mut layer = self.layer();
        for (index, mapping) in self.mappings().iter().enumerate() {
            scale::apply(
                &mut layer,
                mapping,
                &self.tensor(&format!("m{index}.best_scales")),
            )
            .unwrap();
            let norms = [&mut layer.input_norm, &mut layer.post_attention_norm];
            let weights = layer.linears.iter_mut().map(|linear| &mut linear.weight);
            for value in weights.chain(norms).flatten() {
                *value = to_half(*value);
            }
        }
        layer
    }

    fn mappings(&self) -> Vec<Mapping> {
        mappings(self.model.spec())
    }

    fn statistics(&self, name: &str, channels: usize, stride: usize) -> InputStatistics {
        let x = self.tensor(name);
        let mut statistics = InputStatistics::new(channels);
        let rows: Vec<f32> = x
            .chunks_exact(channels)
            .step_by(stride)
            .flatten()
            .copied()
            .collect();
        statistics.add(&rows);
        statistics.finish();
        statistics
    }
}

fn to_half(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

fn of(layer: &LayerWeights, role: LinearRole) -> &LayerLinear {
    layer.linear(role).unwrap()
}

/// Share of equal elements.
fn agreement<T: PartialEq>(a: &[T], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

#[test]
fn with_recorded_scales_and_clips_the_packed_tensors_are_autoawqs_bytes() {
    let Some(golden) = golden() else { return };
    let mut layer = golden.scaled();
    for (index, role) in CLIPPED.into_iter().enumerate() {
        let linear = layer.linear_mut(role).unwrap();
        assert_eq!(
            linear.weight,
            golden.tensor(&format!("c{index}.w_in")),
            "{role:?} before the clip"
        );
        clip::apply(
            &mut linear.weight,
            linear.spec.in_features,
            &golden.tensor(&format!("c{index}.max")),
        );
    }
    let affine = Affine::new(4, Arithmetic::Half);
    for linear in &layer.linears {
        let matrix =
            rtn::quantize(&linear.spec.name, &linear.weight, linear.shape(), GROUP, &affine).unwrap();
        for (name, bytes) in encode::packed(&linear.spec.name, &matrix).unwrap() {
            assert_eq!(bytes, *golden.quantized.bytes(&name).unwrap(), "{name}");
        }
    }
    for (name, bytes) in encode::dense_parts(golden.model.spec(), &layer).unwrap() {
        if !name.contains("proj") {
            assert_eq!(bytes, *golden.quantized.bytes(&name).unwrap(), "{name}");
        }
    }
}

#[test]
fn means_and_scales_are_those_that_were_recorded() {
    let Some(golden) = golden() else { return };
    // Half precision rounds the recorded means and scales; they pass through a square root and a division.
    const TOLERANCE: f32 = 4e-3;
    let (layer, options) = (golden.layer(), QuantizeOptions::default());
    for (index, mapping) in golden.mappings().iter().enumerate() {
        let channels = golden.tensor(&format!("m{index}.x_mean")).len();
        let input = golden.statistics(&format!("m{index}.x"), channels, 1);
        let affine = Affine::new(4, Arithmetic::Single);
        let search = ScaleSearch::new(mapping, &layer, &input, affine, &options);
        let argmin = arg_min(&golden.losses[index]);
        let (_, scales) = search
            .candidates()
            .into_iter()
            .find(|(c, _)| *c == Candidate::Ratio(argmin as f64 / 20.0))
            .unwrap();
        let w_means = scale::weight_means(&search.linears, GROUP);
        for (name, got) in [
            ("x_mean", input.abs_means().iter().map(|m| *m as f32).collect()),
            ("w_mean", w_means.iter().map(|m| *m as f32).collect()),
            ("best_scales", scales),
        ] {
            for (want, got) in golden
                .tensor(&format!("m{index}.{name}"))
                .iter()
                .zip::<Vec<f32>>(got)
            {
                assert!(
                    (want - got).abs() <= TOLERANCE * want.abs(),
                    "m{index}.{name}: {want} {got}"
                );
            }
        }
    }
}

fn arg_min(losses: &[f64]) -> usize {
    (0..losses.len())
        .min_by(|a, b| losses[*a].total_cmp(&losses[*b]))
        .unwrap()
}

/// Losses of the recorded ratios, by the linear's output or by the block's.
fn losses(
    golden: &Golden,
    index: usize,
    probe: Option<&dyn BlockProbe>,
    input: &InputStatistics,
) -> Vec<f64> {
    let (layer, options) = (golden.layer(), QuantizeOptions::default());
    let mapping = &golden.mappings()[index];
    let search = ScaleSearch::new(
        mapping,
        &layer,
        input,
        Affine::new(4, Arithmetic::Single),
        &options,
    );
    let candidates = search.candidates();
    let ratios = candidates.iter().skip(1);
    ratios
        .map(|(_, scales)| match probe {
            None => search.gram_losses(std::iter::once(scales.as_slice()))[0],
            Some(probe) => probe
                .loss(search.rounded(scales), f64::INFINITY)
                .unwrap()
                .unwrap(),
        })
        .collect()
}

/// The recorded losses are of half-precision weights and outputs.
fn compare_losses(ours: &[f64], recorded: &[f64], what: &str) {
    const TOLERANCE: f64 = 0.03;
    const EXCESS: f64 = 0.005;
    for (ratio, (a, b)) in ours.iter().zip(recorded).enumerate() {
        assert!((a / b - 1.0).abs() < TOLERANCE, "{what}, ratio {ratio}: {a} {b}");
    }
    let (best, theirs) = (arg_min(ours), arg_min(recorded));
    assert!(
        recorded[best] <= recorded[theirs] * (1.0 + EXCESS),
        "{what}: {best} instead of {theirs}"
    );
}

#[test]
fn gram_losses_of_single_linears_follow_the_recorded_ones() {
    let Some(golden) = golden() else { return };
    for (index, channels) in [(1, 256), (3, 512)] {
        let input = golden.statistics(&format!("m{index}.x"), channels, 1);
        compare_losses(
            &losses(&golden, index, None, &input),
            &golden.losses[index],
            &format!("m{index}"),
        );
    }
}

#[test]
fn block_losses_of_qkv_and_gate_up_follow_the_recorded_ones() {
    let Some(golden) = golden() else { return };
    let calibration = CalibrationSet::new(golden.ids.clone());
    let (device, cancel) = (Default::default(), CancelToken::default());
    let mut hidden = HiddenStates::<Cpu>::embed(&golden.model, &calibration, &device, &cancel).unwrap();
    let layer = DecoderLayer::load(golden.model.tensors(), golden.model.spec(), 0, &device).unwrap();
    for (half, index) in [(Half::Attention, 0), (Half::Mlp, 2)] {
        let (run, [input, _]) = hidden.run(half, &layer).unwrap();
        compare_losses(
            &losses(&golden, index, Some(&run), &input),
            &golden.losses[index],
            &format!("{half:?}"),
        );
        let outputs = run.into_outputs();
        hidden.add(outputs);
    }
}

#[test]
fn clips_are_the_recorded_ones() {
    let Some(golden) = golden() else { return };
    const AGREEMENT: f64 = 0.995;
    let layer = golden.scaled();
    for (index, role) in CLIPPED.into_iter().enumerate() {
        let linear = of(&layer, role);
        let cols = linear.spec.in_features;
        let input = golden.statistics(&format!("c{index}.x_in"), cols, CLIP_STRIDE);
        let search = ClipSearch {
            cols,
            group_size: GROUP,
            gram: input.gram(),
            affine: Affine::new(4, Arithmetic::Half),
            jointly: false,
        };
        let found = search.run(&linear.weight);
        let recorded = golden.tensor(&format!("c{index}.max"));
        let equal = agreement(&found.limits, &recorded);
        assert!(equal >= AGREEMENT, "{role:?}: {equal}");
    }
}

#[test]
fn the_gram_loss_is_the_loss_over_the_tokens() {
    let Some(golden) = golden() else { return };
    const TOLERANCE: f64 = 1e-5;
    let (layer, options) = (golden.layer(), QuantizeOptions::default());
    let mapping = &golden.mappings()[3];
    let input = golden.statistics("m3.x", 512, 1);
    let search = ScaleSearch::new(
        mapping,
        &layer,
        &input,
        Affine::new(4, Arithmetic::Single),
        &options,
    );
    let x = golden.tensor("m3.x");
    let (_, scales) = &search.candidates()[7];
    let (_, rounded) = &search.rounded(scales)[0];
    let weight = &of(&layer, LinearRole::Down).weight;
    let delta: Vec<f64> = rounded
        .iter()
        .zip(weight)
        .map(|(a, b)| f64::from(*a) - f64::from(*b))
        .collect();
    let mut sum = 0.0;
    for x in x.chunks_exact(512) {
        for delta in delta.chunks_exact(512) {
            let y: f64 = x.iter().zip(delta).map(|(x, d)| f64::from(*x) * d).sum();
            sum += y * y;
        }
    }
    let tokens = sum / (x.len() / 512 * 256) as f64;
    assert!((search.gram_losses(std::iter::once(scales.as_slice()))[0] / tokens - 1.0).abs() < TOLERANCE);
}
