//! Searching: the space of points, which comes next, and what the best ones are.

mod objective;
mod sampler;
mod space;
mod tpe;

pub use objective::{Objective, Values, non_dominated, rank, resolve_goals};
pub use sampler::{Observation, Sampler, sampler};
pub use space::{Choice, Point, Slot, Space};
