//! Cleaning of single texts: what stays, what is said about it, and what is never said.

use proptest::prelude::*;

use super::*;

fn everything() -> CleanSpec {
    CleanSpec {
        remove_control_characters: true,
        normalize_unicode: true,
        collapse_whitespace: true,
        redact: vec![Redaction::Email, Redaction::Phone, Redaction::Secret],
        minimum_length: Some(3),
        maximum_length: Some(60),
        ..CleanSpec::default()
    }
}

fn place() -> String {
    "f row 1".into()
}

#[test]
fn texts_pass_untouched_by_default() {
    let mut cleaner = Cleaner::new(&CleanSpec::default()).unwrap();
    for text in [" a\0b  c@d.com ", "é", "e\u{301}"] {
        assert!(matches!(cleaner.clean(text, place), Cleaned::Kept(Cow::Borrowed(kept)) if kept == text));
    }
    let report = cleaner.into_report();
    assert_eq!((report.rows, report.kept, report.steps.len()), (3, 3, 0));
}

#[test]
fn steps_run_in_order_and_say_what_they_did() {
    let mut cleaner = Cleaner::new(&everything()).unwrap();
    // Without the control character e and accent become one; without the break the spaces do.
    let cleaned = cleaner.clean(" caf\0e\u{8}\u{301} \n  to a@b.com ", place);
    assert_eq!(cleaned, Cleaned::Kept("café to [EMAIL]".into()));
    assert_eq!(cleaner.clean("  x \0", place), Cleaned::Removed(Removal::TooShort { length: 1, minimum: 3 }));
    let long = "y".repeat(61);
    assert_eq!(cleaner.clean(&long, place), Cleaned::Removed(Removal::TooLong { length: 61, maximum: 60 }));
    let report = cleaner.report();
    let counts: Vec<_> = report.steps.iter().map(|step| (step.step, step.changed, step.removed)).collect();
    assert_eq!(
        counts,
        [
            (Step::RemoveControlCharacters, 2, 0),
            (Step::NormalizeUnicode, 1, 0),
            (Step::CollapseWhitespace, 2, 0),
            (Step::RedactEmail, 1, 0),
            (Step::MinimumLength, 0, 1),
            (Step::MaximumLength, 0, 1),
        ]
    );
    let removed = &report.step(Step::MinimumLength).unwrap().examples[0];
    assert_eq!(removed.reason.as_deref(), Some("1 characters are fewer than minimumLength, 3"));
    assert_eq!((removed.place.as_str(), removed.before.as_deref()), ("f row 1", Some("x")));
    let json = serde_json::to_value(report).unwrap();
    assert_eq!(json["steps"][0]["step"], "removeControlCharacters");
    assert_eq!((&json["rows"], &json["kept"]), (&3.into(), &1.into()));
}

#[test]
fn a_text_that_cleaning_leaves_empty_goes() {
    let spec = CleanSpec { collapse_whitespace: true, ..CleanSpec::default() };
    assert!(matches!(
        Cleaner::new(&spec).unwrap().clean(" \n", place),
        Cleaned::Removed(Removal::TooShort { length: 0, minimum: 1 })
    ));
}

#[test]
fn examples_show_ten_rows_and_where_they_change() {
    let spec = CleanSpec { collapse_whitespace: true, ..CleanSpec::default() };
    let mut cleaner = Cleaner::new(&spec).unwrap();
    let text = format!("{} two  spaces {}", "a".repeat(300), "b".repeat(300));
    for row in 0..25 {
        cleaner.clean(&text, || format!("row {row}"));
    }
    let step = cleaner.report().step(Step::CollapseWhitespace).unwrap();
    assert_eq!((step.changed, step.examples.len()), (25, EXAMPLES));
    assert_eq!(step.examples[9].place, "row 9");
    assert!(step.examples[0].before.as_deref().unwrap().contains("two  spaces"));
    assert!(step.examples[0].after.as_deref().unwrap().contains("two spaces"));
}

#[test]
fn no_example_shows_what_was_redacted() {
    let mut spec = everything();
    spec.minimum_length = Some(40);
    let mut cleaner = Cleaner::new(&spec).unwrap();
    let secret = format!("AKIA{}", "0123456789ABCDEF");
    for text in [
        format!("key  {secret} and jane.doe@example.com"),
        // Only whole after the control character is gone.
        format!("x {}\0{} y", &secret[..8], &secret[8..]),
        format!("{}  {secret}", "z".repeat(50)),
    ] {
        cleaner.clean(&text, place);
    }
    let report = serde_json::to_string(cleaner.report()).unwrap();
    assert!(report.contains("[SECRET]") && report.contains("[EMAIL]") && report.contains("redactSecret"));
    for leak in ["AKIA", "6789", "jane", "example.com"] {
        assert!(!report.contains(leak), "{leak} in {report}");
    }
}

fn mixture() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        ".{0,8}",
        "[\\x00-\\x20\\x7f-\\xa0]{0,3}",
        "[e\u{301}\u{308}\u{1100}\u{1161}\u{11a8}\u{200d}\u{2000}\u{3000}ﬁ]{0,4}",
        r"a@b\.co|\+49 30 123456|0171 1234567|555-234-5678|password: abc12345|sk-[a-z0-9]{20}|eyJ[a-z]{9}\.[a-z]{9}\.x",
        Just("-----BEGIN PRIVATE KEY-----".to_owned()),
    ];
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn cleaning_a_cleaned_text_changes_nothing(text in mixture(), flags in any::<[bool; 5]>()) {
        let mut spec = everything();
        spec.remove_control_characters = flags[0];
        spec.normalize_unicode = flags[1];
        spec.collapse_whitespace = flags[2];
        if flags[3] {
            spec.redact.clear();
        }
        if flags[4] {
            spec.maximum_length = None;
        }
        if let Cleaned::Kept(once) = Cleaner::new(&spec).unwrap().clean(&text, place) {
            let once = once.into_owned();
            let mut again = Cleaner::new(&spec).unwrap();
            prop_assert!(matches!(again.clean(&once, place), Cleaned::Kept(Cow::Borrowed(_))), "{once:?}");
            prop_assert!(again.report().steps.is_empty());
        }
    }
}
