//! `std::mt19937` with the way in which C++ makes a floating-point number of its words.

/// `std::mt19937`.
#[derive(Clone)]
pub struct Mt19937(olive_core::rng::Mt19937);

impl Mt19937 {
    /// Starts from a seed.
    pub fn new(seed: u32) -> Self {
        Self(olive_core::rng::Mt19937::new(seed))
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// A number in `[0, 1)` from two draws, the low half first: `std::generate_canonical<double, 53>`.
    pub fn canonical(&mut self) -> f64 {
        let low = f64::from(self.next_u32());
        let high = f64::from(self.next_u32());
        let value = (low + high * 4_294_967_296.0) / 18_446_744_073_709_551_616.0;
        if value >= 1.0 { 1.0f64.next_down() } else { value }
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
