//! `OnnxPeepholeOptimizer`: small rewrites that keep every result, repeated until none applies.
//!
//! Constant folding of integers (what shapes are computed from), nodes that pass their input on, chains of `Cast`,
//! `Reshape` and `Transpose`, equal nodes, equal constants, and what nothing reads.

use olive_core::{ParamKind, ParamSpec, PassConfig, Result};
use serde::Deserialize;

use super::params::{param, with_external_data};
use super::rewrite::{declare_opset, remove_dead};
use super::{Draft, GraphPass, OnnxPass};
use crate::ir::{MICROSOFT, Model};

mod chains;
pub(super) mod duplicates;
mod fold;
mod passing;

pub(super) use passing::bypass;

const PARAMS: [ParamSpec; 10] = with_external_data([
    param(
        "onnxscript_optimize",
        ParamKind::Bool,
        "true",
        "Folds integer constants and removes nodes that pass their input on.",
    ),
    param(
        "onnxoptimizer_optimize",
        ParamKind::Bool,
        "true",
        "Fuses chains of casts and transposes; merges equal nodes and constants.",
    ),
    param(
        "fuse_reshape_operations",
        ParamKind::Bool,
        "true",
        "Fuses a `Reshape` of a `Reshape`.",
    ),
    param(
        "fix_com_microsoft_opset",
        ParamKind::Bool,
        "false",
        "Declares the domain `com.microsoft` where nodes use it.",
    ),
    param(
        "cast_chain_elimination",
        ParamKind::Bool,
        "false",
        "Removes casts to a narrower float and back, whose rounding is lost then.",
    ),
]);

/// The pass.
pub const PASS: OnnxPass = OnnxPass::new("OnnxPeepholeOptimizer", &PARAMS, parse);

/// Rounds after which the rewrites are taken not to end.
const MAX_ROUNDS: usize = 1000;

#[derive(Deserialize)]
struct Peephole {
    onnxscript_optimize: bool,
    onnxoptimizer_optimize: bool,
    fuse_reshape_operations: bool,
    fix_com_microsoft_opset: bool,
    cast_chain_elimination: bool,
}

fn parse(origin: &str, config: &PassConfig) -> Result<Box<dyn GraphPass>> {
    Ok(Box::new(config.parse::<Peephole>(origin)?))
}

/// The rewrites that keep every bit, as other passes use them before they begin.
pub fn clean(model: &mut Model) -> Result<bool> {
    let all = Peephole {
        onnxscript_optimize: true,
        onnxoptimizer_optimize: true,
        fuse_reshape_operations: true,
        fix_com_microsoft_opset: false,
        cast_chain_elimination: false,
    };
    all.optimize(model)
}

impl GraphPass for Peephole {
    fn apply(&self, draft: &mut Draft) -> Result<bool> {
        self.optimize(&mut draft.model)
    }
}

impl Peephole {
    fn optimize(&self, model: &mut Model) -> Result<bool> {
        let mut changed = false;
        for _ in 0..MAX_ROUNDS {
            if !self.round(model)? {
                break;
            }
            changed = true;
        }
        if self.fix_com_microsoft_opset && model.graph.nodes.iter().any(|node| node.domain == MICROSOFT) {
            changed |= declare_opset(model, MICROSOFT, 1);
        }
        Ok(changed)
    }

    fn round(&self, model: &mut Model) -> Result<bool> {
        let graph = &mut model.graph;
        let mut changed = false;
        if self.onnxscript_optimize {
            changed |= fold::fold(graph)?;
            changed |= passing::remove(graph)?;
        }
        if self.onnxoptimizer_optimize {
            changed |= chains::casts(graph, false)?;
            changed |= chains::transposes(graph)?;
            changed |= duplicates::nodes(graph);
            changed |= duplicates::constants(graph)?;
        }
        if self.cast_chain_elimination {
            changed |= chains::casts(graph, true)?;
        }
        if self.fuse_reshape_operations {
            changed |= chains::reshapes(graph)?;
        }
        if self.onnxscript_optimize || self.onnxoptimizer_optimize {
            changed |= remove_dead(graph);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests;
