//! JSON of `/v1/classify` and `/v1/models`, shared by server and router.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor},
};

/// `POST /v1/classify`
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClassifyRequest {
    /// Name of the model; absent: the one that is served.
    #[serde(default)]
    pub model: Option<String>,
    pub input: Input,
    /// OpenAI clients send it; it is not used.
    #[serde(default)]
    pub user: Option<String>,
}

/// One text or a list of texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Input(pub Vec<String>);

// Written by hand because an untagged enum could not say which element is wrong.
impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Input;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Input, E> {
                Ok(Input(vec![text.to_owned()]))
            }

            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Input, E> {
                Ok(Input(vec![text]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Input, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = elements.next_element()? {
                    texts.push(text);
                }
                Ok(Input(texts))
            }
        }
        deserializer.deserialize_any(Texts)
    }
}

impl JsonSchema for Input {
    fn schema_name() -> Cow<'static, str> {
        "Input".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClassifyResponse {
    /// `list`
    pub object: String,
    pub model: String,
    pub data: Vec<ClassifyResult>,
    pub usage: Usage,
}

/// The answer to one input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClassifyResult {
    pub index: u32,
    pub label: String,
    /// Probability of `label`.
    pub score: f32,
    /// Every label, in the model's order.
    pub probabilities: Vec<LabelScore>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LabelScore {
    pub label: String,
    pub score: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub total_tokens: u64,
}

/// `GET /v1/models`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelList {
    /// `list`
    pub object: String,
    pub data: Vec<Model>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Model {
    pub id: String,
    /// `model`
    pub object: String,
    /// Seconds since the epoch.
    pub created: i64,
    pub owned_by: String,
    /// Extension, as at vLLM: the model that this adapter belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Extension: the labels of a classifier, in the order of its probabilities.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Extension: tokens of an input that are read.
    #[serde(default)]
    pub max_model_len: usize,
}
