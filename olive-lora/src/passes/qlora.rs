//! The pass `QLoRA`: LoRA over a base in 4-bit floats, with Olive's parameter names.

use std::sync::Arc;

use olive_core::decoder::Cpu;
use olive_core::packed::nf4::{BLOCK, Nf4Options, QuantType};
use olive_core::{
    DType, HfModel, ModelHandle, ModelKind, ParamKind, ParamSpec, Pass, PassConfig, PassContext, Result,
};
use serde::Deserialize;

use super::training::{PARAMS, Params, SampleSource, concat};
use crate::qlora::{QloraOptions, check_dense, finetune_qlora, with_all_linears};

const ORIGIN: &str = "pass `QLoRA`";

const OWN: [ParamSpec; 4] = [
    ParamSpec::optional(
        "double_quant",
        ParamKind::Bool,
        "false",
        "Whether the blocks' magnitudes are quantized too.",
    ),
    ParamSpec::optional(
        "quant_type",
        ParamKind::OneOf(&["nf4", "fp4"]),
        "\"nf4\"",
        "The 4-bit type of the base.",
    ),
    ParamSpec::optional(
        "compute_dtype",
        ParamKind::OneOf(&["bfloat16", "float16", "float32"]),
        "null",
        "Written for those who load the result; torch_dtype if not given. The CPU computes in fp32.",
    ),
    ParamSpec::optional(
        "save_quant_config",
        ParamKind::Bool,
        "true",
        "Whether the result's model is the 4-bit base, or else the one that was given.",
    ),
];

const ALL: [ParamSpec; 16] = concat(PARAMS, OWN);

#[derive(Deserialize)]
struct Own {
    double_quant: bool,
    quant_type: String,
    compute_dtype: Option<String>,
    save_quant_config: bool,
    torch_dtype: String,
}

impl Own {
    fn options(&self) -> QloraOptions {
        let dtype = self.compute_dtype.as_deref().unwrap_or(&self.torch_dtype);
        QloraOptions {
            rounding: Nf4Options {
                quant_type: match self.quant_type.as_str() {
                    "fp4" => QuantType::Fp4,
                    _ => QuantType::Nf4,
                },
                block_size: BLOCK,
                double_quant: self.double_quant,
            },
            compute_dtype: match dtype {
                "float16" => DType::F16,
                "float32" => DType::F32,
                _ => DType::BF16,
            },
            keep_rounded: self.save_quant_config,
        }
    }
}

/// Trains a LoRA adapter over a 4-bit base.
pub struct QloraPass {
    samples: Arc<SampleSource>,
}

impl QloraPass {
    /// A pass whose data configs `samples` resolves.
    pub fn new(samples: Arc<SampleSource>) -> Self {
        Self { samples }
    }
}

impl Pass for QloraPass {
    fn name(&self) -> &'static str {
        "QLoRA"
    }

    fn params(&self) -> &'static [ParamSpec] {
        &ALL
    }

    fn transforms(&self) -> (ModelKind, ModelKind) {
        (ModelKind::HuggingFace, ModelKind::HuggingFace)
    }

    fn check(&self, model: &dyn ModelHandle, config: &PassConfig) -> Result<()> {
        check_dense(model)?;
        let params = Params::read(ORIGIN, config)?;
        params.check(model, &with_all_linears(&params.options(ORIGIN)?))
    }

    fn run(
        &self,
        model: &dyn ModelHandle,
        config: &PassConfig,
        context: &PassContext<'_>,
    ) -> Result<Arc<dyn ModelHandle>> {
        let params = Params::read(ORIGIN, config)?;
        let qlora = config.parse::<Own>(ORIGIN)?.options();
        let options = params.options(ORIGIN)?;
        let report = params.with_data(model, self.samples.as_ref(), |data, arguments| {
            finetune_qlora::<Cpu>(model, data, &options, qlora, arguments, context)
        })?;
        report.say();
        Ok(Arc::new(HfModel::open(context.output)?))
    }
}
