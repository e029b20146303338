//! Learning-rate schedules, as factors of the base rate: the formulas of `transformers.optimization`.

use std::f64::consts::PI;

use olive_core::{Error, Result};
use serde_json::{Map, Value};

/// A learning-rate schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Schedule {
    /// The base rate throughout; warm-up has no effect.
    Constant,
    /// Linear warm-up, then the base rate.
    ConstantWithWarmup,
    /// Linear warm-up, then linear decay to 0.
    Linear,
    /// Linear warm-up, then `cycles` waves of a cosine.
    Cosine {
        /// Waves; 0.5 falls once to 0.
        cycles: f64,
    },
    /// Linear warm-up, then `cycles` cosine falls, each from the base rate.
    CosineWithRestarts {
        /// Number of falls.
        cycles: f64,
    },
    /// Linear warm-up, then decay to `end` as a power of what is left.
    Polynomial {
        /// The last rate.
        end: f64,
        /// The power.
        power: f64,
    },
    /// Linear warm-up, then `1 / √(step / timescale)`.
    InverseSqrt {
        /// Steps; the warm-up's, or 10,000 without one.
        timescale: Option<f64>,
    },
    /// Linear warm-up, then a cosine fall to a share of the base rate.
    CosineWithMinLr {
        /// Waves.
        cycles: f64,
        /// The share.
        min_rate: f64,
    },
}

/// A schedule with the sizes that it needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    /// The kind.
    pub schedule: Schedule,
    /// The base rate.
    pub base: f64,
    /// Optimizer steps of warm-up.
    pub warmup_steps: usize,
    /// Optimizer steps in all.
    pub training_steps: usize,
}

const NAMES: &[&str] = &[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
];

impl Schedule {
    /// The schedule that `lr_scheduler_type` and `lr_scheduler_kwargs` name.
    ///
    /// # Errors
    /// [`Error::Config`] for a name or option that is not known, or `reduce_lr_on_plateau` and its like.
    pub fn from_name(name: &str, options: &Map<String, Value>, base: f64) -> Result<Self> {
        let origin = "training arguments";
        let mut known: Vec<&str> = Vec::new();
        let mut number = |key: &'static str| -> Result<Option<f64>> {
            known.push(key);
            match options.get(key) {
                None | Some(Value::Null) => Ok(None),
                Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                    let key = format!("lr_scheduler_kwargs.{key}");
                    Error::config(origin, key, "a number", value.to_string())
                }),
            }
        };
        let schedule = match name {
            "constant" => Self::Constant,
            "constant_with_warmup" => Self::ConstantWithWarmup,
            "linear" => Self::Linear,
            "cosine" => Self::Cosine {
                cycles: number("num_cycles")?.unwrap_or(0.5),
            },
            "cosine_with_restarts" => Self::CosineWithRestarts {
                cycles: number("num_cycles")?.unwrap_or(1.0),
            },
            "polynomial" => Self::Polynomial {
                end: number("lr_end")?.unwrap_or(1e-7),
                power: number("power")?.unwrap_or(1.0),
            },
            "inverse_sqrt" => Self::InverseSqrt {
                timescale: number("timescale")?,
            },
            "cosine_with_min_lr" => {
                let share = match (number("min_lr")?, number("min_lr_rate")?) {
                    (Some(rate), None) => rate / base,
                    (None, Some(share)) => share,
                    _ => {
                        let expected = "either min_lr or min_lr_rate";
                        return Err(Error::config(
                            origin,
                            "lr_scheduler_kwargs",
                            expected,
                            "both or none",
                        ));
                    }
                };
                Self::CosineWithMinLr {
                    cycles: number("num_cycles")?.unwrap_or(0.5),
                    min_rate: share,
                }
            }
            _ => {
                let expected = format!("one of {}", NAMES.join(", "));
                return Err(Error::config(origin, "lr_scheduler_type", expected, name));
            }
        };
        if let Some(key) = options.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(Error::unknown_key(
                origin,
                format!("lr_scheduler_kwargs.{key}"),
                known,
            ));
        }
        if let Self::Polynomial { end, .. } = schedule
            && end >= base
        {
            let expected = format!("a rate below learning_rate ({base})");
            return Err(Error::config(
                origin,
                "lr_scheduler_kwargs.lr_end",
                expected,
                end.to_string(),
            ));
        }
        Ok(schedule)
    }
}

impl LearningRate {
    /// The rate that optimizer step `step` (from 0) uses.
    pub fn at(&self, step: usize) -> f64 {
        self.base * self.factor(step)
    }

    fn factor(&self, step: usize) -> f64 {
        let (now, warmup, total) = (step as f64, self.warmup_steps as f64, self.training_steps as f64);
        if self.schedule == Schedule::Constant {
            return 1.0;
        }
        if step < self.warmup_steps {
            return now / warmup.max(1.0);
        }
        let progress = (now - warmup) / (total - warmup).max(1.0);
        let wave = |cycles: f64| 0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos());
        match self.schedule {
            Schedule::Constant | Schedule::ConstantWithWarmup => 1.0,
            Schedule::Linear => ((total - now) / (total - warmup).max(1.0)).max(0.0),
            Schedule::Cosine { cycles } => wave(cycles).max(0.0),
            Schedule::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            Schedule::CosineWithRestarts { cycles } => {
                (0.5 * (1.0 + (PI * ((cycles * progress) % 1.0)).cos())).max(0.0)
            }
            Schedule::Polynomial { end, .. } if now > total => end / self.base,
            Schedule::Polynomial { end, power } => {
                let left = 1.0 - (now - warmup) / (total - warmup);
                ((self.base - end) * left.powf(power) + end) / self.base
            }
            Schedule::InverseSqrt { timescale } => {
                let fallback = if self.warmup_steps > 0 { warmup } else { 10_000.0 };
                let timescale = timescale.unwrap_or(fallback);
                1.0 / ((now + timescale - warmup) / timescale).sqrt()
            }
            Schedule::CosineWithMinLr { cycles, min_rate } => {
                (wave(cycles) * (1.0 - min_rate) + min_rate).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both sides compute in double precision; the order of a product may differ.
    const TOLERANCE: f64 = 1e-15;

    #[test]
    fn rates_are_those_of_transformers() {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/peft/schedules.json");
        let golden: Value = olive_core::fsio::read_json(path).unwrap();
        let mut compared = 0;
        for record in golden["schedules"].as_array().unwrap() {
            let name = record["name"].as_str().unwrap();
            if name == "warmup_stable_decay" {
                assert!(Schedule::from_name(name, &Map::new(), 1.0).is_err());
                continue;
            }
            let base = golden["base_learning_rate"].as_f64().unwrap();
            let options = record["options"].as_object().unwrap();
            let rate = LearningRate {
                schedule: Schedule::from_name(name, options, base).unwrap(),
                base,
                warmup_steps: record["warmup_steps"].as_u64().unwrap() as usize,
                training_steps: golden["training_steps"].as_u64().unwrap() as usize,
            };
            for (step, expected) in record["learning_rate"].as_array().unwrap().iter().enumerate() {
                let (found, expected) = (rate.at(step), expected.as_f64().unwrap());
                assert!(
                    (found - expected).abs() < TOLERANCE,
                    "{name} {step}: {found} {expected}"
                );
                compared += 1;
            }
        }
        assert!(compared >= 500, "{compared}");
    }

    #[test]
    fn unknown_schedules_and_options_are_refused() {
        let options = serde_json::json!({"num_cycle": 2});
        let error = Schedule::from_name("cosine", options.as_object().unwrap(), 1.0).unwrap_err();
        assert!(error.to_string().contains("num_cycle"), "{error}");
        assert!(Schedule::from_name("reduce_lr_on_plateau", &Map::new(), 1.0).is_err());
    }
}
