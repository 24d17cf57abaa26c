//! Labels for rows that have none, from a language model or from the job's teacher.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::Decimal;

/// Gives each row without a label one: exactly one of `endpoint` and `teacher` is asked. Rows that get none are left out. What was
/// answered is kept beside the output, so a job that starts again asks about no row twice, and the report says how many rows were
/// labelled. Validation and test rows labelled this way are left out, unless no other of them has a label: results are measured by
/// the data's own labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::ENDPOINT_OR_TEACHER]))]
pub struct AnnotateSpec {
    /// A language model at an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<EndpointAnnotator>,
    /// The job's teacher, a trained classifier, asked by the training processes themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherAnnotator>,
}

/// Any endpoint that speaks OpenAI's chat completions will do: a ModelDeployment with a container of its own, vLLM, or a hosted
/// service. The report says what it cost, and how often the model disagreed with itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::COST_NEEDS_PRICES]))]
pub struct EndpointAnnotator {
    /// Base URL, up to and including its version, such as http://teacher.models:8000/v1: requests go to {url}/chat/completions.
    #[schemars(length(min = 1, max = 2048), regex(pattern = r"^https?://.+"))]
    pub url: String,
    /// The model's name, as the endpoint knows it.
    #[schemars(length(min = 1, max = 256))]
    pub model: String,
    /// Environment variable of the trainer that holds the API key, usually a key of the Secret in `credentialsSecretName`. The key
    /// goes to the endpoint alone and is never logged. Absent: requests carry no key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$"))]
    pub api_key_variable: Option<String>,
    /// Labels to choose from. Absent: `model.labels`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 1024), inner(length(min = 1, max = 256)))]
    pub labels: Option<Vec<String>>,
    /// What the model is asked, a Jinja template: {{ text }} is the row's text and {{ labels }} the list of labels. The answer has
    /// to be one of the labels alone, in whatever case, or {"label": "..."}.
    #[serde(default = "default_prompt")]
    #[schemars(length(min = 1, max = 16384))]
    pub prompt: String,
    /// Randomness of the answers, "0" to "2". Absent: "0" for one sample, "1" for more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = [rules::FROM_0_TO_2]))]
    pub temperature: Option<Decimal>,
    /// How often each row is asked about. With more than one, the label that most answers name is taken, a tie leaves the row
    /// without one, and the report tells the share of rows whose answers differ.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
    pub samples: u32,
    /// Requests at the same time.
    #[serde(default = "eight")]
    #[schemars(range(min = 1, max = 256))]
    pub concurrency: u32,
    /// Seconds that one request may take.
    #[serde(default = "sixty")]
    #[schemars(range(min = 1, max = 3600))]
    pub timeout_seconds: u32,
    /// How often a request is repeated that was turned away (status 429), failed (5xx), broke off or took too long, after a pause
    /// that grows; what the endpoint says in Retry-After is kept to. A row whose request fails still is left without a label.
    #[serde(default = "five")]
    #[schemars(range(min = 0, max = 20))]
    pub max_retries: u32,
    /// Price of a million tokens of prompts, in whatever currency. Absent: cost is not reckoned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_token_price: Option<Decimal>,
    /// Price of a million tokens of answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_token_price: Option<Decimal>,
    /// Once this is spent, earlier attempts of the job included, no more rows are asked about; requests under way are waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum_cost: Option<Decimal>,
}

/// Labels by `teacher.from`, whose labels have to be among `model.labels`; without those, the job's labels are the teacher's. The
/// report says how the labels are distributed, and how often the teacher disagrees with rows of the training part that have one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TeacherAnnotator {
    /// The least probability of the winning label, "0" to "1"; a row of which the teacher is less sure is left out.
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
