//! The Mersenne Twister with 32-bit outputs (Matsumoto and Nishimura 1998), as `std::mt19937`.

const N: usize = 624;
const M: usize = 397;

/// `std::mt19937`.
#[derive(Debug, Clone)]
pub struct Mt19937 {
    state: [u32; N],
    next: usize,
}

impl Mt19937 {
    /// Starts from a seed.
    pub fn new(seed: u32) -> Self {
        let mut state = [seed; N];
        for i in 1..N {
            let before = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(before ^ (before >> 30))
                .wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number in `[0, 1)` from two draws, the low half first: `std::generate_canonical<double, 53>`.
    pub fn canonical(&mut self) -> f64 {
        let low = f64::from(self.next_u32());
        let high = f64::from(self.next_u32());
        let value = (low + high * 4_294_967_296.0) / 18_446_744_073_709_551_616.0;
        if value >= 1.0 { 1.0f64.next_down() } else { value }
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ten_thousandth_output_is_the_one_of_the_standard() {
        let mut rng = Mt19937::new(5489);
        let outputs: Vec<u32> = (0..10_000).map(|_| rng.next_u32()).collect();
        assert_eq!(outputs[0], 3_499_211_612);
        assert_eq!(outputs[9_999], 4_123_659_995);
    }

    #[test]
    fn canonical_takes_the_low_half_first() {
        let mut rng = Mt19937::new(5489);
        let want = (3_499_211_612.0 + 581_869_302.0 * 4_294_967_296.0) / 18_446_744_073_709_551_616.0;
        assert_eq!(rng.canonical(), want);
    }
}
