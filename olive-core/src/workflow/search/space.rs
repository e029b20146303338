//! The space of points: for each place in a pipeline one of its passes, for each searched parameter one value.

use crate::workflow::plan::Step;

/// All points, numbered from 0: the last place varies fastest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// The places.
    pub slots: Vec<Slot>,
}

/// A place with its alternatives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// How many values each searched parameter of each alternative has.
    pub choices: Vec<Vec<usize>>,
}

/// What a point takes at one place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    /// Which alternative.
    pub pass: usize,
    /// Which value of each of its searched parameters.
    pub values: Vec<usize>,
}

/// One choice for each place.
pub type Point = Vec<Choice>;

impl Slot {
    /// How many choices there are. Saturates.
    pub fn len(&self) -> u64 {
        self.choices
            .iter()
            .map(|sizes| product(sizes))
            .fold(0, u64::saturating_add)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn choice(&self, mut index: u64) -> Option<Choice> {
        for (pass, sizes) in self.choices.iter().enumerate() {
            let here = product(sizes);
            if index < here {
                let mut values = vec![0; sizes.len()];
                for (value, size) in values.iter_mut().zip(sizes).rev() {
                    let size = *size as u64;
                    *value = usize::try_from(index % size).ok()?;
                    index /= size;
                }
                return Some(Choice { pass, values });
            }
            index -= here;
        }
        None
    }

    fn index(&self, choice: &Choice) -> Option<u64> {
        let before: u64 = self
            .choices
            .get(..choice.pass)?
            .iter()
            .map(|sizes| product(sizes))
            .sum();
        let sizes = self.choices.get(choice.pass)?;
        let inside = choice
            .values
            .iter()
            .zip(sizes)
            .fold(0, |index, (value, size)| index * *size as u64 + *value as u64);
        Some(before + inside)
    }
}

impl Space {
    /// The space of some places of a pipeline.
    pub fn of(steps: &[Step]) -> Self {
        let sizes = |step: &Step| -> Vec<Vec<usize>> {
            let choices = step.choices.iter();
            choices
                .map(|pass| pass.search.iter().map(|(_, values)| values.len()).collect())
                .collect()
        };
        Self {
            slots: steps.iter().map(|step| Slot { choices: sizes(step) }).collect(),
        }
    }

    /// How many points there are. Saturates.
    pub fn len(&self) -> u64 {
        self.slots.iter().map(Slot::len).fold(1, u64::saturating_mul)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The point of that number.
    pub fn point(&self, mut index: u64) -> Option<Point> {
        let mut point = Vec::with_capacity(self.slots.len());
        for slot in self.slots.iter().rev() {
            let size = slot.len();
            if size == 0 {
                return None;
            }
            point.push(slot.choice(index % size)?);
            index /= size;
        }
        point.reverse();
        (index == 0).then_some(point)
    }

    /// The number of a point.
    pub fn index(&self, point: &[Choice]) -> Option<u64> {
        let mut index = 0_u64;
        for (slot, choice) in self.slots.iter().zip(point) {
            index = index.checked_mul(slot.len())?.checked_add(slot.index(choice)?)?;
        }
        Some(index)
    }
}

fn product(sizes: &[usize]) -> u64 {
    sizes.iter().fold(1, |p, size| p.saturating_mul(*size as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_and_numbers_are_inverse() {
        let space = Space {
            slots: vec![
                Slot {
                    choices: vec![vec![2, 3], vec![], vec![4]],
                },
                Slot {
                    choices: vec![vec![2]],
                },
                Slot {
                    choices: vec![vec![], vec![]],
                },
            ],
        };
        assert_eq!(space.len(), (6 + 1 + 4) * 2 * 2);
        let mut seen = std::collections::BTreeSet::new();
        for index in 0..space.len() {
            let point = space.point(index).unwrap();
            assert_eq!(space.index(&point), Some(index));
            assert!(seen.insert(point));
        }
        assert_eq!(space.point(space.len()), None);
    }
}
