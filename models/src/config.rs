//! `config.json` of an encoder, with Hugging Face's field names.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use crate::{families::encoders::Family, load::LoadError};

/// The fields of `config.json` that shape the model, and those that transformers wants to see again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncoderConfig {
    #[serde(default)]
    pub architectures: Vec<String>,
    pub model_type: &'static Family,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classifier_dropout: Option<f64>,
    pub max_position_embeddings: i64,
    /// BERT's alone.
    #[serde(default = "two")]
    pub type_vocab_size: i64,
    /// MPNet's alone: buckets of the distance between two tokens, each with a bias of the attention.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_attention_num_buckets: Option<i64>,
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
    /// Units and activation of a hidden layer in the head, which transformers' models do not have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub athanor_head: Option<HiddenHead>,
    /// Weights of fewer bits, in the notation of compressed-tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization_config: Option<serde_json::Value>,
}

/// A hidden layer between encoder and classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HiddenHead {
    pub units: i64,
    pub activation: HeadActivation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadActivation {
    Tanh,
    Gelu,
    Relu,
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

/// What follows the family's name in the architecture of a model with a head.
pub const CLASSIFIER: &str = "ForSequenceClassification";
pub const MASKED_LANGUAGE_MODEL: &str = "ForMaskedLM";
pub const PLAIN: &str = "Model";
/// The architecture of a head with a hidden layer.
const HIDDEN_CLASSIFIER: &str = "AthanorForSequenceClassification";
/// `problem_type` of a model whose one output is a number.
const REGRESSION: &str = "regression";
/// `problem_type` of a model whose outputs are classes of which a text has one.
const SINGLE_LABEL: &str = "single_label_classification";
/// MPNet's, where `config.json` is silent.
const DEFAULT_BUCKETS: i64 = 32;

impl EncoderConfig {
    /// Reads `config.json` of a model folder; what is no known encoder is refused by the field that says so.
    pub fn load(folder: &Path) -> Result<Self, LoadError> {
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
        let field =
            |field: &str, message: String| LoadError::Config { file: path.clone(), field: field.into(), message };
        let raw: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| field("(root)", format!("not JSON: {error}")))?;
        // Before the typed reading: a GPT-2 should be refused for what it is, not for a field it lacks.
        let family = match raw.get("model_type").and_then(|value| value.as_str()) {
            Some(name) => Family::find(name)
                .ok_or_else(|| field("model_type", format!("{name:?} is not supported, {} are", Family::known())))?,
            None => return Err(field("model_type", format!("missing; {} are supported", Family::known()))),
        };
        let is_known = |name: &str| {
            name == HIDDEN_CLASSIFIER
                || name
                    .strip_prefix(family.name)
                    .is_some_and(|kind| [PLAIN, CLASSIFIER, MASKED_LANGUAGE_MODEL, "ForPreTraining"].contains(&kind))
        };
        let architectures = raw["architectures"].as_array().into_iter().flatten();
        if let Some(other) = architectures.into_iter().find(|name| !name.as_str().is_some_and(is_known)) {
            let name = family.name;
            let known = [PLAIN, CLASSIFIER, MASKED_LANGUAGE_MODEL].map(|kind| format!("\"{name}{kind}\"")).join(", ");
            return Err(field("architectures", format!("{other} is not supported, of {name} {known} are")));
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
            ("max_position_embeddings", self.max_position_embeddings - self.first_position()),
            ("type_vocab_size", self.type_vocab_size),
            ("relative_attention_num_buckets", self.relative_buckets() / 4),
        ] {
            if value < 1 {
                return Err((name, "too small".into()));
            }
        }
        if self.hidden_size % self.num_attention_heads != 0 {
            return Err((
                "num_attention_heads",
                format!("{} does not divide hidden_size {}", self.num_attention_heads, self.hidden_size),
            ));
        }
        if !(0..self.vocab_size).contains(&self.pad_token_id) {
            return Err(("pad_token_id", format!("{} is not in the vocabulary", self.pad_token_id)));
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
        if let Some(other) = &self.problem_type
            && self.has_sequence_head()
            && ![SINGLE_LABEL, REGRESSION].contains(&other.as_str())
        {
            let message = format!("{other:?} is not supported, {SINGLE_LABEL:?} and {REGRESSION:?} are");
            return Err(("problem_type", message));
        }
        if let Some(id2label) = &self.id2label
            && id2label.keys().copied().ne(0..id2label.len() as u32)
        {
            return Err(("id2label", "the ids are not 0, 1, 2, ... without a gap".into()));
        }
        Ok(())
    }

    /// Row of the position embeddings that the first token gets.
    pub fn first_position(&self) -> i64 {
        if self.model_type.positions_follow_padding { self.pad_token_id + 1 } else { 0 }
    }

    /// Tokens of the longest text.
    pub fn max_length(&self) -> usize {
        (self.max_position_embeddings - self.first_position()).try_into().unwrap_or(0)
    }

    pub(crate) fn relative_buckets(&self) -> i64 {
        self.relative_attention_num_buckets.unwrap_or(DEFAULT_BUCKETS)
    }

    /// Class names in the order of the outputs, if this is a classifier's configuration. Hugging Face writes placeholder
    /// labels (`LABEL_0`) into models without a head as well, so the architecture decides.
    pub fn labels(&self) -> Option<Vec<String>> {
        if !self.has_sequence_head() || self.is_regression() {
            return None;
        }
        self.id2label.as_ref().map(|labels| labels.values().cloned().collect())
    }

    /// Whether the head gives one number for a text.
    pub fn is_regression(&self) -> bool {
        self.has_sequence_head() && self.problem_type.as_deref() == Some(REGRESSION)
    }

    /// Whether the folder has a trained head for texts, of classes or of a number.
    pub fn has_sequence_head(&self) -> bool {
        let own = format!("{}{CLASSIFIER}", self.model_type.name);
        self.architectures.iter().any(|name| *name == own || name == HIDDEN_CLASSIFIER)
    }

    /// The same encoder with a head for these labels.
    pub fn with_labels(mut self, labels: &[String]) -> Self {
        self.id2label = Some((0..).zip(labels.iter().cloned()).collect());
        self.label2id = Some(labels.iter().cloned().zip(0..).collect());
        self.problem_type = Some(SINGLE_LABEL.into());
        self.with_sequence_head()
    }

    /// The same encoder with a head for one number.
    pub fn with_regression(mut self) -> Self {
        self.id2label = Some([(0, "LABEL_0".to_owned())].into());
        self.label2id = Some([("LABEL_0".to_owned(), 0)].into());
        self.problem_type = Some(REGRESSION.into());
        self.with_sequence_head()
    }

    fn with_sequence_head(mut self) -> Self {
        self.architectures = vec![match self.athanor_head {
            Some(_) => HIDDEN_CLASSIFIER.into(),
            None => format!("{}{CLASSIFIER}", self.model_type.name),
        }];
        self
    }

    /// The same encoder as another architecture: [`PLAIN`] or [`MASKED_LANGUAGE_MODEL`].
    pub fn with_architecture(mut self, kind: &str) -> Self {
        self.architectures = vec![format!("{}{kind}", self.model_type.name)];
        (self.id2label, self.label2id, self.problem_type) = (None, None, None);
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
    use crate::families::encoders::MPNET;

    fn load(edit: impl FnOnce(&mut serde_json::Value)) -> Result<EncoderConfig, LoadError> {
        let mut config = serde_json::json!({
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32, "id2label": {"0": "LABEL_0"},
        });
        edit(&mut config);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        EncoderConfig::load(folder.path())
    }

    #[test]
    fn labels_are_a_classifiers_alone() {
        let config = load(|_| ()).unwrap();
        assert_eq!(config.labels(), None);
        let labels: Vec<String> = (0..12).map(|i| format!("l{i}")).collect();
        let config = config.with_labels(&labels);
        let again: EncoderConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.labels().unwrap(), labels, "ids are numbers, not text: 10 comes after 9");
        let number = again.clone().with_regression();
        assert!(number.is_regression() && number.labels().is_none());
        assert_eq!(again.with_architecture(PLAIN).architectures, ["BertModel"]);
    }

    #[test]
    fn mpnet_counts_positions_behind_its_padding() {
        let config = load(|c| {
            c["model_type"] = "mpnet".into();
            c["architectures"] = serde_json::json!(["MPNetModel"]);
            c["pad_token_id"] = 1.into();
        })
        .unwrap();
        assert_eq!((config.model_type, config.first_position(), config.max_length()), (&MPNET, 2, 30));
        assert_eq!(serde_json::to_value(&config).unwrap()["model_type"], "mpnet");
    }

    #[test]
    fn what_is_no_encoder_is_refused_by_field() {
        type Edit = fn(&mut serde_json::Value);
        let cases: [(&str, Edit); 8] = [
            ("model_type", |c| c["model_type"] = "gpt2".into()),
            ("model_type", |c| drop(c.as_object_mut().unwrap().remove("model_type"))),
            ("architectures", |c| c["architectures"] = serde_json::json!(["MPNetModel"])),
            ("num_attention_heads", |c| c["num_attention_heads"] = 3.into()),
            ("position_embedding_type", |c| c["position_embedding_type"] = "relative_key".into()),
            ("hidden_dropout_prob", |c| c["hidden_dropout_prob"] = 1.5.into()),
            ("pad_token_id", |c| c["pad_token_id"] = 100.into()),
            ("problem_type", |c| {
                c["architectures"] = serde_json::json!(["BertForSequenceClassification"]);
                c["problem_type"] = "multi_label_classification".into();
            }),
        ];
        for (field, edit) in cases {
            let error = load(edit).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(field), "{error}");
        }
    }
}
