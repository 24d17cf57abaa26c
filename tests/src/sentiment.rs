//! The demo's data: short texts of four domains with mean human ratings from -4 to 4, as binary sentiment.
//!
//! A text whose rating is nearer to zero than [`NEUTRAL`] has no clear sentiment and is left out, and so is one that occurs in home
//! and in away domains, which have other shares of parts. Apart from that the part of a text depends on the text alone, so no text
//! is in two parts, however often it occurs.

use std::{collections::HashSet, fmt::Write};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::paths;

/// Ratings between minus this and this are neutral.
pub const NEUTRAL: f64 = 0.5;
/// The domains the first model is trained on.
pub const HOME: [&str; 2] = ["amazon", "movies"];
/// The domains the traffic turns to.
pub const AWAY: [&str; 2] = ["tweets", "nyt"];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    pub domain: &'static str,
    pub text: String,
    pub label: &'static str,
}

/// What a text is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Only ever used to measure accuracy: never uploaded, never sent with feedback.
    Exam,
    /// Sent to the model as traffic.
    Traffic,
    /// Uploaded as training data.
    Training,
}

/// A text without what makes no other text of it: case, and white space around.
fn key(text: &str) -> String {
    text.trim().to_lowercase()
}

/// The part of a text. Home domains: 10 % exam, 10 % traffic, the rest training. Away domains: 25 % exam, the rest traffic.
pub fn part(domain: &str, text: &str) -> Part {
    let digest = Sha256::digest(key(text).as_bytes());
    let percent = u64::from_be_bytes(digest[..8].try_into().expect("eight bytes")) % 100;
    match (HOME.contains(&domain), percent) {
        (true, 0..10) => Part::Exam,
        (true, 10..20) => Part::Traffic,
        (true, _) => Part::Training,
        (false, 0..25) => Part::Exam,
        (false, _) => Part::Traffic,
    }
}

/// Every clear text of a domain.
pub fn load(domain: &'static str) -> Result<Vec<Text>> {
    let path = paths::data().join("sentiment").join(format!("{domain}.txt"));
    // The files are Latin-1 in places; a replaced character does no harm to a sentiment.
    let bytes = std::fs::read(&path).with_context(|| format!("{} (scripts/fetch data brings it)", path.display()))?;
    let mut texts = Vec::new();
    for (row, line) in String::from_utf8_lossy(&bytes).lines().enumerate() {
        let mut fields = line.splitn(3, '\t');
        let (Some(_), Some(rating), Some(text)) = (fields.next(), fields.next(), fields.next()) else {
            anyhow::bail!("{} row {}: three tab-separated fields expected", path.display(), row + 1);
        };
        let rating: f64 =
            rating.trim().parse().with_context(|| format!("{} row {}: rating", path.display(), row + 1))?;
        if rating.abs() >= NEUTRAL && !text.trim().is_empty() {
            let label = if rating > 0.0 { "positive" } else { "negative" };
            texts.push(Text { domain, text: text.trim().to_owned(), label });
        }
    }
    ensure!(!texts.is_empty(), "{} has no rows", path.display());
    Ok(texts)
}

/// The texts of one part of some domains, in a fixed shuffled order.
pub fn texts(domains: &[&'static str], wanted: Part) -> Result<Vec<Text>> {
    let mut all = Vec::new();
    for domain in HOME.into_iter().chain(AWAY) {
        all.extend(load(domain)?);
    }
    Ok(select(all, domains, wanted))
}

/// What [`texts`] makes of every text of all domains.
fn select(all: Vec<Text>, domains: &[&'static str], wanted: Part) -> Vec<Text> {
    let keys = |domains: [&str; 2]| -> HashSet<String> {
        all.iter().filter(|text| domains.contains(&text.domain)).map(|text| key(&text.text)).collect()
    };
    let (home, away) = (keys(HOME), keys(AWAY));
    let is_wanted = |text: &Text| {
        let key = key(&text.text);
        domains.contains(&text.domain)
            && part(text.domain, &text.text) == wanted
            && !(home.contains(&key) && away.contains(&key))
    };
    let mut found: Vec<Text> = all.into_iter().filter(is_wanted).collect();
    found.sort_by_cached_key(|text| Sha256::digest(format!("order {}", text.text)).to_vec());
    found.dedup_by(|a, b| a.text == b.text);
    found
}

/// `text,label` rows as CSV (RFC 4180).
pub fn csv(texts: &[Text]) -> String {
    let mut csv = String::from("text,label\n");
    for text in texts {
        let _ = writeln!(csv, "\"{}\",{}", text.text.replace('"', "\"\""), text.label);
    }
    csv
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_in_one_part_whatever_its_case_or_spaces() {
        assert_eq!(part("amazon", "Good. "), part("movies", " good."));
        let shares = |domain: &str| {
            let exam = (0..4000).filter(|n| part(domain, &format!("text {n}")) == Part::Exam).count();
            exam as f64 / 4000.0
        };
        assert!((shares("amazon") - 0.10).abs() < 0.02);
        assert!((shares("nyt") - 0.25).abs() < 0.03);
        assert!((0..4000).all(|n| part("nyt", &format!("text {n}")) != Part::Training));
    }

    #[test]
    fn no_text_is_in_two_parts_of_any_domains() {
        // A third of the texts occur in all domains, in another case in some; a third in both domains at home or away; the others
        // in one domain each.
        let mut all = Vec::new();
        for n in 0..1_500 {
            for (index, domain) in HOME.into_iter().chain(AWAY).enumerate() {
                let text = if index % 2 == 0 { format!("text {n}") } else { format!("Text {n}") };
                let place = if HOME.contains(&domain) { "home" } else { "away" };
                let text = match n % 3 {
                    0 => text,
                    1 => format!("{text} of {place}"),
                    _ => format!("{text} of {domain}"),
                };
                all.push(Text { domain, text, label: "positive" });
            }
        }
        let mut seen = HashSet::new();
        for part in [Part::Exam, Part::Traffic, Part::Training] {
            let found: HashSet<String> = [HOME, AWAY]
                .iter()
                .flat_map(|domains| select(all.clone(), domains, part))
                .map(|it| key(&it.text))
                .collect();
            assert!(found.len() > 100, "{part:?}");
            for text in found {
                assert!(seen.insert(text.clone()), "{text:?} is in two parts");
            }
        }
        // Nothing else is left out.
        assert_eq!(seen.len(), 500 * 2 + 500 * 4);
    }

    #[test]
    fn csv_quotes() {
        let row = Text { domain: "amazon", text: "so \"good\", really".into(), label: "positive" };
        assert_eq!(csv(&[row]), "text,label\n\"so \"\"good\"\", really\",positive\n");
    }
}
