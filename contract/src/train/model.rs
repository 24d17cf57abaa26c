//! The model to start from and what it shall do.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;

/// The model to start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// A folder with config.json, model.safetensors and tokenizer.json: s3://, gs://, az://, file://, in a cluster pvc://CLAIM/PATH
    /// (a plain model folder or an Athanor artifact). BERT and MPNet encoders. Pickled weights are refused.
    #[schemars(
        length(min = 1, max = 2048),
        regex(pattern = r"^((s3|gs|az|http|https|file)://|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?/).+")
    )]
    pub from: String,
    /// What the model learns to do.
    pub task: Task,
    /// Class names in the order of the model's outputs. Absent: the labels found in the data, sorted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 1024), inner(length(min = 1, max = 256)))]
    pub labels: Option<Vec<String>>,
    /// Shape of the head. Absent: as transformers has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadSpec>,
    /// Makes the model a smaller one before training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub student: Option<StudentSpec>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Task {
    /// One label for each text; the loss is cross entropy.
    TextClassification,
    /// One number for each text; the loss is the squared error.
    TextRegression,
    /// The tokens that were masked: adapts an encoder to the language of a domain, without labels.
    MaskedLanguageModel,
    /// One vector for each text, by mean pooling; the loss is contrastive over pairs of texts.
    Embedding,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeadSpec {
    /// Units of a hidden layer between encoder and outputs. Absent: the head that transformers' models have, which transformers
    /// loads; it has none with a layer of another size.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub hidden_units: Option<u32>,
    /// Of the hidden layer.
    pub activation: HeadActivation,
    /// Dropout before the head's layers. Absent: the encoder's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: Option<f64>,
    /// How the head's weights begin.
    pub initializer: Initializer,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HeadActivation {
    #[default]
    Tanh,
    GELU,
    ReLU,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Initializer {
    /// Normal with the deviation that config.json names (0.02), as transformers does.
    #[default]
    Normal,
    XavierUniform,
    KaimingUniform,
}

/// A smaller model: exactly one of `keepLayers` and `fresh`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::KEEP_LAYERS_OR_FRESH]))]
pub struct StudentSpec {
    /// Layers of model.from that the student keeps, counted from 0, in this order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128), inner(range(min = 0, max = 1023)))]
    pub keep_layers: Option<Vec<u32>>,
    /// An encoder that begins at random, with the vocabulary of model.from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fresh: Option<FreshEncoder>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::HEADS_DIVIDE_SIZE]))]
pub struct FreshEncoder {
    /// Transformer layers.
    #[schemars(range(min = 1, max = 128))]
    pub layers: u32,
    /// Units of a hidden state.
    #[schemars(range(min = 8, max = 8192))]
    pub hidden_size: u32,
    /// Heads of each layer's attention.
    #[schemars(range(min = 1, max = 128))]
    pub attention_heads: u32,
    /// Units between a layer's two products.
    #[schemars(range(min = 8, max = 32768))]
    pub intermediate_size: u32,
}
