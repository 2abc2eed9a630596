//! Numbers that look random and are the same every time.

/// The generator xorshift64*.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        // The only state that it would never leave is 0; seeds next to each other begin far apart.
        let mixed = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self(if mixed == 0 { 1 } else { mixed })
    }

    /// From 0 up to 1, which it never is. A `f32` holds it exactly.
    pub(crate) fn share(&mut self) -> f64 {
        let state = &mut self.0;
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        let high = state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40;
        // 24 bits are what the significand of a `f32` holds.
        #[allow(clippy::cast_precision_loss)]
        let share = high as f64 / (1_u64 << 24) as f64;
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(seed: u64) -> Vec<f64> {
        let mut random = Random::new(seed);
        (0..10_000).map(|_| random.share()).collect()
    }

    #[test]
    fn shares_fill_the_range_and_depend_on_the_seed_alone() {
        for seed in [0, 1, u64::MAX] {
            let drawn = drawn(seed);
            let mean = drawn.iter().sum::<f64>() / 10_000.0;
            assert!(drawn.iter().all(|share| (0.0..1.0).contains(share)), "{seed}");
            assert!((mean - 0.5).abs() < 0.02, "{seed}: {mean}");
        }
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
    }
}
