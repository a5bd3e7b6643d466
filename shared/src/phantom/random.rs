//! Seeded random numbers for the phantom: a 64-bit seed and a stream number come in, numbers that are the same on every CPU go out.
//!
//! The generator is SplitMix64 (Steele, Lea and Flood 2014). Nothing here is cryptographic.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finalizer of SplitMix64: a bijection of 64-bit words that scatters neighbouring inputs.
pub(super) const fn scatter(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub(super) struct Random {
    state: u64,
}

impl Random {
    /// The stream `stream` of `seed`. Different streams of one seed are independent for our purposes.
    pub(super) const fn new(seed: u64, stream: u64) -> Self {
        Self {
            state: scatter(seed ^ scatter(stream.wrapping_mul(GOLDEN) ^ GOLDEN)),
        }
    }

    /// The next 64 random bits.
    pub(super) const fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        scatter(self.state)
    }

    /// A number in `[0, 1)`, a multiple of 2^-32.
    pub(super) fn unit(&mut self) -> f64 {
        f64::from((self.bits() >> 32) as u32) / 4_294_967_296.0
    }

    /// A number in `[low, high)`.
    pub(super) fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// True with the given probability.
    pub(super) fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// A whole number in `0..n`, 0 for `n == 0`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the product's upper 64 bits are below n"
        )]
        let index = ((u128::from(self.bits()) * n as u128) >> 64) as usize;
        index
    }
}
