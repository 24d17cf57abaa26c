//! Events of a snapshot joined to rows. Pure: the result depends on the events and their places alone.

use std::collections::{HashMap, HashSet};

use athanor_contract::{
    artifact::sha256_hex,
    event::{Event, EventData, Feedback, Generation, GenerationInput, Judgement, Prediction},
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

/// Request id and index.
type Input = (String, u32);
/// The newest feedback of one kind to each input, by the event's time: after an outage the order of offsets is not that of time.
#[derive(Default)]
struct Newest(HashMap<Input, (jiff::Timestamp, String)>);

impl Newest {
    fn insert(&mut self, input: Input, time: jiff::Timestamp, value: String) {
        let entry = self.0.entry(input).or_insert((time, String::new()));
        if time >= entry.0 {
            *entry = (time, value);
        }
    }

    fn take(&mut self, request_id: &str, index: u32) -> Option<String> {
        self.0.remove(&(request_id.to_owned(), index)).map(|(_, value)| value)
    }
}

#[derive(Default)]
struct Join {
    snapshot: Snapshot,
    answered: HashSet<Input>,
    predictions: Vec<Prediction>,
    generations: Vec<Generation>,
    labels: Newest,
    texts: Newest,
    feedback_inputs: Vec<Input>,
}

pub(super) fn join(mut events: Vec<Placed>) -> Snapshot {
    events.sort_by_key(|placed| (placed.partition, placed.offset));
    let mut seen = HashSet::with_capacity(events.len());
    let mut join = Join::default();
    for Placed { event, .. } in events {
        if !seen.insert((event.source.clone(), event.id.clone())) {
            join.snapshot.duplicates += 1;
            continue;
        }
        let time = event_time(&event);
        match event.data {
            EventData::Prediction(prediction) => join.prediction(prediction),
            EventData::Generation(generation) => join.generation(generation),
            EventData::Feedback(feedback) => join.feedback(time, feedback),
        }
    }
    join.finish()
}

impl Join {
    fn prediction(&mut self, prediction: Prediction) {
        if self.answered.insert((prediction.request_id.clone(), prediction.index)) {
            self.predictions.push(prediction);
        } else {
            self.snapshot.duplicates += 1;
        }
    }

    fn generation(&mut self, generation: Generation) {
        if self.answered.insert((generation.request_id.clone(), generation.index)) {
            self.generations.push(generation);
        } else {
            self.snapshot.duplicates += 1;
        }
    }

    fn feedback(&mut self, time: jiff::Timestamp, feedback: Feedback) {
        self.snapshot.feedbacks += 1;
        let input = (feedback.request_id, feedback.index);
        self.feedback_inputs.push(input.clone());
        match feedback.judgement {
            Judgement::ExpectedLabel(label) => self.labels.insert(input, time, label),
            Judgement::ExpectedText(text) => self.texts.insert(input, time, text),
            Judgement::Rating(_) | Judgement::Preferred(_) => {}
        }
    }

    fn finish(mut self) -> Snapshot {
        let mut snapshot = self.snapshot;
        snapshot.predictions = self.predictions.len() as u64;
        snapshot.generations = self.generations.len() as u64;
        snapshot.orphans = self.feedback_inputs.iter().filter(|input| !self.answered.contains(*input)).count() as u64;
        for Prediction { request_id, index, text, .. } in self.predictions {
            if let Some(label) = self.labels.take(&request_id, index) {
                snapshot.rows.push(LabelledRow { id: format!("{request_id}/{index}"), text, label });
            }
        }
        for Generation { request_id, index, input, .. } in self.generations {
            if let Some(expected) = self.texts.take(&request_id, index) {
                snapshot.corrections.push(CorrectedAnswer { id: format!("{request_id}/{index}"), input, expected });
            }
        }
        snapshot.digest = digest(&snapshot.rows, &snapshot.corrections);
        snapshot
    }
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
            GenerationInput::Messages(messages) => ("messages", serde_json::Value::from(messages.clone()).to_string()),
            GenerationInput::Prompt(prompt) => ("prompt", prompt.clone()),
        };
        [id, kind, &text, expected].into_iter().for_each(&mut add);
    }
    sha256_hex(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use athanor_contract::event::{Rating, TokenUsage};
    use proptest::prelude::*;

    /// sha256 over the length-prefixed fields, computed with Python's hashlib.
    const DIGEST_OF_ONE_ROW: &str = "79057823a0628d18e1da80120ede750f1bd587fd3129d970f5d17127eec9b9bf";

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
        event(id.into(), second, EventData::Feedback(Feedback { request_id, index, judgement, comment: None }))
    }

    fn event(id: String, second: u32, data: EventData) -> Event {
        let time = format!("2026-11-24T12:00:{second:02}Z");
        Event { id, source: "/athanor/ns/d".into(), time, trace_parent: None, data }
    }

    fn place(events: &[(i32, i64, Event)]) -> Vec<Placed> {
        events
            .iter()
            .map(|(partition, offset, event)| Placed { partition: *partition, offset: *offset, event: event.clone() })
            .collect()
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
        let snapshot = join(sample());
        let rows: Vec<_> =
            snapshot.rows.iter().map(|row| (row.id.as_str(), row.text.as_str(), row.label.as_str())).collect();
        assert_eq!(
            rows,
            [("p/0", "text p 0", "newest"), ("p/1", "text p 1", "before its prediction"), ("q/0", "text q 0", "b"),]
        );
        assert_eq!((snapshot.predictions, snapshot.feedbacks, snapshot.duplicates, snapshot.orphans), (4, 5, 2, 1));
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
        let snapshot = join(place(&events));
        let expected = CorrectedAnswer { id: "c/0".into(), input: prompt(), expected: "second".into() };
        assert_eq!(snapshot.corrections, [expected]);
        assert_eq!((snapshot.rows.len(), snapshot.generations, snapshot.feedbacks, snapshot.orphans), (0, 2, 5, 1));
        assert_ne!(snapshot.digest, join(place(&events[..2])).digest);
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
        fn the_order_of_arrival_does_not_matter(order in Just((0..sample().len()).collect::<Vec<_>>()).prop_shuffle()) {
            let events = sample();
            let arrived = order.iter().map(|at| events[*at].clone()).collect();
            prop_assert_eq!(join(arrived), join(events));
        }
    }
}
