//! What is found and what is left alone. Secrets are put together here so that no scanner takes this file for a leak.

use proptest::prelude::*;

use super::*;

fn all() -> Redactor {
    Redactor::new(&[Redaction::Email, Redaction::Phone, Redaction::Secret]).unwrap().unwrap()
}

#[test]
fn nothing_is_looked_for_unless_asked() {
    assert!(Redactor::new(&[]).unwrap().is_none());
    let phones = Redactor::new(&[Redaction::Phone]).unwrap().unwrap();
    assert_eq!(phones.shown("a@b.com +49 30 1234567"), "a@b.com [PHONE]");
}

#[test]
fn addresses_and_numbers_become_placeholders() {
    for (text, expected) in [
        ("write to jane.doe+news@mail.example.co.uk.", "write to [EMAIL]."),
        ("<jürgen@bücher.example>", "<[EMAIL]>"),
        ("mailto:a_b@x-y.org,c@d.io", "mailto:[EMAIL],[EMAIL]"),
        ("call +49 30 1234567 now", "call [PHONE] now"),
        ("(call +49 (0)30/123-4567)", "(call [PHONE])"),
        ("+14155552671", "[PHONE]"),
        ("+1 (555) 234-5678", "[PHONE]"),
        ("0033 1 23 45 67 89", "[PHONE]"),
        ("(555) 234-5678 or 555-234-5678 or 1-555.234.5678", "[PHONE] or [PHONE] or [PHONE]"),
        ("Tel. 030 1234567, 0171/1234567", "Tel. [PHONE], [PHONE]"),
        ("01 23 45 67 89", "[PHONE]"),
        ("(0171) 123 45 67", "[PHONE]"),
    ] {
        assert_eq!(all().shown(text), expected, "{text}");
    }
}

#[test]
fn secrets_become_placeholders() {
    let digits = "0123456789";
    let letters = "abcdefghijklmnopqrstuvwxyz";
    let long = format!("{letters}{digits}");
    for (text, expected) in [
        (format!("key AKIA{}ABCDEF.", digits), "key [SECRET].".to_owned()),
        (format!("ghp_{long}"), "[SECRET]".into()),
        (format!("sk-proj-{long} "), "[SECRET] ".into()),
        (format!("hf_{long}"), "[SECRET]".into()),
        (format!("xoxb-{digits}-{letters}"), "[SECRET]".into()),
        (format!("sk_live_{long}"), "[SECRET]".into()),
        (format!("AIza{}", &long[..35]), "[SECRET]".into()),
        (format!("token eyJ{letters}.eyJ{letters}.{long}!"), "token [SECRET]!".into()),
        (format!("Authorization: Bearer {long}"), "Authorization: Bearer [SECRET]".into()),
        ("postgres://admin:pa55word@db.example:5432/x".into(), "postgres://[SECRET]@db.example:5432/x".into()),
        ("password=hunter2hunter2".into(), "password=[SECRET]".into()),
        ("\"apiKey\": \"a1b2c3d4e5\"".into(), "\"apiKey\": \"[SECRET]\"".into()),
        (format!("aws_secret_access_key = {long}/+AA"), "aws_secret_access_key = [SECRET]".into()),
        (
            format!("x -----BEGIN RSA PRIVATE KEY-----\n{long}\n{long}==\n-----END RSA PRIVATE KEY----- y"),
            "x [SECRET] y".into(),
        ),
        (format!("-----BEGIN PRIVATE KEY----- {long} é cut off"), "[SECRET]".into()),
    ] {
        assert_eq!(all().shown(&text), expected, "{text}");
    }
}

#[test]
fn dates_amounts_and_identifiers_stay() {
    for text in [
        "2024-01-15 10:30:00",
        "05.11.2024 10:30",
        "05/11/2024 10 people",
        "version 1.2.3, 192.168.100.20:8080",
        "order 1234567890 of 3,000,000.00",
        "ISBN 978-3-16-148410-0",
        "550e8400-e29b-41d4-a716-446655440000",
        "he said @home and a@b",
        "the password is a secret; token: nothing",
        "sk-learn-is-a-library-for-python",
        "basic understanding-of-things",
        "see https://example.org/a:b@c",
        "+1 +2 = 3",
        "[EMAIL] [PHONE] [SECRET]",
    ] {
        assert_eq!(all().shown(text), text);
    }
}

#[test]
fn what_a_placeholder_sets_free_is_found_too() {
    let once = all().shown("x@y.com555-234-5678 a@b.com@c.com 555-234-5678@d.com");
    assert_eq!(all().shown(&once), once);
    assert!(!once.contains("555"), "{once}");
}

/// Text that looks like a secret from each of its starts, and never is one. Eight times the text takes about eight times as
/// long; where each start is followed to the end of the text it takes 64 times.
#[test]
fn time_is_linear_in_hostile_text() {
    let redactor = all();
    for part in ["sk-", "pwd=", "token:"] {
        // The fastest of some runs: other processes may interrupt one.
        let seconds = |bytes: usize, runs: usize| {
            let text = part.repeat(bytes / part.len());
            let run = |_| {
                let began = std::time::Instant::now();
                assert!(redactor.redact(&text).is_none(), "{part}");
                began.elapsed().as_secs_f64()
            };
            (0..runs).map(run).fold(f64::INFINITY, f64::min)
        };
        let (short, long) = (seconds(250_000, 8), seconds(2_000_000, 3));
        assert!(long < 24.0 * short, "{part}: {short:.4} s for 250 kB, {long:.4} s for 2 MB");
        let text = part.repeat(2_000_000 / part.len());
        let (redacted, _) = redactor.redact(&format!("{text} and password=abc12345")).unwrap();
        assert!(redacted.ends_with(" password=[SECRET]"), "{part}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn redacting_twice_is_redacting_once(
        text in r"([a-c]{0,3}|[0-9]{1,4}|@|\.|-| |\+|\(|\)|:|=|://|password|token|sk-|eyJ|bearer |b\.com|-----|\[EMAIL\]|é){0,24}",
    ) {
        let once = all().shown(&text);
        prop_assert_eq!(all().shown(&once), once);
    }
}
