//! Which module of a model is quantized how, and where every tensor of the checkpoint comes from.

use olive_core::arch::quantization::exclusion_matches;
use olive_core::arch::{ModuleQuantization, QuantizationConfig};
use olive_core::packed::olive;
use olive_core::{
    CheckpointPlan, DType, Error, HfModel, LinearRole, LinearSpec, ModelHandle, ModelKind, Result, TensorInfo,
};
use serde_json::{Map, Value, json};

use super::options::{ORIGIN, UniformOptions};
use crate::quantizer::mixed_precision::{module_name, sorted_by_name};
use crate::work::layer_name;

/// The weight of the head in a checkpoint of its own.
const HEAD: &str = "lm_head.weight";

/// A module to be quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// `model.layers.0.mlp.down_proj`, `lm_head`, …
    pub module: String,
    /// The tensor that holds its weight: that of the embedding for the head of a tied model.
    pub weight: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// The type of the weight, and of the scales.
    pub dtype: DType,
    /// How.
    pub settings: ModuleQuantization,
}

impl Target {
    /// Names, types and shapes of what it is stored as.
    pub fn plan(&self) -> Vec<(String, DType, Vec<usize>)> {
        olive::plan(&self.module, self.shape, self.settings, self.dtype)
    }
}

/// Where a tensor of the checkpoint comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Entry {
    /// It is copied as it is stored.
    Copied {
        from: String,
        to: String,
        info: TensorInfo,
    },
    /// The parts of a module that is rounded.
    Rounded(Target),
}

/// What is worked on together: a decoder layer, the embedding, the head.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Part {
    pub name: String,
    pub layer: Option<usize>,
    pub targets: Vec<Target>,
}

impl Part {
    pub fn plan(&self) -> CheckpointPlan {
        let mut plan = CheckpointPlan::default();
        for (name, dtype, shape) in self.targets.iter().flat_map(Target::plan) {
            plan.push(name, dtype, shape);
        }
        plan
    }
}

/// The checkpoint that a run will write.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// In the order of the forward pass.
    pub(super) entries: Vec<Entry>,
    /// The same modules by part; every layer has one, though there be nothing to round in it.
    pub(super) parts: Vec<Part>,
    /// `quantization_config` as Olive writes it.
    pub config: Value,
    /// Whether the model's own `tie_word_embeddings` has to become false.
    pub(super) unties: bool,
}

/// What becomes of a module.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Dense,
    /// It is packed already.
    Kept(ModuleQuantization),
    Rounded(ModuleQuantization),
}

impl Fate {
    fn settings(self) -> Option<ModuleQuantization> {
        match self {
            Self::Dense => None,
            Self::Kept(settings) | Self::Rounded(settings) => Some(settings),
        }
    }
}

impl Layout {
    /// Resolves `options` for a model: a dense one, or, without calibration, one whose other modules are in Olive's
    /// layout already and stay as they are.
    ///
    /// # Errors
    /// [`Error::Config`] for an option; [`Error::Unsupported`] for a model that cannot be quantized;
    /// [`Error::Tensor`] for groups that do not divide a module's inputs; those of [`HfModel::check_tensors`].
    pub fn new(model: &dyn ModelHandle, options: &UniformOptions) -> Result<Self> {
        options.check()?;
        check_kind(model, options)?;
        HfModel::open(model.path())?.check_tensors()?;
        let draft = Draft::new(model, options)?;
        let entries = draft.entries(model)?;
        for entry in &entries {
            if let Entry::Rounded(target) = entry {
                target.settings.checked_group(&target.module, target.shape)?;
            }
        }
        Ok(Self {
            parts: parts(model, &entries),
            config: draft.config(options)?,
            unties: model.spec().tie_word_embeddings && draft.ends != Ends::AsTheyAre,
            entries,
        })
    }

    /// All modules that will be rounded, in the order of the forward pass.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Rounded(target) => Some(target),
            Entry::Copied { .. } => None,
        })
    }

    /// Names, types and shapes of the whole checkpoint.
    pub fn plan(&self) -> CheckpointPlan {
        let mut plan = CheckpointPlan::default();
        for entry in &self.entries {
            match entry {
                Entry::Copied { to, info, .. } => plan.push(to.clone(), info.dtype, info.shape.clone()),
                Entry::Rounded(target) => {
                    for (name, dtype, shape) in target.plan() {
                        plan.push(name, dtype, shape);
                    }
                }
            }
        }
        plan
    }
}

fn check_kind(model: &dyn ModelHandle, options: &UniformOptions) -> Result<()> {
    let refuse = |reason: String| {
        let what = format!("model `{}`", model.path().display());
        Err(Error::unsupported(what, reason))
    };
    if model.kind() != ModelKind::HuggingFace {
        return refuse("quantization starts from a Hugging Face checkpoint".to_owned());
    }
    if model.adapter().is_some() {
        return refuse("it has an adapter; quantize the base, or merge the adapter first".to_owned());
    }
    match &model.spec().quantization {
        Some(own) if own.quant_method != "olive" => {
            refuse(format!("it is quantized already (`{}`)", own.quant_method))
        }
        Some(_) if options.rounding.calibrates() => {
            refuse("it is quantized already, and calibration wants dense weights".to_owned())
        }
        _ => Ok(()),
    }
}

/// Embedding and head of a tied model.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ends {
    /// Tied or not, nothing changes.
    AsTheyAre,
    /// One packed table serves both.
    OneTable,
    /// They part.
    Untied,
}

struct Draft {
    modules: Vec<(String, Fate)>,
    ends: Ends,
    /// What modules without an override follow.
    default: ModuleQuantization,
    /// Exclusions of an earlier pass.
    excluded: Vec<String>,
    embedding: String,
    head: String,
}

impl Draft {
    fn new(model: &dyn ModelHandle, options: &UniformOptions) -> Result<Self> {
        let (spec, source) = (model.spec(), model.tensors());
        let existing = spec.quantization.as_ref();
        let fate = |module: &str, weight: &str| -> Result<Fate> {
            let packed = source.info(weight).is_none();
            match existing.filter(|_| packed) {
                Some(existing) => Ok(Fate::Kept(existing.module(module)?)),
                None => Ok(options.module(module)?.map_or(Fate::Dense, Fate::Rounded)),
            }
        };
        let table = |name: &str, weight: &str, wanted: bool| -> Result<(String, Fate)> {
            let module = module_name(name);
            let fate = match fate(&module, weight)? {
                Fate::Rounded(settings) if !wanted || settings.bits == 16 => Fate::Dense,
                fate => fate,
            };
            Ok((module, fate))
        };
        let embedding_name = spec.embedding_name();
        let embedding = table(embedding_name, embedding_name, options.embeds)?;
        let mut modules = vec![embedding.clone()];
        for layer in 0..spec.n_layers {
            let linears = spec.linears(layer);
            let mut fates = linears
                .iter()
                .map(|linear| fate(&linear.name, &format!("{}.weight", linear.name)))
                .collect::<Result<Vec<_>>>()?;
            share_qkv(&linears, &mut fates);
            let names = linears.into_iter().map(|linear| linear.name);
            modules.extend(names.zip(fates));
        }
        // A tied head is read where the embedding is.
        let mut head = table(HEAD, spec.lm_head_name(), options.lm_head)?;
        let mut ends = Ends::AsTheyAre;
        if spec.tie_word_embeddings {
            ends = match (embedding.1, head.1) {
                (Fate::Kept(_), _) => Ends::OneTable,
                (Fate::Rounded(own), Fate::Rounded(other)) if own == other => Ends::OneTable,
                (Fate::Dense, Fate::Dense) => Ends::AsTheyAre,
                _ => Ends::Untied,
            };
            if ends == Ends::OneTable {
                head.1 = embedding.1;
            }
        }
        let (embedding, head_name) = (embedding.0, head.0.clone());
        modules.push(head);
        for (_, fate) in &mut modules {
            if matches!(fate, Fate::Rounded(settings) if settings.bits == 16) {
                *fate = Fate::Dense;
            }
        }
        Ok(Self {
            modules,
            ends,
            default: existing.map_or(options.settings, default_settings),
            excluded: existing
                .and_then(|own| own.modules_to_not_convert.clone())
                .unwrap_or_default(),
            embedding,
            head: head_name,
        })
    }

    fn fate(&self, module: &str) -> Fate {
        let found = self.modules.iter().find(|(name, _)| name == module);
        found.map_or(Fate::Dense, |(_, fate)| *fate)
    }

    fn entries(&self, model: &dyn ModelHandle) -> Result<Vec<Entry>> {
        let spec = model.spec();
        let mut entries = Vec::new();
        for (name, shape) in spec.dense_tensors() {
            self.push(&mut entries, model, (&name, &name), &shape)?;
        }
        if self.ends == Ends::Untied {
            let shape = [spec.vocab_size, spec.hidden_size];
            let names = (spec.embedding_name(), HEAD);
            self.push(&mut entries, model, names, &shape)?;
        }
        Ok(entries)
    }

    /// What tensor `to` is made of, which is stored as `from`.
    fn push(
        &self,
        entries: &mut Vec<Entry>,
        model: &dyn ModelHandle,
        (from, to): (&str, &str),
        shape: &[usize],
    ) -> Result<()> {
        let source = model.tensors();
        let module = module_name(to);
        match (self.fate(&module), shape) {
            (Fate::Rounded(settings), [rows, cols]) => entries.push(Entry::Rounded(Target {
                module,
                weight: from.to_owned(),
                shape: [*rows, *cols],
                dtype: source.require(from)?.dtype,
                settings,
            })),
            (Fate::Kept(settings), [_, _]) => {
                let parts = olive::stored_parts(source, &module).into_iter().zip(olive::PARTS);
                for (stored, part) in parts.take(if settings.symmetric { 2 } else { 3 }) {
                    let from = format!("{module}.{stored}");
                    let to = format!("{module}.{part}");
                    let info = source.require(&from)?.clone();
                    entries.push(Entry::Copied { from, to, info });
                }
            }
            _ => entries.push(Entry::Copied {
                from: from.to_owned(),
                to: to.to_owned(),
                info: source.require(from)?.clone(),
            }),
        }
        Ok(())
    }

    fn config(&self, options: &UniformOptions) -> Result<Value> {
        let mut overrides = Map::new();
        for (module, fate) in &self.modules {
            if let Some(settings) = fate.settings()
                && settings != self.default
            {
                overrides.insert(module.clone(), difference(settings, self.default));
            }
        }
        let mut excluded: Vec<String> = Vec::new();
        for pattern in self.excluded.iter().chain(&options.modules_to_not_convert) {
            // What an earlier pass left out may be packed by now.
            let mut packed = false;
            for (module, fate) in &self.modules {
                let matches = exclusion_matches(ORIGIN, pattern, module)?;
                packed |= matches && *fate != Fate::Dense;
            }
            if !packed && !excluded.contains(pattern) {
                excluded.push(pattern.clone());
            }
        }
        let is_end = |module: &String| *module == self.embedding || *module == self.head;
        for (module, fate) in &self.modules {
            let mut named = false;
            for pattern in &excluded {
                named |= exclusion_matches(ORIGIN, pattern, module)?;
            }
            // The flags below say it of embedding and head.
            if *fate == Fate::Dense && !named && !is_end(module) {
                excluded.push(module.clone());
            }
        }
        let overrides = sorted_by_name(overrides);
        Ok(json!({
            "quant_method": "olive",
            "bits": self.default.bits,
            "symmetric": self.default.symmetric,
            "group_size": self.default.group_size,
            "lm_head": self.fate(&self.head) != Fate::Dense,
            "embeds": self.fate(&self.embedding) != Fate::Dense,
            "moe": false,
            "quantize_vision": false,
            "modules_to_not_convert": if excluded.is_empty() { Value::Null } else { json!(excluded) },
            "overrides": if overrides.is_empty() { Value::Null } else { Value::Object(overrides) },
            "tie_word_embeddings": self.ends == Ends::OneTable,
        }))
    }
}

fn default_settings(existing: &QuantizationConfig) -> ModuleQuantization {
    ModuleQuantization {
        bits: existing.bits,
        group_size: existing.group_size,
        symmetric: existing.symmetric,
    }
}

/// What `settings` says that `default` does not.
fn difference(settings: ModuleQuantization, default: ModuleQuantization) -> Value {
    let mut keys = Map::new();
    if settings.bits != default.bits {
        keys.insert("bits".to_owned(), settings.bits.into());
    }
    if settings.symmetric != default.symmetric {
        keys.insert("symmetric".to_owned(), settings.symmetric.into());
    }
    if settings.group_size != default.group_size {
        keys.insert("group_size".to_owned(), settings.group_size.into());
    }
    Value::Object(keys)
}

/// Gives query, key and value of a layer the same settings, which a fused product of the three needs: those that are
/// packed already, else the most precise.
fn share_qkv(linears: &[LinearSpec], fates: &mut [Fate]) {
    let is_qkv = |role| matches!(role, LinearRole::Q | LinearRole::K | LinearRole::V);
    let own: Vec<usize> = (0..linears.len()).filter(|i| is_qkv(linears[*i].role)).collect();
    let kept: Vec<ModuleQuantization> = own
        .iter()
        .filter_map(|i| match fates[*i] {
            Fate::Kept(settings) => Some(settings),
            _ => None,
        })
        .collect();
    let rounded = own.iter().filter_map(|i| fates[*i].settings());
    // More bits, then smaller groups; a whole row is the largest.
    let precision = |own: &ModuleQuantization| {
        let size = if own.group_size > 0 {
            own.group_size
        } else {
            i64::MAX
        };
        (own.bits, std::cmp::Reverse(size))
    };
    let shared = match kept.first() {
        // Two that differ for good cannot be fused whatever the third does.
        Some(first) if kept.iter().any(|other| other != first) => return,
        Some(first) => Some(*first),
        // The first of equals, so that the order of names does not matter.
        None => rounded.reduce(|a, b| if precision(&b) > precision(&a) { b } else { a }),
    };
    for i in own {
        if let (Fate::Rounded(settings), Some(shared)) = (&mut fates[i], shared) {
            *settings = shared;
        }
    }
}

/// The modules of embedding, layers and head.
fn parts(model: &dyn ModelHandle, entries: &[Entry]) -> Vec<Part> {
    let spec = model.spec();
    let targets = |belongs: &dyn Fn(&str) -> bool| -> Vec<Target> {
        let rounded = entries.iter().filter_map(|entry| match entry {
            Entry::Rounded(target) if belongs(&target.module) => Some(target.clone()),
            _ => None,
        });
        rounded.collect()
    };
    let end = |name: &str, weight: &str| Part {
        name: name.to_owned(),
        layer: None,
        targets: targets(&|module| *module == module_name(weight)),
    };
    let mut parts = vec![end("embedding", spec.embedding_name())];
    for layer in 0..spec.n_layers {
        let names: Vec<String> = spec.linears(layer).into_iter().map(|own| own.name).collect();
        parts.push(Part {
            name: layer_name(layer),
            layer: Some(layer),
            targets: targets(&|module| names.iter().any(|name| name == module)),
        });
    }
    parts.push(end("head", HEAD));
    parts
}
