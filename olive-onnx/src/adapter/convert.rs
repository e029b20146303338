//! From PEFT's names and orders to a graph's: A and B transposed, B scaled, fused projections cut.
//!
//! A fused `qkv_proj` shares its A among q, k and v and cuts B's rows; `gate_up_proj` likewise. Modules of lower rank
//! are padded with zeros to the highest, because the inputs of a graph share one rank; that adds exact zeros.

use std::path::Path;
use std::sync::Arc;

use olive_core::{DType, Error, ModelSpec, Result, arch};

use super::format::{AdapterFile, write_adapter};
use super::peft::{LoraPair, PeftAdapter};
use crate::build::{LoraInput, LoraTargets};
use crate::ir::{Dim, Graph, OnnxType, Tensor};
use crate::model::OnnxFolder;

/// How an adapter is converted.
#[derive(Debug, Clone, Copy)]
pub struct ConvertOptions<'a> {
    /// The model folder it is for: names and sizes have to be those of its graph. Without one, the names are those
    /// that the builder gives.
    pub model: Option<&'a Path>,
    /// Type of the stored weights: [`DType::F32`] or [`DType::F16`].
    pub dtype: DType,
}

/// Converts a PEFT folder to an `.onnx_adapter` file at `output`. Returns the adapter that was written.
///
/// # Errors
/// Errors of [`PeftAdapter::open`] and [`OnnxFolder::open`]; [`Error::Unsupported`] or [`Error::Tensor`] if adapter
/// and model do not fit, naming every module; [`Error::Config`] for another dtype.
pub fn convert_adapter(folder: &Path, options: &ConvertOptions<'_>, output: &Path) -> Result<AdapterFile> {
    let peft = Arc::new(PeftAdapter::open(folder)?);
    let opened = options.model.map(OnnxFolder::open).transpose()?;
    let graph = opened.as_ref().map(|folder| &folder.model().graph);
    let sizes = match graph {
        Some(graph) => Sizes::of_graph(graph),
        None => Sizes::of_base(&peft),
    };
    let places = places(&peft, &sizes)?;
    if let Some((graph, model)) = graph.zip(options.model) {
        check_against(graph, &places, options.dtype, model)?;
    }
    let parameters = tensors(&peft, places, options.dtype)?;
    let adapter = AdapterFile {
        parameters,
        ..AdapterFile::default()
    };
    write_adapter(output, &adapter)?;
    Ok(adapter)
}

/// The places that an adapter needs in the graph of `spec`.
///
/// # Errors
/// [`Error::Unsupported`] naming modules that the model does not have.
pub fn lora_targets(peft: &PeftAdapter, spec: &ModelSpec) -> Result<LoraTargets> {
    let places = places(peft, &Sizes::of_spec(spec))?;
    let targets = LoraTargets::new(places.into_iter().map(|place| place.input));
    targets.check(spec)?;
    Ok(targets)
}

/// The tensors of an adapter as the graph of `spec` names and orders them, made when they are written.
///
/// # Errors
/// As [`lora_targets`].
pub fn adapter_parameters(peft: &Arc<PeftAdapter>, spec: &ModelSpec, dtype: DType) -> Result<Vec<Tensor>> {
    tensors(peft, places(peft, &Sizes::of_spec(spec))?, dtype)
}

/// What is known about the graph that an adapter goes into.
struct Sizes<'a> {
    /// Rows of q and of k (or v) in a fused projection.
    q_and_kv: Option<[usize; 2]>,
    /// The graph itself.
    graph: Option<&'a Graph>,
}

impl<'a> Sizes<'a> {
    fn of_spec(spec: &ModelSpec) -> Self {
        Self {
            graph: None,
            q_and_kv: Some([spec.q_size(), spec.kv_size()]),
        }
    }

    /// From the graph's own inputs; the adapter of a fused projection has a place for all three or for none.
    fn of_graph(graph: &'a Graph) -> Self {
        let columns = |part: &str| {
            let ending = format!("attn.{part}.lora_B.MatMul.weight");
            let input = graph.inputs.iter().find(|input| input.name.ends_with(&ending))?;
            match input.shape.as_deref() {
                Some([_, Dim::Known(columns)]) => Some(*columns),
                _ => None,
            }
        };
        Self {
            graph: Some(graph),
            q_and_kv: columns("q_proj").zip(columns("k_proj")).map(|(q, k)| [q, k]),
        }
    }

    /// From the config of the base that the adapter names, if that is a folder here.
    fn of_base(peft: &PeftAdapter) -> Self {
        let spec = peft.base().map(Path::new).filter(|path| path.is_dir());
        match spec.and_then(|path| arch::read_spec(path).ok()) {
            Some(spec) => Self::of_spec(&spec),
            None => Self {
                q_and_kv: None,
                graph: None,
            },
        }
    }

    /// The inputs for a linear that the graph names as the checkpoint does, which exporters of whole PyTorch models
    /// do: A `[in, r]` and B `[r, out]`, fused projections in one piece.
    fn own_names(&self, module: &str) -> Option<[String; 2]> {
        let names = ["lora_A", "lora_B"].map(|part| format!("{module}.{part}.weight"));
        let graph = self.graph?;
        names
            .iter()
            .all(|name| graph.input(name).is_some())
            .then_some(names)
    }
}

/// One linear of the graph and the rows of the stored B that belong to it.
#[derive(Clone)]
struct Place {
    input: LoraInput,
    /// Names of A and B in the graph.
    names: [String; 2],
    pair: LoraPair,
    rows: std::ops::Range<usize>,
}

/// The graph's linears for all adapted modules, in the order of the graph.
fn places(peft: &PeftAdapter, sizes: &Sizes<'_>) -> Result<Vec<Place>> {
    let mut places = Vec::new();
    let mut unknown = Vec::new();
    for pair in peft.pairs() {
        let Some((layer, part)) = layer_and_part(&pair.module) else {
            unknown.push(pair.module.clone());
            continue;
        };
        if let Some(names) = sizes.own_names(&pair.module) {
            let input = LoraInput {
                module: pair.module.clone(),
                in_features: pair.in_features,
                out_features: pair.out_features,
            };
            let rows = 0..pair.out_features;
            let place = Place {
                input,
                names,
                pair: pair.clone(),
                rows,
            };
            places.push((layer, ORDER.len(), place));
            continue;
        }
        for (name, rows) in cut(pair, part, sizes)? {
            let input = LoraInput {
                module: format!("model.layers.{layer}.{name}"),
                in_features: pair.in_features,
                out_features: rows.len(),
            };
            places.push((
                layer,
                place_order(name),
                Place {
                    names: [input.a_name(), input.b_name()],
                    input,
                    pair: pair.clone(),
                    rows,
                },
            ));
        }
    }
    if !unknown.is_empty() {
        let what = format!(
            "an adapter of {} module(s): {}",
            unknown.len(),
            unknown.join(", ")
        );
        return Err(Error::unsupported(
            what,
            "only linears of decoder layers take one",
        ));
    }
    places.sort_by_key(|(layer, order, _)| (*layer, *order));
    Ok(places.into_iter().map(|(_, _, place)| place).collect())
}

const ORDER: [&str; 7] = [
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

fn place_order(name: &str) -> usize {
    ORDER
        .iter()
        .position(|known| *known == name)
        .unwrap_or(ORDER.len())
}

/// `model.layers.7.self_attn.q_proj` → 7 and `self_attn.q_proj`.
fn layer_and_part(module: &str) -> Option<(usize, &str)> {
    let (layer, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, part))
}

/// The graph's names for a stored linear, with the rows of B that each takes.
fn cut(
    pair: &LoraPair,
    part: &str,
    sizes: &Sizes<'_>,
) -> Result<Vec<(&'static str, std::ops::Range<usize>)>> {
    let out = pair.out_features;
    let whole = |name: &'static str| Ok(vec![(name, 0..out)]);
    match part {
        "self_attn.q_proj" => whole("attn.q_proj"),
        "self_attn.k_proj" => whole("attn.k_proj"),
        "self_attn.v_proj" => whole("attn.v_proj"),
        "self_attn.o_proj" => whole("attn.o_proj"),
        "mlp.gate_proj" => whole("mlp.gate_proj"),
        "mlp.up_proj" => whole("mlp.up_proj"),
        "mlp.down_proj" => whole("mlp.down_proj"),
        "mlp.gate_up_proj" if out.is_multiple_of(2) => {
            Ok(vec![("mlp.gate_proj", 0..out / 2), ("mlp.up_proj", out / 2..out)])
        }
        "self_attn.qkv_proj" => {
            let [q, kv] = sizes.q_and_kv.ok_or_else(|| {
                let what = format!("the fused `{}` without its model", pair.module);
                Error::unsupported(what, "where q, k and v begin is not known; give the model folder")
            })?;
            if q + 2 * kv != out {
                let expected = format!("{} output features ({q} and twice {kv})", q + 2 * kv);
                return Err(Error::tensor(&pair.module, expected, out.to_string()));
            }
            Ok(vec![
                ("attn.q_proj", 0..q),
                ("attn.k_proj", q..q + kv),
                ("attn.v_proj", q + kv..out),
            ])
        }
        _ => Err(Error::unsupported(
            format!("an adapter of `{}`", pair.module),
            "only linears of decoder layers take one",
        )),
    }
}

/// Checks that the graph's adapter inputs are exactly those of `places`.
fn check_against(graph: &Graph, places: &[Place], dtype: DType, model: &Path) -> Result<()> {
    let inputs: Vec<&str> = graph
        .optional_inputs()
        .map(|input| input.name.as_str())
        .filter(|name| name.contains(".lora_"))
        .collect();
    if inputs.is_empty() {
        let expected = "a graph with adapter inputs";
        return Err(Error::file(model, expected, "none; build it with an adapter"));
    }
    let names: Vec<String> = places
        .iter()
        .flat_map(|place| place.names.iter().cloned())
        .collect();
    let unknown: Vec<String> = names
        .iter()
        .filter(|n| !inputs.contains(&n.as_str()))
        .cloned()
        .collect();
    if !unknown.is_empty() {
        let what = format!(
            "an adapter with {} weight(s) that the graph has no input for: {}",
            unknown.len(),
            unknown.join(", ")
        );
        return Err(mismatch(what, model));
    }
    let missing: Vec<String> = inputs
        .iter()
        .filter(|n| !names.iter().any(|name| name == *n))
        .map(|n| (*n).to_owned())
        .collect();
    if !missing.is_empty() {
        let what = format!(
            "an adapter without {} weight(s) that the graph has inputs for: {}",
            missing.len(),
            missing.join(", ")
        );
        return Err(mismatch(what, model));
    }
    for place in places {
        let sizes = [place.input.in_features, place.input.out_features];
        for (fixed, (name, size)) in place.names.iter().zip(sizes).enumerate() {
            let input = graph.input(name);
            let wanted = input.and_then(|input| input.dtype).and_then(OnnxType::to_core);
            if wanted != Some(dtype) {
                let expected = wanted.map_or_else(
                    || "a known type".to_owned(),
                    |wanted| format!("{wanted} as the graph has it"),
                );
                return Err(Error::tensor(name, expected, dtype.to_string()));
            }
            let shape = input.and_then(|input| input.shape.as_deref());
            if shape.and_then(|dims| dims.get(fixed)) != Some(&Dim::Known(size)) {
                let text: Vec<String> = shape.unwrap_or_default().iter().map(Dim::to_string).collect();
                return Err(Error::tensor(
                    name,
                    format!("[{}] as the graph has it", text.join(", ")),
                    size.to_string(),
                ));
            }
        }
    }
    Ok(())
}

fn mismatch(what: String, model: &Path) -> Error {
    Error::unsupported(
        what,
        format!(
            "adapter and `{}` have to have the same adapted linears",
            model.display()
        ),
    )
}

fn tensors(peft: &Arc<PeftAdapter>, places: Vec<Place>, dtype: DType) -> Result<Vec<Tensor>> {
    let onnx = match dtype {
        DType::F32 => OnnxType::Float,
        DType::F16 => OnnxType::Float16,
        DType::BF16 => OnnxType::Bfloat16,
        other => {
            return Err(Error::config(
                "convert-adapters",
                "dtype",
                "float32, float16 or bfloat16",
                other.to_string(),
            ));
        }
    };
    let rank = peft.rank();
    let encode = move |name: &str, values: Vec<f32>| {
        let lost = values
            .iter()
            .filter(|value| !dtype.round(**value).is_finite())
            .count();
        match lost {
            0 => Ok(dtype.from_f32(&values).unwrap_or_default()),
            _ => Err(Error::NotFinite {
                what: format!("`{name}` as {dtype}"),
                found: lost,
            }),
        }
    };
    let mut tensors = Vec::with_capacity(2 * places.len());
    for place in places {
        let [a_name, b_name] = place.names.clone();
        let (a_shape, b_shape) = ([place.input.in_features, rank], [rank, place.input.out_features]);
        let (source, own) = (peft.clone(), place.clone());
        let a = move || {
            let a = source.read_a(&own.pair)?;
            encode(&own.names[0], transposed(&a, own.pair.rank, rank))
        };
        tensors.push(Tensor::produced(a_name, onnx, a_shape, Arc::new(a))?);
        let source = peft.clone();
        let b = move || {
            let stored = source.read_b(&place.pair)?;
            let own = place.pair.rank;
            let rows = &stored[place.rows.start * own..place.rows.end * own];
            let scale = place.pair.scale as f32;
            let mut out = vec![0.0; rank * place.rows.len()];
            for (column, row) in rows.chunks_exact(own).enumerate() {
                for (line, value) in row.iter().enumerate() {
                    out[line * place.rows.len() + column] = value * scale;
                }
            }
            encode(&place.names[1], out)
        };
        tensors.push(Tensor::produced(b_name, onnx, b_shape, Arc::new(b))?);
    }
    Ok(tensors)
}

/// `a [own, in]` → `[in, rank]`, columns beyond `own` zero.
fn transposed(a: &[f32], own: usize, rank: usize) -> Vec<f32> {
    let in_features = a.len() / own.max(1);
    let mut out = vec![0.0; in_features * rank];
    for (line, row) in a.chunks_exact(in_features.max(1)).enumerate() {
        for (column, value) in row.iter().enumerate() {
            out[column * rank + line] = *value;
        }
    }
    out
}
