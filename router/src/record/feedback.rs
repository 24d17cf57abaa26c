//! `POST /v1/feedback`: what the answer should have been, or how good it was. Accepted once it is durable.

use std::{fmt, sync::Arc};

use athanor_contract::event::{Event, EventData, Feedback, Judgement, JudgementError, Rating};
use athanor_serving::api::openai::ApiError;
use axum::http::StatusCode;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use uuid::Uuid;

use super::{events, request_id::RequestId};
use crate::{config::Configuration, gateway::Gateway};

/// Items of one request.
const MAX_ITEMS: usize = 256;
/// Bytes of a comment.
const MAX_COMMENT: usize = 4096;
/// Bytes of a corrected text.
const MAX_TEXT: usize = 256 << 10;
/// Labels that an error lists.
const LISTED_LABELS: usize = 50;

/// Feedback to one input or choice of one request: exactly one of `expected_label`, `expected_text`, `rating` and `preferred`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    pub request_id: String,
    #[serde(default)]
    pub index: u32,
    #[serde(default)]
    pub expected_label: Option<String>,
    #[serde(default)]
    pub expected_text: Option<String>,
    #[serde(default)]
    pub rating: Option<Rating>,
    #[serde(default)]
    pub preferred: Option<u32>,
    #[serde(default)]
    pub comment: Option<String>,
}

/// A checked item.
struct Checked {
    id: RequestId,
    request_id: String,
    index: u32,
    judgement: Judgement,
    comment: Option<String>,
}

/// One item or a list of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Items {
    pub items: Vec<Item>,
    /// Whether they came as a list: errors then name the element.
    pub list: bool,
}

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;
        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Items;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a feedback object or a list of them")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Items, A::Error> {
                Item::deserialize(MapAccessDeserializer::new(map)).map(|item| Items { items: vec![item], list: false })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Items, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = elements.next_element()? {
                    items.push(item);
                }
                Ok(Items { items, list: true })
            }
        }
        deserializer.deserialize_any(OneOrMany)
    }
}

/// The body of a 202.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    pub accepted: usize,
}

/// Checks all items, then publishes all of them; nothing is published when one is wrong.
pub async fn accept(gateway: &Gateway, items: Items, caller: Option<&str>) -> Result<Accepted, ApiError> {
    let Some(config) = gateway.records() else {
        let message = "this deployment records no events, so it takes no feedback";
        return Err(ApiError::new(StatusCode::NOT_FOUND, "feedback_off", message));
    };
    let unprocessable = |code, message: String| ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code, message);
    if items.items.is_empty() {
        return Err(unprocessable("feedback_empty", "there is no feedback in the list".into()));
    }
    if items.items.len() > MAX_ITEMS {
        let message = format!("{} items; at most {MAX_ITEMS} in one request", items.items.len());
        return Err(unprocessable("too_many_items", message));
    }
    let mut checked = Vec::with_capacity(items.items.len());
    for (position, item) in items.items.into_iter().enumerate() {
        let path = |field: &str| if items.list { format!("[{position}].{field}") } else { field.to_owned() };
        checked.push(check(gateway, item, &path)?);
    }
    let sink = gateway.events.get().ok_or_else(|| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "events_unavailable", "events cannot be kept at the moment")
    })?;
    let trace_parent = athanor_telemetry::propagation::current_traceparent();
    let percent = config.events.as_ref().map_or(0, |events| events.sample_percent);
    // Feedback to an answer that is not recorded would be about nothing.
    let recorded = checked.iter().filter(|item| item.id.is_sampled(percent));
    let events: Vec<Event> = recorded.map(|item| event(&config, item, caller, trace_parent.clone())).collect();
    sink.publish_durable(events).await.map_err(|error| {
        tracing::error!(error, "feedback could not be kept");
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "events_unavailable",
            "the feedback could not be kept; send it again",
        )
    })?;
    for item in &checked {
        if let Some(answer) = gateway.recent.judge((item.id.uuid, item.index)) {
            let is_good = match &item.judgement {
                Judgement::ExpectedLabel(label) => *answer.label == **label,
                Judgement::Rating(rating) => *rating == Rating::Positive,
                Judgement::ExpectedText(_) | Judgement::Preferred(_) => continue,
            };
            gateway.analysis.of(&answer.revision).judged(is_good);
        }
    }
    Ok(Accepted { accepted: checked.len() })
}

fn check(gateway: &Gateway, item: Item, path: &dyn Fn(&str) -> String) -> Result<Checked, ApiError> {
    let Item { request_id, index, expected_label, expected_text, rating, preferred, comment } = item;
    let shown: String = request_id.chars().take(80).collect();
    let proven = gateway.ids.verify(&request_id).map_err(|error| {
        ApiError::new(StatusCode::NOT_FOUND, "request_not_found", format!("there is no request {shown:?}: {error}"))
            .param(path("request_id"))
    })?;
    for (field, code, text, most) in [
        ("comment", "comment_too_long", &comment, MAX_COMMENT),
        ("expected_text", "text_too_long", &expected_text, MAX_TEXT),
    ] {
        if let Some(text) = text.as_ref().filter(|text| text.len() > most) {
            let message = format!("{field} has {} bytes; at most {most}", text.len());
            return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code, message).param(path(field)));
        }
    }
    let judgement = Judgement::from_fields(expected_label, expected_text, rating, preferred).map_err(|error| {
        let message = match error {
            JudgementError::Missing => "one of expected_label, expected_text, rating and preferred is required",
            JudgementError::Several => "only one of expected_label, expected_text, rating and preferred may be set",
        };
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_field", message).param(path("expected_label"))
    })?;
    let answer = gateway.recent.get((proven.id.uuid, index));
    if index >= proven.answers {
        let message = format!("request {shown:?} had no input {index}");
        return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "no_such_input", message).param(path("index")));
    }
    let known: Vec<String> = match answer.and_then(|answer| gateway.labels.get(&answer.revision)) {
        Some(labels) => labels.to_vec(),
        None => gateway.labels.all().into_iter().collect(),
    };
    match &judgement {
        Judgement::ExpectedLabel(_) if known.is_empty() && gateway.labels.are_known() => {
            let message = "expected_label is for classifiers; this deployment is a language model: use expected_text, rating or \
                           preferred";
            let error = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_feedback", message);
            return Err(error.param(path("expected_label")));
        }
        Judgement::ExpectedLabel(label) => check_label(label, &known, path)?,
        Judgement::Preferred(choice) if *choice >= proven.answers => {
            let message = format!("request {shown:?} had no choice {choice}");
            let error = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "no_such_choice", message);
            return Err(error.param(path("preferred")));
        }
        Judgement::ExpectedText(_) if !known.is_empty() => return Err(not_of_a_classifier("expected_text", path)),
        Judgement::Preferred(_) if !known.is_empty() => return Err(not_of_a_classifier("preferred", path)),
        Judgement::ExpectedText(_) | Judgement::Preferred(_) | Judgement::Rating(_) => {}
    }
    Ok(Checked { id: proven.id, request_id, index, judgement, comment })
}

fn not_of_a_classifier(field: &str, path: &dyn Fn(&str) -> String) -> ApiError {
    let message = format!("{field} is for language models; this deployment classifies: use expected_label or rating");
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_feedback", message).param(path(field))
}

fn check_label(label: &str, known: &[String], path: &dyn Fn(&str) -> String) -> Result<(), ApiError> {
    if known.is_empty() {
        let message = "the model's labels are not known yet; send the feedback again";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "labels_unknown", message));
    }
    if known.iter().any(|name| name == label) {
        return Ok(());
    }
    let label: String = label.chars().take(80).collect();
    let more = if known.len() > LISTED_LABELS { ", ..." } else { "" };
    let listed = known.iter().take(LISTED_LABELS).map(|label| format!("{label:?}")).collect::<Vec<_>>().join(", ");
    let message = format!("the model has no label {label:?}; its labels are {listed}{more}");
    Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "unknown_label", message).param(path("expected_label")))
}

fn event(config: &Arc<Configuration>, item: &Checked, caller: Option<&str>, trace_parent: Option<String>) -> Event {
    let redacted = |text: &String| {
        let mut text = text.clone();
        config.redaction.apply(&mut text);
        text
    };
    let judgement = match &item.judgement {
        Judgement::ExpectedText(text) => Judgement::ExpectedText(redacted(text)),
        other => other.clone(),
    };
    Event {
        id: Uuid::now_v7().to_string(),
        source: events::source(config),
        time: jiff::Timestamp::now().to_string(),
        trace_parent,
        data: EventData::Feedback(Feedback {
            request_id: item.request_id.clone(),
            index: item.index,
            judgement,
            comment: item.comment.as_ref().map(redacted),
            caller: caller.map(Into::into),
        }),
    }
}
