//! Planted near duplicates are found, others are not, in any order of the rows.

use std::collections::BTreeSet;

use athanor_contract::{
    Decimal,
    train::{NearDuplicateAction, Shingles},
};
use proptest::prelude::*;

use super::*;

fn spec(threshold: f64, shingles: Shingles) -> NearDuplicates {
    NearDuplicates { threshold: Decimal::new(threshold).unwrap(), shingles, action: NearDuplicateAction::Group }
}

fn clusters(texts: &[String], spec: &NearDuplicates) -> Clusters {
    near_duplicates(spec, texts.len(), |row| Cow::Borrowed(&texts[row]), &|_| {})
}

/// Clusters of more than one row, as sets of texts.
fn groups(texts: &[String], clusters: &Clusters) -> BTreeSet<BTreeSet<String>> {
    let mut groups = vec![BTreeSet::new(); texts.len()];
    for (row, text) in texts.iter().enumerate() {
        groups[clusters.id(row)].insert(text.clone());
    }
    groups.into_iter().filter(|group| group.len() > 1).collect()
}

/// Numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) % limit as u64) as usize
    }

    fn words(&mut self, count: usize) -> Vec<String> {
        let word = |numbers: &mut Self| {
            (0..3 + numbers.below(6)).map(|_| char::from(b'a' + numbers.below(26) as u8)).collect::<String>()
        };
        (0..count).map(|_| word(self)).collect()
    }
}

#[test]
fn planted_near_duplicates_are_found_and_distinct_texts_are_not_joined() {
    for (threshold, shingles) in [
        (0.5, Shingles::Characters),
        (0.7, Shingles::Words),
        (0.8, Shingles::Characters),
        (0.8, Shingles::Words),
        (0.9, Shingles::Characters),
        (0.95, Shingles::Words),
    ] {
        let spec = spec(threshold, shingles);
        let hasher = MinHasher::new(shingles);
        let mut numbers = Numbers(3);
        let (mut texts, mut pairs) = (Vec::new(), Vec::new());
        while pairs.len() < 300 {
            // Words are changed one by one until the next change would leave the pair below the threshold.
            let count = 30 + numbers.below(120);
            let words = numbers.words(count);
            let original = words.join(" ");
            let set = hasher.shingle_set(&original);
            let (mut copy, mut changed) = (original.clone(), words);
            loop {
                let at = numbers.below(changed.len());
                changed[at] = numbers.words(1).remove(0);
                let next = changed.join(" ");
                if jaccard(&set, &hasher.shingle_set(&next)) < threshold {
                    break;
                }
                copy = next;
            }
            if copy == original {
                continue;
            }
            pairs.push((texts.len(), texts.len() + 1));
            texts.extend([original, copy]);
        }
        let clusters = clusters(&texts, &spec);
        let found = pairs.iter().filter(|(one, other)| clusters.id(*one) == clusters.id(*other)).count();
        assert!(found as f64 >= 0.95 * pairs.len() as f64, "{found} of {} at {threshold}, {shingles:?}", pairs.len());
        for row in 0..texts.len() {
            assert_eq!(clusters.id(row) / 2, row / 2, "rows {row} and {} have little in common", clusters.id(row));
        }
    }
}

#[test]
fn pairs_just_below_the_threshold_are_not_joined() {
    let hasher = MinHasher::new(Shingles::Characters);
    let mut numbers = Numbers(5);
    for _ in 0..200 {
        let words = numbers.words(40);
        let mut changed = words.clone();
        let texts = loop {
            let at = numbers.below(changed.len());
            changed[at] = numbers.words(1).remove(0);
            let texts = [words.join(" "), changed.join(" ")];
            if jaccard(&hasher.shingle_set(&texts[0]), &hasher.shingle_set(&texts[1])) < 0.8 {
                break texts;
            }
        };
        assert!(clusters(&texts, &spec(0.8, Shingles::Characters)).is_first(1), "{texts:?}");
    }
}

#[test]
fn texts_that_differ_in_case_and_spacing_alone_are_one_and_empty_ones_are_not() {
    let texts = ["", "A b c d e f", " ", "a  B c D e f ", "x", "", "X"].map(str::to_owned);
    let clusters = clusters(&texts, &spec(1.0, Shingles::Characters));
    assert_eq!((0..7).map(|row| clusters.id(row)).collect::<Vec<_>>(), [0, 1, 2, 1, 4, 5, 4]);
    assert!(near_duplicates(&spec(0.8, Shingles::Words), 0, |_| Cow::Borrowed(""), &|_| {}).is_empty());
}

#[test]
fn boilerplate_that_thousands_share_is_not_compared_pair_by_pair() {
    // Half of each text is the same: far below the threshold, and yet every band of some is equal.
    let mut numbers = Numbers(9);
    let shared = numbers.words(60).join(" ");
    let texts: Vec<String> = (0..4000).map(|_| format!("{shared} {}", numbers.words(30).join(" "))).collect();
    let clusters = clusters(&texts, &spec(0.9, Shingles::Characters));
    assert!((0..texts.len()).all(|row| clusters.is_first(row)));
}

#[test]
fn bands_give_a_pair_at_the_threshold_its_chance() {
    for (threshold, rows) in [(0.5, 3), (0.8, 6), (1.0, 16)] {
        assert_eq!(band_rows(threshold), rows);
    }
}

#[test]
fn rows_take_few_bytes_however_many_they_are() {
    assert_eq!(size_of::<Sketch>(), 24);
    assert_eq!([1, 5_000_000, 10_000_000, 100_000_000].map(|count| at_once(21, count, KEYS)), [21, 21, 11, 1]);
    for bands in 1..=PERMUTATIONS {
        assert!(at_once(bands, 10_000_000, KEYS) * 10_000_000 * 4 <= KEYS);
    }
}

#[test]
fn near_duplicates_are_found_among_thousands_of_one_template() {
    // All share nine tenths of their bands' keys with hundreds of others.
    let mut numbers = Numbers(11);
    let shared = numbers.words(20).join(" ");
    let originals: Vec<String> = (0..3000).map(|_| format!("{} {shared}", numbers.words(15).join(" "))).collect();
    let copies: Vec<String> = originals.iter().map(|text| format!("{text} x")).collect();
    let texts = [originals, copies].concat();
    let clusters = clusters(&texts, &spec(0.8, Shingles::Characters));
    let found = (0..3000).filter(|row| clusters.id(row + 3000) == *row).count();
    assert!(found >= 2970, "{found}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn clusters_do_not_depend_on_the_order_of_the_rows(
        seed in any::<u64>(),
        order in Just((0..60_usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut numbers = Numbers(seed);
        let mut texts: Vec<String> = Vec::new();
        while texts.len() < 60 {
            let count = 10 + numbers.below(10);
            let mut words = numbers.words(count);
            for _ in 0..1 + numbers.below(6) {
                texts.push(words.join(" "));
                let at = numbers.below(words.len());
                words[at] = numbers.words(1).remove(0);
            }
        }
        texts.truncate(60);
        let shuffled: Vec<String> = order.iter().map(|&row| texts[row].clone()).collect();
        let spec = spec(0.7, Shingles::Characters);
        let (one, other) = (clusters(&texts, &spec), clusters(&shuffled, &spec));
        prop_assert_eq!(&one, &find(&spec, 60, |row| Cow::Borrowed(&texts[row]), 4 * 60 * 5, &|_| {}), "in rounds of some bands");
        prop_assert_eq!(groups(&texts, &one), groups(&shuffled, &other));
        for row in 0..60 {
            prop_assert!(one.id(row) <= row && one.is_first(one.id(row)));
        }
    }
}

#[test]
fn progress_ends_at_its_total_however_many_rounds_there_are() {
    let texts: Vec<String> = (0..10_000).map(|row| format!("row {row} of some")).collect();
    let spec = spec(0.8, Shingles::Characters);
    for memory in [KEYS, 4 * texts.len() * 5] {
        let seen = std::sync::Mutex::new(Vec::new());
        let report = |progress: Progress<'_>| {
            let Progress::Comparing { done, total } = progress else { panic!("{progress:?}") };
            seen.lock().unwrap().push((done, total));
        };
        find(&spec, texts.len(), |row| Cow::Borrowed(&texts[row]), memory, &report);
        let mut seen = seen.into_inner().unwrap();
        // Two threads may tell in another order than they counted.
        seen.sort_unstable();
        seen.dedup();
        let (done, total) = *seen.last().unwrap();
        assert_eq!(done, total, "{seen:?}");
        assert!(seen.len() > 10 && seen.iter().all(|moment| moment.1 == total), "{seen:?}");
        assert_eq!(
            total as usize / texts.len(),
            if memory == KEYS { 2 } else { 1 + (PERMUTATIONS / band_rows(0.8)).div_ceil(5) }
        );
    }
}
