//! Evaluators of workflows: what a metric of a workflow file measures.
//!
//! | `type` | `sub_types` | on | what it is |
//! |---|---|---|---|
//! | `accuracy` | `accuracy_score`, `f1_score`, `precision`, `recall` | a data config with `label_cols` | the label whose text is likeliest, against the row's own |
//! | | `accuracy_score` | a data config without | share of the tokens that the model would have chosen |
//! | | `exact_match` | either | share of the rows whose answer (without `label_cols`: whose text) greedy decoding gives |
//! | | `perplexity` | either | over the samples of the data config |
//! | `latency` | `avg`, `max`, `min`, `p50` … `p999` | every model | milliseconds from a sample to its last token's logits; a checkpoint's include reading its weights |
//! | `throughput` | the same | every model | samples a second |
//! | `size_on_disk` | `bytes` | every model | the files of the model and its adapter |
//! | tasks | named by the task | local files | multiple choice, see [`tasks`] |
//!
//! A workflow that measures how often the tone of a phrase is found, before and after (the input model is measured,
//! too):
//!
//! ```json
//! {
//!   "data_configs": [{
//!     "name": "held_out", "type": "HuggingfaceContainer",
//!     "load_dataset_config": {"data_name": "json", "data_files": "dataset-classification.json",
//!                             "shuffle_seed": 42, "split": "train[80%:]"},
//!     "pre_process_data_config": {"text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
//!                                 "label_cols": ["tone"], "labels": ["joy", "fear", "sadness", "surprise"]}
//!   }],
//!   "evaluators": {"tone": {"metrics": [{
//!     "name": "tone", "type": "accuracy", "data_config": "held_out",
//!     "sub_types": [{"name": "accuracy_score"}]
//!   }]}},
//!   "evaluator": "tone"
//! }
//! ```
//!
//! The result is the value `tone-accuracy_score` of `metrics.json`, that of the input model is in
//! `input_model_metrics.json`. `label_cols` names the column that holds the answer; the template names it, too. Every
//! label is put in its place, and the text that the model finds likeliest is its choice. Without `labels` the labels
//! are all values that the files hold. `metric_config.average` of the other scores is `micro` (the default), `macro`
//! or `weighted`, as in torchmetrics.

mod accuracy;
mod score;
mod speed;
pub mod tasks;

pub use accuracy::Accuracy;
pub use score::{OnnxScorer, Scorer, Scorers};
pub use speed::{LatencyEvaluator, ThroughputEvaluator};

use std::sync::Arc;

use olive_core::workflow::registry::EvaluatorRegistry;

/// Adds all evaluators. `hugging_face` scores checkpoints: running them is the business of another crate.
pub fn register_evaluators(registry: &mut EvaluatorRegistry, hugging_face: Arc<dyn Scorer>) {
    let scorers = Scorers::new(hugging_face);
    registry.register(Box::new(Accuracy::new(scorers.clone())));
    registry.register(Box::new(tasks::TaskEvaluator::new(scorers.clone())));
    registry.register(Box::new(LatencyEvaluator(scorers.clone())));
    registry.register(Box::new(ThroughputEvaluator(scorers)));
}
