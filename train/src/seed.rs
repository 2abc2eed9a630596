/// 2^64 divided by the golden ratio: the increment of splitmix64.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The seed of a training step, for everything random in it (dropout above all): the same whether the step runs for the
/// first time or again after an interruption.
///
/// Output number `step + 1` of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014)
/// with the state `seed`, shifted right by one bit so that it fits an `i64`, as libtorch's seeds must:
///
/// ```text
/// z = seed + (step + 1) * 0x9E3779B97F4A7C15             all modulo 2^64
/// z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
/// z = (z ^ (z >> 27)) * 0x94D049BB133111EB
/// (z ^ (z >> 31)) >> 1
/// ```
pub fn step_seed(seed: u64, step: u64) -> u64 {
    finalize(seed.wrapping_add(step.wrapping_add(1).wrapping_mul(GOLDEN))) >> 1
}

/// The finalizer of splitmix64: a bijection under which close values become unrelated.
fn finalize(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// What random numbers are for, so that equal seeds do not give equal numbers for different purposes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    /// The order of rows.
    Shuffle = 1,
    /// The values of synthetic data.
    Values = 2,
}

/// Splitmix64: small, fast and good enough to shuffle rows and to make up data. Nothing secret.
#[derive(Debug, Clone)]
pub(crate) struct Generator {
    state: u64,
}

impl Generator {
    pub(crate) fn new(state: u64) -> Generator {
        Generator { state }
    }

    /// A generator of its own for each purpose and each list of keys.
    pub(crate) fn keyed(seed: u64, purpose: Purpose, keys: &[u64]) -> Generator {
        let mix = |state: u64, key: u64| finalize((state ^ key).wrapping_add(GOLDEN));
        Generator::new(keys.iter().fold(mix(finalize(seed), purpose as u64), |state, key| mix(state, *key)))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        finalize(self.state)
    }

    /// A number below `bound`, which is not 0, each as likely as any other (Lemire: "Fast random integer generation in an
    /// interval", 2019).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            let [low, high] = halves(product);
            if low >= threshold {
                return high;
            }
        }
    }
}

#[allow(clippy::cast_possible_truncation)] // both halves are kept
fn halves(value: u128) -> [u64; 2] {
    [value as u64, (value >> 64) as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // As published with the reference implementation.
        let mut generator = Generator::new(1_234_567);
        let expected: [u64; 5] = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(expected.map(|_| generator.next()), expected);
    }

    #[test]
    fn seeds_of_steps_are_fixed_forever() {
        assert_eq!(step_seed(0, 0), 0xE220_A839_7B1D_CDAF >> 1);
        assert_eq!(step_seed(0, 1), 0x6E78_9E6A_A1B9_65F4 >> 1);
        assert_eq!(step_seed(1_234_567, 4), 16_408_922_859_458_223_821 >> 1);
        // Nothing overflows, and every seed fits an i64.
        for (seed, step) in [(u64::MAX, u64::MAX), (u64::MAX, 0), (0, u64::MAX - 1)] {
            assert!(i64::try_from(step_seed(seed, step)).is_ok());
        }
    }

    #[test]
    fn numbers_below_a_bound_are_uniform() {
        let mut generator = Generator::new(7);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[usize::try_from(generator.below(6)).unwrap()] += 1;
        }
        // Five standard deviations are 456.
        assert!(counts.iter().all(|count| count.abs_diff(10_000) < 460), "{counts:?}");
        assert_eq!(generator.below(1), 0);
        assert!((0..100).all(|_| generator.below(u64::MAX) < u64::MAX));
    }

    #[test]
    fn purposes_and_keys_have_numbers_of_their_own() {
        let first = |purpose, keys: &[u64]| Generator::keyed(5, purpose, keys).next();
        let all = [
            first(Purpose::Shuffle, &[0]),
            first(Purpose::Shuffle, &[1]),
            first(Purpose::Values, &[0]),
            first(Purpose::Values, &[0, 0]),
            first(Purpose::Values, &[0, 1]),
            first(Purpose::Values, &[1, 0]),
        ];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
    }
}
