//! `config.json` of a BERT model, with Hugging Face's field names.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use crate::load::LoadError;

/// The fields of `config.json` that shape the model, and those that transformers wants to see again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BertConfig {
    #[serde(default)]
    pub architectures: Vec<String>,
    pub model_type: String,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub intermediate_size: i64,
    #[serde(default)]
    pub hidden_act: Activation,
    #[serde(default = "tenth")]
    pub hidden_dropout_prob: f64,
    #[serde(default = "tenth")]
    pub attention_probs_dropout_prob: f64,
    /// Dropout before the classification layer; absent: `hidden_dropout_prob`.
    #[serde(default)]
    pub classifier_dropout: Option<f64>,
    pub max_position_embeddings: i64,
    #[serde(default = "two")]
    pub type_vocab_size: i64,
    #[serde(default = "initializer_range")]
    pub initializer_range: f64,
    #[serde(default = "layer_norm_eps")]
    pub layer_norm_eps: f64,
    #[serde(default)]
    pub pad_token_id: i64,
    #[serde(default = "absolute")]
    pub position_embedding_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id2label: Option<BTreeMap<u32, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label2id: Option<BTreeMap<String, u32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem_type: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Exact, by the error function.
    #[default]
    Gelu,
    /// The approximation by tanh.
    GeluNew,
    Relu,
}

fn tenth() -> f64 {
    0.1
}

fn two() -> i64 {
    2
}

fn initializer_range() -> f64 {
    0.02
}

fn layer_norm_eps() -> f64 {
    1e-12
}

fn absolute() -> String {
    "absolute".into()
}

/// Name of the architecture with a classification head.
const CLASSIFIER: &str = "BertForSequenceClassification";

impl BertConfig {
    /// Reads `config.json` of a model folder; what is not a BERT is refused by the field that says so.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
        let field =
            |field: &str, message: String| LoadError::Config { file: path.clone(), field: field.into(), message };
        let raw: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| field("(root)", format!("not JSON: {error}")))?;
        // Before the typed reading: a GPT-2 should be refused for what it is, not for a field it lacks.
        match raw.get("model_type").and_then(|value| value.as_str()) {
            Some("bert") => {}
            Some(other) => return Err(field("model_type", format!("{other:?} is not supported, \"bert\" is"))),
            None => return Err(field("model_type", "missing; \"bert\" is supported".into())),
        }
        if let Some(other) = raw["architectures"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|name| !name.as_str().is_some_and(|name| name.starts_with("Bert")))
        {
            return Err(field(
                "architectures",
                format!("{other} is not supported, \"BertModel\" and \"{CLASSIFIER}\" are"),
            ));
        }
        let config: Self = serde_json::from_value(raw).map_err(|error| field("(root)", error.to_string()))?;
        config.check().map_err(|(name, message)| field(name, message))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ] {
            if value < 1 {
                return Err((name, format!("{value} must be at least 1")));
            }
        }
        if self.hidden_size % self.num_attention_heads != 0 {
            return Err((
                "num_attention_heads",
                format!("{} does not divide hidden_size {}", self.num_attention_heads, self.hidden_size),
            ));
        }
        if self.position_embedding_type != "absolute" {
            return Err((
                "position_embedding_type",
                format!("{:?} is not supported, \"absolute\" is", self.position_embedding_type),
            ));
        }
        for (name, value) in [
            ("hidden_dropout_prob", Some(self.hidden_dropout_prob)),
            ("attention_probs_dropout_prob", Some(self.attention_probs_dropout_prob)),
            ("classifier_dropout", self.classifier_dropout),
        ] {
            if value.is_some_and(|value| !(0.0..1.0).contains(&value)) {
                return Err((name, format!("{value:?} is not in [0, 1)")));
            }
        }
        if let Some(id2label) = &self.id2label
            && id2label.keys().copied().ne(0..id2label.len() as u32)
        {
            return Err(("id2label", "the ids are not 0, 1, 2, ... without a gap".into()));
        }
        Ok(())
    }

    /// Class names in the order of the outputs, if this is a classifier's configuration. Hugging Face writes placeholder
    /// labels (`LABEL_0`) into models without a head as well, so the architecture decides.
    pub fn labels(&self) -> Option<Vec<String>> {
        if !self.architectures.iter().any(|name| name == CLASSIFIER) {
            return None;
        }
        self.id2label.as_ref().map(|labels| labels.values().cloned().collect())
    }

    /// The same encoder with a head for these labels.
    pub fn with_labels(mut self, labels: &[String]) -> Self {
        self.architectures = vec![CLASSIFIER.into()];
        self.id2label = Some((0..).zip(labels.iter().cloned()).collect());
        self.label2id = Some(labels.iter().cloned().zip(0..).collect());
        self.problem_type = Some("single_label_classification".into());
        self
    }

    /// Dropout before the classification layer.
    pub fn head_dropout(&self) -> f64 {
        self.classifier_dropout.unwrap_or(self.hidden_dropout_prob)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(edit: impl FnOnce(&mut serde_json::Value)) -> Result<BertConfig, LoadError> {
        let mut config = serde_json::json!({
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32, "id2label": {"0": "LABEL_0"},
        });
        edit(&mut config);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        BertConfig::load(folder.path())
    }

    #[test]
    fn labels_are_a_classifiers_alone() {
        let config = load(|_| ()).unwrap();
        assert_eq!(config.labels(), None);
        let labels: Vec<String> = (0..12).map(|i| format!("l{i}")).collect();
        let config = config.with_labels(&labels);
        let again: BertConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.labels().unwrap(), labels, "ids are numbers, not text: 10 comes after 9");
    }

    #[test]
    fn what_is_no_bert_is_refused_by_field() {
        type Edit = fn(&mut serde_json::Value);
        let cases: [(&str, Edit); 6] = [
            ("model_type", |c| c["model_type"] = "gpt2".into()),
            ("model_type", |c| drop(c.as_object_mut().unwrap().remove("model_type"))),
            ("architectures", |c| c["architectures"] = serde_json::json!(["MPNetModel"])),
            ("num_attention_heads", |c| c["num_attention_heads"] = 3.into()),
            ("position_embedding_type", |c| c["position_embedding_type"] = "relative_key".into()),
            ("hidden_dropout_prob", |c| c["hidden_dropout_prob"] = 1.5.into()),
        ];
        for (field, edit) in cases {
            let error = load(edit).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(field), "{error}");
        }
    }
}
