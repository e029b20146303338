//! Merging an adapter into its base: `W ← W + s B A`, and with DoRA `m / ‖W + s B A‖ · (W + s B A)`.
//!
//! ```text
//! <output>/model/              the merged checkpoint
//! <output>/model_config.json   names it; written last
//! <output>/merge_report.json   what became of the change, module by module
//! ```
//!
//! A dense base stays dense in its own type, as PEFT's `merge_and_unload` leaves it. On a packed base the merged weight
//! is either rounded to the same layout again or stored dense. Rounding to 4 bits takes a part of the change away: a
//! step of the grid is as large as many changes. How much is left is measured and reported.

mod rounding;

use std::path::Path;

use olive_core::packed::nf4::STATE_BYTES;
use olive_core::packed::olive::StoredPart;
use olive_core::weight::{WeightKind, stored_names};
use olive_core::{DType, Error, ModelHandle, ModelKind, PassContext, Result, TensorInfo, TensorSource, fsio};
use rayon::prelude::*;
use serde::Serialize;

use crate::adapter::{Adapter, AdapterModule};
use crate::output::{self, MODEL_FOLDER, Replacement};

/// The report's file name.
pub const MERGE_REPORT_FILE: &str = "merge_report.json";

/// What is left of a change that counts as little: less of it is worth a warning.
const LITTLE: f64 = 0.9;

/// What a packed base becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MergeLayout {
    /// Dense for bitsandbytes' layout, as Olive does it; the same layout for the others.
    #[default]
    Auto,
    /// Rounded to its own layout again: bits, groups and types stay.
    Same,
    /// Dense, in the type that the model's config names.
    Dense,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergeReport {
    /// How the base was stored: `dense`, or its `quant_method`.
    pub base: String,
    /// How the result is stored.
    pub result: String,
    /// Share of the change that is in the result, over all modules; 1 if nothing was rounded but to the stored type.
    pub kept: f64,
    /// What rounding added or took, over all modules, relative to the change.
    pub error: f64,
    /// Every adapted module.
    pub modules: Vec<MergedModule>,
}

/// What became of one module.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MergedModule {
    /// Its path.
    pub name: String,
    /// `‖ΔW‖ / ‖W‖`, the change that the adapter asks for.
    pub change: f64,
    /// `⟨ΔW', ΔW⟩ / ‖ΔW‖²`, where `ΔW'` is the change of the stored weight.
    pub kept: f64,
    /// `‖ΔW' - ΔW‖ / ‖ΔW‖`.
    pub error: f64,
}

/// Sums over the elements of modules.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    weight: f64,
    change: f64,
    along: f64,
    error: f64,
}

impl Sums {
    fn add(self, other: Self) -> Self {
        Self {
            weight: self.weight + other.weight,
            change: self.change + other.change,
            along: self.along + other.along,
            error: self.error + other.error,
        }
    }

    /// Of rows before, as they should be, and as they are stored.
    fn of(before: &[f32], wanted: &[f32], stored: &[f32]) -> Self {
        let mut sums = Self::default();
        for ((before, wanted), stored) in before.iter().zip(wanted).zip(stored) {
            let (before, wanted, stored) = (f64::from(*before), f64::from(*wanted), f64::from(*stored));
            let (change, left) = (wanted - before, stored - before);
            sums.weight += before * before;
            sums.change += change * change;
            sums.along += change * left;
            sums.error += (left - change) * (left - change);
        }
        sums
    }

    fn kept(self) -> f64 {
        if self.change > 0.0 {
            self.along / self.change
        } else {
            1.0
        }
    }

    fn relative_error(self) -> f64 {
        if self.change > 0.0 {
            (self.error / self.change).sqrt()
        } else {
            0.0
        }
    }

    fn relative_change(self) -> f64 {
        if self.weight > 0.0 {
            (self.change / self.weight).sqrt()
        } else {
            0.0
        }
    }
}

/// Merges the PEFT folder `adapter` into `model` and writes the result to [`PassContext::output`]. Weights are read,
/// changed and written one at a time.
///
/// # Errors
/// Those of [`Adapter::open`] and of reading the weights; [`Error::NotFinite`] naming a module whose merged weight does
/// not fit its type; [`Error::Config`] if the layout asked for is not the base's; [`Error::File`] for an output folder
/// that holds something else; [`Error::Cancelled`]; errors of writing.
pub fn merge(
    model: &dyn ModelHandle,
    adapter: &Path,
    layout: MergeLayout,
    context: &PassContext<'_>,
) -> Result<MergeReport> {
    if model.kind() != ModelKind::HuggingFace {
        let what = format!("merging into `{}`", model.path().display());
        return Err(Error::unsupported(what, "it is an ONNX model"));
    }
    let adapter = Adapter::open(adapter, model.spec())?;
    output::check_replaceable(model, context.output)?;
    let dense = is_dense_result(model, layout);
    let work = plan(model, &adapter, dense)?;
    let replacements: Vec<Replacement> = work
        .iter()
        .map(|work| work.replacement(model))
        .collect::<Result<_>>()?;
    fsio::create_dir(context.output)?;
    let mut modules = Vec::new();
    let mut all = Sums::default();
    output::write_model(
        model,
        &replacements,
        &context.output.join(MODEL_FOLDER),
        ("merging", context),
        |index| {
            let work = &work[index];
            let (parts, sums) = work.run(model)?;
            if let Some(module) = work.module {
                modules.push(MergedModule {
                    name: module.place.linear.name.clone(),
                    change: sums.relative_change(),
                    kept: sums.kept(),
                    error: sums.relative_error(),
                });
                all = all.add(sums);
            }
            Ok(parts)
        },
        |config| {
            if dense {
                config.remove("quantization_config");
            }
        },
    )?;
    let method = model.spec().quantization.as_ref().map(|q| q.quant_method.clone());
    let base = method.unwrap_or_else(|| "dense".to_owned());
    let report = MergeReport {
        result: if dense { "dense".to_owned() } else { base.clone() },
        base,
        kept: all.kept(),
        error: all.relative_error(),
        modules,
    };
    fsio::write_json(context.output.join(MERGE_REPORT_FILE), &report, 2)?;
    output::write_model_config(context.output, None)?;
    say(&report);
    Ok(report)
}

fn is_dense_result(model: &dyn ModelHandle, layout: MergeLayout) -> bool {
    match (&model.spec().quantization, layout) {
        (None, _) | (_, MergeLayout::Dense) => true,
        (_, MergeLayout::Same) => false,
        (Some(quantization), MergeLayout::Auto) => quantization.quant_method == "bitsandbytes",
    }
}

fn say(report: &MergeReport) {
    let (kept, error) = (100.0 * report.kept, 100.0 * report.error);
    if report.result == "dense" {
        tracing::info!("merged {} modules into a dense checkpoint", report.modules.len());
    } else if report.kept < LITTLE {
        tracing::warn!(
            "rounding to {} left {kept:.0} % of the adapter's change, with an error of {error:.0} % of it; a dense \
             result (`layout`: dense) keeps it whole",
            report.result
        );
    } else {
        tracing::info!(
            "merged {} modules; rounding to {} left {kept:.0} % of the change, with an error of {error:.0} % of it",
            report.modules.len(),
            report.result
        );
    }
}

/// One module that is stored anew: adapted, or dequantized for a dense result.
struct Work<'a> {
    name: String,
    shape: [usize; 2],
    module: Option<&'a AdapterModule>,
    dense: bool,
}

fn plan<'a>(model: &dyn ModelHandle, adapter: &'a Adapter, dense: bool) -> Result<Vec<Work<'a>>> {
    let (spec, source) = (model.spec(), model.tensors());
    let mut work = Vec::new();
    for (tensor, shape) in spec.dense_tensors() {
        let (Some(name), [rows, cols]) = (tensor.strip_suffix(".weight"), shape.as_slice()) else {
            continue;
        };
        let module = adapter.modules.iter().find(|m| m.place.linear.name == name);
        let unpacked = match &spec.quantization {
            Some(quantization) => dense && stored_names(source, quantization, name)?.is_some(),
            None => false,
        };
        if module.is_some() || unpacked {
            work.push(Work {
                name: name.to_owned(),
                shape: [*rows, *cols],
                module,
                dense,
            });
        }
    }
    Ok(work)
}

impl Work<'_> {
    fn replacement(&self, model: &dyn ModelHandle) -> Result<Replacement> {
        let (spec, source) = (model.spec(), model.tensors());
        let weight = format!("{}.weight", self.name);
        let packed = match &spec.quantization {
            Some(quantization) => stored_names(source, quantization, &self.name)?,
            None => None,
        };
        let Some(old) = packed else {
            // Stored dense, and so it stays.
            let info = source.require(&weight)?.clone();
            return Ok(Replacement {
                old: vec![weight.clone()],
                new: vec![(weight, info)],
            });
        };
        let new = match self.dense {
            true => {
                let info = TensorInfo {
                    dtype: spec.weight_dtype,
                    shape: self.shape.to_vec(),
                };
                vec![(weight, info)]
            }
            false => same_layout(source, &old)?,
        };
        Ok(Replacement { old, new })
    }

    /// The tensors of the merged module, and what rounding did to the change.
    fn run(&self, model: &dyn ModelHandle) -> Result<(Vec<StoredPart>, Sums)> {
        let (spec, source) = (model.spec(), model.tensors());
        let quantization = spec.quantization.as_ref();
        let stored = WeightKind::read(source, quantization, &self.name, self.shape)?;
        let before = stored.to_dense();
        let mut wanted = before.clone();
        if let Some(module) = self.module {
            apply(module, &mut wanted);
        }
        let merged = match &stored {
            WeightKind::Dense(_, dtype) => WeightKind::Dense(wanted.clone(), *dtype),
            _ if self.dense => WeightKind::Dense(wanted.clone(), spec.weight_dtype),
            WeightKind::Packed(matrix) => WeightKind::Packed(rounding::integers(matrix, &wanted)?),
            WeightKind::Nf4(matrix) => WeightKind::Nf4(rounding::floats(&self.name, matrix, &wanted)?),
        };
        let after = match &merged {
            WeightKind::Dense(values, dtype) => rounded(&self.name, values, *dtype)?,
            packed => packed.to_dense(),
        };
        let cols = self.shape[1].max(1);
        let rows = before
            .par_chunks(cols)
            .zip(wanted.par_chunks(cols))
            .zip(after.par_chunks(cols))
            .map(|((before, wanted), after)| Sums::of(before, wanted, after))
            .collect::<Vec<_>>();
        let sums = rows.into_iter().fold(Sums::default(), Sums::add);
        let mut parts = merged.store(quantization, &self.name)?;
        // `g_idx` is optional: a base without it stays so.
        let weight = format!("{}.weight", self.name);
        parts.retain(|(name, ..)| source.info(name).is_some() || *name == weight);
        Ok((parts, sums))
    }
}

/// Names, types and shapes of a module that keeps its layout: as they are, but for a state of olive's own length.
fn same_layout(source: &dyn TensorSource, names: &[String]) -> Result<Vec<(String, TensorInfo)>> {
    let info = |name: &String| {
        let mut info = source.require(name)?.clone();
        if name.contains(".quant_state.") {
            info.shape = vec![STATE_BYTES];
        }
        Ok((name.clone(), info))
    };
    names.iter().map(info).collect()
}

/// Values as they will be read back.
fn rounded(name: &str, values: &[f32], dtype: DType) -> Result<Vec<f32>> {
    let rounded: Vec<f32> = values.iter().map(|w| dtype.round(*w)).collect();
    match rounded.iter().filter(|w| !w.is_finite()).count() {
        0 => Ok(rounded),
        found => Err(Error::NotFinite {
            what: format!("merged weight of `{name}` in {dtype}"),
            found,
        }),
    }
}

/// Puts the adapter's change on the dense weight `[out, in]`.
fn apply(module: &AdapterModule, weight: &mut [f32]) {
    let (rank, cols) = (module.place.rank, module.place.linear.in_features);
    let scaling = module.place.scaling as f32;
    weight.par_chunks_mut(cols.max(1)).enumerate().for_each_init(
        || vec![0.0f32; cols],
        |product, (row, weight)| {
            product.fill(0.0);
            for (a, b) in module
                .a
                .chunks_exact(cols)
                .zip(&module.b[row * rank..(row + 1) * rank])
            {
                for (sum, a) in product.iter_mut().zip(a) {
                    *sum += b * a;
                }
            }
            for (w, delta) in weight.iter_mut().zip(&*product) {
                *w += delta * scaling;
            }
            if let Some(magnitude) = &module.magnitude {
                let norm = weight.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
                // A row of zeros has no direction, and stays as it is.
                let gain = if norm > 0.0 {
                    f64::from(magnitude[row]) / norm
                } else {
                    1.0
                };
                weight.iter_mut().for_each(|w| *w *= gain as f32);
            }
        },
    );
}
