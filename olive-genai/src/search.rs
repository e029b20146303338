//! Choice of the next token, with the order of steps and the arithmetic of onnxruntime-genai's CPU search.

mod beam;
mod discrete;
mod mersenne;
mod penalty;
mod select;

pub use beam::BeamSearch;
pub use discrete::DiscreteDistribution;
pub use mersenne::Mt19937;
pub use penalty::penalize;
pub use select::{argmax, pick};
