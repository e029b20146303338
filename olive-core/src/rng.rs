//! Random numbers that PyTorch and CPython draw, so that a seed of theirs gives the same order here.
//!
//! Both are the 32-bit Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998); they differ in how a seed becomes
//! a state and in how words become numbers.

const STATE: usize = 624;
const SHIFT: usize = 397;

/// MT19937: the generator behind PyTorch's CPU numbers, CPython's `random` and C++'s `std::mt19937`.
#[derive(Clone)]
pub struct Mt19937 {
    words: [u32; STATE],
    next: usize,
}

impl Mt19937 {
    /// Seeded as `std::mt19937(seed)` and PyTorch do.
    pub fn new(seed: u32) -> Self {
        let mut words = [0; STATE];
        words[0] = seed;
        for i in 1..STATE {
            let previous = words[i - 1];
            words[i] = 1_812_433_253u32
                .wrapping_mul(previous ^ (previous >> 30))
                .wrapping_add(i as u32);
        }
        Self { words, next: STATE }
    }

    /// Seeded from several words, as CPython seeds from an integer; `key` must not be empty.
    fn from_key(key: &[u32]) -> Self {
        let mut twister = Self::new(19_650_218);
        let words = &mut twister.words;
        let mut i = 1;
        let wrap = |words: &mut [u32; STATE], i: &mut usize| {
            *i += 1;
            if *i >= STATE {
                words[0] = words[STATE - 1];
                *i = 1;
            }
        };
        for step in 0..STATE.max(key.len()) {
            let j = step % key.len();
            let previous = words[i - 1];
            words[i] = (words[i] ^ (previous ^ (previous >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            wrap(words, &mut i);
        }
        for _ in 1..STATE {
            let previous = words[i - 1];
            words[i] =
                (words[i] ^ (previous ^ (previous >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            wrap(words, &mut i);
        }
        words[0] = 0x8000_0000;
        twister
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == STATE {
            self.refill();
        }
        let mut word = self.words[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn refill(&mut self) {
        for i in 0..STATE {
            let mixed = (self.words[i] & 0x8000_0000) | (self.words[(i + 1) % STATE] & 0x7fff_ffff);
            let twist = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[i] = self.words[(i + SHIFT) % STATE] ^ (mixed >> 1) ^ twist;
        }
        self.next = 0;
    }
}

/// PyTorch's CPU generator after `manual_seed(seed)`.
#[derive(Clone)]
pub struct TorchRng(Mt19937);

impl TorchRng {
    /// `torch.Generator().manual_seed(seed)`; like PyTorch, only the low 32 bits of the seed count.
    pub fn new(seed: u64) -> Self {
        Self(Mt19937::new(seed as u32))
    }

    /// `torch.randperm(n)`: the numbers below `n` in random order.
    ///
    /// # Panics
    /// If `n` has more than 32 bits: PyTorch draws other numbers there.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        assert!(u32::try_from(n).is_ok(), "invariant: at most 2^32 items");
        let mut order: Vec<usize> = (0..n).collect();
        for i in 0..n.saturating_sub(1) {
            let offset = self.0.next_u32() as usize % (n - i);
            order.swap(i, i + offset);
        }
        order
    }

    /// One element of a float32 tensor's `uniform_(low, high)`.
    pub fn uniform_f32(&mut self, low: f32, high: f32) -> f32 {
        const BITS: u32 = 24;
        let fraction = (self.0.next_u32() & ((1 << BITS) - 1)) as f32 / (1u32 << BITS) as f32;
        fraction * (high - low) + low
    }
}

/// CPython's `random.Random`.
#[derive(Clone)]
pub struct PythonRng(Mt19937);

impl PythonRng {
    /// `random.Random(seed)` for an integer seed, of which CPython takes the absolute value.
    pub fn new(seed: i64) -> Self {
        let seed = seed.unsigned_abs();
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        let key: &[u32] = if high == 0 { &[low] } else { &[low, high] };
        Self(Mt19937::from_key(key))
    }

    /// `getrandbits(bits)` for 1 to 64 bits.
    fn bits(&mut self, bits: u32) -> u64 {
        if bits <= 32 {
            return u64::from(self.0.next_u32() >> (32 - bits));
        }
        let low = u64::from(self.0.next_u32());
        let high = u64::from(self.0.next_u32() >> (64 - bits));
        low | (high << 32)
    }

    /// `shuffle(values)`.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for at in (1..values.len()).rev() {
            let other = self.up_to(at as u64) as usize;
            values.swap(at, other);
        }
    }

    /// `randint(0, high)`: both ends can be drawn.
    pub fn up_to(&mut self, high: u64) -> u64 {
        // CPython takes the bits of the number of choices, which for a power of two is one more than needed, and
        // draws again whatever is too large.
        let Some(choices) = high.checked_add(1) else {
            // 2^64 choices have 65 bits: three words, of which the highest has one bit that must be 0.
            loop {
                let value = self.bits(64);
                if self.0.next_u32() >> 31 == 0 {
                    return value;
                }
            }
        };
        let bits = u64::BITS - choices.leading_zeros();
        loop {
            let value = self.bits(bits);
            if value < choices {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn golden() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/rng.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn numbers(value: &Value) -> Vec<u64> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap())
            .collect()
    }

    #[test]
    fn the_twister_is_that_of_the_cpp_standard() {
        // The standard fixes the 10000th word of a default-seeded `std::mt19937`.
        let mut twister = Mt19937::new(5489);
        let last = (0..10_000).map(|_| twister.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn permutations_are_pytorchs() {
        for case in golden()["torch_randperm"].as_array().unwrap() {
            let seed = case["seed"].as_u64().unwrap();
            let n = case["n"].as_u64().unwrap() as usize;
            let drawn: Vec<u64> = TorchRng::new(seed)
                .permutation(n)
                .iter()
                .map(|i| *i as u64)
                .collect();
            assert_eq!(drawn, numbers(&case["values"]), "seed {seed}, n {n}");
        }
    }

    #[test]
    fn uniform_floats_are_pytorchs() {
        for case in golden()["torch_uniform_float32"].as_array().unwrap() {
            let mut rng = TorchRng::new(case["seed"].as_u64().unwrap());
            let [low, high] = ["low", "high"].map(|key| case[key].as_f64().unwrap() as f32);
            for wanted in case["values"].as_array().unwrap() {
                assert_eq!(rng.uniform_f32(low, high), wanted.as_f64().unwrap() as f32);
            }
        }
    }

    #[test]
    fn integers_are_cpythons() {
        for case in golden()["python_randint"].as_array().unwrap() {
            let mut rng = PythonRng::new(case["seed"].as_i64().unwrap());
            let high = case["high"].as_u64().unwrap();
            let wanted = numbers(&case["values"]);
            let drawn: Vec<u64> = wanted.iter().map(|_| rng.up_to(high)).collect();
            assert_eq!(drawn, wanted, "seed {}, high {high}", case["seed"]);
        }
        for case in golden()["python_randint_mixed"].as_array().unwrap() {
            let mut rng = PythonRng::new(case["seed"].as_i64().unwrap());
            for pair in case["high_and_value"].as_array().unwrap() {
                assert_eq!(rng.up_to(pair[0].as_u64().unwrap()), pair[1].as_u64().unwrap());
            }
        }
    }

    #[test]
    fn shuffles_are_cpythons() {
        // `r = random.Random(seed); x = list(range(n)); r.shuffle(x)`.
        let shuffled = |seed: i64, n: usize| {
            let mut values: Vec<usize> = (0..n).collect();
            PythonRng::new(seed).shuffle(&mut values);
            values
        };
        assert_eq!(shuffled(7, 10), [8, 3, 1, 4, 7, 0, 9, 6, 2, 5]);
        assert_eq!(shuffled(42, 8), [3, 4, 6, 7, 2, 5, 0, 1]);
    }
}
