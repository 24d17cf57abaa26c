//! The events of a deployment: CloudEvents 1.0 in Kafka's binary binding (attributes in `ce_*` headers, JSON in the
//! value).
//!
//! Both kinds go to one topic and carry the request id as the Kafka key, so a prediction and its feedback share a
//! partition and keep their order; a dataset is then a set of offset ranges of this one topic.

use serde::{Deserialize, Serialize};

pub const PREDICTION: &str = "dev.athanor.prediction.v1";
pub const FEEDBACK: &str = "dev.athanor.feedback.v1";
pub const CONTENT_TYPE: &str = "application/json";
pub const SPEC_VERSION: &str = "1.0";

/// The CloudEvents attributes that Athanor sets; `ce_` in front of each makes the Kafka header.
pub mod attribute {
    pub const ID: &str = "ce_id";
    pub const SOURCE: &str = "ce_source";
    pub const SPEC_VERSION: &str = "ce_specversion";
    pub const TYPE: &str = "ce_type";
    pub const TIME: &str = "ce_time";
    pub const TRACE_PARENT: &str = "ce_traceparent";
    pub const CONTENT_TYPE: &str = "content-type";
}

/// An event with its CloudEvents attributes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Unique for the source: `{request_id}/{index}` for a prediction, a UUID for feedback. Consumers drop a second
    /// event of one id.
    pub id: String,
    /// `/athanor/{namespace}/{deployment}`.
    pub source: String,
    /// RFC 3339.
    pub time: String,
    /// W3C trace context of the request.
    pub trace_parent: Option<String>,
    pub data: EventData,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EventData {
    Prediction(Prediction),
    Feedback(Feedback),
}

impl EventData {
    pub fn event_type(&self) -> &'static str {
        match self {
            Self::Prediction(_) => PREDICTION,
            Self::Feedback(_) => FEEDBACK,
        }
    }

    pub fn request_id(&self) -> &str {
        match self {
            Self::Prediction(prediction) => &prediction.request_id,
            Self::Feedback(feedback) => &feedback.request_id,
        }
    }
}

/// What the model answered to one input of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Prediction {
    pub request_id: String,
    /// Which input of the request, from 0.
    pub index: u32,
    pub revision: String,
    pub text: String,
    pub label: String,
    /// Probability of `label`.
    pub confidence: f32,
    /// Time the model took for the request, in milliseconds.
    pub latency_ms: f32,
}

/// What a person or a later system says the answer should have been.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Feedback {
    pub request_id: String,
    pub index: u32,
    /// The true label.
    pub expected_label: String,
    /// Free text, at most 4,096 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}
