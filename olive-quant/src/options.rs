//! What a quantization run is asked to do.

use olive_core::{Error, LinearSpec, Result};
use serde::{Deserialize, Serialize};

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Activation-aware scales and clipping, then rounding to nearest.
    #[default]
    Awq,
    /// Rounding to nearest.
    Rtn,
}

/// How a candidate scale of a mapping whose output goes through a nonlinearity (q, k, v; gate, up) is judged.
/// Mappings with one linear (o, down) are always judged exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Search {
    /// By the output of attention or MLP, for every candidate that can still be the best.
    #[default]
    Exact,
    /// By the outputs of the linears, then the few best by the output of attention or MLP.
    Hybrid,
    /// By the outputs of the linears alone.
    Fast,
}

/// Options of [`quantize`](crate::quantize).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizeOptions {
    /// How weights are rounded.
    pub algorithm: Algorithm,
    /// Bits of a weight; 4, which is what the `gemm` layout holds.
    pub bits: usize,
    /// Inputs that share a scale and zero point; -1 for all inputs of a row.
    pub group_size: i64,
    /// Whether groups have a zero point; the `gemm` layout wants one.
    pub zero_point: bool,
    /// Whether scales weigh activations against weights, or follow activations alone.
    pub duo_scaling: bool,
    /// Whether the range of each group is shrunk where that lowers the error.
    pub clip: bool,
    /// Ratios tried in `0..1`; the identity is tried besides.
    pub n_grid: usize,
    /// How candidates are judged.
    pub search: Search,
    /// Linears whose name contains one of these stay in half precision.
    pub modules_to_not_convert: Vec<String>,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Awq,
            bits: 4,
            group_size: 128,
            zero_point: true,
            duo_scaling: true,
            clip: true,
            n_grid: 20,
            search: Search::Exact,
            modules_to_not_convert: Vec::new(),
        }
    }
}

impl QuantizeOptions {
    /// Round to nearest with the defaults.
    pub fn rtn() -> Self {
        Self {
            algorithm: Algorithm::Rtn,
            ..Self::default()
        }
    }

    /// Checks what does not depend on a model.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn check(&self) -> Result<()> {
        let wrong =
            |key: &str, expected: &str, found: String| Err(Error::config("quantize", key, expected, found));
        if self.bits != 4 {
            return wrong("bits", "4, which the `gemm` layout holds", self.bits.to_string());
        }
        if !self.zero_point {
            return wrong(
                "zero_point",
                "true: the `gemm` layout stores zero points",
                "false".to_owned(),
            );
        }
        if self.group_size < 1 && self.group_size != -1 {
            return wrong(
                "group_size",
                "a positive number or -1",
                self.group_size.to_string(),
            );
        }
        if !(1..=1000).contains(&self.n_grid) {
            return wrong("n_grid", "1 to 1000", self.n_grid.to_string());
        }
        Ok(())
    }

    /// Inputs that share a scale in a linear of `cols` inputs.
    pub fn group_for(&self, cols: usize) -> usize {
        usize::try_from(self.group_size).unwrap_or(cols)
    }

    /// Whether this linear is quantized.
    pub fn converts(&self, linear: &LinearSpec) -> bool {
        !self
            .modules_to_not_convert
            .iter()
            .any(|part| linear.name.contains(part.as_str()))
    }
}
