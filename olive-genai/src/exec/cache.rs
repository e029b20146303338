//! Keys and values of the tokens so far. Room grows with the sequence, in place and never by a copy a step.

use olive_core::{Error, Result};

use crate::kernels::aligned::Aligned;
use crate::kernels::attention::SLAB;

/// Sizes of a layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// Heads of keys and values.
    pub heads: usize,
    /// Width of a head.
    pub head_size: usize,
}

#[derive(Debug, Default)]
struct Layer {
    shape: Option<LayerShape>,
    capacity: usize,
    keys: Aligned<f32>,
    values: Aligned<f32>,
}

/// Keys and values of all layers: keys `[batch, heads, capacity / 16, head_size, 16]`, values
/// `[batch, heads, capacity, head_size]`.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Layer>,
    lengths: Vec<usize>,
    limit: usize,
}

/// Positions that a new cache has room for.
const FIRST_CAPACITY: usize = 64;

impl KvCache {
    /// An empty cache for `batch` rows of at most `limit` tokens.
    pub fn new(layers: usize, batch: usize, limit: usize) -> Self {
        Self {
            layers: (0..layers).map(|_| Layer::default()).collect(),
            lengths: vec![0; batch],
            limit,
        }
    }

    /// Tokens of each row whose keys and values are there.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Says that a run has written `lengths` tokens in all, or drops what lies behind them.
    pub fn set_lengths(&mut self, lengths: &[usize]) {
        self.lengths.copy_from_slice(lengths);
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.layers
            .iter()
            .map(|l| (l.keys.len() + l.values.len()) * size_of::<f32>())
            .sum()
    }

    /// Row `b` becomes a copy of what row `sources[b]` was.
    pub fn reorder(&mut self, sources: &[usize]) {
        for layer in &mut self.layers {
            let Some(shape) = layer.shape else { continue };
            let row = shape.heads * layer.capacity * shape.head_size;
            for data in [&mut layer.keys, &mut layer.values] {
                let mut sorted = Aligned::new(data.len());
                for (place, source) in sorted.chunks_exact_mut(row.max(1)).zip(sources) {
                    place.copy_from_slice(&data[source * row..(source + 1) * row]);
                }
                *data = sorted;
            }
        }
        self.lengths = sources.iter().map(|s| self.lengths[*s]).collect();
    }

    /// The buffers of a layer with room for `tokens` positions: keys, values, positions that there is room for, a
    /// multiple of 16.
    ///
    /// # Errors
    /// [`Error::Unsupported`] above the limit or for a layer that changes its sizes.
    pub fn layer(
        &mut self,
        index: usize,
        shape: LayerShape,
        tokens: usize,
    ) -> Result<(&mut [f32], &mut [f32], usize)> {
        if tokens > self.limit {
            let what = format!("a sequence of {tokens} tokens");
            return Err(Error::unsupported(what, format!("the limit is {}", self.limit)));
        }
        let batch = self.lengths.len();
        let known = self.layers.len();
        let layer = self.layers.get_mut(index);
        let layer = layer.ok_or_else(|| {
            Error::unsupported(
                format!("layer {index} of the cache"),
                format!("there are {known} layers"),
            )
        })?;
        if layer.shape.is_some_and(|known| known != shape) {
            let what = format!("layer {index} of the cache changing its sizes");
            return Err(Error::unsupported(
                what,
                format!("{:?} became {shape:?}", layer.shape),
            ));
        }
        layer.shape = Some(shape);
        if tokens > layer.capacity {
            // Some more than asked for, so that the first token behind a prompt moves nothing; pages that are not
            // written to take no memory.
            let capacity = (tokens + tokens / 4)
                .max(layer.capacity * 2)
                .max(FIRST_CAPACITY)
                .min(self.limit.max(tokens))
                .next_multiple_of(SLAB);
            let old = layer.capacity * shape.head_size;
            let new = capacity * shape.head_size;
            for data in [&mut layer.keys, &mut layer.values] {
                let mut grown = Aligned::new(batch * shape.heads * new);
                if old > 0 {
                    for (from, to) in data.chunks_exact(old).zip(grown.chunks_exact_mut(new)) {
                        to[..old].copy_from_slice(from);
                    }
                }
                *data = grown;
            }
            layer.capacity = capacity;
        }
        Ok((&mut layer.keys, &mut layer.values, layer.capacity))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_keeps_what_was_written_and_the_limit_holds() {
        let mut cache = KvCache::new(1, 2, 100);
        let shape = LayerShape {
            heads: 2,
            head_size: 3,
        };
        let (keys, _, capacity) = cache.layer(0, shape, 10).unwrap();
        assert_eq!(capacity, FIRST_CAPACITY);
        for h in 0..4 {
            keys[h * capacity * 3 + 9 * 3] = h as f32 + 1.0;
        }
        let (keys, values, capacity) = cache.layer(0, shape, 65).unwrap();
        assert_eq!((capacity, values.len()), (112, 1344));
        assert!((0..4).all(|h| keys[h * capacity * 3 + 27] == h as f32 + 1.0));
        cache.reorder(&[1, 1]);
        let (keys, _, capacity) = cache.layer(0, shape, 65).unwrap();
        assert_eq!(keys[27], 3.0);
        assert_eq!(keys[2 * capacity * 3 + 27], 3.0);
        assert!(cache.layer(0, shape, 101).is_err());
        assert!(cache.layer(1, shape, 1).is_err());
        assert!(
            cache
                .layer(
                    0,
                    LayerShape {
                        heads: 1,
                        head_size: 3
                    },
                    1
                )
                .is_err()
        );
    }
}
