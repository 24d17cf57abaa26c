use std::collections::{HashMap, HashSet};

use athanor_contract::train::HeldOutPart;
use proptest::prelude::*;

use super::*;
use crate::rows::{Fields, Origin, Rows};

fn spec() -> SplitSpec {
    SplitSpec::default()
}

/// Rows of text, label and group.
fn dataset<'a>(rows: impl IntoIterator<Item = (&'a str, Option<&'a str>, Option<&'a str>)>) -> Dataset {
    let mut built = Rows::default();
    built.begin(0, Origin::File { uri: "f".into() });
    for (text, label, group) in rows {
        built.push(1, Fields { text, label, group, ..Fields::default() });
    }
    Dataset { sources: vec!["s".into()], rows: built, ..Dataset::default() }
}

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("text {number}")).collect()
}

fn parts_by_row(parts: &Parts) -> HashMap<usize, Part> {
    let named = [(&parts.train, Part::Train), (&parts.validation, Part::Validation), (&parts.test, Part::Test)];
    named.into_iter().flat_map(|(rows, part)| rows.iter().map(move |&row| (row, part))).collect()
}

#[test]
fn parts_have_their_shares_and_a_larger_share_keeps_its_rows() {
    let small = spec();
    let large = SplitSpec { test_percent: 20, ..small };
    let other = SplitSpec { seed: 1, ..small };
    let texts = texts(10_000);
    let count = |split: &SplitSpec, part| texts.iter().filter(|text| part_of(text, split) == part).count();
    assert!((900..1100).contains(&count(&small, Part::Test)));
    assert!((900..1100).contains(&count(&small, Part::Validation)));
    let mut moved = 0;
    for text in &texts {
        if part_of(text, &small) == Part::Test {
            assert_eq!(part_of(text, &large), Part::Test);
            moved += usize::from(part_of(text, &other) != Part::Test);
        }
    }
    assert!(moved > 800, "another seed gives another split");
}

/// The split of 0.1: jobs that were split then are split the same way by whatever comes later.
#[test]
fn a_text_stays_where_it_has_always_been() {
    let all: Vec<Part> = (0..24).map(|number| part_of(&format!("text {number}"), &spec())).collect();
    let digest = |text: &str| {
        let digest = Sha256::new().chain_update(0_i64.to_le_bytes()).chain_update(text.as_bytes()).finalize();
        digest[0]
    };
    for (number, part) in all.iter().enumerate() {
        // 10 % of 256 is 25.6, 20 % is 51.2: away from these the first byte alone decides.
        match digest(&format!("text {number}")) {
            0..=24 => assert_eq!(*part, Part::Test),
            26..=50 => assert_eq!(*part, Part::Validation),
            52..=255 => assert_eq!(*part, Part::Train),
            25 | 51 => {}
        }
    }
    let texts = texts(1000);
    let data = dataset(texts.iter().map(|text| (text.as_str(), None, None)));
    for (row, part) in parts_by_row(&data.split(&spec()).unwrap()) {
        assert_eq!(part, part_of(&texts[row], &spec()));
    }
}

#[test]
fn stratified_parts_have_exact_shares_of_each_label() {
    let texts = texts(1000);
    // 700 of a, 200 of b, 95 of c, 5 of d.
    let label = |row: usize| match row {
        ..700 => "a",
        700..900 => "b",
        900..995 => "c",
        _ => "d",
    };
    let data = dataset(texts.iter().enumerate().map(|(row, text)| (text.as_str(), Some(label(row)), None)));
    let split = SplitSpec { stratify: true, ..spec() };
    let parts = data.split(&split).unwrap();
    let count = |part: &[usize], name| part.iter().filter(|&&row| label(row) == name).count();
    assert_eq!(["a", "b", "c", "d"].map(|name| count(&parts.test, name)), [70, 20, 10, 1]);
    assert_eq!(["a", "b", "c", "d"].map(|name| count(&parts.validation, name)), [70, 20, 9, 0]);
    assert_eq!(parts.counts().train + parts.counts().validation + parts.counts().test, 1000);
    assert_eq!(data.split(&split).unwrap(), parts);
    assert_ne!(data.split(&SplitSpec { seed: 1, ..split }).unwrap(), parts);
}

#[test]
fn groups_and_near_duplicates_are_never_parted() {
    let texts = texts(2000);
    let groups: Vec<String> = (0..2000).map(|row| format!("author {}", row % 300)).collect();
    let group = |row: usize| (row < 1500).then(|| groups[row].as_str());
    let mut data = dataset(texts.iter().enumerate().map(|(row, text)| (text.as_str(), Some("x"), group(row))));
    // Rows of the last 500 are near duplicates in twos; 1499 and 1500 tie a group to a cluster.
    let clusters: Vec<u32> = (0..2000).map(|row| if row < 1499 { row } else { 1499 + (row - 1499) / 2 }).collect();
    data.clusters = Some(clusters.clone());
    for stratify in [false, true] {
        let split = SplitSpec { stratify, ..spec() };
        let parts = data.split(&split).unwrap();
        let by_row = parts_by_row(&parts);
        for row in 0..2000 {
            if row < 1200 {
                assert_eq!(by_row[&row], by_row[&(row + 300)], "group of row {row}");
            }
            if row >= 1499 && row % 2 == 1 && row + 1 < 2000 {
                assert_eq!(by_row[&row], by_row[&(row + 1)], "cluster of row {row}");
            }
            if !stratify && row < 1500 {
                assert_eq!(by_row[&row], part_of(&groups[row], &split), "a group is placed by its key");
            }
        }
        assert!((100..350).contains(&parts.test.len()), "{}", parts.test.len());
        let folds = data.folds(&split, &parts.train, 4).unwrap();
        for fold in &folds {
            let held_out: HashSet<_> = fold.held_out.iter().collect();
            for row in 0..1200 {
                assert_eq!(held_out.contains(&row), held_out.contains(&(row + 300)));
            }
            for row in (1499..1999).step_by(2) {
                assert_eq!(held_out.contains(&row), held_out.contains(&(row + 1)), "near duplicates straddle folds");
            }
        }
    }
    // A cluster is placed by its smallest text, whatever the order of rows is.
    let mut pair = dataset([("b", None, None), ("a", None, None)]);
    pair.clusters = Some(vec![7, 7]);
    let units = Units::new(&pair.rows, pair.clusters.as_deref());
    assert_eq!((units.key(0), units.key(1)), ("a", "a"));
}

#[test]
fn folds_hold_each_of_their_rows_out_once() {
    let texts = texts(1000);
    let data = dataset(texts.iter().enumerate().map(|(row, text)| (text.as_str(), Some(["a", "b"][row % 2]), None)));
    for stratify in [false, true] {
        let split = SplitSpec { stratify, ..spec() };
        let parts = data.split(&split).unwrap();
        let folds = data.folds(&split, &parts.train, 5).unwrap();
        let mut seen = HashSet::new();
        for fold in &folds {
            assert_eq!(fold.train.len() + fold.held_out.len(), parts.train.len());
            assert!(fold.held_out.is_sorted() && fold.train.is_sorted());
            assert!(fold.held_out.iter().all(|row| seen.insert(*row)), "a row is held out twice");
            assert!(fold.held_out.iter().all(|row| !fold.train.contains(row) && parts.train.contains(row)));
            let shares = if stratify { 159..=161 } else { 120..=210 };
            assert!(shares.contains(&fold.held_out.len()), "{}", fold.held_out.len());
        }
        assert_eq!(seen.len(), parts.train.len());
    }
    let parts = data.split(&spec()).unwrap();
    assert!(data.folds(&spec(), &parts.train, 1).unwrap_err().to_string().contains("two folds or more, not 1"));
    assert!(data.folds(&spec(), &[0, 1], 7).unwrap_err().to_string().contains("of 7: give more rows, or fewer folds"));
}

#[test]
fn held_out_rows_have_labels_of_their_own_where_there_are_any() {
    let texts = texts(1000);
    let mut data = dataset(texts.iter().map(|text| (text.as_str(), Some("a"), None)));
    let whole = data.split(&spec()).unwrap();
    data.annotated = (0..1000).map(|row| row % 3 == 0).collect();
    let parts = data.split(&spec()).unwrap();
    assert_eq!(parts.train, whole.train);
    for (part, whole) in [(parts.validation, whole.validation.clone()), (parts.test, whole.test.clone())] {
        assert_eq!(part, whole.into_iter().filter(|row| row % 3 != 0).collect::<Vec<_>>());
    }
    // Where there are none, a model's word is better than nothing.
    data.annotated = vec![true; 1000];
    assert_eq!(data.split(&spec()).unwrap(), whole);
}

#[test]
fn an_empty_part_is_named() {
    let error = dataset([("a", None, None)]).split(&spec()).unwrap_err().to_string();
    assert!(error.starts_with("none of the 1 rows falls into the "), "{error}");
}

proptest! {
    /// Exact within each label, and every unit whole, whatever the texts and labels are.
    #[test]
    fn stratified_counts_are_exact(labels in proptest::collection::vec(0..4_usize, 1..200), seed in 0..100_i64) {
        let texts = texts(labels.len());
        let names = ["a", "b", "c", "d"];
        let data = dataset(std::iter::zip(&texts, &labels).map(|(text, &label)| (text.as_str(), Some(names[label]), None)));
        let split = SplitSpec { seed, stratify: true, test_percent: 20, ..spec() };
        let units = Units::new(&data.rows, None);
        let parts = data.stratified(&split, &units, &Places::new(&data, &units));
        for label in 0..4 {
            let of = |part| std::iter::zip(&labels, &parts).filter(|&(&l, &p)| l == label && p == part).count();
            let all = labels.iter().filter(|&&l| l == label).count();
            prop_assert_eq!(of(Part::Test), (all * 20 + 50) / 100);
            prop_assert_eq!(of(Part::Test) + of(Part::Validation), (all * 30 + 50) / 100);
        }
    }
}

/// Rows of text and group in three sources: without a part, validation, test.
fn with_held_out(sources: [&[(&str, Option<&str>)]; 3]) -> Dataset {
    let mut built = Rows::default();
    for (source, rows) in sources.into_iter().enumerate() {
        built.begin(source, Origin::File { uri: format!("{source}") });
        for (number, &(text, group)) in (1..).zip(rows) {
            built.push(number, Fields { text, group, ..Fields::default() });
        }
    }
    Dataset {
        sources: ["train", "validation", "test"].map(Into::into).into(),
        held_out: vec![None, Some(HeldOutPart::Validation), Some(HeldOutPart::Test)],
        rows: built,
        ..Dataset::default()
    }
}

#[test]
fn a_source_with_a_part_is_that_part() {
    let texts = texts(200);
    let open: Vec<_> = texts.iter().map(|text| (text.as_str(), None)).collect();
    let mut data = with_held_out([&open, &[("v", None)], &[("t", None)]]);
    for stratify in [false, true] {
        let parts = data.split(&SplitSpec { stratify, ..spec() }).unwrap();
        assert_eq!((parts.validation, parts.test), (vec![200], vec![201]));
        assert_eq!(parts.train, (0..200).collect::<Vec<_>>());
        assert_eq!(parts.overlap, Some(Overlap::default()));
    }
    // A part that no source is keeps the rows that the split gives it; the others are trained on.
    let by_share = dataset(open.iter().map(|&(text, group)| (text, None, group))).split(&spec()).unwrap();
    assert_eq!(by_share.overlap, None);
    data.held_out[1] = None;
    let parts = data.split(&spec()).unwrap();
    let split_alone = |parts: &Parts| parts.validation.iter().copied().filter(|&row| row < 200).collect::<Vec<_>>();
    assert_eq!(split_alone(&parts), by_share.validation);
    assert_eq!(parts.test, [201]);
    assert!(by_share.test.iter().all(|row| parts.train.contains(row)));
}

#[test]
fn rows_that_a_held_out_source_has_too_are_left_out() {
    let data = with_held_out([
        &[("a", None), ("b", None), ("c", Some("g")), ("d", Some("h")), ("e", None)],
        &[("b", None), ("t", None), ("v", Some("h"))],
        &[("t", None), ("a", None), ("c", None)],
    ]);
    let parts = data.split(&spec()).unwrap();
    assert_eq!((parts.train, parts.validation, parts.test), (vec![4], vec![5, 7], vec![8, 9, 10]));
    let overlap = parts.overlap.unwrap();
    assert_eq!(overlap.rows, 5);
    assert_eq!(overlap.examples[0], "1 row 2, also held out as 2 row 1", "a test text is not a validation text");
    assert!(overlap.examples.contains(&"0 row 4, also held out as 1 row 3".into()), "a group is held out whole");
    // Near duplicates, by cluster: the training row left has one among the test rows.
    let clusters = Some(vec![0, 1, 2, 3, 9, 1, 8, 7, 8, 0, 9]);
    let error = Dataset { clusters, ..data }.split(&spec()).unwrap_err().to_string();
    let expected = "none of the 11 rows falls into the training part (6 were left out: a source with a part has the \
                    same texts)";
    assert!(error.starts_with(expected), "{error}");
}
