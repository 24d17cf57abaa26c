//! The events of a deployment: CloudEvents 1.0 in Kafka's binary binding (attributes in `ce_*` headers, JSON in the
//! value).
//! docs/events.md describes every field.
//!
//! All kinds go to one topic and carry the request id as the Kafka key, so an answer and its feedback share a
//! partition and keep
//! their order. A dataset is a set of offset ranges of this one topic.

use serde::{Deserialize, Serialize};

pub const PREDICTION: &str = "dev.athanor.prediction.v1";
pub const GENERATION: &str = "dev.athanor.generation.v1";
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
    /// HMAC-SHA256 of type, id, source, time and data in hexadecimal digits, by the deployment's signing key.
    pub const SIGNATURE: &str = "ce_signature";
    pub const CONTENT_TYPE: &str = "content-type";
}

/// An event with its CloudEvents attributes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Unique within the source: `{request_id}/{index}` for an answer, a UUID for feedback. Consumers drop a second
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
    Generation(Generation),
    Feedback(Feedback),
}

impl EventData {
    pub fn event_type(&self) -> &'static str {
        match self {
            Self::Prediction(_) => PREDICTION,
            Self::Generation(_) => GENERATION,
            Self::Feedback(_) => FEEDBACK,
        }
    }

    pub fn request_id(&self) -> &str {
        match self {
            Self::Prediction(prediction) => &prediction.request_id,
            Self::Generation(generation) => &generation.request_id,
            Self::Feedback(feedback) => &feedback.request_id,
        }
    }
}

/// What a classifier answered to one input of a request.
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

/// What a language model answered: one choice of one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Generation {
    pub request_id: String,
    /// Number of the choice, from 0; requests with `n` above 1 have several.
    pub index: u32,
    pub revision: String,
    /// Name of the adapter that the request selected by its `model`. Absent: the revision itself answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    pub input: GenerationInput,
    /// The generated text, without calls of functions.
    pub answer: String,
    /// Calls of functions in the answer, in OpenAI's shape.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<serde_json::Value>,
    /// OpenAI's word for why generation ended, such as `stop` or `length`.
    pub finish_reason: String,
    /// Absent: the server reported none, as in a stream without `stream_options.include_usage`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
    /// Mean natural logarithm of the probabilities of the answer's tokens. Absent: not computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_log_probability: Option<f32>,
    /// Time from the request to the last token, in milliseconds.
    pub latency_ms: f32,
}

/// What a language model was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum GenerationInput {
    /// The messages of a chat completion, as the client sent them.
    Messages(Vec<serde_json::Value>),
    /// The prompt of a completion.
    Prompt(String),
}

/// Tokens of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TokenUsage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// What a person or a later system says of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "FeedbackFields", into = "FeedbackFields")]
pub struct Feedback {
    pub request_id: String,
    /// Which input or choice of the request, from 0.
    pub index: u32,
    pub judgement: Judgement,
    /// Free text, at most 4,096 bytes.
    pub comment: Option<String>,
    /// Name of the API key by which it was sent. Absent: the deployment has no API keys.
    pub caller: Option<String>,
}

/// The kinds of feedback. On the wire exactly one of four fields is set: `expectedLabel`, `expectedText`, `rating`,
/// `preferred`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The true label of a classified text.
    ExpectedLabel(String),
    /// The text that the answer should have been.
    ExpectedText(String),
    /// Whether the answer was good.
    Rating(Rating),
    /// Number of the best choice among all choices of the request.
    Preferred(u32),
}

/// 1 or -1 on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub enum Rating {
    Negative,
    Positive,
}

impl TryFrom<i64> for Rating {
    type Error = String;

    fn try_from(value: i64) -> Result<Self, String> {
        match value {
            -1 => Ok(Self::Negative),
            1 => Ok(Self::Positive),
            other => Err(format!("a rating is 1 or -1, not {other}")),
        }
    }
}

impl From<Rating> for i64 {
    fn from(rating: Rating) -> Self {
        match rating {
            Rating::Negative => -1,
            Rating::Positive => 1,
        }
    }
}

impl Judgement {
    /// Makes a judgement of the four fields of the wire.
    ///
    /// # Errors
    /// None of them is set, or more than one is.
    pub fn from_fields(
        expected_label: Option<String>,
        expected_text: Option<String>,
        rating: Option<Rating>,
        preferred: Option<u32>,
    ) -> Result<Self, JudgementError> {
        let label = expected_label.map(Self::ExpectedLabel);
        let text = expected_text.map(Self::ExpectedText);
        let fields = [label, text, rating.map(Self::Rating), preferred.map(Self::Preferred)];
        let mut set = fields.into_iter().flatten();
        match (set.next(), set.next()) {
            (Some(judgement), None) => Ok(judgement),
            (None, _) => Err(JudgementError::Missing),
            (Some(_), Some(_)) => Err(JudgementError::Several),
        }
    }
}

/// Why four fields are no judgement. The message names them as events do; HTTP has them in snake case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JudgementError {
    #[error("one of expectedLabel, expectedText, rating and preferred is required")]
    Missing,
    #[error("only one of expectedLabel, expectedText, rating and preferred may be set")]
    Several,
}

/// The wire format of [`Feedback`].
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FeedbackFields {
    request_id: String,
    index: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expected_label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expected_text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rating: Option<Rating>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    preferred: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    comment: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    caller: Option<String>,
}

impl TryFrom<FeedbackFields> for Feedback {
    type Error = JudgementError;

    fn try_from(fields: FeedbackFields) -> Result<Self, JudgementError> {
        let FeedbackFields { request_id, index, expected_label, expected_text, rating, preferred, comment, caller } =
            fields;
        let judgement = Judgement::from_fields(expected_label, expected_text, rating, preferred)?;
        Ok(Self { request_id, index, judgement, comment, caller })
    }
}

impl From<Feedback> for FeedbackFields {
    fn from(feedback: Feedback) -> Self {
        let Feedback { request_id, index, judgement, comment, caller } = feedback;
        let (mut expected_label, mut expected_text, mut rating, mut preferred) = (None, None, None, None);
        match judgement {
            Judgement::ExpectedLabel(label) => expected_label = Some(label),
            Judgement::ExpectedText(text) => expected_text = Some(text),
            Judgement::Rating(value) => rating = Some(value),
            Judgement::Preferred(choice) => preferred = Some(choice),
        }
        Self { request_id, index, expected_label, expected_text, rating, preferred, comment, caller }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn with(field: &str, value: Value) -> Value {
        let mut event = json!({"requestId": "r", "index": 0});
        event[field] = value;
        event
    }

    #[test]
    fn feedback_has_exactly_one_judgement() {
        let cases = [
            ("expectedLabel", json!("spam"), Judgement::ExpectedLabel("spam".into())),
            ("expectedText", json!("42"), Judgement::ExpectedText("42".into())),
            ("rating", json!(-1), Judgement::Rating(Rating::Negative)),
            ("preferred", json!(2), Judgement::Preferred(2)),
        ];
        for (field, value, judgement) in cases {
            let wire = with(field, value);
            let feedback: Feedback = serde_json::from_value(wire.clone()).unwrap();
            assert_eq!(feedback.judgement, judgement);
            assert_eq!(serde_json::to_value(feedback).unwrap(), wire);
        }
        let mut several = with("rating", json!(1));
        several["expectedText"] = json!("a");
        for (wire, expected) in [
            (
                json!({"requestId": "r", "index": 0}),
                "one of expectedLabel, expectedText, rating and preferred is required",
            ),
            (several, "only one of expectedLabel, expectedText, rating and preferred may be set"),
            (with("rating", json!(5)), "a rating is 1 or -1, not 5"),
            (with("other", json!(1)), "unknown field `other`"),
        ] {
            let error = serde_json::from_value::<Feedback>(wire).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn feedback_of_before_the_union_is_still_read() {
        let old = json!({"requestId": "r", "index": 3, "expectedLabel": "positive", "comment": "why"});
        let feedback: Feedback = serde_json::from_value(old).unwrap();
        let judgement = Judgement::ExpectedLabel("positive".into());
        let comment = Some("why".into());
        assert_eq!(feedback, Feedback { request_id: "r".into(), index: 3, judgement, comment, caller: None });
    }
}
