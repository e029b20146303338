//! Adapters in host memory, and PEFT's folder of files.
//!
//! `adapter_model.safetensors` holds, for each adapted module, `base_model.model.<path>.lora_A.weight` `[r, in]` and
//! `….lora_B.weight` `[out, r]` in `F32`.

use std::path::Path;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use olive_core::checkpoint::{Checkpoint, TensorInfo, TensorSource, write_file};
use olive_core::decoder::{DecoderLayer, LowRank};
use olive_core::rng::TorchRng;
use olive_core::{DType, Error, ModelSpec, Result, fsio};

use crate::options::{AdaptedLinear, LoraOptions};
use crate::peft_config::{self, CONFIG_FILE};

/// The weights' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// The low-rank part of one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterModule {
    /// Where it is, its rank and its scale.
    pub place: AdaptedLinear,
    /// `A [rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `B [out, rank]`, row-major.
    pub b: Vec<f32>,
}

impl AdapterModule {
    fn a_shape(&self) -> [usize; 2] {
        [self.place.rank, self.place.linear.in_features]
    }

    fn b_shape(&self) -> [usize; 2] {
        [self.place.linear.out_features, self.place.rank]
    }

    fn names(place: &AdaptedLinear) -> [String; 2] {
        ["lora_A", "lora_B"].map(|part| format!("{PREFIX}{}.{part}.weight", place.linear.name))
    }

    /// The low-rank part on a device.
    pub fn low_rank<B: Backend>(&self, device: &B::Device) -> LowRank<B> {
        let tensor = |values: &Vec<f32>, shape: [usize; 2]| {
            Tensor::from_data(TensorData::new(values.clone(), shape), device)
        };
        LowRank {
            a: tensor(&self.a, self.a_shape()),
            b: tensor(&self.b, self.b_shape()),
            scaling: self.place.scaling,
        }
    }
}

/// A LoRA adapter of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Its options, targets filled in.
    pub options: LoraOptions,
    /// Its parts, in the order of the forward pass.
    pub modules: Vec<AdapterModule>,
}

impl Adapter {
    /// A fresh adapter: `A` uniform in `±1/√in` (Kaiming with `a = √5`), `B` zero, so that it changes nothing yet.
    ///
    /// # Errors
    /// Those of [`LoraOptions::adapted_linears`].
    pub fn new(spec: &ModelSpec, options: &LoraOptions, seed: u64) -> Result<Self> {
        let mut options = options.clone();
        options.target_modules = Some(options.targets(spec));
        let mut rng = TorchRng::new(seed);
        let modules = options
            .adapted_linears(spec)?
            .into_iter()
            .map(|place| {
                let bound = 1.0 / (place.linear.in_features as f32).sqrt();
                let n = place.rank * place.linear.in_features;
                let a = (0..n).map(|_| rng.uniform_f32(-bound, bound)).collect();
                let b = vec![0.0; place.linear.out_features * place.rank];
                AdapterModule { place, a, b }
            })
            .collect();
        Ok(Self { options, modules })
    }

    /// Reads a PEFT folder that must fit a model: every module that its config targets, with the right shapes, and
    /// nothing else.
    ///
    /// # Errors
    /// Those of [`peft_config::read`] and [`Checkpoint::open_files`]; [`Error::MissingTensors`],
    /// [`Error::UnknownTensors`], [`Error::Tensor`] or [`Error::NotFinite`] naming what does not fit.
    pub fn open(folder: &Path, spec: &ModelSpec) -> Result<Self> {
        let options = peft_config::read(folder)?;
        let file = folder.join(WEIGHTS_FILE);
        let checkpoint = Checkpoint::open_files(folder, vec![file.clone()])?;
        let places = options.adapted_linears(spec)?;
        let expected: Vec<String> = places.iter().flat_map(AdapterModule::names).collect();
        let missing = |name: &&String| checkpoint.info(name).is_none();
        let names: Vec<String> = expected.iter().filter(missing).cloned().collect();
        if !names.is_empty() {
            return Err(Error::MissingTensors { path: file, names });
        }
        let unknown = |name: &&str| !expected.iter().any(|known| known == name);
        let names: Vec<String> = checkpoint
            .names()
            .into_iter()
            .filter(unknown)
            .map(str::to_owned)
            .collect();
        if !names.is_empty() {
            return Err(Error::UnknownTensors { path: file, names });
        }
        let source: &dyn TensorSource = &checkpoint;
        let modules = places
            .into_iter()
            .map(|place| {
                let [a, b] = AdapterModule::names(&place);
                let a = source.read_f32_checked(&a, &[place.rank, place.linear.in_features])?;
                let b = source.read_f32_checked(&b, &[place.linear.out_features, place.rank])?;
                Ok(AdapterModule { place, a, b })
            })
            .collect::<Result<_>>()?;
        Ok(Self { options, modules })
    }

    /// Trainable numbers.
    pub fn parameters(&self) -> usize {
        self.modules.iter().map(|m| m.a.len() + m.b.len()).sum()
    }

    /// Gives a layer its low-rank parts, replacing any that it has.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the layer has no linear of that shape.
    pub fn attach<B: Backend>(&self, layer: &mut DecoderLayer<B>) -> Result<()> {
        let index = layer.index;
        for module in self.modules.iter().filter(|m| m.place.layer == index) {
            let device = layer.input_norm.weight.device();
            let linear = layer.linear_mut(module.place.linear.role);
            let shape = [module.place.linear.out_features, module.place.linear.in_features];
            match linear.filter(|linear| linear.shape() == shape) {
                Some(linear) => linear.low_rank = Some(module.low_rank(&device)),
                None => {
                    return Err(Error::tensor(
                        &module.place.linear.name,
                        format!("a linear {shape:?}"),
                        "none",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The weights' file as bytes-to-be: names, types and contents, sorted by name.
    pub(crate) fn tensors(&self) -> Vec<(String, TensorInfo, Vec<u8>)> {
        let mut tensors = Vec::with_capacity(2 * self.modules.len());
        for module in &self.modules {
            let [a, b] = AdapterModule::names(&module.place);
            tensors.push(f32_tensor(a, &module.a_shape(), &module.a));
            tensors.push(f32_tensor(b, &module.b_shape(), &module.b));
        }
        tensors.sort_by(|x, y| x.0.cmp(&y.0));
        tensors
    }

    /// Writes PEFT's files: weights, model card and config, in that order.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path, base_model: &str) -> Result<()> {
        fsio::create_dir(folder)?;
        write_file(folder.join(WEIGHTS_FILE), &self.tensors())?;
        let targets = self.options.target_modules.clone();
        let targets = targets.unwrap_or(crate::matching::Targets::Names(Vec::new()));
        fsio::write(
            folder.join("README.md"),
            self.card(base_model, &targets).as_bytes(),
        )?;
        let config = peft_config::to_json(&self.options, &targets, base_model);
        fsio::write_json(folder.join(CONFIG_FILE), &config, 2)
    }

    fn card(&self, base_model: &str, targets: &crate::matching::Targets) -> String {
        let targets = match targets {
            crate::matching::Targets::Names(names) => names.join(", "),
            crate::matching::Targets::Pattern(text) => text.clone(),
        };
        format!(
            "---\nbase_model: {base_model}\nlibrary_name: peft\n---\n\n# LoRA adapter\n\nTrained with olive on \
             `{base_model}`: rank {}, alpha {}, dropout {}, modules {targets}; {} parameters.\n",
            self.options.r,
            self.options.alpha,
            self.options.dropout,
            self.parameters(),
        )
    }
}

/// A tensor in the form that [`write_file`] takes.
pub(crate) fn f32_tensor(name: String, shape: &[usize], values: &[f32]) -> (String, TensorInfo, Vec<u8>) {
    let info = TensorInfo {
        dtype: DType::F32,
        shape: shape.to_vec(),
    };
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (name, info, bytes)
}
