//! Labels for rows without one, from a language model or from the job's teacher.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::Decimal;

/// Labels each row without a label by exactly one of `endpoint` and `teacher`. Rows that remain without a label are
/// left out. Answers are kept next to the output, so a restarted job does not ask about a row again; the report says
/// how many rows were labelled. Validation and test rows that are labelled this way are left out, unless none of them
/// has a label of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::ENDPOINT_OR_TEACHER]))]
pub struct AnnotateSpec {
    /// Language model at a URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<EndpointAnnotator>,
    /// The job's teacher, a trained classifier, which the training processes run themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherAnnotator>,
}

/// An endpoint with OpenAI's chat completions API, such as vLLM or a hosted service. The report gives the cost and how
/// often the model's samples disagreed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::COST_NEEDS_PRICES]))]
pub struct EndpointAnnotator {
    /// Base URL including the version, such as http://teacher.models:8000/v1. Requests go to {url}/chat/completions.
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^https?://.+"))]
    pub url: String,
    /// Name of the model at the endpoint.
    #[schemars(length(min = 1, max = 256))]
    pub model: String,
    /// Environment variable of the trainer with the API key, usually a key of the Secret in credentialsSecretName. The
    /// API key is sent only to the endpoint and never logged. Absent: requests carry no key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$"))]
    pub api_key_variable: Option<String>,
    /// Labels to choose from. Absent: model.labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 1024), inner(length(min = 1, max = 256)))]
    pub labels: Option<Vec<String>>,
    /// Jinja template of the prompt: {{ text }} is the row's text and {{ labels }} the list of labels. The answer must
    /// be one of the labels only, in upper or lower case, or {"label": "..."}.
    #[serde(default = "default_prompt")]
    #[schemars(length(min = 1, max = 16384))]
    pub prompt: String,
    /// Sampling temperature, "0" to "2". Absent: "0" for one sample, "1" for more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = [rules::FROM_0_TO_2]))]
    pub temperature: Option<Decimal>,
    /// Number of answers for each row. With more than one, the most frequent label is used, a tie leaves the row
    /// without a label, and the report gives the share of rows whose answers differ.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
    pub samples: u32,
    /// Largest number of concurrent requests.
    #[serde(default = "eight")]
    #[schemars(range(min = 1, max = 256))]
    pub concurrency: u32,
    /// Time limit of one request in seconds.
    #[serde(default = "sixty")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: u32,
    /// Number of retries of a request that was rejected (status 429), failed (5xx), was interrupted or timed out. The
    /// pause between retries grows, and Retry-After is respected. A row whose request still fails remains without a
    /// label.
    #[serde(default = "five")]
    #[schemars(range(min = 0, max = 20))]
    pub max_retries: u32,
    /// Price of a million tokens of prompts, in any currency. Absent: the cost is not computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_token_price: Option<Decimal>,
    /// Price of a million tokens of answers, in the same currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_token_price: Option<Decimal>,
    /// Limit of the cost, including earlier attempts of the job. Once it is reached no further request is sent; answers
    /// to requests already sent are used. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum_cost: Option<Decimal>,
}

/// Labels rows by `teacher.from`, whose labels must be among `model.labels`; if these are absent, the job's labels are
/// the teacher's. The report gives the distribution of the labels and how often the teacher disagrees with labelled
/// training rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TeacherAnnotator {
    /// Least probability, "0" to "1", of the teacher's label; a row with a lower probability is left out.
    #[schemars(extend("x-kubernetes-validations" = [rules::FROM_0_TO_1]))]
    pub minimum_confidence: Decimal,
}

impl Default for TeacherAnnotator {
    fn default() -> Self {
        Self { minimum_confidence: Decimal::new(0.9).expect("a finite constant") }
    }
}

fn default_prompt() -> String {
    "Classify the text into exactly one of these labels: {{ labels | join(\", \") }}.\n\
     Answer with the label alone.\n\nText:\n{{ text }}"
        .into()
}

fn one() -> u32 {
    1
}

fn eight() -> u32 {
    8
}

fn sixty() -> u32 {
    60
}

fn five() -> u32 {
    5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_and_a_model_suffice_and_so_does_a_teacher() {
        let spec: AnnotateSpec =
            serde_json::from_str(r#"{"endpoint": {"url": "http://teacher/v1", "model": "m"}}"#).unwrap();
        let endpoint = spec.endpoint.as_ref().unwrap();
        assert_eq!(
            (endpoint.samples, endpoint.concurrency, endpoint.timeout_seconds, endpoint.max_retries),
            (1, 8, 60, 5)
        );
        assert!(endpoint.prompt.contains("{{ text }}") && endpoint.prompt.contains("labels"));
        assert_eq!(serde_json::from_str::<AnnotateSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);

        let spec: AnnotateSpec = serde_json::from_str(r#"{"teacher": {}}"#).unwrap();
        assert_eq!(spec.teacher.unwrap().minimum_confidence.to_string(), "0.9");
        assert_eq!(serde_json::from_str::<AnnotateSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
    }
}
