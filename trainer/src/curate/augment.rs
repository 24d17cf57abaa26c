//! New texts from the training rows, for the teacher to answer: the data augmentation of TinyBERT (Jiao et al. 2020,
//! <https://arxiv.org/abs/1909.10351>), with the teacher's own word embeddings in the place of GloVe's and of a masked
//! language model's guesses, so that it needs nothing but the teacher; and halves of two rows as one text, whose parts
//! may disagree.

use std::collections::HashMap;

use athanor_contract::train::AugmentSpec;
use athanor_torch::ProcessGroup;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::{TrainError, data::batches::mix};

/// Words that may take a word's place: those whose vectors are nearest by cosine.
const NEIGHBOURS: i64 = 15;
/// Words whose cosines to all others are in memory at once.
const CHUNK: usize = 1024;

/// New texts of each training row that the report shows.
const SHOWN: usize = 8;

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AugmentReport {
    /// New texts.
    pub rows: usize,
    /// Training rows that they were made from.
    pub of: usize,
    /// Different words of the training rows that could give way to another.
    pub words: usize,
    pub examples: Vec<String>,
    /// Every how many-th of the texts is an example.
    #[serde(skip)]
    step: usize,
}

impl AugmentReport {
    /// A report without texts, which [`Self::add`] adds; there will be `texts` of them.
    pub fn new(of: usize, near: &Neighbours, texts: usize) -> Self {
        // From all over the rows: the copies of one row are much alike.
        Self { rows: 0, of, words: near.of.len(), examples: Vec::new(), step: (texts / SHOWN).max(1) }
    }

    /// Adds the next texts.
    pub fn add(&mut self, texts: &[String]) {
        let first = self.rows.next_multiple_of(self.step) - self.rows;
        let room = SHOWN - self.examples.len();
        self.examples.extend(texts.iter().skip(first).step_by(self.step).take(room).cloned());
        self.rows += texts.len();
    }
}

/// The nearest neighbours of words of the teacher's vocabulary.
pub struct Neighbours {
    of: HashMap<String, Vec<u32>>,
    words: Vec<String>,
}

impl Neighbours {
    /// The neighbours of the words that occur in `texts`. `words` are the vocabulary's with their rows in `embeddings` [V, C]. Rank 0
    /// decides for all, since cosines may differ in their last bit from machine to machine.
    pub fn find<'t>(
        texts: impl Iterator<Item = &'t str>,
        words: Vec<(String, u32)>,
        embeddings: &Tensor,
        group: Option<&ProcessGroup>,
    ) -> Result<Self, TrainError> {
        let (words, ids): (Vec<String>, Vec<i64>) = words.into_iter().map(|(word, id)| (word, i64::from(id))).unzip();
        let mut used = vec![false; words.len()];
        {
            let index: HashMap<&str, usize> = words.iter().map(String::as_str).zip(0..).collect();
            for text in texts {
                for piece in pieces(text).filter(|piece| is_word(piece)) {
                    if let Some(&word) = index.get(piece.to_lowercase().as_str()) {
                        used[word] = true;
                    }
                }
            }
        }
        let asked: Vec<i64> = (0..words.len()).filter(|&word| used[word]).map(|word| word as i64).collect();
        let count = NEIGHBOURS.min(words.len() as i64 - 1);
        let mut of = HashMap::new();
        if count > 0 {
            let device = embeddings.device();
            let vectors = embeddings.index_select(0, &Tensor::from_slice(&ids).to_device(device)).to_kind(Kind::Float);
            // Without what all words have in common, which is mostly how rare they are.
            let vectors = &vectors - vectors.mean_dim([0_i64].as_slice(), true, Kind::Float);
            let norms = vectors.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt();
            let vectors = vectors / norms.clamp_min(1e-12);
            for some in asked.chunks(CHUNK) {
                let rows = Tensor::from_slice(some).to_device(device);
                let cosines = vectors.index_select(0, &rows).matmul(&vectors.tr());
                // A word is no neighbour of itself.
                let _ = cosines.shallow_clone().scatter_value_(1, &rows.unsqueeze(1), -2.0);
                let (_, nearest) = cosines.topk(count, 1, true, true);
                if let Some(group) = group {
                    group.broadcast(&nearest, 0)?;
                }
                let nearest = Vec::<Vec<i64>>::try_from(nearest.to_device(Device::Cpu))?;
                for (word, nearest) in some.iter().zip(nearest) {
                    of.insert(words[*word as usize].clone(), nearest.into_iter().map(|word| word as u32).collect());
                }
            }
        }
        Ok(Self { of, words })
    }

    /// A word that may stand for this one, if it has any.
    fn instead_of(&self, word: &str, random: &mut StdRng) -> Option<&str> {
        let nearest = self.of.get(&word.to_lowercase())?;
        Some(&self.words[nearest[random.random_range(0..nearest.len())] as usize])
    }
}

/// `copies` new texts of each row, row by row.
pub fn texts<'t>(spec: &AugmentSpec, rows: &'t [&'t str], near: &'t Neighbours) -> impl Iterator<Item = String> + 't {
    let (copies, seed) = (u64::from(spec.copies), mix(spec.seed as u64, 0x61_7567_6d65_6e74));
    let share = f64::from(spec.replaced_percent) / 100.0;
    (0..rows.len()).flat_map(move |row| {
        (0..copies).map(move |copy| {
            let mut random = StdRng::seed_from_u64(mix(mix(seed, row as u64), copy));
            let other = rows[random.random_range(0..rows.len())];
            let base =
                if random.random_bool(0.5) { joined(rows[row], other, &mut random) } else { rows[row].to_owned() };
            let mut text = String::with_capacity(base.len() + 16);
            for piece in pieces(&base) {
                let is_replaced = is_word(piece) && random.random_bool(share);
                text.push_str(is_replaced.then(|| near.instead_of(piece, &mut random)).flatten().unwrap_or(piece));
            }
            text
        })
    })
}

/// The beginning of one text before the end of another.
fn joined(first: &str, second: &str, random: &mut StdRng) -> String {
    let (first, second): (Vec<&str>, Vec<&str>) =
        (first.split_whitespace().collect(), second.split_whitespace().collect());
    let begin = random.random_range(0..=first.len());
    let end = random.random_range(0..=second.len());
    let words: Vec<&str> = first[..begin].iter().chain(&second[end..]).copied().collect();
    if words.is_empty() { first.join(" ") } else { words.join(" ") }
}

/// A text's words and what is between them; all of them together are the text.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        let end = rest.find(|next| belongs(next) != belongs(first)).unwrap_or(rest.len());
        let (piece, others) = rest.split_at(end);
        rest = others;
        Some(piece)
    })
}

/// Whether a character is a part of words; parts of "don't" are no words.
fn belongs(character: char) -> bool {
    character.is_alphanumeric() || matches!(character, '\'' | '’')
}

fn is_word(piece: &str) -> bool {
    piece.chars().all(char::is_alphabetic)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn spec(copies: u8, replaced_percent: u8) -> AugmentSpec {
        AugmentSpec { copies, replaced_percent, seed: 3 }
    }

    /// Twenty words of two kinds each, whose vectors are near those of their kind.
    fn neighbours(text: &str) -> Neighbours {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tch::manual_seed(2);
        let letter = |number: u8| char::from(b'a' + number);
        let words = (0..40_u8)
            .map(|word| (format!("{}{}", ["good", "bad"][usize::from(word % 2)], letter(word / 2)), word.into()));
        let kinds = Tensor::arange(40, (Kind::Float, Device::Cpu)).remainder(2.0) * 2.0 - 1.0;
        let noise = Tensor::randn([40, 8], (Kind::Float, Device::Cpu)) * 0.1;
        Neighbours::find([text].into_iter(), words.collect(), &(noise + kinds.unsqueeze(1)), None).unwrap()
    }

    #[test]
    fn words_give_way_to_words_of_their_kind() {
        let text = "Gooda, badb don't gooda unknown 7!";
        let near = neighbours(text);
        assert_eq!(near.of.len(), 2);
        let new: BTreeSet<String> = texts(&spec(50, 100), &[text], &near).collect();
        assert!(new.len() > 20, "{new:?}");
        let whole: Vec<&String> =
            new.iter().filter(|text| text.ends_with("unknown 7!") && text.contains(", bad")).collect();
        assert!(!whole.is_empty());
        for text in &new {
            let words: Vec<&str> =
                pieces(text).filter(|piece| piece.starts_with("good") || piece.starts_with("bad")).collect();
            assert!(words.iter().all(|word| !["Gooda", "gooda", "badb"].contains(word)), "{text}");
        }
    }

    #[test]
    fn texts_are_rows_or_halves_of_two() {
        let rows = ["one two three", "four five", "six"];
        let near = neighbours("");
        let new: Vec<String> = texts(&spec(30, 50), &rows, &near).collect();
        assert_eq!(new.len(), 90);
        assert_eq!(new, texts(&spec(30, 50), &rows, &near).collect::<Vec<_>>(), "the same seed draws the same");
        assert!(new[..30].iter().any(|text| text == rows[0]) && new[30..60].iter().any(|text| text == rows[1]));
        assert!(new[..30].iter().any(|text| text == "one four five"), "{new:?}");
        assert!(new.iter().all(|text| !text.is_empty()));
    }

    #[test]
    fn examples_are_from_all_over_the_texts_however_they_come() {
        let near = Neighbours { of: HashMap::new(), words: Vec::new() };
        for count in [0, 3, 8, 50] {
            let all: Vec<String> = (0..count).map(|number| number.to_string()).collect();
            let step = (count / SHOWN).max(1);
            let expected: Vec<String> = all.iter().step_by(step).take(SHOWN).cloned().collect();
            for size in [1, 7, 100] {
                let mut report = AugmentReport::new(1, &near, count);
                all.chunks(size).for_each(|some| report.add(some));
                assert_eq!((report.rows, &report.examples), (count, &expected), "{count} in pieces of {size}");
            }
        }
    }

    #[test]
    fn pieces_are_the_text() {
        let text = "It isn't  bad: 7up, naïve!";
        let found: Vec<&str> = pieces(text).collect();
        assert_eq!(found.concat(), text);
        let words: Vec<&str> = found.into_iter().filter(|piece| is_word(piece)).collect();
        assert_eq!(words, ["It", "bad", "naïve"]);
    }
}
