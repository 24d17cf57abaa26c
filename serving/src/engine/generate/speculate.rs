//! Speculation: tokens that may come next, proposed from the text so far and checked several at a time in one step.
//!
//! A proposal is what followed the latest earlier occurrence of the last tokens, in prompt and answer (prompt lookup
//! decoding, <https://github.com/apoorvumang/prompt-lookup-decoding>), or in an example of what an answer has to be, such as
//! the names of a schema's fields. Text that a grammar forces comes before both. The tokens of the answer are drawn as they
//! would be without it, so the text is the same. Only the time differs: a step with proposed tokens takes longer and may yield
//! several tokens.
//!
//! Whether that pays is decided from what was measured: how often the proposals of a sequence were right ([`Record`]),
//! also when no step computed them, and how long steps of each size took ([`Costs`]). No clock, no thread, no model.

use std::{iter, sync::Arc};

/// Largest number of tokens that are proposed for a sequence in a step.
pub const MOST: usize = 15;
/// Largest number of sequences in a step with proposed tokens. With more of them a row costs about as much as it gains.
pub const MOST_SEQUENCES: usize = 8;
/// Largest number of rows in a step with proposed tokens.
pub const MOST_ROWS: usize = 64;
/// Longer matches count as matches of this length.
const LONGEST: usize = 8;

/// Kinds of proposed tokens whose chances are counted apart: by the number of tokens that matched before them, and forced ones.
const CLASSES: usize = LONGEST + 1;
const FORCED: usize = LONGEST;

/// Tokens that may come next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proposal {
    /// First those that a grammar forces.
    pub tokens: Vec<u32>,
    /// Number of tokens that a grammar forces.
    pub forced: usize,
    /// Number of tokens before the others that also stand before the earlier occurrence, at most [`LONGEST`].
    pub matched: usize,
}

impl Proposal {
    /// The kind of the token at a place.
    fn class(&self, place: usize) -> usize {
        match place.checked_sub(self.forced) {
            Some(place) => (self.matched + place).clamp(1, LONGEST) - 1,
            None => FORCED,
        }
    }
}

/// The place behind the longest match of the last of `tokens` in `text`, of equally long ones the latest, and its length.
/// Something follows there.
fn find(text: &[u32], tokens: &[u32]) -> (usize, usize) {
    let (mut follows, mut matched) = (0, 0);
    for end in (1..text.len()).rev() {
        let pairs = iter::zip(text[..end].iter().rev(), tokens.iter().rev()).take(LONGEST);
        let common = pairs.take_while(|(earlier, last)| earlier == last).count();
        if common > matched {
            (follows, matched) = (end, common);
        }
        if matched == LONGEST {
            break;
        }
    }
    (follows, matched)
}

/// What followed the longest match of the last tokens, of equally long ones the latest, at most `most` tokens. `example` is
/// read as if it stood before the tokens. Where the tokens end, the proposal continues with itself, so that a repetition is
/// proposed as far as `most` allows.
pub fn propose(tokens: &[u32], example: &[u32], most: usize) -> Proposal {
    let (follows, matched) = find(tokens, tokens);
    let in_example = find(example, tokens);
    if in_example.1 > matched {
        let tokens = example[in_example.0..].iter().copied().take(most).collect();
        return Proposal { tokens, forced: 0, matched: in_example.1 };
    }
    let mut proposed: Vec<u32> = Vec::new();
    if matched > 0 {
        proposed.reserve_exact(most);
        for place in follows..follows + most {
            let own = place.checked_sub(tokens.len()).map(|place| proposed[place]);
            proposed.push(own.unwrap_or_else(|| tokens[place]));
        }
    }
    Proposal { tokens: proposed, forced: 0, matched }
}

/// How often proposed tokens were right, by their kinds. Older ones count less.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    right: [f64; CLASSES],
    checked: [f64; CLASSES],
}

impl Record {
    /// Share of right tokens before any was checked.
    const FIRST: [f64; CLASSES] = [0.15, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.9];
    /// Number of checked tokens that the estimate before them counts as.
    const WEIGHT: f64 = 2.0;

    /// Adds a token that was checked. `memory`: what earlier ones of its class count from now on, 0 to 1.
    fn add(&mut self, class: usize, is_right: bool, memory: f64) {
        self.right[class] = self.right[class] * memory + f64::from(u8::from(is_right));
        self.checked[class] = self.checked[class] * memory + 1.0;
    }

    fn share(&self, class: usize, before: f64) -> f64 {
        (self.right[class] + Self::WEIGHT * before) / (self.checked[class] + Self::WEIGHT)
    }

    /// Probability that a token is right whose predecessors are, `all`: the record of all sequences.
    fn chance(&self, class: usize, all: &Self) -> f64 {
        self.share(class, all.share(class, Self::FIRST[class]))
    }
}

/// What speculation has been for one sequence.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// A text that the answer may repeat parts of.
    example: Arc<[u32]>,
    record: Record,
    /// Tokens of the text that a grammar forces behind the last token.
    forced: Vec<u32>,
    proposal: Proposal,
    /// Steps by which the answer is ahead of itself without speculation: tokens gained less time lost.
    ahead: f64,
}

impl History {
    /// Memory of a sequence for its checked tokens.
    const MEMORY: f64 = 0.9;
    /// Memory of the engine.
    const MEMORY_OF_ALL: f64 = 0.995;

    /// `example`: a text that the answer may repeat parts of.
    pub fn new(example: Arc<[u32]>) -> Self {
        Self { example, ..Self::default() }
    }

    /// Takes the tokens of the text that a grammar forces behind the last token, for the next proposal.
    pub fn force(&mut self, tokens: Vec<u32>) {
        self.forced = tokens;
    }

    /// Proposes at most `most` next tokens, none of them a stop token: what follows one is not drawn.
    pub fn propose(&mut self, tokens: &[u32], most: usize, stop_tokens: &[u32], all: &Record) -> Candidate {
        let most = most.min(MOST);
        let mut forced = std::mem::take(&mut self.forced);
        forced.truncate(most);
        self.proposal = match forced.is_empty() {
            true => propose(tokens, &self.example, most),
            false => {
                let behind = propose(&[tokens, &forced].concat(), &self.example, most - forced.len());
                let count = forced.len();
                forced.extend(behind.tokens);
                Proposal { tokens: forced, forced: count, matched: behind.matched }
            }
        };
        if let Some(stop) = self.proposal.tokens.iter().position(|token| stop_tokens.contains(token)) {
            self.proposal.tokens.truncate(stop);
        }
        let mut chance = 1.0;
        let gains = (0..self.proposal.tokens.len()).map(|place| {
            chance *= self.record.chance(self.proposal.class(place), all);
            chance
        });
        Candidate { gains: gains.collect(), ahead: self.ahead }
    }

    /// Makes no proposal for the next step.
    pub fn pass(&mut self) {
        self.proposal = Proposal::default();
        self.forced.clear();
    }

    /// The first proposed tokens.
    pub fn proposed(&self, length: usize) -> &[u32] {
        &self.proposal.tokens[..length.min(self.proposal.tokens.len())]
    }

    /// Compares the proposal, computed or not, with the tokens that a step has drawn. `delay`: what the proposed tokens
    /// added to the step, as a share of it.
    pub fn learn(&mut self, drawn: impl ExactSizeIterator<Item = u32>, delay: f64, all: &mut Record) {
        self.ahead += drawn.len() as f64 - 1.0 - delay;
        for (place, (proposed, drawn)) in iter::zip(&self.proposal.tokens, drawn).enumerate() {
            let (class, is_right) = (self.proposal.class(place), *proposed == drawn);
            self.record.add(class, is_right, Self::MEMORY);
            all.add(class, is_right, Self::MEMORY_OF_ALL);
            if !is_right {
                break;
            }
        }
    }
}

/// Measured times of steps in which every sequence computes its last token and perhaps proposed ones, by the number of
/// rows. Times between and beyond those measured are estimated by a line. Older ones count less, since a row costs more the
/// longer the texts are.
#[derive(Clone, Debug)]
pub struct Costs {
    /// Weight and mean of the seconds of each number of rows less one.
    steps: [(f64, f64); MOST_ROWS],
    weight: f64,
    /// Means, and sums of products of differences from them.
    rows: f64,
    seconds: f64,
    rows_rows: f64,
    rows_seconds: f64,
}

impl Default for Costs {
    fn default() -> Self {
        let steps = [(0.0, 0.0); MOST_ROWS];
        Self { steps, weight: 0.0, rows: 0.0, seconds: 0.0, rows_rows: 0.0, rows_seconds: 0.0 }
    }
}

impl Costs {
    const MEMORY: f64 = 0.98;
    /// What the assumed cost of a row counts against the measured one.
    const ASSUMED: f64 = 2.0;

    /// Adds a step. A step that took far longer than expected counts as twice what was expected, since something else has
    /// used the processor.
    pub fn add(&mut self, rows: usize, seconds: f64) {
        if !(1..=MOST_ROWS).contains(&rows) {
            return;
        }
        let expected = self.seconds(rows);
        let seconds = if self.weight > 8.0 { seconds.min(2.0 * expected) } else { seconds };
        for (weight, _) in &mut self.steps {
            *weight *= Self::MEMORY;
        }
        let (weight, mean) = &mut self.steps[rows - 1];
        *weight += 1.0;
        *mean += (seconds - *mean) / weight.min(8.0);
        self.weight = self.weight * Self::MEMORY + 1.0;
        let difference = rows as f64 - self.rows;
        self.rows += difference / self.weight;
        self.seconds += (seconds - self.seconds) / self.weight;
        self.rows_rows = self.rows_rows * Self::MEMORY + difference * (rows as f64 - self.rows);
        self.rows_seconds = self.rows_seconds * Self::MEMORY + difference * (seconds - self.seconds);
    }

    /// Whether steps of so many rows were measured lately: what speculation saves is measured by them.
    pub fn knows(&self, rows: usize) -> bool {
        (1..=MOST_ROWS).contains(&rows) && self.steps[rows - 1].0 > 0.3
    }

    /// Expected seconds of a step.
    pub fn seconds(&self, rows: usize) -> f64 {
        // Half of the time is that of the rows: less than what most machines need for few rows, so that it is tried.
        let assumed = 0.5 * self.seconds / self.rows.max(1.0);
        let slope = (self.rows_seconds + Self::ASSUMED * assumed) / (self.rows_rows + Self::ASSUMED);
        let line = self.seconds + slope.max(0.0) * (rows as f64 - self.rows);
        let line = line.max(0.1 * self.seconds);
        let (weight, mean) = self.steps.get(rows.wrapping_sub(1)).copied().unwrap_or_default();
        (weight * mean + line) / (weight + 1.0)
    }
}

/// A sequence in a step that may have proposed tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidate {
    /// Probabilities that each proposed token and all before it are right, which do not increase.
    pub gains: Vec<f64>,
    /// Steps by which its answer is ahead of itself without speculation.
    pub ahead: f64,
}

/// What is expected to be gained at least, as a share of the speed without: estimates are never exact.
const MARGIN: f64 = 1.15;

/// Number of proposed tokens that a step computes for each sequence: those of the highest probabilities, as many as make
/// the sequences fastest together and none of them slower than it would be without speculation. None if that is no
/// noticeable gain.
pub fn choose(candidates: &[Candidate], costs: &Costs, most_rows: usize) -> Vec<usize> {
    let count = candidates.len();
    let mut best = vec![0; count];
    if !costs.knows(count) || count > MOST_SEQUENCES {
        return best;
    }
    let gain = |&(sequence, place): &(usize, usize)| candidates[sequence].gains[place];
    let places =
        candidates.iter().enumerate().flat_map(|(index, one)| (0..one.gains.len()).map(move |place| (index, place)));
    let mut places: Vec<(usize, usize)> = places.collect();
    places.sort_by(|a, b| gain(b).total_cmp(&gain(a)));
    let plain = costs.seconds(count);
    let (mut lengths, mut gains, mut highest) = (vec![0; count], vec![0.0; count], MARGIN);
    for place in places.into_iter().take(most_rows.min(MOST_ROWS).saturating_sub(count)) {
        lengths[place.0] += 1;
        gains[place.0] += gain(&place);
        let slowdown = costs.seconds(count + lengths.iter().sum::<usize>()) / plain;
        let speed = (1.0 + gains.iter().sum::<f64>() / count as f64) / slowdown;
        let delays = |(gain, one): (&f64, &Candidate)| gain + one.ahead.max(0.0) < slowdown - 1.0;
        if speed > highest && !iter::zip(&gains, candidates).any(delays) {
            highest = speed;
            best.clone_from(&lengths);
        }
    }
    best
}

#[cfg(test)]
#[path = "speculate_tests.rs"]
mod tests;
