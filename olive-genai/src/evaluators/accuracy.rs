//! Metrics of type `accuracy`.

use olive_core::data::{Sample, SampleScore};
use olive_core::text::TextTokenizer;
use olive_core::workflow::data::TextData;
use olive_core::workflow::registry::{EvalContext, Evaluator, Measured};
use olive_core::workflow::schema::{DataConfig, MetricSpec, SubType};
use olive_core::{Error, ModelHandle, Result};
use serde_json::Value;

use super::score::{Scorer, Scorers};

/// Measures `accuracy`.
pub struct Accuracy {
    scorers: Scorers,
}

impl Accuracy {
    /// The evaluator.
    pub fn new(scorers: Scorers) -> Self {
        Self { scorers }
    }
}

/// What was computed for a model and its data, as far as it was asked for.
#[derive(Default)]
struct Computed {
    /// The samples as the data config makes them.
    samples: Option<Vec<SampleScore>>,
    /// The samples whose answer alone is predicted.
    answers: Option<Vec<SampleScore>>,
    /// Chosen and true labels, and how many labels there are.
    choices: Option<(Vec<usize>, Vec<usize>, usize)>,
}

struct Measure<'a> {
    scorers: &'a Scorers,
    model: &'a dyn ModelHandle,
    context: &'a EvalContext<'a>,
    data: TextData,
    tokenizer: TextTokenizer,
    done: Computed,
}

impl Evaluator for Accuracy {
    fn metric(&self) -> &'static str {
        "accuracy"
    }

    fn check(&self, metric: &MetricSpec, data: Option<&DataConfig>) -> Result<()> {
        let data = TextData::read(&given(metric, data)?.to_value())?;
        for sub in &metric.sub_types {
            known(sub, data.has_labels())?;
            Average::of(sub)?;
        }
        Ok(())
    }

    fn evaluate(
        &self,
        model: &dyn ModelHandle,
        metric: &MetricSpec,
        context: &EvalContext<'_>,
    ) -> Result<Vec<Measured>> {
        let data = given(metric, context.data)?;
        let mut measure = Measure {
            scorers: &self.scorers,
            model,
            context,
            data: TextData::read(&data.to_value())?,
            tokenizer: TextTokenizer::open(model.path())?,
            done: Computed::default(),
        };
        let mut measured = Vec::new();
        for sub in &metric.sub_types {
            measured.push(Measured {
                name: sub.name.clone(),
                value: measure.value(sub)?,
                higher_is_better: sub.higher_is_better,
            });
        }
        Ok(measured)
    }
}

impl Measure<'_> {
    fn value(&mut self, sub: &SubType) -> Result<f64> {
        let labelled = self.data.has_labels();
        match sub.name.as_str() {
            "perplexity" => {
                let (loss, tokens, _) = totals(self.samples()?);
                match tokens {
                    0 => Err(nothing("a token to predict")),
                    tokens => Ok((loss / tokens as f64).exp()),
                }
            }
            "exact_match" => {
                let scores = if labelled {
                    self.answers()?
                } else {
                    self.samples()?
                };
                let exact = scores
                    .iter()
                    .filter(|s| s.tokens > 0 && s.hits == s.tokens)
                    .count();
                Ok(exact as f64 / scores.len().max(1) as f64)
            }
            "accuracy_score" if !labelled => {
                let (_, tokens, hits) = totals(self.samples()?);
                match tokens {
                    0 => Err(nothing("a token to predict")),
                    tokens => Ok(hits as f64 / tokens as f64),
                }
            }
            "accuracy_score" | "f1_score" | "precision" | "recall" if labelled => {
                let average = Average::of(sub)?;
                let (chosen, answers, labels) = self.choices()?;
                Ok(average.of_labels(&sub.name, chosen, answers, *labels))
            }
            _ => Err(unknown(sub, labelled)),
        }
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<SampleScore>> {
        self.scorers
            .score(self.model, samples, self.context.progress, self.context.cancel)
    }

    fn samples(&mut self) -> Result<&[SampleScore]> {
        if self.done.samples.is_none() {
            let samples = self.data.samples(&self.tokenizer)?;
            self.done.samples = Some(self.score(&samples)?);
        }
        Ok(self.done.samples.as_deref().unwrap_or_default())
    }

    fn answers(&mut self) -> Result<&[SampleScore]> {
        if self.done.answers.is_none() {
            let samples = self.data.answers(&self.tokenizer)?;
            self.done.answers = Some(self.score(&samples)?);
        }
        Ok(self.done.answers.as_deref().unwrap_or_default())
    }

    fn choices(&mut self) -> Result<&(Vec<usize>, Vec<usize>, usize)> {
        let done = match self.done.choices.take() {
            Some(done) => done,
            None => {
                let choices = self.data.choices(&self.tokenizer)?;
                let scores = self.score(&choices.samples)?;
                (choices.chosen(&scores), choices.answers, choices.labels.len())
            }
        };
        Ok(self.done.choices.insert(done))
    }
}

/// The data config of a metric.
fn given<'d>(metric: &MetricSpec, data: Option<&'d DataConfig>) -> Result<&'d DataConfig> {
    let what = format!("the metric `{}` without `data_config`", metric.name);
    data.ok_or_else(|| Error::unsupported(what, "it is measured on data: name a data config"))
}

fn known(sub: &SubType, labelled: bool) -> Result<()> {
    let names: &[&str] = match labelled {
        true => &[
            "accuracy_score",
            "f1_score",
            "precision",
            "recall",
            "exact_match",
            "perplexity",
        ],
        false => &["accuracy_score", "exact_match", "perplexity"],
    };
    match names.contains(&sub.name.as_str()) {
        true => Ok(()),
        false => Err(unknown(sub, labelled)),
    }
}

fn unknown(sub: &SubType, labelled: bool) -> Error {
    let reason = match labelled {
        true => {
            "with labels there are accuracy_score, f1_score, precision, recall, exact_match and perplexity"
        }
        false => {
            "without `label_cols` in the data config there are accuracy_score, exact_match and perplexity"
        }
    };
    Error::unsupported(format!("the sub type `{}` of accuracy", sub.name), reason)
}

fn nothing(expected: &str) -> Error {
    Error::config("evaluator", "data_config", expected, "none")
}

/// Loss, tokens and hits of all samples.
fn totals(scores: &[SampleScore]) -> (f64, usize, usize) {
    scores.iter().fold((0.0, 0, 0), |(loss, tokens, hits), score| {
        (loss + score.loss, tokens + score.tokens, hits + score.hits)
    })
}

/// How values of several labels become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Average {
    Micro,
    Macro,
    Weighted,
}

impl Average {
    fn of(sub: &SubType) -> Result<Self> {
        match sub.config.get("average").and_then(Value::as_str) {
            None | Some("micro") => Ok(Self::Micro),
            Some("macro") => Ok(Self::Macro),
            Some("weighted") => Ok(Self::Weighted),
            Some(other) => Err(Error::config(
                "evaluator",
                format!("{}.metric_config.average", sub.name),
                "micro, macro or weighted",
                format!("`{other}`"),
            )),
        }
    }

    /// Recall is the accuracy of one label, so `accuracy_score` averages it, too.
    fn of_labels(self, name: &str, chosen: &[usize], answers: &[usize], labels: usize) -> f64 {
        let right = chosen.iter().zip(answers).filter(|(a, b)| a == b).count();
        if self == Self::Micro {
            return right as f64 / answers.len().max(1) as f64;
        }
        let (mut sum, mut weights) = (0.0, 0.0);
        for label in 0..labels {
            let count = |list: &[usize]| list.iter().filter(|one| **one == label).count() as f64;
            let both = chosen
                .iter()
                .zip(answers)
                .filter(|(a, b)| **a == label && a == b)
                .count() as f64;
            let (given, true_ones) = (count(chosen), count(answers));
            let ratio = |of: f64, all: f64| if all > 0.0 { of / all } else { 0.0 };
            let value = match name {
                "precision" => ratio(both, given),
                "f1_score" => ratio(2.0 * both, given + true_ones),
                _ => ratio(both, true_ones),
            };
            // A label that neither is there nor was chosen says nothing.
            let weight = match self {
                Self::Weighted => true_ones,
                _ if given + true_ones > 0.0 => 1.0,
                _ => 0.0,
            };
            sum += value * weight;
            weights += weight;
        }
        if weights > 0.0 { sum / weights } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_those_of_torchmetrics() {
        let (chosen, answers) = ([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2]);
        let value = |average: Average, name: &str| average.of_labels(name, &chosen, &answers, 4);
        for name in ["accuracy_score", "precision", "recall", "f1_score"] {
            assert!((value(Average::Micro, name) - 4.0 / 6.0).abs() < 1e-12, "{name}");
        }
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(value(Average::Macro, "recall"), (0.5 + 0.5 + 1.0) / 3.0);
        near(value(Average::Macro, "precision"), (0.5 + 1.0 + 2.0 / 3.0) / 3.0);
        near(
            value(Average::Weighted, "f1_score"),
            (2.0 * 0.5 + 2.0 * (2.0 / 3.0) + 2.0 * 0.8) / 6.0,
        );
    }
}
