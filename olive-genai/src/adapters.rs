//! [`Adapters`]: files of weights that a graph takes as optional inputs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use olive_core::{Error, Result};
use olive_onnx::adapter::read_adapter;
use olive_onnx::ir::{Dim, Tensor, ValueInfo};

use crate::exec::Value;
use crate::model::Model;

/// Loaded adapters of a model, by name.
pub struct Adapters {
    model: Model,
    loaded: BTreeMap<String, Arc<Adapter>>,
}

/// The tensors of an adapter with the places that they go to.
pub(crate) struct Adapter {
    pub(crate) values: Vec<(usize, Value)>,
}

impl Adapters {
    /// No adapters yet.
    pub fn new(model: &Model) -> Self {
        Self {
            model: model.clone(),
            loaded: BTreeMap::new(),
        }
    }

    /// Loads an `.onnx_adapter` file under a name. Modules may have different ranks.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is taken; errors of the file; [`Error::Tensor`] for a tensor that the graph does
    /// not take, with another type or other sizes, or without its other half.
    pub fn load(&mut self, path: impl AsRef<Path>, name: &str) -> Result<()> {
        if self.loaded.contains_key(name) {
            return Err(Error::config(
                "adapters",
                name,
                "a new name",
                "an adapter that is loaded",
            ));
        }
        let file = read_adapter(path.as_ref())?;
        let info = self.model.info();
        if info.optional_inputs.is_empty() {
            let what = format!("an adapter for `{}`", self.model.folder().display());
            return Err(Error::unsupported(
                what,
                "the graph has no optional inputs for adapters",
            ));
        }
        let mut values = Vec::new();
        for tensor in &file.parameters {
            let input = info
                .optional_inputs
                .iter()
                .find(|input| input.name == tensor.name);
            let index = self.model.inner.plan.override_index(&tensor.name);
            let (Some(input), Some(index)) = (input, index) else {
                return Err(Error::tensor(
                    &tensor.name,
                    "the name of an optional input of the graph",
                    nearest(info, tensor),
                ));
            };
            check_tensor(input, tensor)?;
            let factor = info
                .lora_pairs
                .iter()
                .any(|(a, b)| *a == tensor.name || *b == tensor.name);
            let value = Value::from_ir(tensor)?;
            let value = match factor {
                true => self.model.install(|| value.with_panels()),
                false => value,
            };
            values.push((index, value));
        }
        for (a, b) in &info.lora_pairs {
            check_pair(a, file.parameter(a), b, file.parameter(b))?;
        }
        self.loaded.insert(name.to_owned(), Arc::new(Adapter { values }));
        Ok(())
    }

    /// Forgets an adapter. Generators that use it keep it.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] if there is none of this name.
    pub fn unload(&mut self, name: &str) -> Result<()> {
        match self.loaded.remove(name) {
            Some(_) => Ok(()),
            None => Err(self.unknown(name)),
        }
    }

    /// The names of the loaded adapters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.loaded.keys().map(String::as_str)
    }

    /// The adapter of this name.
    pub(crate) fn get(&self, model: &Model, name: &str) -> Result<Arc<Adapter>> {
        if !Arc::ptr_eq(&self.model.inner, &model.inner) {
            return Err(Error::config(
                "adapters",
                name,
                "an adapter loaded for this model",
                "one of another model",
            ));
        }
        self.loaded.get(name).cloned().ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> Error {
        Error::unknown_key("adapters", name, self.names())
    }
}

fn nearest(info: &crate::exec::PlanInfo, tensor: &Tensor) -> String {
    let names = info.optional_inputs.iter().map(|input| input.name.as_str());
    match olive_core::error::nearest_name(&tensor.name, names) {
        Some(name) => format!("an unknown name (did you mean `{name}`?)"),
        None => "an unknown name".to_owned(),
    }
}

fn check_tensor(input: &ValueInfo, tensor: &Tensor) -> Result<()> {
    let type_fits = input.dtype.is_none_or(|dtype| dtype == tensor.dtype());
    let sizes_fit = input.shape.as_ref().is_none_or(|shape| {
        let fits = |(dim, size): (&Dim, &usize)| !matches!(dim, Dim::Known(known) if known != size);
        shape.len() == tensor.shape().len() && shape.iter().zip(tensor.shape()).all(fits)
    });
    if type_fits && sizes_fit {
        return Ok(());
    }
    let found = format!("{}{:?}", tensor.dtype(), tensor.shape());
    Err(Error::tensor(
        &tensor.name,
        format!("what the graph takes, `{input}`"),
        found,
    ))
}

fn check_pair(a_name: &str, a: Option<&Tensor>, b_name: &str, b: Option<&Tensor>) -> Result<()> {
    match (a, b) {
        (None, None) => Ok(()),
        (Some(a), Some(b)) => {
            let (rank_a, rank_b) = (a.shape().last(), b.shape().first());
            if rank_a == rank_b {
                return Ok(());
            }
            Err(Error::tensor(
                b_name,
                format!("the rank of `{a_name}`, {rank_a:?}"),
                format!("{rank_b:?}"),
            ))
        }
        (Some(_), None) => Err(Error::tensor(
            b_name,
            format!("a tensor that goes with `{a_name}`"),
            "none",
        )),
        (None, Some(_)) => Err(Error::tensor(
            a_name,
            format!("a tensor that goes with `{b_name}`"),
            "none",
        )),
    }
}
