//! Which scales may be moved where: the table of the families, from a [`ModelSpec`].
//!
//! A mapping multiplies the input columns of its linears by `s` and divides what produces that input. Every reader of
//! a norm's output is in the norm's mapping; a producer that is a linear is divided on the rows that are read.

use olive_core::{LinearRole, ModelSpec};

/// The input of some linears of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearInput {
    /// Of q, k, v: the first norm's output.
    Attention,
    /// Of the output projection: the attended values.
    Output,
    /// Of gate and up: the second norm's output.
    Mlp,
    /// Of the down projection.
    Down,
}

impl LinearInput {
    /// The input of a linear of this role.
    pub fn of(role: LinearRole) -> Self {
        match role {
            LinearRole::Qkv | LinearRole::Q | LinearRole::K | LinearRole::V => Self::Attention,
            LinearRole::O => Self::Output,
            LinearRole::GateUp | LinearRole::Gate | LinearRole::Up => Self::Mlp,
            LinearRole::Down => Self::Down,
        }
    }
}

/// What is divided by the scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Producer {
    /// The weight of the norm before attention.
    InputNorm,
    /// The weight of the norm before the MLP.
    PostAttentionNorm,
    /// The last rows of a linear, and its bias there: one row for each scale.
    LastRows(LinearRole),
}

/// How the channels of an input share scales: channel `c` of `head_dim * heads` belongs to head `c / head_dim`, and
/// `repeats` consecutive heads read the same producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadSharing {
    /// Channels of a head.
    pub head_dim: usize,
    /// Query heads that share a value head.
    pub repeats: usize,
}

impl HeadSharing {
    /// The scale that channel `channel` takes.
    #[inline]
    pub fn scale_of(self, channel: usize) -> usize {
        channel / self.head_dim / self.repeats * self.head_dim + channel % self.head_dim
    }

    /// Means over the channels that share a scale.
    pub fn reduce(self, channels: &[f64]) -> Vec<f64> {
        let mut means = vec![0.0; channels.len() / self.repeats];
        for (channel, value) in channels.iter().enumerate() {
            means[self.scale_of(channel)] += value / self.repeats as f64;
        }
        means
    }

    /// The scales of the producer's channels, one of each that share.
    pub fn own(self, scales: &[f32]) -> Vec<f32> {
        (0..scales.len() / self.repeats)
            .map(|row| {
                let head = row / self.head_dim * self.repeats;
                scales[head * self.head_dim + row % self.head_dim]
            })
            .collect()
    }

    /// The scale of every channel.
    pub fn expand(self, scales: &[f32]) -> Vec<f32> {
        (0..scales.len() * self.repeats)
            .map(|channel| scales[self.scale_of(channel)])
            .collect()
    }
}

/// Linears whose input columns are scaled together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Producer and linears, for reports.
    pub name: &'static str,
    /// What is divided.
    pub producer: Producer,
    /// What is scaled.
    pub input: LinearInput,
    /// The linears that read it.
    pub roles: Vec<LinearRole>,
    /// How channels share scales.
    pub sharing: HeadSharing,
}

impl Mapping {
    /// Whether a nonlinearity follows the linears, so that their own outputs say little about the block's.
    pub fn is_nonlinear(&self) -> bool {
        matches!(self.input, LinearInput::Attention | LinearInput::Mlp)
    }
}

/// The mappings of every layer of a model, in the order in which their scales are applied.
pub fn mappings(spec: &ModelSpec) -> Vec<Mapping> {
    let roles: Vec<LinearRole> = spec.linears(0).into_iter().map(|linear| linear.role).collect();
    let reading = |input| {
        roles
            .iter()
            .copied()
            .filter(move |role| LinearInput::of(*role) == input)
            .collect()
    };
    let last = |candidates: [LinearRole; 2]| {
        let role = candidates.into_iter().find(|role| roles.contains(role));
        Producer::LastRows(role.expect("invariant: a layer stores v and up, fused or split"))
    };
    let own = HeadSharing {
        head_dim: 1,
        repeats: 1,
    };
    let mapping = |name, producer, input, sharing| Mapping {
        name,
        producer,
        input,
        roles: reading(input),
        sharing,
    };
    vec![
        mapping(
            "input_layernorm -> q, k, v",
            Producer::InputNorm,
            LinearInput::Attention,
            own,
        ),
        mapping(
            "v -> o",
            last([LinearRole::Qkv, LinearRole::V]),
            LinearInput::Output,
            HeadSharing {
                head_dim: spec.head_dim,
                repeats: spec.n_heads / spec.n_kv_heads,
            },
        ),
        mapping(
            "post_attention_layernorm -> gate, up",
            Producer::PostAttentionNorm,
            LinearInput::Mlp,
            own,
        ),
        mapping(
            "up -> down",
            last([LinearRole::GateUp, LinearRole::Up]),
            LinearInput::Down,
            own,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_heads_reduce_and_expand_consistently() {
        // Two value heads of two channels, each read by two query heads.
        let sharing = HeadSharing {
            head_dim: 2,
            repeats: 2,
        };
        let channels = [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0];
        assert_eq!(sharing.reduce(&channels), [2.0, 3.0, 20.0, 30.0]);
        assert_eq!(
            sharing.expand(&[1.0, 2.0, 3.0, 4.0]),
            [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]
        );
    }
}
