//! Random numbers by counter: a number is a function of (seed, choice, position), without any state.
//!
//! Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): ten rounds
//! of multiplications that scramble a counter under a key. As there is no state, a stream that is resumed elsewhere, or
//! computed again after a preemption, meets the same numbers.

/// Multipliers of the two halves of a round, and what the two halves of the key grow by (the paper, section 4.3).
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const N_ROUNDS: usize = 10;

/// Binary places of a uniform number.
pub(super) const UNIFORM_BITS: u32 = 53;

/// The uniform number in [0, 1) that decides the token at `position` (of the whole sequence, prompt included) of one
/// choice, times 2^53.
pub(super) fn uniform(seed: u64, choice: u32, position: u64) -> u64 {
    let [lo, hi] = words(position);
    let [first, second, ..] = philox(words(seed), [lo, hi, choice, 0]);
    (u64::from(second) << 32 | u64::from(first)) >> (u64::BITS - UNIFORM_BITS)
}

fn words(number: u64) -> [u32; 2] {
    // The halves, the lower one first.
    [number as u32, (number >> 32) as u32]
}

fn philox(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..N_ROUNDS {
        let [lo_0, hi_0] = words(u64::from(counter[0]) * u64::from(MULTIPLIERS[0]));
        let [lo_1, hi_1] = words(u64::from(counter[2]) * u64::from(MULTIPLIERS[1]));
        counter = [hi_1 ^ counter[1] ^ key[0], lo_1, hi_0 ^ counter[3] ^ key[1], lo_0];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers for `philox4x32 10` that come with the authors' Random123 library (`kat_vectors`).
    #[test]
    fn philox_gives_the_known_answers() {
        let check = |counter, key, expected| assert_eq!(philox(key, counter), expected);
        check([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        check([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        check(
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn seed_choice_and_position_each_change_the_number() {
        let numbers = [
            uniform(1, 2, 3),
            uniform(2, 2, 3),
            uniform(1 << 32, 2, 3),
            uniform(1, 3, 3),
            uniform(1, 2, 4),
            uniform(1, 2, 3 + (1 << 32)),
        ];
        for (i, a) in numbers.iter().enumerate() {
            assert!(numbers[..i].iter().all(|b| a != b), "{numbers:?}");
        }
    }

    #[test]
    fn numbers_are_uniform_and_below_one() {
        const N: u64 = 100_000;
        let mut bins = [0u32; 10];
        for position in 0..N {
            let number = uniform(7, 0, position);
            assert!(number < 1 << UNIFORM_BITS);
            bins[((number * 10) >> UNIFORM_BITS) as usize] += 1;
        }
        let expected = N as f64 / 10.0;
        let chi_square: f64 = bins.iter().map(|&count| (f64::from(count) - expected).powi(2) / expected).sum();
        assert!(chi_square < 27.88, "9 degrees of freedom, one in a thousand: {chi_square}");
    }
}
