//! Rows together: which stay, and what is said of those that do not.

use athanor_contract::train::NearDuplicates;

use super::*;

/// Source, text, label.
type Row = (usize, String, Option<&'static str>);

impl Corpus for Vec<Row> {
    fn len(&self) -> usize {
        self.as_slice().len()
    }

    fn text(&self, row: usize) -> &str {
        &self[row].1
    }

    fn pair(&self, _: usize) -> Option<&str> {
        None
    }

    fn label(&self, row: usize) -> Option<&str> {
        self[row].2
    }

    fn source(&self, row: usize) -> usize {
        self[row].0
    }

    fn place(&self, row: usize) -> String {
        format!("row {row}")
    }
}

fn rows(rows: &[(usize, &str, &'static str)]) -> Vec<Row> {
    rows.iter().map(|&(source, text, label)| (source, text.to_owned(), (!label.is_empty()).then_some(label))).collect()
}

/// Indices of the rows that stay, and the report.
fn kept(corpus: &impl Corpus, spec: &CleanSpec, newest: bool) -> (Vec<usize>, CleaningReport) {
    let mut report = CleaningReport::default();
    let resolved =
        resolve(corpus, spec, |_| Standing { newest_wins: newest, part: None }, &mut report, &|_| {}).unwrap();
    let kept: Vec<usize> = (0..resolved.keep.len()).filter(|&row| resolved.keep[row]).collect();
    assert_eq!(report.kept, kept.len() as u64);
    (kept, report)
}

#[test]
fn a_text_stays_once_in_a_source() {
    let corpus = rows(&[(0, "a", "x"), (0, "b", "x"), (0, "a", "x"), (1, "a", "x"), (0, "a", "x")]);
    let (stay, report) = kept(&corpus, &CleanSpec::default(), false);
    assert_eq!(stay, [0, 1, 3]);
    let step = report.step(Step::ExactDuplicates).unwrap();
    assert_eq!((step.removed, step.examples[0].place.as_str()), (2, "row 2"));
    assert_eq!(step.examples[0].reason.as_deref(), Some("the same text is at row 0"));
    assert_eq!(kept(&corpus, &CleanSpec::default(), true).0, [1, 3, 4], "a topic's newest row stays");
    let keep = CleanSpec { exact_duplicates: ExactDuplicates::Keep, ..CleanSpec::default() };
    assert_eq!(kept(&corpus, &keep, false).0.len(), 5);
}

#[test]
fn a_labelled_row_is_preferred() {
    let corpus = rows(&[(0, "a", ""), (0, "a", "x"), (0, "a", ""), (0, "b", ""), (0, "b", "")]);
    for newest in [false, true] {
        let (stay, report) = kept(&corpus, &CleanSpec::default(), newest);
        assert_eq!(stay, [1, if newest { 4 } else { 3 }]);
        assert!(report.step(Step::ConflictingLabels).is_none());
    }
}

#[test]
fn conflicts_are_kept_dropped_or_refused() {
    let corpus = rows(&[(0, "a", "x"), (0, "b", "x"), (1, "a", "y"), (0, "a", ""), (0, "c", "x"), (0, "c", "x")]);
    let spec = |conflicting_labels| CleanSpec { conflicting_labels, ..CleanSpec::default() };
    let (stay, report) = kept(&corpus, &spec(ConflictingLabels::Keep), false);
    assert_eq!(stay, [0, 1, 2, 4]);
    let step = report.step(Step::ConflictingLabels).unwrap();
    assert_eq!((step.found, step.removed, step.examples.len()), (3, 0, 1));
    let (stay, report) = kept(&corpus, &spec(ConflictingLabels::Drop), false);
    assert_eq!(stay, [1, 4]);
    assert_eq!(report.step(Step::ConflictingLabels).unwrap().removed, 3);
    let error = resolve(
        &corpus,
        &spec(ConflictingLabels::Fail),
        |_| Standing::default(),
        &mut CleaningReport::default(),
        &|_| {},
    )
    .unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, DataError::User(_)));
    assert!(message.contains("row 0: \"a\" has label \"x\", and \"y\" at row 2"), "{message}");
    let calm = rows(&[(0, "a", "x"), (1, "a", "x")]);
    assert_eq!(kept(&calm, &spec(ConflictingLabels::Fail), false).0, [0, 1]);
}

#[test]
fn near_duplicates_are_grouped_or_dropped() {
    let text = "the quick brown fox jumps over the lazy dog near the river bank on a sunny day";
    let corpus: Vec<Row> = [text.into(), "nothing alike".into(), format!("{text}s"), text.into(), "b".into()]
        .map(|text| (0, text, Some("x")))
        .into();
    let mut spec = CleanSpec { near_duplicates: Some(NearDuplicates::default()), ..CleanSpec::default() };
    let mut report = CleaningReport::default();
    let resolved = resolve(&corpus, &spec, |_| Standing::default(), &mut report, &|_| {}).unwrap();
    assert_eq!(resolved.keep, [true, true, true, false, true]);
    let clusters = resolved.clusters.unwrap();
    assert_eq!((0..5).map(|row| clusters.id(row)).collect::<Vec<_>>(), [0, 1, 0, 3, 4]);
    assert_eq!(report.step(Step::NearDuplicates).unwrap().found, 1);
    spec.near_duplicates = Some(NearDuplicates { action: NearDuplicateAction::Drop, ..NearDuplicates::default() });
    let (stay, report) = kept(&corpus, &spec, false);
    assert_eq!(stay, [0, 1, 4]);
    let step = report.step(Step::NearDuplicates).unwrap();
    assert_eq!(step.removed, 1);
    assert!(step.examples[0].reason.as_deref().unwrap().starts_with("in one cluster with row 0: the quick"));
}

#[test]
fn many_rows_are_resolved_as_a_map_would() {
    let corpus: Vec<Row> = (0..5000_usize).map(|row| (row % 3, format!("{}", row * 7919 % 1000), Some("x"))).collect();
    let mut seen = std::collections::HashSet::new();
    let expected: Vec<usize> = (0..5000).filter(|&row| seen.insert((corpus[row].0, corpus[row].1.clone()))).collect();
    assert_eq!(kept(&corpus, &CleanSpec::default(), false).0, expected);
}

/// Source 0 is trained on, 1 is validation and 2 is test.
fn part_of_source(source: usize) -> Standing {
    let part = [None, Some(HeldOutPart::Validation), Some(HeldOutPart::Test)][source];
    Standing { newest_wins: false, part }
}

#[test]
fn held_out_rows_stay_where_training_rows_have_near_duplicates_or_other_labels() {
    let text = "the quick brown fox jumps over the lazy dog near the river bank on a sunny day";
    let corpus: Vec<Row> = vec![
        (0, text.into(), Some("x")),
        (1, format!("{text}s"), Some("x")),
        (2, format!("{text}!"), Some("x")),
        (2, format!("{text}?"), Some("x")),
        (0, "twice".into(), Some("x")),
        (2, "twice".into(), Some("y")),
        (0, "at odds".into(), Some("x")),
        (0, "at odds".into(), Some("y")),
    ];
    let near = NearDuplicates { action: NearDuplicateAction::Drop, ..NearDuplicates::default() };
    let spec =
        CleanSpec { near_duplicates: Some(near), conflicting_labels: ConflictingLabels::Drop, ..CleanSpec::default() };
    let mut report = CleaningReport::default();
    let resolved = resolve(&corpus, &spec, part_of_source, &mut report, &|_| {}).unwrap();
    // Of the first four the first of the test rows stays. The row "twice" of the test part has no conflict there.
    assert!(resolved.keep[2] && !resolved.keep[0] && !resolved.keep[1] && !resolved.keep[3], "{:?}", resolved.keep);
    assert_eq!(resolved.keep[6..], [false, false]);
    assert_eq!(report.step(Step::ConflictingLabels).unwrap().removed, 2);
    let near = report.step(Step::NearDuplicates).unwrap();
    assert!(near.examples[0].reason.as_deref().unwrap().starts_with("in one cluster with row 2"), "{near:?}");
}
