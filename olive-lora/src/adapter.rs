//! Adapters in host memory, and PEFT's folder of files.
//!
//! `adapter_model.safetensors` holds, for each adapted module, `base_model.model.<path>.lora_A.weight` `[r, in]`,
//! `….lora_B.weight` `[out, r]` and, with DoRA, `….lora_magnitude_vector` `[out]`, in `F32`.

use std::path::Path;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use olive_core::checkpoint::{Checkpoint, TensorInfo, TensorSource, write_file};
use olive_core::decoder::{DecoderLayer, LowRank};
use olive_core::rng::TorchRng;
use olive_core::{DType, Error, LinearWeight, ModelHandle, ModelSpec, Result, fsio};

use crate::options::{AdaptedLinear, LoraOptions};
use crate::peft_config::{self, CONFIG_FILE};

/// The weights' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// The trained parts of one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterModule {
    /// Where it is, its rank and its scale.
    pub place: AdaptedLinear,
    /// `A [rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `B [out, rank]`, row-major.
    pub b: Vec<f32>,
    /// DoRA's magnitudes `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

/// Names of a module's parts without `.weight`, in the order in which they are trained.
const PARTS: [&str; 3] = ["lora_A", "lora_B", "lora_magnitude_vector"];

impl AdapterModule {
    fn shapes(place: &AdaptedLinear) -> [Vec<usize>; 3] {
        let (rows, cols) = (place.linear.out_features, place.linear.in_features);
        [vec![place.rank, cols], vec![rows, place.rank], vec![rows]]
    }

    fn names(place: &AdaptedLinear) -> [String; 3] {
        let [a, b, m] = PARTS.map(|part| format!("{PREFIX}{}.{part}", place.linear.name));
        [format!("{a}.weight"), format!("{b}.weight"), m]
    }

    /// Parts of a module: two, and a third with DoRA.
    fn count(use_dora: bool) -> usize {
        if use_dora { 3 } else { 2 }
    }

    /// The trained numbers of each part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Vec<f32>> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude)
    }

    /// As [`AdapterModule::parts`].
    pub(crate) fn parts_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        [&mut self.a, &mut self.b].into_iter().chain(&mut self.magnitude)
    }

    /// The low-rank part on a device, without magnitudes.
    pub fn low_rank<B: Backend>(&self, device: &B::Device) -> LowRank<B> {
        let [rows, cols] = [self.place.linear.out_features, self.place.linear.in_features];
        let tensor = |values: &Vec<f32>, shape: [usize; 2]| {
            Tensor::from_data(TensorData::new(values.clone(), shape), device)
        };
        LowRank {
            a: tensor(&self.a, [self.place.rank, cols]),
            b: tensor(&self.b, [rows, self.place.rank]),
            scaling: self.place.scaling,
            magnitude: None,
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
    /// A fresh adapter: `A` uniform in `±1/√in` (Kaiming with `a = √5`), `B` zero and DoRA's magnitudes the norms of
    /// the base's rows, so that it changes nothing yet.
    ///
    /// # Errors
    /// Those of [`LoraOptions::adapted_linears`]; with DoRA those of reading the weights.
    pub fn new(model: &dyn ModelHandle, options: &LoraOptions, seed: u64) -> Result<Self> {
        let spec = model.spec();
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
                let magnitude = match options.use_dora {
                    true => Some(row_norms(model, &place)?),
                    false => None,
                };
                Ok(AdapterModule {
                    place,
                    a,
                    b,
                    magnitude,
                })
            })
            .collect::<Result<_>>()?;
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
        let count = AdapterModule::count(options.use_dora);
        let names_of = |place| AdapterModule::names(place).into_iter().take(count);
        let expected: Vec<String> = places.iter().flat_map(names_of).collect();
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
                let ([a, b, m], [a_shape, b_shape, m_shape]) =
                    (AdapterModule::names(&place), AdapterModule::shapes(&place));
                Ok(AdapterModule {
                    a: source.read_f32_checked(&a, &a_shape)?,
                    b: source.read_f32_checked(&b, &b_shape)?,
                    magnitude: match options.use_dora {
                        true => Some(source.read_f32_checked(&m, &m_shape)?),
                        false => None,
                    },
                    place,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { options, modules })
    }

    /// Trainable numbers.
    pub fn parameters(&self) -> usize {
        self.modules
            .iter()
            .flat_map(AdapterModule::parts)
            .map(Vec::len)
            .sum()
    }

    /// `<module>.<part>` of everything that is trained, in the order of [`AdapterModule::parts`].
    pub(crate) fn part_names(&self) -> Vec<String> {
        let count = AdapterModule::count(self.options.use_dora);
        let of = |module: &AdapterModule| {
            PARTS[..count]
                .iter()
                .map(|part| format!("{}.{part}", module.place.linear.name))
                .collect::<Vec<_>>()
        };
        self.modules.iter().flat_map(of).collect()
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
                Some(linear) => {
                    let magnitude = module.magnitude.as_ref().map(|values| {
                        Tensor::from_data(TensorData::new(values.clone(), [values.len()]), &device)
                    });
                    linear.adapt(module.low_rank(&device), magnitude);
                }
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
        let mut tensors = Vec::new();
        for module in &self.modules {
            let named = AdapterModule::names(&module.place)
                .into_iter()
                .zip(AdapterModule::shapes(&module.place));
            for ((name, shape), values) in named.zip(module.parts()) {
                tensors.push(f32_tensor(name, &shape, values));
            }
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
            "---\nbase_model: {base_model}\nlibrary_name: peft\n---\n\n# {} adapter\n\nTrained with olive on \
             `{base_model}`: rank {}, alpha {}, dropout {}, modules {targets}; {} parameters.\n",
            if self.options.use_dora { "DoRA" } else { "LoRA" },
            self.options.r,
            self.options.alpha,
            self.options.dropout,
            self.parameters(),
        )
    }
}

/// `‖W‖` of each row of a base's linear, `[out]`.
fn row_norms(model: &dyn ModelHandle, place: &AdaptedLinear) -> Result<Vec<f32>> {
    let weight = LinearWeight::read(model.tensors(), model.spec(), &place.linear)?
        .weight
        .into_dense();
    let norm = |row: &[f32]| row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt() as f32;
    Ok(weight
        .chunks_exact(place.linear.in_features.max(1))
        .map(norm)
        .collect())
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
