//! Metrics of type `latency` and `throughput`.

use std::time::{Duration, Instant};

use olive_core::data::DEFAULT_CALIBRATION_TEXT;
use olive_core::text::TextTokenizer;
use olive_core::workflow::data::TextData;
use olive_core::workflow::registry::{EvalContext, Evaluator, Measured};
use olive_core::workflow::schema::{MetricSpec, SubType};
use olive_core::{Error, ModelHandle, ModelKind, Result};
use serde_json::Value;

use crate::generator::Generator;
use crate::model::Model;
use crate::params::GeneratorParams;

/// Tokens of a sample where no data is given.
const DEFAULT_TOKENS: usize = 64;
/// Olive's defaults of `warmup_num` and `repeat_test_num`.
const RUNS: (usize, usize) = (10, 20);

/// Milliseconds from a sample to the logits of its last token.
#[derive(Debug, Clone, Copy, Default)]
pub struct LatencyEvaluator;

/// Samples a second.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThroughputEvaluator;

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
        measure(model, metric, context, |seconds| seconds * 1e3)
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
        measure(model, metric, context, |seconds| 1.0 / seconds.max(1e-9))
    }
}

fn measure(
    model: &dyn ModelHandle,
    metric: &MetricSpec,
    context: &EvalContext<'_>,
    value: impl Fn(f64) -> f64,
) -> Result<Vec<Measured>> {
    if model.kind() != ModelKind::Onnx {
        return Err(Error::unsupported(
            format!("`{}` of a Hugging Face model", metric.kind),
            "checkpoints are streamed, a layer at a time; the time of an ONNX model is measured",
        ));
    }
    let loaded = Model::open(model.path())?;
    let samples = samples(model, &loaded, context)?;
    let mut runs: Option<(Runs, Vec<f64>)> = None;
    let mut measured = Vec::new();
    for sub in &metric.sub_types {
        let wanted = Runs::of(sub)?;
        let values = match runs.take() {
            Some((done, values)) if done == wanted => values,
            _ => time(&loaded, &samples, wanted, context)?
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
fn samples(model: &dyn ModelHandle, loaded: &Model, context: &EvalContext<'_>) -> Result<Vec<Vec<u32>>> {
    let tokenizer = TextTokenizer::open(model.path())?;
    let made_up = |data: &olive_core::workflow::schema::DataConfig| {
        let kind = data.kind.as_deref().unwrap_or_default().to_ascii_lowercase();
        kind.contains("dummy")
    };
    let limit = loaded.config().model.context_length.max(2) - 1;
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

/// Seconds of each counted run, all samples in turn.
fn time(loaded: &Model, samples: &[Vec<u32>], runs: Runs, context: &EvalContext<'_>) -> Result<Vec<f64>> {
    let mut params = GeneratorParams::new(loaded);
    let options = params.options_mut();
    options.do_sample = false;
    options.batch_size = 1;
    options.num_beams = 1;
    options.num_return_sequences = 1;
    let total = runs.warm + runs.counted;
    context.progress.start("latency", total as u64);
    let mut seconds = Vec::with_capacity(runs.counted);
    for (run, ids) in samples.iter().cycle().take(total).enumerate() {
        context.cancel.check()?;
        params.options_mut().max_length = ids.len() + 1;
        let mut generator = Generator::new(loaded, &params)?;
        let start = Instant::now();
        generator.append_tokens(ids)?;
        generator.get_logits()?;
        let taken = start.elapsed().as_secs_f64();
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
