//! Metrics of type `latency` and `throughput`.

use std::time::{Duration, Instant};

use olive_core::data::{DEFAULT_CALIBRATION_TEXT, IGNORED_LABEL, Sample};
use olive_core::text::TextTokenizer;
use olive_core::workflow::data::TextData;
use olive_core::workflow::registry::{EvalContext, Evaluator, Measured};
use olive_core::workflow::schema::{MetricSpec, SubType};
use olive_core::{Error, ModelHandle, ModelKind, NoProgress, Result};
use serde_json::Value;

use super::score::{Scorer, Scorers};
use crate::generator::Generator;
use crate::model::Model;
use crate::params::GeneratorParams;

/// Tokens of a sample where no data is given.
const DEFAULT_TOKENS: usize = 64;
/// Olive's defaults of `warmup_num` and `repeat_test_num`.
const RUNS: (usize, usize) = (10, 20);

/// Milliseconds from a sample to the logits of its last token. A checkpoint is streamed, a layer at a time, so that
/// its time includes reading the weights.
pub struct LatencyEvaluator(pub(super) Scorers);

/// Samples a second.
pub struct ThroughputEvaluator(pub(super) Scorers);

impl Evaluator for LatencyEvaluator {
    fn metric(&self) -> &'static str {
        "latency"
    }

    fn evaluate(
        &self,
        model: &dyn ModelHandle,
        metric: &MetricSpec,
        context: &EvalContext<'_>,
    ) -> Result<Vec<Measured>> {
        measure(&self.0, model, metric, context, |seconds| seconds * 1e3)
    }
}

impl Evaluator for ThroughputEvaluator {
    fn metric(&self) -> &'static str {
        "throughput"
    }

    fn evaluate(
        &self,
        model: &dyn ModelHandle,
        metric: &MetricSpec,
        context: &EvalContext<'_>,
    ) -> Result<Vec<Measured>> {
        measure(&self.0, model, metric, context, |seconds| 1.0 / seconds.max(1e-9))
    }
}

fn measure(
    scorers: &Scorers,
    model: &dyn ModelHandle,
    metric: &MetricSpec,
    context: &EvalContext<'_>,
    value: impl Fn(f64) -> f64,
) -> Result<Vec<Measured>> {
    let loaded = match model.kind() {
        ModelKind::Onnx => Some(Model::open(model.path())?),
        ModelKind::HuggingFace => None,
    };
    let longest = match &loaded {
        Some(loaded) => loaded.config().model.context_length,
        None => model.spec().max_position,
    };
    let samples = samples(model, longest, context)?;
    let forward = |ids: &[u32]| match &loaded {
        Some(loaded) => forward(loaded, ids),
        None => stream(scorers, model, ids, context),
    };
    let mut runs: Option<(Runs, Vec<f64>)> = None;
    let mut measured = Vec::new();
    for sub in &metric.sub_types {
        let wanted = Runs::of(sub)?;
        let values = match runs.take() {
            Some((done, values)) if done == wanted => values,
            _ => time(&samples, wanted, context, forward)?
                .into_iter()
                .map(&value)
                .collect(),
        };
        measured.push(Measured {
            name: sub.name.clone(),
            value: statistic(&sub.name, &values)?,
            higher_is_better: sub.higher_is_better,
        });
        runs = Some((wanted, values));
    }
    Ok(measured)
}

/// How often a sample is run.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Runs {
    warm: usize,
    counted: usize,
    pause: Duration,
}

impl Runs {
    fn of(sub: &SubType) -> Result<Self> {
        let count = |key: &str, default: usize| match sub.config.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| {
                    let key = format!("{}.metric_config.{key}", sub.name);
                    Error::config("evaluator", key, "a whole number", value.to_string())
                }),
        };
        Ok(Self {
            warm: count("warmup_num", RUNS.0)?,
            counted: count("repeat_test_num", RUNS.1)?.max(1),
            pause: Duration::from_millis(count("sleep_num", 0)? as u64),
        })
    }
}

/// Token ids to run: the samples of the data config, or one of the built-in text.
fn samples(model: &dyn ModelHandle, longest: usize, context: &EvalContext<'_>) -> Result<Vec<Vec<u32>>> {
    let tokenizer = TextTokenizer::open(model.path())?;
    let made_up = |data: &olive_core::workflow::schema::DataConfig| {
        let kind = data.kind.as_deref().unwrap_or_default().to_ascii_lowercase();
        kind.contains("dummy")
    };
    let limit = longest.max(3) - 1;
    match context.data {
        Some(data) if !made_up(data) => {
            let samples = TextData::read(&data.to_value())?.samples(&tokenizer)?;
            let ids = samples.into_iter().map(|mut sample| {
                sample.input_ids.truncate(sample.length.min(limit));
                sample.input_ids
            });
            Ok(ids.filter(|ids| !ids.is_empty()).collect())
        }
        data => {
            let asked = data.and_then(|data| {
                let length = |key: &str| data.load_dataset.get(key).and_then(Value::as_u64);
                length("max_seq_len").or_else(|| length("seq_len"))
            });
            let length = asked.map_or(DEFAULT_TOKENS, |n| usize::try_from(n).unwrap_or(DEFAULT_TOKENS));
            let mut ids = tokenizer.encode(DEFAULT_CALIBRATION_TEXT, false)?;
            ids.truncate(length.clamp(1, limit));
            Ok(vec![ids])
        }
    }
}

/// Runs an ONNX model over a sample, up to the logits of the last token.
fn forward(loaded: &Model, ids: &[u32]) -> Result<f64> {
    let mut params = GeneratorParams::new(loaded);
    let options = params.options_mut();
    options.do_sample = false;
    options.batch_size = 1;
    options.num_beams = 1;
    options.num_return_sequences = 1;
    options.max_length = ids.len() + 1;
    let mut generator = Generator::new(loaded, &params)?;
    let start = Instant::now();
    generator.append_tokens(ids)?;
    generator.get_logits()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Runs a checkpoint over a sample; only the last token is predicted.
fn stream(scorers: &Scorers, model: &dyn ModelHandle, ids: &[u32], context: &EvalContext<'_>) -> Result<f64> {
    let mut sample = Sample::from_ids(ids.to_vec());
    let last = ids.len().saturating_sub(1);
    sample.labels[..last].fill(IGNORED_LABEL);
    let start = Instant::now();
    scorers.score(model, &[sample], &NoProgress, context.cancel)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of each counted run, all samples in turn.
fn time(
    samples: &[Vec<u32>],
    runs: Runs,
    context: &EvalContext<'_>,
    mut forward: impl FnMut(&[u32]) -> Result<f64>,
) -> Result<Vec<f64>> {
    let total = runs.warm + runs.counted;
    context.progress.start("latency", total as u64);
    let mut seconds = Vec::with_capacity(runs.counted);
    for (run, ids) in samples.iter().cycle().take(total).enumerate() {
        context.cancel.check()?;
        let taken = forward(ids)?;
        if run >= runs.warm {
            seconds.push(taken);
        }
        if !runs.pause.is_zero() {
            std::thread::sleep(runs.pause);
        }
        context.progress.update(run as u64 + 1, "");
    }
    context.progress.finish();
    Ok(seconds)
}

/// A statistic by Olive's name; percentiles are interpolated as numpy does.
fn statistic(name: &str, values: &[f64]) -> Result<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else {
        return Err(Error::config("evaluator", name, "at least one run", "none"));
    };
    let percentile = |part: f64| {
        let place = part * (sorted.len() - 1) as f64;
        let (low, share) = (place.floor() as usize, place.fract());
        let high = (low + 1).min(sorted.len() - 1);
        sorted[low] + (sorted[high] - sorted[low]) * share
    };
    Ok(match name {
        "avg" => sorted.iter().sum::<f64>() / sorted.len() as f64,
        "max" => *last,
        "min" => *first,
        "p50" => percentile(0.50),
        "p75" => percentile(0.75),
        "p90" => percentile(0.90),
        "p95" => percentile(0.95),
        "p99" => percentile(0.99),
        "p999" => percentile(0.999),
        other => {
            let known = "avg, max, min, p50, p75, p90, p95, p99, p999";
            return Err(Error::config(
                "evaluator",
                "sub_types",
                known,
                format!("`{other}`"),
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_numpys() {
        let values = [4.0, 1.0, 3.0, 2.0];
        let value = |name: &str| statistic(name, &values).unwrap();
        assert_eq!((value("avg"), value("min"), value("max")), (2.5, 1.0, 4.0));
        assert_eq!((value("p50"), value("p75")), (2.5, 3.25));
        assert!((value("p999") - 3.997).abs() < 1e-12);
        assert!(statistic("p42", &values).is_err());
        assert!(statistic("avg", &[]).is_err());
    }
}
