//! What a run did, as it is written to `quantization_report.json`.

use serde::{Deserialize, Serialize};

use crate::options::QuantizeOptions;
use crate::preflight::Preflight;
use crate::quantizer::awq::clip::Clip;
use crate::quantizer::awq::search::Measure;

/// The report's file in an output folder.
pub const REPORT_FILE: &str = "quantization_report.json";

/// A finished run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuantizeReport {
    /// What was asked for.
    pub options: QuantizeOptions,
    /// Sequences and tokens of the calibration; zero without one.
    pub calibration_sequences: usize,
    /// Tokens of the calibration.
    pub calibration_tokens: usize,
    /// What was expected before the run.
    pub expected: Preflight,
    /// All layers, in order.
    pub layers: Vec<LayerReport>,
    /// Sums over the layers.
    pub totals: Totals,
}

/// One decoder layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerReport {
    /// Which layer of the model.
    pub layer: usize,
    /// Wall time.
    pub seconds: f64,
    /// Relative change of the layer's output by the scaling, before rounding; absent without scaling.
    pub preservation_error: Option<f64>,
    /// Scale searches; empty without scaling.
    pub mappings: Vec<MappingReport>,
    /// Every linear of the layer.
    pub linears: Vec<LinearReport>,
}

/// The search for the scales of one mapping.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MappingReport {
    /// Producer and readers.
    pub name: String,
    /// The linears that were scaled.
    pub linears: Vec<String>,
    /// How the losses were measured.
    pub measure: Measure,
    /// Loss of rounding to nearest: the identity.
    pub loss_rtn: f64,
    /// Loss with the chosen scales; never above `loss_rtn`.
    pub loss: f64,
    /// The chosen ratio; absent if the identity won.
    pub ratio: Option<f64>,
    /// Whether scales weigh activations against weights.
    pub duo_scaling: bool,
    /// Wall time of the search.
    pub seconds: f64,
}

/// One linear.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinearReport {
    /// Its name.
    pub name: String,
    /// Whether it was quantized; else it is stored in half precision.
    pub quantized: bool,
    /// `‖Q(W) - W‖ / ‖W‖` of the weight that was rounded, after scaling and clipping.
    pub weight_error: f64,
    /// The clip search; absent if it was not clipped.
    pub clip: Option<ClipReport>,
}

/// The clip search of one linear.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ClipReport {
    /// Share of the linear's squared output error that clipping removed.
    pub gain: f64,
    /// Share of the groups whose range was shrunk.
    pub clipped: f64,
}

impl ClipReport {
    /// Sums up a search.
    pub fn new(clip: &Clip) -> Self {
        let clipped = clip.steps.iter().filter(|step| **step > 0).count();
        Self {
            gain: if clip.before > 0.0 {
                1.0 - clip.after / clip.before
            } else {
                0.0
            },
            clipped: clipped as f64 / clip.steps.len().max(1) as f64,
        }
    }
}

/// Sums over the layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Sum of `loss_rtn` over all mappings.
    pub loss_rtn: f64,
    /// Sum of `loss` over all mappings.
    pub loss: f64,
    /// Linears that were quantized.
    pub quantized_linears: usize,
    /// Bytes of the checkpoint that was written.
    pub output_bytes: u64,
    /// Wall time of the layers, those of an interrupted run included.
    pub seconds: f64,
}

impl Totals {
    /// Sums up `layers`.
    pub fn new(layers: &[LayerReport], output_bytes: u64) -> Self {
        let mappings = || layers.iter().flat_map(|layer| &layer.mappings);
        let linears = layers.iter().flat_map(|layer| &layer.linears);
        Self {
            loss_rtn: mappings().map(|mapping| mapping.loss_rtn).sum(),
            loss: mappings().map(|mapping| mapping.loss).sum(),
            quantized_linears: linears.filter(|linear| linear.quantized).count(),
            output_bytes,
            seconds: layers.iter().map(|layer| layer.seconds).sum(),
        }
    }
}
