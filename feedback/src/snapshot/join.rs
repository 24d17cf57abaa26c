//! Events of a snapshot joined to rows. Pure: the result depends on the events and their places alone.

use std::collections::{HashMap, HashSet};

use athanor_contract::{
    artifact::sha256_hex,
    event::{Event, EventData},
};

use super::{LabelledRow, Snapshot};
use crate::cloudevents::event_time;

/// An event and where it was.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub partition: i32,
    pub offset: i64,
    pub event: Event,
}

pub(super) fn join(mut events: Vec<Placed>) -> Snapshot {
    events.sort_by_key(|placed| (placed.partition, placed.offset));
    let mut snapshot = Snapshot::default();
    let mut seen = HashSet::with_capacity(events.len());
    let mut inputs = HashSet::new();
    let mut predictions = Vec::new();
    // The newest feedback to each input, by the event's time: after an outage the order of offsets is not that of time.
    let mut labels = HashMap::new();
    let mut feedback_inputs = Vec::new();
    for Placed { event, .. } in events {
        if !seen.insert((event.source.clone(), event.id.clone())) {
            snapshot.duplicates += 1;
            continue;
        }
        let time = event_time(&event);
        match event.data {
            EventData::Prediction(prediction) => {
                if inputs.insert((prediction.request_id.clone(), prediction.index)) {
                    predictions.push(prediction);
                } else {
                    snapshot.duplicates += 1;
                }
            }
            EventData::Feedback(feedback) => {
                snapshot.feedbacks += 1;
                let input = (feedback.request_id, feedback.index);
                feedback_inputs.push(input.clone());
                let (newest, label) = labels.entry(input).or_insert((time, String::new()));
                if time >= *newest {
                    (*newest, *label) = (time, feedback.expected_label);
                }
            }
        }
    }
    snapshot.predictions = predictions.len() as u64;
    snapshot.orphans = feedback_inputs.iter().filter(|input| !inputs.contains(*input)).count() as u64;
    for prediction in predictions {
        let id = format!("{}/{}", prediction.request_id, prediction.index);
        if let Some((_, label)) = labels.remove(&(prediction.request_id, prediction.index)) {
            snapshot.rows.push(LabelledRow { id, text: prediction.text, label });
        }
    }
    snapshot.digest = digest(&snapshot.rows);
    snapshot
}

/// Each field with its length in front, so that no two lists of rows are the same bytes.
fn digest(rows: &[LabelledRow]) -> String {
    let mut bytes = Vec::new();
    for field in rows.iter().flat_map(|row| [&row.id, &row.text, &row.label]) {
        bytes.extend_from_slice(&(field.len() as u64).to_le_bytes());
        bytes.extend_from_slice(field.as_bytes());
    }
    sha256_hex(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use athanor_contract::event::{Feedback, Prediction};
    use proptest::prelude::*;

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

    fn feedback(id: &str, second: u32, request: &str, index: u32, label: &str) -> Event {
        let (request_id, expected_label) = (request.into(), label.into());
        event(id.into(), second, EventData::Feedback(Feedback { request_id, index, expected_label, comment: None }))
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
    fn the_digest_tells_rows_apart() {
        let row =
            |id: &str, text: &str, label: &str| LabelledRow { id: id.into(), text: text.into(), label: label.into() };
        assert_ne!(digest(&[row("1", "ab", "c")]), digest(&[row("1", "a", "bc")]));
        assert_ne!(digest(&[]), digest(&[row("", "", "")]));
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
