//! `olive generate-cost-model`.

use olive_core::cost_model::{cost_model, write_cost_model};
use olive_core::{ModelHandle, Result};

use super::{Context, open_model};
use crate::args::CostModelArgs;
use crate::output;

/// Runs the command.
///
/// # Errors
/// Those of reading the model's config and of writing the table.
pub fn run(args: &CostModelArgs, context: &Context<'_>) -> Result<()> {
    let model = open_model(&args.model, context)?;
    let rows = cost_model(model.spec(), args.weight_precision.bits());
    let mut path = args.output_path.clone();
    // Not `set_extension`: names of models have dots.
    if path.extension().is_none_or(|suffix| suffix != "csv") {
        path.as_mut_os_string().push(".csv");
    }
    write_cost_model(&path, &rows)?;
    let bytes: u64 = rows.iter().map(|row| row.bytes).sum();
    output::line(&format!("Cost model written to {}", path.display()))?;
    output::line(&format!("{} modules, {bytes} bytes in all", rows.len()))
}
