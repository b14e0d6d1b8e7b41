//! All chance in a simulation: one stream of numbers per seed and purpose, so that a seed replays itself.

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

use crate::clock::Nanos;

/// A stream of chance.
pub struct Dice(ChaCha8Rng);

/// The generator behind a gateway's keys and nonces: drawn from the seed, so good for nothing but simulations.
#[must_use]
pub fn generator(seed: u64, purpose: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(purpose);
    rng
}

impl Dice {
    /// The stream of one seed and purpose.
    #[must_use]
    pub fn new(seed: u64, purpose: u64) -> Self {
        Self(generator(seed, purpose))
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `end`; 0 if `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.0.next_u64() % end }
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// True so many times in a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// A time from `low` to `high` microseconds.
    pub fn us(&mut self, low: u64, high: u64) -> Nanos {
        self.between(low * 1000, high * 1000)
    }

    /// A time from `low` to `high` milliseconds.
    pub fn ms(&mut self, low: u64, high: u64) -> Nanos {
        self.us(low * 1000, high * 1000)
    }

    /// One of them, or `None` of none.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        of.get(self.below(of.len() as u64) as usize).copied()
    }
}
