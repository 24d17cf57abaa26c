//! An [`Event`] as a Kafka record and back: CloudEvents 1.0, binary content mode (attributes in `ce_*` headers, data in the
//! value), keyed by the request id. Nothing here talks to Kafka.

use athanor_contract::{
    event::{
        CONTENT_TYPE, Event, EventData, FEEDBACK, Feedback, GENERATION, Generation, PREDICTION, Prediction,
        SPEC_VERSION, attribute,
    },
    hexadecimal,
};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders, Timestamp};
use serde::de::DeserializeOwned;

use crate::signing::{LENGTH, Purpose, SigningKeys};

/// A record ready to be produced.
#[derive(Clone, Debug)]
pub struct Record {
    /// The request id: a prediction and its feedback share a partition.
    pub key: String,
    pub headers: OwnedHeaders,
    /// JSON of the event's data.
    pub payload: Vec<u8>,
}

/// Why a record is not one of our events. Consumers count and skip such records.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedEvent {
    #[error("header {name} is missing")]
    MissingHeader { name: &'static str },
    #[error("header {name} is not UTF-8 text")]
    NotText { name: &'static str },
    #[error("header ce_specversion is {found:?}, not \"1.0\"")]
    SpecVersion { found: String },
    #[error("header content-type is {found:?}, not application/json")]
    ContentType { found: String },
    #[error("header ce_type is {found:?}, which is not an event of Athanor")]
    Type { found: String },
    #[error("header ce_time is {found:?}, not an RFC 3339 time")]
    Time { found: String },
    #[error("the value is missing")]
    NoValue,
    #[error("the value is not a {event_type}: {message}")]
    Value { event_type: &'static str, message: String },
    #[error("field confidence is {found}, not between 0 and 1")]
    Confidence { found: String },
    #[error("the key is not the request id {request_id:?}")]
    Key { request_id: String },
    #[error("header ce_signature is missing: the event is not signed by the deployment")]
    Unsigned,
    #[error("header ce_signature does not fit the event and the deployment's keys")]
    Signature,
}

/// Writes an event as a record, signed if there are keys.
///
/// # Errors
/// The data cannot be JSON: a confidence, log probability or latency is not finite.
pub fn encode(event: &Event, keys: Option<&SigningKeys>) -> Result<Record, serde_json::Error> {
    let payload = match &event.data {
        EventData::Prediction(prediction) => serde_json::to_vec(prediction)?,
        EventData::Generation(generation) => serde_json::to_vec(generation)?,
        EventData::Feedback(feedback) => serde_json::to_vec(feedback)?,
    };
    let mut headers = OwnedHeaders::new_with_capacity(8)
        .insert(Header { key: attribute::SPEC_VERSION, value: Some(SPEC_VERSION) })
        .insert(Header { key: attribute::ID, value: Some(&event.id) })
        .insert(Header { key: attribute::SOURCE, value: Some(&event.source) })
        .insert(Header { key: attribute::TYPE, value: Some(event.data.event_type()) })
        .insert(Header { key: attribute::TIME, value: Some(&event.time) })
        .insert(Header { key: attribute::CONTENT_TYPE, value: Some(CONTENT_TYPE) });
    if let Some(trace_parent) = &event.trace_parent {
        headers = headers.insert(Header { key: attribute::TRACE_PARENT, value: Some(trace_parent) });
    }
    if let Some(keys) = keys {
        let parts = signed(event.data.event_type(), &event.id, &event.source, &event.time, &payload);
        let signature = hexadecimal::encode(&keys.sign(Purpose::Event, &parts));
        headers = headers.insert(Header { key: attribute::SIGNATURE, value: Some(&signature) });
    }
    Ok(Record { key: event.data.request_id().to_owned(), headers, payload })
}

/// What the signature of an event covers: all but the trace.
fn signed<'a>(event_type: &'a str, id: &'a str, source: &'a str, time: &'a str, payload: &'a [u8]) -> [&'a [u8]; 5] {
    [event_type.as_bytes(), id.as_bytes(), source.as_bytes(), time.as_bytes(), payload]
}

/// Reads a consumed message as an event. With keys, only an event that one of them signed is accepted.
pub fn decode<M: Message>(message: &M, keys: Option<&SigningKeys>) -> Result<Event, MalformedEvent> {
    let required = |name| optional_header(message.headers(), name)?.ok_or(MalformedEvent::MissingHeader { name });
    let spec_version = required(attribute::SPEC_VERSION)?;
    if spec_version != SPEC_VERSION {
        return Err(MalformedEvent::SpecVersion { found: spec_version });
    }
    let content_type = required(attribute::CONTENT_TYPE)?;
    if content_type.split(';').next().is_none_or(|kind| !kind.trim().eq_ignore_ascii_case(CONTENT_TYPE)) {
        return Err(MalformedEvent::ContentType { found: content_type });
    }
    let (id, source, time) = (required(attribute::ID)?, required(attribute::SOURCE)?, required(attribute::TIME)?);
    if time.parse::<jiff::Timestamp>().is_err() {
        return Err(MalformedEvent::Time { found: time });
    }
    let payload = message.payload().ok_or(MalformedEvent::NoValue)?;
    let event_type = required(attribute::TYPE)?;
    if let Some(keys) = keys {
        let text = optional_header(message.headers(), attribute::SIGNATURE)?.ok_or(MalformedEvent::Unsigned)?;
        let signature = hexadecimal::decode::<LENGTH>(&text).ok_or(MalformedEvent::Signature)?;
        if !keys.verify(Purpose::Event, &signed(&event_type, &id, &source, &time, payload), &signature) {
            return Err(MalformedEvent::Signature);
        }
    }
    let data = match event_type.as_str() {
        PREDICTION => EventData::Prediction(prediction(payload)?),
        GENERATION => EventData::Generation(value::<Generation>(GENERATION, payload)?),
        FEEDBACK => EventData::Feedback(value::<Feedback>(FEEDBACK, payload)?),
        found => return Err(MalformedEvent::Type { found: found.to_owned() }),
    };
    if message.key() != Some(data.request_id().as_bytes()) {
        return Err(MalformedEvent::Key { request_id: data.request_id().to_owned() });
    }
    let trace_parent = optional_header(message.headers(), attribute::TRACE_PARENT)?;
    Ok(Event { id, source, time, trace_parent, data })
}

/// Time of an event. [`decode`] has checked it; an event built elsewhere with an unreadable time counts as the oldest.
pub fn event_time(event: &Event) -> jiff::Timestamp {
    event.time.parse().unwrap_or(jiff::Timestamp::MIN)
}

/// Time at which an event arrived, for the order of a window: the broker's, if the topic's records have it (`LogAppendTime`).
/// Records of other topics have the clock of their sender only. Then it is the event's own time, but at most `now`.
pub fn arrival(record: Timestamp, event: &Event, now: jiff::Timestamp) -> jiff::Timestamp {
    let appended = match record {
        Timestamp::LogAppendTime(milliseconds) => jiff::Timestamp::from_millisecond(milliseconds).ok(),
        Timestamp::CreateTime(_) | Timestamp::NotAvailable => None,
    };
    appended.unwrap_or_else(|| event_time(event).min(now))
}

fn prediction(payload: &[u8]) -> Result<Prediction, MalformedEvent> {
    let prediction: Prediction = value(PREDICTION, payload)?;
    if !(0.0..=1.0).contains(&prediction.confidence) {
        return Err(MalformedEvent::Confidence { found: prediction.confidence.to_string() });
    }
    Ok(prediction)
}

fn value<T: DeserializeOwned>(event_type: &'static str, payload: &[u8]) -> Result<T, MalformedEvent> {
    serde_json::from_slice(payload).map_err(|error| MalformedEvent::Value { event_type, message: error.to_string() })
}

fn optional_header<H: Headers>(headers: Option<&H>, name: &'static str) -> Result<Option<String>, MalformedEvent> {
    let Some(bytes) = headers.and_then(|headers| headers.iter().find(|header| header.key == name)?.value) else {
        return Ok(None);
    };
    let text = std::str::from_utf8(bytes).map_err(|_| MalformedEvent::NotText { name })?;
    Ok(Some(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use athanor_contract::event::{GenerationInput, Judgement, Rating, TokenUsage};
    use rdkafka::message::OwnedMessage;

    fn event() -> Event {
        Event {
            id: "r-1/0".into(),
            source: "/athanor/default/reviews".into(),
            time: "2026-11-24T12:00:00Z".into(),
            trace_parent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            data: EventData::Prediction(Prediction {
                request_id: "r-1".into(),
                index: 0,
                revision: "reviews-1".into(),
                text: "naïve, \"quoted\"\nand 長い".into(),
                label: "positive".into(),
                confidence: 0.75,
                latency_ms: 3.5,
            }),
        }
    }

    fn message(record: &Record) -> OwnedMessage {
        OwnedMessage::new(
            Some(record.payload.clone()),
            Some(record.key.clone().into_bytes()),
            "events".into(),
            Timestamp::NotAvailable,
            0,
            0,
            Some(record.headers.clone()),
        )
    }

    #[test]
    fn a_record_reads_back_as_the_same_event() {
        let with = |data| Event { trace_parent: None, data, ..event() };
        let feedback = |judgement| {
            with(EventData::Feedback(Feedback {
                request_id: "r-1".into(),
                index: 0,
                judgement,
                comment: None,
                caller: None,
            }))
        };
        let generation = |input| {
            with(EventData::Generation(Generation {
                request_id: "r-1".into(),
                index: 1,
                revision: "chat-1".into(),
                adapter: None,
                input,
                answer: "[Bank - ORGANIZATION]".into(),
                finish_reason: "stop".into(),
                usage: Some(TokenUsage { prompt_tokens: 40, completion_tokens: 7 }),
                tool_calls: vec![
                    serde_json::json!({"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}),
                ],
                mean_log_probability: Some(-0.25),
                latency_ms: 310.5,
            }))
        };
        let events = vec![
            event(),
            feedback(Judgement::ExpectedLabel("negative".into())),
            feedback(Judgement::ExpectedText("No entities found".into())),
            feedback(Judgement::Rating(Rating::Positive)),
            feedback(Judgement::Preferred(1)),
            generation(GenerationInput::Prompt("Once upon a time".into())),
            generation(GenerationInput::Messages(vec![serde_json::json!({"role": "user", "content": "Hi"})])),
        ];
        for event in events {
            let record = encode(&event, None).expect("finite numbers");
            assert_eq!(record.key, "r-1");
            assert_eq!(decode(&message(&record), None), Ok(event));
        }
    }

    #[test]
    fn each_malformed_record_is_named() {
        let good = encode(&event(), None).expect("finite numbers");
        let with_header = |name: &str, value: Option<&str>| {
            let mut headers = OwnedHeaders::new();
            for header in good.headers.as_borrowed().iter() {
                match (header.key == name, value) {
                    (true, Some(value)) => headers = headers.insert(Header { key: name, value: Some(value) }),
                    (true, None) => {}
                    (false, _) => headers = headers.insert(Header { key: header.key, value: header.value }),
                }
            }
            message(&Record { headers, ..good.clone() })
        };
        let with_value = |text: &str| message(&Record { payload: text.as_bytes().to_vec(), ..good.clone() });
        let confidence = String::from_utf8(good.payload.clone()).expect("JSON").replace("0.75", "1.5");
        let cases = [
            (with_header("ce_id", None), "header ce_id is missing"),
            (with_header("ce_specversion", Some("0.3")), "header ce_specversion is \"0.3\", not \"1.0\""),
            (with_header("content-type", Some("text/plain")), "header content-type is \"text/plain\", not"),
            (with_header("ce_type", Some("other")), "header ce_type is \"other\", which is not an event of Athanor"),
            (with_header("ce_time", Some("noon")), "header ce_time is \"noon\", not an RFC 3339 time"),
            (with_value("{}"), "the value is not a dev.athanor.prediction.v1: missing field `requestId`"),
            (with_value(&confidence), "field confidence is 1.5, not between 0 and 1"),
            (message(&good).set_payload(None), "the value is missing"),
            (message(&good).set_key(Some(b"r-2".to_vec())), "the key is not the request id \"r-1\""),
        ];
        for (message, expected) in cases {
            let error = decode(&message, None).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error:?} should start with {expected:?}");
        }
    }

    #[test]
    fn the_brokers_time_is_the_arrival_and_a_senders_time_is_never_in_the_future() {
        let time = |text: &str| text.parse::<jiff::Timestamp>().expect("a time");
        let (own, earlier, later) =
            (time("2026-11-24T12:00:00Z"), time("2026-11-24T11:00:00Z"), time("2100-01-01T00:00:00Z"));
        let cases = [
            ("a router whose clock is ahead", Timestamp::LogAppendTime(earlier.as_millisecond()), later, earlier),
            ("a router whose clock is behind", Timestamp::LogAppendTime(later.as_millisecond()), later, later),
            ("a sender's time", Timestamp::CreateTime(later.as_millisecond()), later, own),
            ("a sender's time in the future", Timestamp::CreateTime(later.as_millisecond()), earlier, earlier),
            ("no time", Timestamp::NotAvailable, later, own),
        ];
        for (name, record, now, expected) in cases {
            assert_eq!(arrival(record, &event(), now), expected, "{name}");
        }
    }

    #[test]
    fn only_what_a_key_signed_is_accepted_with_keys() {
        let (old, new, other) =
            (SigningKeys::new(b"old", None), SigningKeys::new(b"new", Some(b"old")), SigningKeys::new(b"other", None));
        let record = encode(&event(), Some(&old)).expect("finite numbers");
        for keys in [None, Some(&old), Some(&new)] {
            assert_eq!(decode(&message(&record), keys), Ok(event()), "{keys:?}");
        }
        assert_eq!(decode(&message(&record), Some(&other)), Err(MalformedEvent::Signature));
        let unsigned = encode(&event(), None).expect("finite numbers");
        assert_eq!(decode(&message(&unsigned), Some(&old)), Err(MalformedEvent::Unsigned));
        // The answer, its time or its id changed under the same signature.
        let changed = |from: &str, to: &str| {
            let text = String::from_utf8(record.payload.clone()).expect("JSON").replace(from, to);
            message(&Record { payload: text.into_bytes(), ..record.clone() })
        };
        assert_eq!(decode(&changed("positive", "negative"), Some(&old)), Err(MalformedEvent::Signature));
        for name in [attribute::TIME, attribute::ID, attribute::SOURCE] {
            let mut headers = OwnedHeaders::new();
            for header in record.headers.as_borrowed().iter() {
                let later: &[u8] = b"2027-01-01T00:00:00Z";
                let value = if header.key == name { Some(later) } else { header.value };
                headers = headers.insert(Header { key: header.key, value });
            }
            let moved = message(&Record { headers, ..record.clone() });
            assert_eq!(decode(&moved, Some(&old)), Err(MalformedEvent::Signature), "{name}");
        }
    }
}
