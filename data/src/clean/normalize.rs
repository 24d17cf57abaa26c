//! Control characters, Unicode's composed form, whitespace. Each function returns `None` for a text that is in order already, so
//! that most texts are never copied; each changes nothing in its own result.

use unicode_normalization::{UnicodeNormalization, is_nfc};

/// Removes control characters (Unicode's category Cc) other than whitespace. Characters that join or direct others
/// (zero-width joiners, direction marks) stay: emoji and many scripts are made of them.
pub(super) fn without_control_characters(text: &str) -> Option<String> {
    let unwanted = |c: char| c.is_control() && !c.is_whitespace();
    text.contains(unwanted).then(|| text.chars().filter(|&c| !unwanted(c)).collect())
}

/// Converts to Normalization Form C (Unicode Standard Annex 15).
pub(super) fn composed(text: &str) -> Option<String> {
    (!text.is_ascii() && !is_nfc(text)).then(|| text.nfc().collect())
}

/// One space for every run of whitespace, none at the ends.
pub(super) fn collapsed_whitespace(text: &str) -> Option<String> {
    let mut after_space = true;
    let mut in_order = true;
    for c in text.chars() {
        let space = c.is_whitespace();
        in_order &= !space || (c == ' ' && !after_space);
        after_space = space;
    }
    if text.is_empty() || (in_order && !after_space) {
        return None;
    }
    let mut collapsed = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !collapsed.is_empty() {
            collapsed.push(' ');
        }
        collapsed.push_str(word);
    }
    Some(collapsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_in_order_are_left_alone_and_others_put_in_order() {
        type Step = fn(&str) -> Option<String>;
        let cases: [(Step, &str, Option<&str>); 13] = [
            (without_control_characters, "a\tb\r\nc", None),
            (without_control_characters, "a\0b\u{1b}[0m\u{7f}\u{9b}", Some("ab[0m")),
            (without_control_characters, "👩\u{200d}🔬", None),
            (composed, "plain", None),
            (composed, "café", None),
            (composed, "cafe\u{301}", Some("café")),
            (collapsed_whitespace, "", None),
            (collapsed_whitespace, "a b", None),
            (collapsed_whitespace, "a  b", Some("a b")),
            (collapsed_whitespace, " a", Some("a")),
            (collapsed_whitespace, "a\n", Some("a")),
            (collapsed_whitespace, "a\u{a0}\u{3000}b", Some("a b")),
            (collapsed_whitespace, " \n", Some("")),
        ];
        for (step, text, expected) in cases {
            assert_eq!(step(text).as_deref(), expected, "{text:?}");
        }
    }
}
