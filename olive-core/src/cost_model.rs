//! Cost models: what each module of a Hugging Face model weighs and computes, as the pass `CaptureSplitInfo` reads it.
//!
//! The table has the columns of Olive's `generate-cost-model`. Operations are counted for one token: twice the
//! parameters of a linear, 4 an element of an RMS norm, 6 an element of the activation, 1 for a look-up.

use std::fmt::Write as _;
use std::path::Path;

use crate::arch::{LinearRole, ModelSpec};
use crate::error::Result;
use crate::fsio;

/// The table's first line.
pub const COLUMNS: &str = "module,num_params,num_bytes,num_flops";

/// One module without children.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleCost {
    /// Its path: `model.layers.0.mlp.down_proj`.
    pub module: String,
    /// Weights and biases.
    pub params: u64,
    /// Bytes of its parameters, rounded up.
    pub bytes: u64,
    /// Operations for one token.
    pub flops: u64,
}

/// The cost of every module, in the order of the forward pass, with parameters of `bits` each.
///
/// A head that is tied to the embedding counts as one of its own, as its product is.
pub fn cost_model(spec: &ModelSpec, bits: u64) -> Vec<ModuleCost> {
    let row = |module: &str, params: usize, flops: usize| ModuleCost {
        module: module.strip_suffix(".weight").unwrap_or(module).to_owned(),
        params: params as u64,
        bytes: (params as u64 * bits).div_ceil(8),
        flops: flops as u64,
    };
    let (hidden, table) = (spec.hidden_size, spec.vocab_size * spec.hidden_size);
    let norm = |name: &str, width: usize| row(name, width, 4 * width);
    let mut rows = vec![row(spec.embedding_name(), table, 1)];
    for layer in 0..spec.n_layers {
        let names = spec.layer_names(layer);
        rows.push(norm(&names.input_norm, hidden));
        for linear in spec.linears(layer) {
            let in_mlp = matches!(linear.role, LinearRole::Gate | LinearRole::GateUp);
            if linear.role == LinearRole::O {
                let heads = [&names.q_norm, &names.k_norm];
                rows.extend(heads.into_iter().flatten().map(|name| norm(name, spec.head_dim)));
            }
            if in_mlp {
                rows.push(norm(&names.post_attention_norm, hidden));
            }
            if linear.role == LinearRole::Down {
                let activation = format!("model.layers.{layer}.mlp.act_fn");
                rows.push(row(&activation, 0, 6 * spec.intermediate_size));
            }
            let bias = if linear.bias { linear.out_features } else { 0 };
            let params = linear.in_features * linear.out_features + bias;
            rows.push(row(&linear.name, params, 2 * params));
        }
    }
    rows.push(norm(spec.final_norm_name(), hidden));
    rows.push(row("lm_head", table, 2 * table));
    rows
}

/// Writes a cost model as CSV.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io).
pub fn write_cost_model(path: &Path, rows: &[ModuleCost]) -> Result<()> {
    let mut text = format!("{COLUMNS}\n");
    for row in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{},{},{},{}", row.module, row.params, row.bytes, row.flops);
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fsio::create_dir(parent)?;
    }
    fsio::write(path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{HfModel, ModelHandle};

    #[test]
    fn every_parameter_of_the_checkpoint_is_counted() {
        let model = HfModel::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/tiny-phi3")).unwrap();
        let stored: u64 = (model.tensors().names().iter())
            .map(|name| {
                let shape = model.tensors().info(name).unwrap().shape.clone();
                shape.iter().map(|size| *size as u64).product::<u64>()
            })
            .sum();
        let rows = cost_model(model.spec(), 4);
        assert_eq!(rows.iter().map(|row| row.params).sum::<u64>(), stored);
        assert_eq!(
            rows.iter().map(|row| row.bytes).sum::<u64>(),
            rows.iter().map(|row| row.params.div_ceil(2)).sum::<u64>()
        );
        let down = rows
            .iter()
            .find(|row| row.module == "model.layers.3.mlp.down_proj")
            .unwrap();
        assert_eq!((down.params, down.flops), (256 * 768, 2 * 256 * 768));
    }
}
