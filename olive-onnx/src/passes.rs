//! Passes from ONNX to ONNX: each takes a model folder and leaves another one.
//!
//! ```text
//! folder ─► Draft::open ─► GraphPass::apply (says exactly whether it changed anything) ─► Graph::check ─► Draft::write
//! ```
//!
//! A pass with the same parameters changes nothing when it runs again on what it made.
//!
//! ```
//! use olive_onnx::passes;
//!
//! let pass = passes::find("onnxpeepholeoptimizer")?;
//! assert_eq!(olive_core::Pass::name(pass), "OnnxPeepholeOptimizer");
//! # Ok::<(), olive_core::Error>(())
//! ```

use std::path::Path;
use std::sync::Arc;

use olive_core::workflow::registry::PassRegistry;
use olive_core::{
    CancelToken, Error, ModelHandle, ModelKind, NoProgress, ParamSpec, Pass, PassConfig, PassContext,
    Progress, Result,
};
use serde_json::{Map, Value};

pub mod draft;
mod handle;
mod params;
pub mod rewrite;
pub mod types;

mod add_metadata;
mod capture_split;
mod conversion;
mod dynamic_quantization;
mod extract_adapters;
mod fixed_shape;
mod float16;
mod io_types;
mod matmul_qdq;
mod model_builder;
mod peephole;
mod split;
mod surgery;
mod weight_only;

/// How one block of weights becomes integers.
pub(crate) mod blocks {
    pub use super::weight_only::{Layout, extremes, k_quant, round_to_nearest};
}

pub use capture_split::CaptureSplitInfo;
pub use conversion::OnnxConversion;
pub use draft::Draft;
pub use model_builder::ModelBuilder;
pub use surgery::SURGEONS;

/// A pass with its parameters set.
pub trait GraphPass: Send + Sync {
    /// Changes the model. `false` if, and only if, it left everything as it was.
    ///
    /// # Errors
    /// What the model has that the pass cannot treat.
    fn apply(&self, draft: &mut Draft) -> Result<bool>;
}

/// What a pass did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Whether anything changed.
    pub changed: bool,
}

type Parse = fn(&str, &PassConfig) -> Result<Box<dyn GraphPass>>;

/// A pass from ONNX to ONNX, before its parameters are known.
#[derive(Clone, Copy)]
pub struct OnnxPass {
    name: &'static str,
    params: &'static [ParamSpec],
    /// Whether the graph may break rules that the pass repairs.
    repairs: bool,
    parse: Parse,
}

impl OnnxPass {
    const fn new(name: &'static str, params: &'static [ParamSpec], parse: Parse) -> Self {
        Self {
            name,
            params,
            repairs: false,
            parse,
        }
    }

    /// The pass with these parameters, which may lack those that have a default.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] or [`Error::Config`] naming the parameter.
    pub fn configure(&self, given: &Map<String, Value>) -> Result<Box<dyn GraphPass>> {
        let origin = self.origin();
        (self.parse)(&origin, &PassConfig::new(&origin, self.params, given)?)
    }

    /// Applies the pass to a model and checks the result.
    ///
    /// # Errors
    /// [`Error::Stage`] naming the pass around what went wrong.
    pub fn apply(&self, pass: &dyn GraphPass, draft: &mut Draft) -> Result<Report> {
        let stage = |error| Error::stage(self.origin())(error);
        if !self.repairs {
            draft.model.graph.check().map_err(|error| stage(error.into()))?;
        }
        let changed = pass.apply(draft).map_err(stage)?;
        draft.model.graph.check().map_err(|error| stage(error.into()))?;
        for (_, part) in &draft.parts {
            part.graph.check().map_err(|error| stage(error.into()))?;
        }
        Ok(Report { changed })
    }

    /// Applies the pass with these parameters to the model folder `input` and leaves the result in `output`.
    ///
    /// # Errors
    /// As [`OnnxPass::configure`], [`OnnxPass::apply`], [`Draft::open`] and [`Draft::write`].
    pub fn run_on_folder(&self, given: &Map<String, Value>, input: &Path, output: &Path) -> Result<Report> {
        let pass = self.configure(given)?;
        let mut draft = Draft::open(input)?;
        let report = self.apply(pass.as_ref(), &mut draft)?;
        draft.write(output, &NoProgress, &CancelToken::default())?;
        Ok(report)
    }

    fn origin(&self) -> String {
        format!("pass `{}`", self.name)
    }

    fn run_with(
        &self,
        model: &Path,
        config: &PassConfig,
        output: &Path,
        progress: &dyn Progress,
        cancel: &CancelToken,
    ) -> Result<Draft> {
        let pass = (self.parse)(&self.origin(), config)?;
        let mut draft = Draft::open(model)?;
        progress.start(self.name, 1);
        cancel.check()?;
        let report = self.apply(pass.as_ref(), &mut draft)?;
        progress.update(
            1,
            if report.changed {
                "changed"
            } else {
                "nothing to change"
            },
        );
        progress.finish();
        draft.write(output, progress, cancel)?;
        Ok(draft)
    }
}

impl Pass for OnnxPass {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> &'static [ParamSpec] {
        self.params
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::Onnx, ModelKind::Onnx)
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        if model.kind() != ModelKind::Onnx {
            return Err(Error::file(model.path(), "an ONNX model", "a Hugging Face model"));
        }
        (self.parse)(&self.origin(), config).map(|_| ())
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        self.check(model, config)?;
        let draft = self.run_with(
            model.path(),
            config,
            context.output,
            context.progress,
            context.cancel,
        )?;
        let models: Vec<_> = match draft.parts.is_empty() {
            true => vec![draft.model],
            false => draft.parts.into_iter().map(|(_, model)| model).collect(),
        };
        Ok(Arc::new(handle::WrittenModel::new(
            context.output,
            model.spec().clone(),
            &models,
        )))
    }
}

/// All passes, by name.
pub static ONNX_PASSES: &[OnnxPass] = &[
    add_metadata::PASS,
    fixed_shape::PASS,
    extract_adapters::PASS,
    surgery::PASS,
    matmul_qdq::PASS,
    weight_only::RTN,
    dynamic_quantization::PASS,
    float16::PASS,
    weight_only::HQQ,
    io_types::PASS,
    weight_only::KQUANT,
    peephole::PASS,
    split::PASS,
];

/// Adds every pass of this crate: the builder, the export by it, the notes on splits, and those from ONNX to ONNX.
pub fn register_passes(registry: &mut PassRegistry) {
    registry.register(Box::new(ModelBuilder));
    registry.register(Box::new(OnnxConversion));
    registry.register(Box::new(CaptureSplitInfo::default()));
    for pass in ONNX_PASSES {
        registry.register(Box::new(*pass));
    }
}

/// The pass of this name, compared without case.
///
/// # Errors
/// [`Error::UnknownKey`] with the nearest name.
pub fn find(name: &str) -> Result<&'static OnnxPass> {
    let found = ONNX_PASSES
        .iter()
        .find(|pass| pass.name.eq_ignore_ascii_case(name));
    found.ok_or_else(|| Error::unknown_key("ONNX passes", name, ONNX_PASSES.iter().map(|pass| pass.name)))
}
