//! Which linears deserve more bits: the rules of llama.cpp's k-quant mixes, or scores of how much rounding harms a
//! weight, as Olive's `SelectiveMixedPrecision` chooses them.
//!
//! ```text
//! snr           10 log10(‖W‖² / ‖W - Q(W)‖²)                      low is sensitive
//! snr_relative  snr at low bits - snr at high bits
//! iqe           1 / (max over rows of the mean of (W - Q(W))² + 1e-12)
//! iqe_relative  iqe at low bits / iqe at high bits
//! kld_gradient  minus the alignment of a million weights, see [`kld`]
//! ```
//!
//! The most sensitive are promoted until they hold `1 - ratio` of all weights. Query, key and value of a layer are one
//! unit: sums (snr, kld_gradient) and maxima (iqe) over the three are those of the fused matrix.

pub mod kld;

use olive_core::arch::ModuleQuantization;
use olive_core::{
    DType, Error, LinearRole, LinearSpec, LinearWeight, ModelSpec, Result, TensorSource, WeightKind,
};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use self::kld::Alignments;
use super::minmax::MinMax;

/// The module of the head.
const HEAD: &str = "lm_head";
/// Smallest quotient.
const EPSILON: f64 = 1e-12;

/// A way to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// The head.
    KQuantLast,
    /// The head, and `down_proj` of the first and last eighth of the layers and of every third between.
    KQuantDown,
    /// As `KQuantDown`, and the query, key and value projections of these layers.
    KQuantMixed,
    /// Signal to noise.
    Snr,
    /// Signal to noise against that at high bits.
    SnrRelative,
    /// Largest mean square error of a row.
    Iqe,
    /// Largest mean square error of a row against that at high bits.
    IqeRelative,
    /// Share in the divergence of the rounded model's output; calibrated.
    KldGradient,
}

impl Choice {
    /// Whether weights have to be looked at.
    pub fn is_scored(self) -> bool {
        !matches!(self, Self::KQuantLast | Self::KQuantDown | Self::KQuantMixed)
    }

    /// Whether the score needs [`kld::alignments`].
    pub fn calibrates(self) -> bool {
        self == Self::KldGradient
    }
}

/// What to choose between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Precisions {
    /// Of most modules.
    pub low: ModuleQuantization,
    /// Of those that are promoted; 16 bits stay dense.
    pub high: ModuleQuantization,
    /// Share of the weights that stays low; for scores.
    pub ratio: f64,
}

/// Settings of all modules and of those that differ, as Olive's `mixed_precision_info`.
#[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct MixedPrecision {
    /// `bits`, and for scores `group_size` and `symmetric`.
    pub default: Map<String, Value>,
    /// The same by module.
    pub overrides: Map<String, Value>,
}

/// Whether the k-quant rules promote layer `index` of `n`.
pub fn promotes_layer(index: usize, n: usize) -> bool {
    8 * index < n || 8 * index >= 7 * n || (index as i64 - n as i64 / 8).rem_euclid(3) == 2
}

/// Chooses by rule or by score; only [`Choice::KldGradient`] looks at `alignments`.
///
/// # Errors
/// Those of reading the weights, for scores; [`Error::Unsupported`] for weights that are packed already.
pub fn choose(
    source: &dyn TensorSource,
    spec: &ModelSpec,
    choice: Choice,
    precisions: &Precisions,
    alignments: &Alignments,
) -> Result<MixedPrecision> {
    if choice.is_scored() {
        let units = match choice.calibrates() {
            true => aligned_units(spec, alignments)?,
            false => damaged_units(source, spec, precisions)?,
        };
        return Ok(choose_by_score(units, spec, choice, precisions));
    }
    let bits = json!({"bits": precisions.high.bits});
    let mut overrides = Map::new();
    let promoted = |role: LinearRole| match role {
        LinearRole::Down => choice != Choice::KQuantLast,
        LinearRole::Qkv | LinearRole::Q | LinearRole::K | LinearRole::V => choice == Choice::KQuantMixed,
        _ => false,
    };
    for layer in (0..spec.n_layers).filter(|layer| promotes_layer(*layer, spec.n_layers)) {
        for linear in spec
            .linears(layer)
            .into_iter()
            .filter(|linear| promoted(linear.role))
        {
            overrides.insert(linear.name, bits.clone());
        }
    }
    if spec.tie_word_embeddings {
        overrides.insert(module_name(spec.embedding_name()), bits.clone());
    }
    overrides.insert(HEAD.to_owned(), bits);
    let mut default = Map::new();
    default.insert("bits".to_owned(), precisions.low.bits.into());
    let overrides = sorted_by_name(overrides);
    Ok(MixedPrecision { default, overrides })
}

/// Settings in the order of their modules' names, numbers as numbers.
pub fn sorted_by_name(settings: Map<String, Value>) -> Map<String, Value> {
    let key = |name: &str| -> Vec<(Option<u64>, String)> {
        let parts = name.split('.');
        parts.map(|part| (part.parse().ok(), part.to_owned())).collect()
    };
    let mut entries: Vec<(String, Value)> = settings.into_iter().collect();
    entries.sort_by_cached_key(|(name, _)| key(name));
    entries.into_iter().collect()
}

/// The module of a weight.
pub fn module_name(tensor: &str) -> String {
    tensor.strip_suffix(".weight").unwrap_or(tensor).to_owned()
}

fn settings_json(settings: ModuleQuantization) -> Map<String, Value> {
    let ModuleQuantization {
        bits,
        group_size,
        symmetric,
    } = settings;
    match json!({"bits": bits, "group_size": group_size, "symmetric": symmetric}) {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// What rounding does to some rows.
#[derive(Debug, Clone, Copy, Default)]
struct Damage {
    signal: f64,
    noise: [f64; 2],
    worst_row: [f64; 2],
    alignment: f64,
}

impl Damage {
    fn and(self, other: Self) -> Self {
        let sum = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
        let most = |a: [f64; 2], b: [f64; 2]| [a[0].max(b[0]), a[1].max(b[1])];
        Self {
            signal: self.signal + other.signal,
            noise: sum(self.noise, other.noise),
            worst_row: most(self.worst_row, other.worst_row),
            alignment: self.alignment + other.alignment,
        }
    }

    /// Low is sensitive.
    fn score(self, choice: Choice, weights: usize) -> f64 {
        let floor = EPSILON * EPSILON;
        let snr = |noise: f64| 10.0 * (self.signal.max(floor) / noise.max(floor)).log10();
        let iqe = |worst: f64| 1.0 / (worst + EPSILON);
        let ([low, high], [worst_low, worst_high]) = (self.noise, self.worst_row);
        match choice {
            Choice::SnrRelative => snr(low) - snr(high),
            Choice::Iqe => iqe(worst_low),
            Choice::IqeRelative => iqe(worst_low) / iqe(worst_high),
            Choice::KldGradient => -self.alignment / (weights.max(1) as f64 / 1e6),
            _ => snr(low),
        }
    }
}

/// Modules that are promoted together.
struct Unit {
    modules: Vec<String>,
    weights: usize,
    damage: Damage,
}

/// Units of the layers, from what `of` makes of a linear.
fn layer_units(spec: &ModelSpec, mut of: impl FnMut(&LinearSpec) -> Result<Unit>) -> Result<Vec<Unit>> {
    let mut units: Vec<Unit> = Vec::new();
    for linear in (0..spec.n_layers).flat_map(|layer| spec.linears(layer)) {
        let unit = of(&linear)?;
        // K and V join the unit that Q began.
        match (units.last_mut(), linear.role) {
            (Some(last), LinearRole::K | LinearRole::V) => {
                last.modules.extend(unit.modules);
                last.weights += unit.weights;
                last.damage = last.damage.and(unit.damage);
            }
            _ => units.push(unit),
        }
    }
    Ok(units)
}

fn damaged_units(source: &dyn TensorSource, spec: &ModelSpec, precisions: &Precisions) -> Result<Vec<Unit>> {
    let mut units = layer_units(spec, |linear| {
        let shape = [linear.out_features, linear.in_features];
        let stored = LinearWeight::read(source, spec, linear)?.weight;
        unit(linear.name.clone(), stored, shape, precisions)
    })?;
    let shape = [spec.vocab_size, spec.hidden_size];
    let module = module_name(spec.lm_head_name());
    let head = WeightKind::read(source, spec.quantization.as_ref(), &module, shape)?;
    units.push(unit(HEAD.to_owned(), head, shape, precisions)?);
    Ok(units)
}

fn aligned_units(spec: &ModelSpec, alignments: &Alignments) -> Result<Vec<Unit>> {
    let unit = |module: &str, weights: usize| {
        let found = alignments.get(module);
        let alignment = *found.ok_or_else(|| Error::tensor(module, "a sensitivity", "none"))?;
        Ok(Unit {
            modules: vec![module.to_owned()],
            weights,
            damage: Damage {
                alignment,
                ..Damage::default()
            },
        })
    };
    let mut units = layer_units(spec, |linear| {
        unit(&linear.name, linear.out_features * linear.in_features)
    })?;
    units.push(unit(HEAD, spec.vocab_size * spec.hidden_size)?);
    Ok(units)
}

fn choose_by_score(
    mut units: Vec<Unit>,
    spec: &ModelSpec,
    choice: Choice,
    precisions: &Precisions,
) -> MixedPrecision {
    let score = |unit: &Unit| unit.damage.score(choice, unit.weights);
    units.sort_by(|a, b| score(a).total_cmp(&score(b)));
    let total: usize = units.iter().map(|unit| unit.weights).sum();
    let wanted = total as f64 * (1.0 - precisions.ratio);
    let (mut promoted, mut overrides) = (0usize, Map::new());
    let high = Value::Object(settings_json(precisions.high));
    for unit in units {
        promoted += unit.weights;
        for module in unit.modules {
            if module == HEAD && spec.tie_word_embeddings {
                overrides.insert(module_name(spec.embedding_name()), high.clone());
            }
            overrides.insert(module, high.clone());
        }
        if promoted as f64 >= wanted {
            break;
        }
    }
    MixedPrecision {
        default: settings_json(precisions.low),
        overrides: sorted_by_name(overrides),
    }
}

fn unit(module: String, stored: WeightKind, shape: [usize; 2], precisions: &Precisions) -> Result<Unit> {
    let WeightKind::Dense(weight, dtype) = stored else {
        return Err(Error::unsupported(
            format!("packed linear `{module}`"),
            "scores need dense weights",
        ));
    };
    let damage = damage(&module, &weight, shape, dtype, precisions)?;
    Ok(Unit {
        modules: vec![module],
        weights: weight.len(),
        damage,
    })
}

fn damage(
    module: &str,
    weight: &[f32],
    shape: [usize; 2],
    dtype: DType,
    precisions: &Precisions,
) -> Result<Damage> {
    let [_, cols] = shape;
    let grids = |settings: ModuleQuantization| -> Result<Option<(MinMax, usize)>> {
        if settings.bits == 16 {
            return Ok(None);
        }
        let group_size = settings.checked_group(module, shape)?;
        Ok(Some((
            MinMax::of_weight(settings.bits, settings.symmetric, dtype),
            group_size,
        )))
    };
    let both = [grids(precisions.low)?, grids(precisions.high)?];
    let rows: Vec<Damage> = weight
        .par_chunks(cols.max(1))
        .map(|row| {
            let mut damage = Damage {
                signal: row.iter().map(|w| f64::from(*w) * f64::from(*w)).sum(),
                ..Damage::default()
            };
            for (index, grids) in both.iter().enumerate() {
                damage.noise[index] =
                    grids.map_or(0.0, |(grids, group_size)| row_noise(row, &grids, group_size));
                damage.worst_row[index] = damage.noise[index] / cols as f64;
            }
            damage
        })
        .collect();
    Ok(rows.into_iter().fold(Damage::default(), Damage::and))
}

fn row_noise(row: &[f32], grids: &MinMax, group_size: usize) -> f64 {
    let group_noise = |group: &[f32]| -> f64 {
        let grid = grids.grid(group);
        // Olive subtracts the weight as its own type holds it.
        let error = |w: f32| f64::from(grids.arithmetic.round(grids.nearest(grid, w)) - w);
        group.iter().map(|w| error(*w).powi(2)).sum()
    };
    row.chunks_exact(group_size).map(group_noise).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_promote_the_ends_and_every_third_between() {
        let promoted = |n: usize| (0..n).filter(|i| promotes_layer(*i, n)).collect::<Vec<_>>();
        assert_eq!(
            promoted(32),
            [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        );
        assert_eq!(promoted(6), [0, 2, 5]);
        assert_eq!(promoted(4), [0, 2]);
        assert_eq!(promoted(1), [0]);
    }

    #[test]
    fn scores_follow_their_formulas() {
        let damage = Damage {
            signal: 100.0,
            noise: [1.0, 0.01],
            worst_row: [0.5, 0.005],
            alignment: -3.0,
        };
        let close = |choice, want: f64| assert!((damage.score(choice, 500_000) - want).abs() < 1e-6 * want);
        close(Choice::Snr, 20.0);
        assert!((damage.score(Choice::SnrRelative, 1) + 20.0).abs() < 1e-9);
        close(Choice::KldGradient, 6.0);
        close(Choice::Iqe, 2.0);
        close(Choice::IqeRelative, 0.01);
    }
}
