//! Events of a snapshot joined to rows, in two readings, so that no more is kept than there may be rows. Pure: the result depends on
//! the events and their places alone.

use std::collections::{BTreeMap, HashMap, HashSet};

use athanor_contract::{
    artifact::sha256_hex,
    event::{Event, EventData, Generation, GenerationInput, Judgement, Prediction},
};

use super::{CorrectedAnswer, LabelledRow, Snapshot};
use crate::cloudevents::event_time;

/// An event and its place in the topic.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub partition: i32,
    pub offset: i64,
    pub event: Event,
}

/// Which answer, and which kind of judgement of it.
type Key = (String, u32, Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Label,
    Text,
}

/// What a feedback says an answer should have been.
#[derive(Clone)]
struct Expected {
    time: jiff::Timestamp,
    /// Id of the event: of two of one time the larger id counts, in whatever order and however often they come.
    id: String,
    value: String,
    caller: Option<String>,
}

/// How many rows there may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The newest by the time of their feedback.
    pub maximum_samples: usize,
    /// Of one caller.
    pub maximum_caller_percent: u32,
}

/// The first reading: the newest feedback to each answer. Answers are only counted, so that what is kept is bounded by the rows that
/// there may be.
pub(super) struct Judgements {
    limits: Limits,
    /// The newest by the event's time: after an outage the order of offsets is not that of time.
    newest: HashMap<Key, Expected>,
    snapshot: Snapshot,
}

/// The second reading: the answers to which feedback was chosen.
pub(super) struct Answers {
    limits: Limits,
    chosen: HashMap<Key, Expected>,
    /// Rows by their answer's place.
    labelled: BTreeMap<Place, (Key, LabelledRow)>,
    corrected: BTreeMap<Place, (Key, CorrectedAnswer)>,
    found: HashSet<Key>,
    snapshot: Snapshot,
}

/// Partition and offset.
type Place = (i32, i64);

/// Feedback is sorted out when there is this many times the maximum of it.
const ROOM: usize = 4;

impl Judgements {
    pub fn new(limits: Limits) -> Self {
        Self { limits, newest: HashMap::new(), snapshot: Snapshot::default() }
    }

    /// Takes an event; those of one partition come in their order.
    pub fn take(&mut self, placed: Placed) {
        let time = event_time(&placed.event);
        let feedback = match placed.event.data {
            EventData::Prediction(_) => return self.snapshot.predictions += 1,
            EventData::Generation(_) => return self.snapshot.generations += 1,
            EventData::Feedback(feedback) => feedback,
        };
        self.snapshot.feedbacks += 1;
        let (kind, value) = match feedback.judgement {
            Judgement::ExpectedLabel(value) => (Kind::Label, value),
            Judgement::ExpectedText(value) => (Kind::Text, value),
            Judgement::Rating(_) | Judgement::Preferred(_) => return,
        };
        let expected = Expected { time, id: placed.event.id, value, caller: feedback.caller };
        let key = (feedback.request_id, feedback.index, kind);
        match self.newest.get(&key) {
            Some(known) if known.id == expected.id => self.snapshot.duplicates += 1,
            Some(known) if (expected.time, &expected.id) < (known.time, &known.id) => {}
            _ => {
                self.newest.insert(key, expected);
                // The newest of all are always among the newest so far.
                if self.newest.len() > self.limits.maximum_samples.saturating_mul(ROOM) {
                    self.snapshot.beyond_maximum +=
                        keep_newest(&mut self.newest, self.limits.maximum_samples * ROOM / 2);
                }
            }
        }
    }

    /// Ends the first reading: chooses whose answers are read.
    pub fn choose(mut self) -> Answers {
        self.snapshot.beyond_share += limit_callers(&mut self.newest, self.limits.maximum_caller_percent);
        self.snapshot.beyond_maximum += keep_newest(&mut self.newest, self.limits.maximum_samples);
        Answers {
            limits: self.limits,
            chosen: self.newest,
            labelled: BTreeMap::new(),
            corrected: BTreeMap::new(),
            found: HashSet::new(),
            snapshot: self.snapshot,
        }
    }
}

impl Answers {
    /// Takes an event; those of one partition come in their order.
    pub fn take(&mut self, placed: Placed) {
        let place = (placed.partition, placed.offset);
        match placed.event.data {
            EventData::Prediction(Prediction { request_id, index, text, .. }) => {
                let id = format!("{request_id}/{index}");
                let key = (request_id, index, Kind::Label);
                if let Some(label) = self.find(&key) {
                    self.labelled.insert(place, (key, LabelledRow { id, text, label }));
                }
            }
            // The revision is not trained on what another adapter was asked.
            EventData::Generation(Generation { request_id, index, input, adapter: None, .. }) => {
                let id = format!("{request_id}/{index}");
                let key = (request_id, index, Kind::Text);
                if let Some(expected) = self.find(&key) {
                    self.corrected.insert(place, (key, CorrectedAnswer { id, input, expected }));
                }
            }
            EventData::Generation(_) | EventData::Feedback(_) => {}
        }
    }

    /// The chosen feedback to an answer, the first time that the answer comes.
    fn find(&mut self, key: &Key) -> Option<String> {
        let value = self.chosen.get(key)?.value.clone();
        if self.found.insert(key.clone()) {
            return Some(value);
        }
        self.snapshot.duplicates += 1;
        None
    }

    /// Ends the second reading.
    pub fn finish(mut self) -> Snapshot {
        let mut snapshot = self.snapshot;
        snapshot.orphans = (self.chosen.len() - self.found.len()) as u64;
        // Feedback without an answer may have made room for a caller.
        self.chosen.retain(|key, _| self.found.contains(key));
        snapshot.beyond_share += limit_callers(&mut self.chosen, self.limits.maximum_caller_percent);
        let is_kept = |key: &Key| self.chosen.contains_key(key);
        let labelled = self.labelled.into_values().filter(|(key, _)| is_kept(key));
        snapshot.rows = labelled.map(|(_, row)| row).collect();
        let corrected = self.corrected.into_values().filter(|(key, _)| is_kept(key));
        snapshot.corrections = corrected.map(|(_, row)| row).collect();
        snapshot.digest = digest(&snapshot.rows, &snapshot.corrections);
        snapshot
    }
}

/// Leaves the newest `maximum`, and returns how many were taken away.
fn keep_newest(feedback: &mut HashMap<Key, Expected>, maximum: usize) -> u64 {
    let surplus = feedback.len().saturating_sub(maximum);
    if surplus > 0 {
        let mut by_age: Vec<(jiff::Timestamp, Key)> =
            feedback.iter().map(|(key, expected)| (expected.time, key.clone())).collect();
        by_age.sort_unstable();
        for (_, key) in by_age.drain(..surplus) {
            feedback.remove(&key);
        }
    }
    surplus as u64
}

/// Leaves each caller its newest feedback, so much that it is at most `percent` of all, and returns how many were taken away.
/// Feedback without a caller is not limited.
fn limit_callers(feedback: &mut HashMap<Key, Expected>, percent: u32) -> u64 {
    if percent >= 100 {
        return 0;
    }
    let mut by_caller: BTreeMap<String, Vec<(jiff::Timestamp, Key)>> = BTreeMap::new();
    let mut others = 0;
    for (key, expected) in feedback.iter() {
        match &expected.caller {
            Some(caller) => by_caller.entry(caller.clone()).or_default().push((expected.time, key.clone())),
            None => others += 1,
        }
    }
    let counts: Vec<usize> = by_caller.values().map(Vec::len).collect();
    let most = share(&counts, others, percent);
    let mut removed = 0;
    for of_caller in by_caller.values_mut() {
        of_caller.sort_unstable();
        for (_, key) in of_caller.drain(..of_caller.len().saturating_sub(most)) {
            feedback.remove(&key);
            removed += 1;
        }
    }
    removed
}

/// Returns the largest number that each caller may have, so that none has more than `percent` of all that is left.
fn share(counts: &[usize], others: usize, percent: u32) -> usize {
    let fits = |most: usize| {
        let all: usize = others + counts.iter().map(|count| (*count).min(most)).sum::<usize>();
        counts.iter().all(|count| (*count).min(most) * 100 <= all * percent as usize)
    };
    // A larger number fits only where a smaller one does: the total grows by at most one for each caller.
    let (mut low, mut high) = (0, counts.iter().copied().max().unwrap_or(0));
    while low < high {
        let middle = (low + high).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

/// The digest of all fields, each preceded by its length, so that no two lists of rows are the same bytes.
fn digest(rows: &[LabelledRow], corrections: &[CorrectedAnswer]) -> String {
    let mut bytes = Vec::new();
    let mut add = |field: &str| {
        bytes.extend_from_slice(&(field.len() as u64).to_le_bytes());
        bytes.extend_from_slice(field.as_bytes());
    };
    rows.iter().flat_map(|row| [&row.id, &row.text, &row.label]).for_each(|field| add(field));
    for CorrectedAnswer { id, input, expected } in corrections {
        let (kind, text) = match input {
            GenerationInput::Messages(messages) => {
                let mut messages = serde_json::Value::from(messages.clone());
                messages.sort_all_objects();
                ("messages", messages.to_string())
            }
            GenerationInput::Prompt(prompt) => ("prompt", prompt.clone()),
        };
        [id, kind, &text, expected].into_iter().for_each(&mut add);
    }
    sha256_hex(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use athanor_contract::event::{Feedback, Rating, TokenUsage};
    use proptest::prelude::*;

    /// sha256 over the length-prefixed fields, computed with Python's hashlib.
    const DIGEST_OF_ONE_ROW: &str = "79057823a0628d18e1da80120ede750f1bd587fd3129d970f5d17127eec9b9bf";

    fn join(events: Vec<Placed>, maximum_caller_percent: u32) -> Snapshot {
        join_newest(events, 1_000, maximum_caller_percent)
    }

    fn join_newest(events: Vec<Placed>, maximum_samples: usize, maximum_caller_percent: u32) -> Snapshot {
        let mut first = Judgements::new(Limits { maximum_samples, maximum_caller_percent });
        events.iter().cloned().for_each(|placed| first.take(placed));
        let mut second = first.choose();
        events.into_iter().for_each(|placed| second.take(placed));
        second.finish()
    }

    fn prediction(request: &str, index: u32) -> Event {
        let data = EventData::Prediction(Prediction {
            request_id: request.into(),
            index,
            revision: "r1".into(),
            text: format!("text {request} {index}"),
            label: "a".into(),
            confidence: 0.9,
            latency_ms: 1.0,
        });
        event(format!("{request}/{index}"), 0, data)
    }

    fn generation(request: &str, index: u32, input: GenerationInput) -> Event {
        let data = EventData::Generation(Generation {
            request_id: request.into(),
            index,
            revision: "r1".into(),
            adapter: None,
            input,
            answer: "an answer".into(),
            finish_reason: "stop".into(),
            usage: Some(TokenUsage::default()),
            tool_calls: Vec::new(),
            mean_log_probability: None,
            latency_ms: 1.0,
        });
        event(format!("{request}/{index}"), 0, data)
    }

    fn feedback(id: &str, second: u32, request: &str, index: u32, label: &str) -> Event {
        judged(id, second, request, index, Judgement::ExpectedLabel(label.into()))
    }

    fn judged(id: &str, second: u32, request: &str, index: u32, judgement: Judgement) -> Event {
        let request_id = request.into();
        event(
            id.into(),
            second,
            EventData::Feedback(Feedback { request_id, index, judgement, comment: None, caller: None }),
        )
    }

    fn event(id: String, second: u32, data: EventData) -> Event {
        let time = format!("2026-11-24T12:00:{second:02}Z");
        Event { id, source: "/athanor/ns/d".into(), time, trace_parent: None, data }
    }

    /// In the order of a partition's offsets, as a consumer has them.
    fn place(events: &[(i32, i64, Event)]) -> Vec<Placed> {
        let mut placed: Vec<Placed> = events
            .iter()
            .map(|(partition, offset, event)| Placed { partition: *partition, offset: *offset, event: event.clone() })
            .collect();
        placed.sort_by_key(|placed| (placed.partition, placed.offset));
        placed
    }

    fn sample() -> Vec<Placed> {
        place(&[
            (1, 0, prediction("q", 0)),
            (0, 4, prediction("p", 1)),
            (0, 3, prediction("p", 0)),
            (0, 5, prediction("p", 0)),
            (0, 6, feedback("f1", 9, "p", 0, "newest")),
            (0, 7, feedback("f2", 5, "p", 0, "older, replayed")),
            (0, 8, feedback("f1", 9, "p", 0, "newest")),
            (0, 2, feedback("f3", 1, "p", 1, "before its prediction")),
            (1, 1, feedback("f4", 1, "gone", 0, "orphan")),
            (1, 2, prediction("unlabelled", 0)),
            (1, 3, feedback("f5", 1, "q", 0, "b")),
        ])
    }

    #[test]
    fn feedback_is_joined_deduplicated_and_ordered() {
        let snapshot = join(sample(), 100);
        let rows: Vec<_> =
            snapshot.rows.iter().map(|row| (row.id.as_str(), row.text.as_str(), row.label.as_str())).collect();
        assert_eq!(
            rows,
            [("p/0", "text p 0", "newest"), ("p/1", "text p 1", "before its prediction"), ("q/0", "text q 0", "b"),]
        );
        assert_eq!((snapshot.predictions, snapshot.feedbacks, snapshot.duplicates, snapshot.orphans), (5, 6, 2, 1));
    }

    #[test]
    fn corrected_answers_are_rows_and_ratings_are_not() {
        let text = |text: &str| Judgement::ExpectedText(text.into());
        let prompt = || GenerationInput::Prompt("List the entities".into());
        let events = [
            (0, 0, generation("c", 0, prompt())),
            (0, 1, judged("f1", 1, "c", 0, text("first"))),
            (0, 2, judged("f2", 2, "c", 0, text("second"))),
            (0, 3, generation("rated", 0, prompt())),
            (0, 4, judged("f3", 3, "rated", 0, Judgement::Rating(Rating::Negative))),
            // A label is no correction of a generated answer.
            (0, 5, feedback("f4", 3, "rated", 0, "label")),
            (0, 6, judged("f5", 4, "gone", 0, text("orphan"))),
        ];
        let snapshot = join(place(&events), 100);
        let expected = CorrectedAnswer { id: "c/0".into(), input: prompt(), expected: "second".into() };
        assert_eq!(snapshot.corrections, [expected]);
        // The label is an orphan as well: no classifier gave that answer.
        assert_eq!((snapshot.rows.len(), snapshot.generations, snapshot.feedbacks, snapshot.orphans), (0, 2, 5, 2));
        assert_ne!(snapshot.digest, join(place(&events[..2]), 100).digest);
    }

    #[test]
    fn corrections_of_another_adapter_are_left_out() {
        let corrected = |adapter: Option<&str>| {
            let mut answer = generation("c", 0, GenerationInput::Prompt("List the entities".into()));
            if let EventData::Generation(generation) = &mut answer.data {
                generation.adapter = adapter.map(Into::into);
            }
            let correction = judged("f", 1, "c", 0, Judgement::ExpectedText("none".into()));
            join(place(&[(0, 0, answer), (0, 1, correction)]), 100)
        };
        assert_eq!(corrected(None).corrections.len(), 1);
        let other = corrected(Some("legal"));
        assert_eq!((other.corrections.len(), other.orphans), (0, 1));
    }

    #[test]
    fn a_repeated_delivery_does_not_bring_an_older_label_back() {
        let older = || feedback("f1", 1, "p", 0, "older");
        let events = place(&[
            (0, 0, prediction("p", 0)),
            (0, 1, older()),
            (0, 2, feedback("f2", 1, "p", 0, "newer")),
            (0, 3, older()),
        ]);
        assert_eq!(join(events, 100).rows[0].label, "newer");
    }

    #[test]
    fn the_newest_rows_are_kept_however_many_there_are() {
        let event = |at: u32| {
            let request = format!("r{at:03}");
            [
                (0, 2 * i64::from(at), prediction(&request, 0)),
                (0, 2 * i64::from(at) + 1, feedback(&format!("f{at}"), at % 60, &request, 0, "a")),
            ]
        };
        let events: Vec<_> = (0..60).flat_map(event).collect();
        let snapshot = join_newest(place(&events), 5, 100);
        let kept: Vec<_> = snapshot.rows.iter().map(|row| row.id.as_str()).collect();
        assert_eq!(kept, ["r055/0", "r056/0", "r057/0", "r058/0", "r059/0"]);
        assert_eq!((snapshot.feedbacks, snapshot.beyond_maximum, snapshot.orphans), (60, 55, 0));
    }

    #[test]
    fn of_each_caller_the_newest_rows_of_its_share_are_kept() {
        let by = |caller: Option<&str>, at: usize| {
            let mut event = feedback(&format!("f{at}"), at as u32, &format!("r{at:02}"), 0, "a");
            let EventData::Feedback(feedback) = &mut event.data else { panic!("feedback") };
            feedback.caller = caller.map(Into::into);
            [(0, 2 * at as i64, prediction(&format!("r{at:02}"), 0)), (0, 2 * at as i64 + 1, event)]
        };
        let callers = |callers: &[Option<&str>]| {
            let events: Vec<_> = callers.iter().enumerate().flat_map(|(at, caller)| by(*caller, at)).collect();
            let snapshot = join(place(&events), 40);
            let kept: Vec<String> = snapshot.rows.into_iter().map(|row| row.id).collect();
            (kept, snapshot.beyond_share)
        };
        let (a, b, c) = (Some("a"), Some("b"), Some("c"));
        // Two of five are 40 %: of the six of `a` its two newest are kept.
        let (kept, beyond) = callers(&[a, a, b, a, a, c, a, b, a]);
        assert_eq!((kept.join(" "), beyond), ("r02/0 r05/0 r06/0 r07/0 r08/0".into(), 4));
        // A caller alone has no share that would do; feedback without a caller is not limited.
        assert_eq!(callers(&[a, a, a]), (vec![], 3));
        assert_eq!(callers(&[None, None, None]).1, 0);
        assert_eq!(callers(&[a, None, None]).1, 0);
    }

    #[test]
    fn different_rows_have_different_digests() {
        let row =
            |id: &str, text: &str, label: &str| LabelledRow { id: id.into(), text: text.into(), label: label.into() };
        assert_ne!(digest(&[row("1", "ab", "c")], &[]), digest(&[row("1", "a", "bc")], &[]));
        assert_ne!(digest(&[], &[]), digest(&[row("", "", "")], &[]));
        let corrected = |input| CorrectedAnswer { id: "1".into(), input, expected: "a".into() };
        let messages = GenerationInput::Messages(vec![serde_json::json!("x")]);
        let prompt = GenerationInput::Prompt("[\"x\"]".into());
        assert_ne!(digest(&[], &[corrected(messages)]), digest(&[], &[corrected(prompt)]));
    }

    /// Checkpoints and lineage of retrainings name the digest: it must not change for the rows of classifiers.
    #[test]
    fn the_digest_of_labelled_rows_stays_what_it_was() {
        let row = LabelledRow { id: "p/0".into(), text: "text".into(), label: "a".into() };
        assert_eq!(digest(&[row], &[]), DIGEST_OF_ONE_ROW);
    }

    proptest! {
        #[test]
        fn the_order_in_which_partitions_arrive_does_not_matter(order in Just(vec![0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]).prop_shuffle()) {
            let mut events = sample();
            events.sort_by_key(|placed| (placed.partition, placed.offset));
            let mut partitions = [0, 1].map(|number| events.iter().filter(move |placed| placed.partition == number).cloned());
            let arrived: Vec<Placed> = order.into_iter().filter_map(|number: usize| partitions[number].next()).collect();
            prop_assert_eq!(arrived.len(), events.len());
            prop_assert_eq!(join(arrived, 100), join(events, 100));
        }
    }
}
