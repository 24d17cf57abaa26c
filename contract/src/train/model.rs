//! The model to start from, its task, its head and its size.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;

/// The model to start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Folder with config.json, safetensors (one file or several with an index) and tokenizer.json: a plain Hugging Face
    /// folder or an Athanor artifact, at s3://, gs://, az://, https://, file://, or in a cluster pvc://CLAIM/PATH. For
    /// CausalLanguageModel also a folder with one GGUF file. Supported families: BERT and MPNet; for
    /// CausalLanguageModel GPT-2, Llama 2 and 3, Mistral, Qwen2, Qwen2.5, Qwen3 and SmolLM. Pickled weights are refused.
    #[schemars(
        length(min = 1, max = 2048),
        regex(pattern = r"^((s3|gs|az|http|https|file)://|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?/).+")
    )]
    pub from: String,
    /// Task that the model is trained for.
    pub task: Task,
    /// Class names in the order of the model's outputs. Absent: the labels of model.from if they include all labels of
    /// the data, otherwise the labels of the data, sorted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 1024), inner(length(min = 1, max = 256)))]
    pub labels: Option<Vec<String>>,
    /// Shape of the head. Absent: the head that transformers has for the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadSpec>,
    /// Smaller model that is made from model.from before training. Absent: the whole model is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub student: Option<StudentSpec>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Task {
    /// Predicts one label for each text; the loss is cross entropy.
    TextClassification,
    /// Predicts one number for each text; the loss is the squared error.
    TextRegression,
    /// Predicts masked tokens: adapts an encoder to the language of a domain, without labels.
    MaskedLanguageModel,
    /// Computes one vector for each text by mean pooling; the loss is contrastive over pairs of texts.
    Embedding,
    /// Generates text: predicts each next token. Rows are conversations, prompts with completions, or plain texts.
    CausalLanguageModel,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeadSpec {
    /// Number of units in a hidden layer between encoder and outputs. Absent: the head that transformers has;
    /// transformers cannot load a head with a hidden layer of another size.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub hidden_units: Option<u32>,
    /// Activation function of the hidden layer.
    pub activation: HeadActivation,
    /// Dropout probability before the head's layers. Absent: the encoder's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: Option<f64>,
    /// Distribution that the head's initial weights are drawn from.
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
    /// Normal distribution with the standard deviation that config.json gives (default 0.02), as in transformers.
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
    /// Indices, from 0, of the layers of model.from that the student keeps, in this order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128), inner(range(min = 0, max = 1023)))]
    pub keep_layers: Option<Vec<u32>>,
    /// Encoder with random initial weights and the vocabulary of model.from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fresh: Option<FreshEncoder>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [rules::HEADS_DIVIDE_SIZE]))]
pub struct FreshEncoder {
    /// Number of transformer layers.
    #[schemars(range(min = 1, max = 128))]
    pub layers: u32,
    /// Number of units in a hidden state; a multiple of attentionHeads.
    #[schemars(range(min = 8, max = 8192))]
    pub hidden_size: u32,
    /// Number of attention heads in each layer.
    #[schemars(range(min = 1, max = 128))]
    pub attention_heads: u32,
    /// Number of units in each layer's feed-forward network.
    #[schemars(range(min = 8, max = 32768))]
    pub intermediate_size: u32,
}
