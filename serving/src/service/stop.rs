//! Stop strings in a text that comes in pieces. What is released does not depend on how the text is cut.

/// Looks for stop strings.
#[derive(Clone, Debug)]
pub struct StopStrings {
    strings: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// What is decided after a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// Text that belongs to the answer.
    pub text: String,
    /// Whether a stop string follows, which is not part of the answer.
    pub stops: bool,
}

impl StopStrings {
    /// Empty strings are left out.
    pub fn new(mut strings: Vec<String>) -> Self {
        strings.retain(|string| !string.is_empty());
        Self { strings, held: String::new() }
    }

    /// Adds a piece of text. The stop string that ends first counts; of those that end together, the longest.
    pub fn push(&mut self, piece: &str) -> Decided {
        if self.strings.is_empty() {
            return Decided { text: piece.to_owned(), stops: false };
        }
        self.held.push_str(piece);
        let places = self.strings.iter().filter_map(|stop| {
            let begin = self.held.find(stop.as_str())?;
            Some((begin + stop.len(), begin))
        });
        if let Some((_, begin)) = places.min() {
            self.held.truncate(begin);
            return Decided { text: std::mem::take(&mut self.held), stops: true };
        }
        let kept = self.strings.iter().map(|stop| self.beginning(stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        Decided { text: std::mem::replace(&mut self.held, rest), stops: false }
    }

    /// The text that was held back, when no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that are the beginning of `stop`.
    fn beginning(&self, stop: &str) -> usize {
        let longest = self.held.len().min(stop.len() - 1);
        let fits = |&bytes: &usize| stop.is_char_boundary(bytes) && self.held.ends_with(&stop[..bytes]);
        (1..=longest).rev().find(fits).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut strings = StopStrings::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut released = Vec::new();
        for piece in pieces {
            let decided = strings.push(piece);
            released.push(decided.text);
            if decided.stops {
                return (released, true);
            }
        }
        released.push(strings.finish());
        (released, false)
    }

    /// Stop strings, pieces of text, what is released after each, and whether the text stops.
    type Case<'t> = (&'t [&'t str], &'t [&'t str], &'t [&'t str], bool);

    #[test]
    fn text_is_held_until_it_is_no_stop_string() {
        let cases: [Case; 7] = [
            (&[], &["a", "b"], &["a", "b", ""], false),
            (&["END"], &["go E", "N", "D more"], &["go ", "", ""], true),
            (&["END"], &["go E", "N", "S"], &["go ", "", "ENS", ""], false),
            (&["END"], &["go E", "N"], &["go ", "", "EN"], false),
            (&["aab"], &["aa", "a", "b"], &["", "a", ""], true),
            (&["é!"], &["caf", "é", "?"], &["caf", "", "é?", ""], false),
            (&["", "x"], &["axb"], &["a"], true),
        ];
        for (stops, pieces, released, stopped) in cases {
            assert_eq!(run(stops, pieces), (released.iter().map(|&text| text.to_owned()).collect(), stopped));
        }
    }

    #[test]
    fn of_stop_strings_that_end_together_the_longest_counts() {
        assert_eq!(run(&["c", "abc"], &["xabc"]).0, ["x"]);
        assert_eq!(run(&["bcd", "c"], &["abcd"]).0, ["ab"], "it ends first");
    }

    proptest! {
        #[test]
        fn the_answer_does_not_depend_on_the_pieces(
            text in "[abé]{0,12}",
            stops in proptest::collection::vec("[abé]{1,3}", 0..3),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let whole = run(&stops, &[&text]);
            let single: Vec<String> = text.chars().map(String::from).collect();
            let single: Vec<&str> = single.iter().map(String::as_str).collect();
            let pieces = run(&stops, &single);
            prop_assert_eq!(whole.0.concat(), pieces.0.concat());
            prop_assert_eq!(whole.1, pieces.1);
        }
    }
}
