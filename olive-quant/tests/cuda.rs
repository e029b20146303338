//! AWQ on the GPU against the CPU's: runs with `OLIVE_TEST_DEVICE=gpu`, and says so where it does not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;

use olive_core::{CancelToken, HfModel, NoProgress};
use olive_quant::report::QuantizeReport;
use olive_quant::{CalibrationSet, QuantizeOptions, Search, quantize, quantize_on_gpu};

/// What activations in bfloat16 may change a loss by.
const TOLERANCE: f64 = 0.03;

fn run(model: &HfModel, search: Search, gpu: bool, output: &Path) -> QuantizeReport {
    let calibration: Vec<Vec<u32>> = (0..6u32)
        .map(|sequence| {
            (0..160)
                .map(|i| (i * i * 7 + i * 31 + sequence * 977) % 4000)
                .collect()
        })
        .collect();
    let options = QuantizeOptions {
        search,
        ..QuantizeOptions::default()
    };
    let quantize = if gpu { quantize_on_gpu } else { quantize };
    let calibration = CalibrationSet::new(calibration);
    quantize(
        model,
        &calibration,
        &options,
        output,
        &NoProgress,
        &CancelToken::default(),
    )
    .unwrap()
}

#[test]
fn scales_and_losses_are_those_of_the_cpu() {
    if std::env::var("OLIVE_TEST_DEVICE").as_deref() != Ok("gpu") {
        eprintln!("SKIPPED: OLIVE_TEST_DEVICE is not `gpu`");
        return;
    }
    let model = HfModel::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/tiny-phi3")).unwrap();
    for search in [Search::Exact, Search::Fast] {
        let folder = tempfile::tempdir().unwrap();
        let [host, device] =
            [false, true].map(|gpu| run(&model, search, gpu, &folder.path().join(format!("{gpu}"))));
        for (host, device) in host.layers.iter().zip(&device.layers) {
            for (host, device) in host.mappings.iter().zip(&device.mappings) {
                let what = format!("{} with {search:?}: {host:?} {device:?}", host.name);
                let near = |a: f64, b: f64| (a / b - 1.0).abs() <= TOLERANCE;
                assert!(near(device.loss_rtn, host.loss_rtn), "{what}");
                // Where two candidates are as good as each other, either may win: the loss decides, not the ratio.
                assert!(near(device.loss, host.loss), "{what}");
            }
            for (host, device) in host.linears.iter().zip(&device.linears) {
                let (Some(host_clip), Some(clip)) = (host.clip, device.clip) else {
                    assert_eq!(host.clip.is_some(), device.clip.is_some(), "{}", host.name);
                    continue;
                };
                assert!((clip.gain - host_clip.gain).abs() <= TOLERANCE, "{}", host.name);
                assert!(
                    (device.weight_error / host.weight_error - 1.0).abs() <= 0.1,
                    "{}",
                    host.name
                );
            }
        }
        let ratio = device.totals.loss / host.totals.loss;
        assert!((ratio - 1.0).abs() <= TOLERANCE, "{search:?}: {ratio}");
    }
}
