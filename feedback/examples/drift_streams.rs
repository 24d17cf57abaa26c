//! What the monitor says of streams of predictions, for `make bench-drift`.
//!
//! Reads a line of JSON for each stream from standard input and writes one for each to standard output: the numbers of predictions
//! after which the verdict changed, and the new verdict. The monitor's window is used as the monitor uses it, record by record.

use std::io::{BufRead, Write};

use athanor_contract::{
    artifact::{ClassReference, Reference},
    event::{Event, EventData, Feedback, Judgement, Prediction},
    monitor::{MonitorSpec, Verdict},
};
use athanor_feedback::{cloudevents::event_time, window::Window};
use serde::{Deserialize, Serialize};

/// Predictions between two looks at the verdict.
const STRIDE: usize = 25;

#[derive(Deserialize)]
struct Stream {
    reference: ClassReference,
    /// Predicted label and its probability.
    predictions: Vec<(String, f32)>,
    /// The label that feedback says, for predictions with feedback.
    expected: Vec<Option<String>>,
}

#[derive(Serialize)]
struct Answer {
    changes: Vec<(usize, Verdict)>,
}

fn event(id: String, second: usize, data: EventData) -> Event {
    let time = jiff::Timestamp::from_second(1_800_000_000 + second as i64).expect("in range").to_string();
    Event { id, source: "/athanor/bench/drift".into(), time, trace_parent: None, data }
}

fn verdicts(stream: Stream) -> Answer {
    let reference = Some(Reference::Classes(stream.reference));
    let mut window = Window::new("r", reference, MonitorSpec::default(), 100);
    let (mut offset, mut changes, mut last) = (0, Vec::new(), Verdict::Unknown);
    for (at, ((label, confidence), expected)) in std::iter::zip(stream.predictions, stream.expected).enumerate() {
        let request_id = format!("q{at}");
        let prediction = Prediction {
            request_id: request_id.clone(),
            index: 0,
            revision: "r".into(),
            text: String::new(),
            label,
            confidence,
            latency_ms: 1.0,
        };
        let judgement = expected.map(Judgement::ExpectedLabel);
        let feedback =
            judgement.map(|judgement| Feedback { request_id, index: 0, judgement, comment: None, caller: None });
        let prediction = event(format!("p{at}"), at, EventData::Prediction(prediction));
        let feedback = feedback.map(|feedback| event(format!("f{at}"), at, EventData::Feedback(feedback)));
        for event in std::iter::once(prediction).chain(feedback) {
            window.observe(0, offset, event_time(&event), Some(&event));
            offset += 1;
        }
        if (at + 1) % STRIDE == 0 {
            let verdict = window.status().verdict;
            if verdict != last {
                changes.push((at + 1, verdict));
                last = verdict;
            }
        }
    }
    Answer { changes }
}

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        serde_json::to_writer(&mut out, &verdicts(serde_json::from_str(&line?)?))?;
        writeln!(out)?;
    }
    Ok(())
}
