//! From scores to a token.

use super::discrete::DiscreteDistribution;
use super::mersenne::Mt19937;
use crate::params::SearchOptions;

/// The place of the largest score, the first of equals.
pub fn argmax(scores: &[f32]) -> usize {
    // The largest of each of sixteen columns first: without branches, the compiler makes a vector of them.
    const WIDTH: usize = 16;
    let Some(first) = scores.first() else {
        return 0;
    };
    let larger = |most: f32, score: f32| if score > most { score } else { most };
    let mut most = [*first; WIDTH];
    let (rows, rest) = scores.as_chunks::<WIDTH>();
    for row in rows {
        for i in 0..WIDTH {
            most[i] = larger(most[i], row[i]);
        }
    }
    let largest = most
        .iter()
        .chain(rest)
        .fold(*first, |most, score| larger(most, *score));
    scores.iter().position(|score| *score == largest).unwrap_or(0)
}

/// The next token: the likeliest, or one drawn from the `top_k` likeliest, from the smallest set that holds `top_p` of
/// the probability, or from both in turn. The temperature divides scores after the `top_k` are found.
pub fn pick(scores: &[f32], options: &SearchOptions, rng: &mut Mt19937) -> usize {
    let SearchOptions {
        top_k,
        top_p,
        temperature,
        ..
    } = *options;
    if !options.do_sample || top_k == 1 || temperature == 0.0 || scores.len() < 2 {
        return argmax(scores);
    }
    let inverse = 1.0 / temperature;
    let (order, weights) = if top_k > 1 {
        let order = largest(scores, top_k.min(scores.len()));
        let mut weights = exponentials(scores, &order, inverse);
        if top_p > 0.0 && top_p < 1.0 {
            normalise(&mut weights);
            weights.truncate(reach(&weights, top_p));
        }
        (order, weights)
    } else {
        nucleus(scores, if top_p > 0.0 { top_p } else { 1.0 }, inverse)
    };
    let mut weights = weights;
    normalise(&mut weights);
    order[DiscreteDistribution::new(&weights).sample(rng)]
}

/// The places of the `count` largest scores, largest first, the first of equals first.
fn largest(scores: &[f32], count: usize) -> Vec<usize> {
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..scores.len()).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, by_score);
        order.truncate(count);
    }
    order.sort_unstable_by(by_score);
    order
}

fn exponentials(scores: &[f32], order: &[usize], inverse: f32) -> Vec<f32> {
    let first = order.first().map_or(0.0, |i| scores[*i]);
    order
        .iter()
        .map(|i| ((scores[*i] - first) * inverse).exp())
        .collect()
}

fn normalise(weights: &mut [f32]) {
    let sum: f32 = weights.iter().fold(0.0, |sum, w| sum + w);
    weights.iter_mut().for_each(|w| *w /= sum);
}

/// How many of `weights` it takes to reach `share`.
fn reach(weights: &[f32], share: f32) -> usize {
    let mut sum = 0.0;
    let found = weights.iter().position(|w| {
        sum += w;
        sum >= share
    });
    found.map_or(weights.len(), |i| i + 1)
}

/// The largest scores that hold `share` of the probability for sure: the ones not looked at are counted as if each were
/// as likely as the last one that was. Small vocabularies are summed exactly.
fn nucleus(scores: &[f32], share: f32, inverse: f32) -> (Vec<usize>, Vec<f32>) {
    const EXACT: usize = 64;
    let mut count = if scores.len() <= EXACT { EXACT } else { 16 };
    loop {
        let sorted = count.min(scores.len());
        let order = largest(scores, sorted);
        let mut weights = exponentials(scores, &order, inverse);
        if scores.len() <= EXACT {
            let mut shares = weights.clone();
            normalise(&mut shares);
            weights.truncate(reach(&shares, share));
            return (order, weights);
        }
        let mut sum = 0.0f32;
        for i in 0..sorted {
            sum += weights[i];
            let unseen = (scores.len() - i - 1) as f32;
            if sum >= share * (sum + unseen * weights[i]) {
                weights.truncate(i + 1);
                return (order, weights);
            }
        }
        if sorted == scores.len() {
            return (order, weights);
        }
        count *= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 37 % 101) as f32 * 0.61).sin() * 4.0)
            .collect()
    }

    /// The chosen set and its probabilities, worked out in double precision.
    fn slow(scores: &[f32], options: &SearchOptions) -> Vec<(usize, f64)> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).unwrap());
        if options.top_k > 1 {
            order.truncate(options.top_k);
        }
        let t = f64::from(options.temperature);
        let top = f64::from(scores[order[0]]);
        let mut set: Vec<(usize, f64)> = order
            .iter()
            .map(|i| (*i, ((f64::from(scores[*i]) - top) / t).exp()))
            .collect();
        let total: f64 = set.iter().map(|(_, p)| p).sum();
        if options.top_p > 0.0 && options.top_p < 1.0 {
            let mut sum = 0.0;
            let keep = set.iter().position(|(_, p)| {
                sum += p / total;
                sum >= f64::from(options.top_p)
            });
            set.truncate(keep.map_or(set.len(), |i| i + 1));
        }
        let total: f64 = set.iter().map(|(_, p)| p).sum();
        set.iter().map(|(i, p)| (*i, p / total)).collect()
    }

    #[test]
    fn the_first_of_the_largest_is_found_at_every_place() {
        for len in [1usize, 15, 16, 17, 40] {
            for at in 0..len {
                let mut scores = vec![-1.0; len];
                scores[at] = 2.0;
                scores[len - 1] = 2.0;
                assert_eq!(argmax(&scores), at);
            }
        }
        assert_eq!(argmax(&[]), 0);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 20]), 0);
        assert_eq!(argmax(&[f32::NAN, 3.0]), 0);
        assert_eq!(argmax(&[1.0, f32::NAN, 3.0, f32::NAN]), 2);
    }

    #[test]
    fn draws_match_a_slow_reference() {
        for (top_k, top_p, temperature) in [
            (50, 0.0, 1.0),
            (5, 0.9, 0.6),
            (20, 0.5, 1.7),
            (1, 0.0, 1.0),
            (0, 0.8, 0.5),
            (0, 0.0, 1.2),
            (0, 0.3, 2.0),
        ] {
            let scores = scores(60);
            let options = SearchOptions {
                do_sample: true,
                top_k,
                top_p,
                temperature,
                ..Default::default()
            };
            let (mut rng, mut slow_rng) = (Mt19937::new(11), Mt19937::new(11));
            let set = slow(&scores, &options);
            for _ in 0..500 {
                let found = pick(&scores, &options, &mut rng);
                if top_k == 1 {
                    assert_eq!(found, argmax(&scores));
                    continue;
                }
                let mut sum = 0.0;
                let u = if set.len() > 1 { slow_rng.canonical() } else { 0.0 };
                let want = set.iter().find(|(_, p)| {
                    sum += p;
                    sum >= u
                });
                assert_eq!(
                    Some(found),
                    want.or(set.last()).map(|(i, _)| *i),
                    "k {top_k} p {top_p} t {temperature}"
                );
            }
        }
    }

    #[test]
    fn the_nucleus_of_a_large_vocabulary_holds_the_share() {
        let scores = scores(5000);
        for share in [0.1f32, 0.5, 0.9, 1.0] {
            let (order, weights) = nucleus(&scores, share, 1.0);
            let all: f64 = scores
                .iter()
                .map(|s| f64::from(*s - scores[order[0]]).exp())
                .sum();
            let kept: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            assert!(kept / all >= f64::from(share) - 1e-6);
        }
    }

    #[test]
    fn without_sampling_the_first_of_the_largest_wins() {
        let mut rng = Mt19937::new(0);
        assert_eq!(pick(&[1.0, 3.0, 3.0], &SearchOptions::default(), &mut rng), 1);
        let options = SearchOptions {
            do_sample: true,
            temperature: 0.0,
            ..Default::default()
        };
        assert_eq!(pick(&[1.0, 0.0, 3.0], &options, &mut rng), 2);
    }
}
