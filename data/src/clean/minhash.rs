//! Texts as sets of shingles, and sets as short signatures: the share of equal places in two signatures estimates the
//! Jaccard similarity of the sets (Broder, "On the resemblance and containment of documents", 1997). The same text
//! gives the same signature on every machine and in every release.

use std::ops::Range;

use athanor_contract::train::Shingles;

use crate::random::mix;

/// Places of a signature. The estimate's standard deviation is at most 0.5 / sqrt(128), 0.044.
pub const PERMUTATIONS: usize = 128;

const SEED: u64 = 0x0a7a_0b0e_5eed_0001;
const CHARACTERS: usize = 5;
const WORDS: usize = 3;

/// Makes shingles and signatures.
#[derive(Clone, Debug)]
pub struct MinHasher {
    shingles: Shingles,
    /// Factor and summand of each permutation: the upper half of `factor * x + summand` (Dietzfelbinger, 1996).
    permutations: [(u64, u64); PERMUTATIONS],
}

impl MinHasher {
    pub fn new(shingles: Shingles) -> Self {
        let mut state = SEED;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        };
        Self { shingles, permutations: std::array::from_fn(|_| (next() | 1, next())) }
    }

    /// Hashes of the text's shingles, sorted, each once. A text shorter than a shingle is one; one without anything to
    /// compare has none.
    pub fn shingle_set(&self, text: &str) -> Vec<u32> {
        let mut set = self.shingles(text);
        set.sort_unstable();
        set.dedup();
        set
    }

    /// Hashes of the text's shingles, as they come.
    pub fn shingles(&self, text: &str) -> Vec<u32> {
        match self.shingles {
            Shingles::Characters => character_shingles(text),
            Shingles::Words => word_shingles(text),
        }
    }

    /// The least hash of each permutation. For a set with at least one shingle.
    pub fn signature(&self, set: &[u32]) -> [u32; PERMUTATIONS] {
        let mut least = [0; PERMUTATIONS];
        self.least(set, 0..PERMUTATIONS, &mut least);
        least
    }

    /// Those places of the signature alone; shingles may come more than once.
    pub fn least(&self, shingles: &[u32], places: Range<usize>, least: &mut [u32; PERMUTATIONS]) {
        let (least, permutations) = (&mut least[places.clone()], &self.permutations[places]);
        least.fill(u32::MAX);
        for &shingle in shingles {
            for (least, (factor, summand)) in std::iter::zip(&mut *least, permutations) {
                let hash = (factor.wrapping_mul(u64::from(shingle)).wrapping_add(*summand) >> 32) as u32;
                *least = hash.min(*least);
            }
        }
    }
}

/// Share of the shingles of both sets that are in both; 0 if there are none.
pub fn jaccard(one: &[u32], other: &[u32]) -> f64 {
    let (mut a, mut b, mut common) = (0, 0, 0_usize);
    while let (Some(left), Some(right)) = (one.get(a), other.get(b)) {
        common += usize::from(left == right);
        a += usize::from(left <= right);
        b += usize::from(right <= left);
    }
    let union = one.len() + other.len() - common;
    if union == 0 { 0.0 } else { common as f64 / union as f64 }
}

fn character_shingles(text: &str) -> Vec<u32> {
    let mut normal = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !normal.is_empty() {
            normal.push(' ');
        }
        normal.extend(word.chars().flat_map(char::to_lowercase));
    }
    let starts: Vec<usize> = normal.char_indices().map(|(at, _)| at).chain([normal.len()]).collect();
    match starts.len() - 1 {
        0 => Vec::new(),
        count if count < CHARACTERS => vec![fold(hash(normal.as_bytes()))],
        _ => starts.windows(CHARACTERS + 1).map(|at| fold(hash(&normal.as_bytes()[at[0]..at[CHARACTERS]]))).collect(),
    }
}

fn word_shingles(text: &str) -> Vec<u32> {
    let words: Vec<u64> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(|word| hash(word.to_lowercase().as_bytes()))
        .collect();
    let join = |words: &[u64]| fold(words.iter().fold(0, |state: u64, &word| mix(state.rotate_left(5) ^ word)));
    match words.len() {
        0 => Vec::new(),
        count if count < WORDS => vec![join(&words)],
        _ => words.windows(WORDS).map(join).collect(),
    }
}

/// FNV-1a with a finaliser: short inputs, no state, the same everywhere.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    mix(bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |state: u64, &byte| (state ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)))
}

fn fold(hash: u64) -> u32 {
    (hash >> 32) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shingles_do_not_mind_case_and_spacing() {
        for shingles in [Shingles::Characters, Shingles::Words] {
            let hasher = MinHasher::new(shingles);
            assert_eq!(hasher.shingle_set("The  quick\nbrown Fox "), hasher.shingle_set("the quick brown fox"));
            assert!(hasher.shingle_set(" \n").is_empty());
            assert_eq!(hasher.shingle_set("ab").len(), 1);
        }
        assert_eq!(MinHasher::new(Shingles::Characters).shingle_set("größer").len(), 2);
        assert_eq!(MinHasher::new(Shingles::Words).shingle_set("one, two - three; four").len(), 2);
    }

    #[test]
    fn signatures_are_the_same_in_every_release() {
        let hasher = MinHasher::new(Shingles::Characters);
        let set = hasher.shingle_set("the quick brown fox");
        assert_eq!(set.len(), 15);
        let signature = hasher.signature(&set).map(|place| place as u16);
        assert_eq!(hash(format!("{signature:?}").as_bytes()), SIGNATURE);
    }

    /// A change of this number changes clusters, and with them the split of existing data: it is a breaking change.
    const SIGNATURE: u64 = 12_510_148_505_061_044_692;

    #[test]
    fn the_estimate_is_close_to_the_similarity() {
        let hasher = MinHasher::new(Shingles::Characters);
        let mut state = 7;
        let mut number = || {
            state = mix(u64::wrapping_add(state, 0x9e37));
            (state >> 32) as u32
        };
        let (mut signed, mut pairs) = (0.0, 0);
        for size in [20, 100, 500] {
            for tenth in 0..=10 {
                for _ in 0..20 {
                    let common: Vec<u32> = (0..size * tenth / 10).map(|_| number()).collect();
                    let mut set = || {
                        let rest = size - common.len();
                        let mut set: Vec<u32> = common.iter().copied().chain((0..rest).map(|_| number())).collect();
                        set.sort_unstable();
                        set.dedup();
                        set
                    };
                    let (one, other) = (set(), set());
                    let equal =
                        std::iter::zip(hasher.signature(&one), hasher.signature(&other)).filter(|(a, b)| a == b);
                    let error = equal.count() as f64 / PERMUTATIONS as f64 - jaccard(&one, &other);
                    assert!(error.abs() < 0.2, "{error} at {size} shingles, {tenth} tenths in common");
                    signed += error;
                    pairs += 1;
                }
            }
        }
        assert!((signed / f64::from(pairs)).abs() < 0.01, "the estimate is biased by {}", signed / f64::from(pairs));
    }

    proptest! {
        #[test]
        fn jaccard_is_what_sets_say(a in prop::collection::btree_set(0_u32..40, 0..30), b in prop::collection::btree_set(0_u32..40, 0..30)) {
            let (one, other): (Vec<u32>, Vec<u32>) = (a.iter().copied().collect(), b.iter().copied().collect());
            let union = a.union(&b).count();
            let expected = if union == 0 { 0.0 } else { a.intersection(&b).count() as f64 / union as f64 };
            prop_assert_eq!(jaccard(&one, &other), expected);
            prop_assert_eq!(jaccard(&other, &one), expected);
        }
    }
}
