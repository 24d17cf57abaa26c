//! What is minimised, and the teacher that is learned from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A trained model whose answers are learned from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TeacherSpec {
    /// A folder of a model trained for the same task and labels, such as another job's artifact.
    #[schemars(
        length(min = 1, max = 2048),
        regex(pattern = r"^((s3|gs|az|http|https|file)://|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?/).+")
    )]
    pub from: String,
    /// Absent: computed once where they are small and kept beside the output, for later epochs, restarts and trials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs: Option<TeacherOutputs>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TeacherOutputs {
    /// Computed once before training.
    Cached,
    /// Computed at each step; what hiddenState terms need.
    Online,
}

/// What is minimised: the weighted sum of the terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectiveSpec {
    /// Absent: the task's own loss, and with a teacher half of it and half soft labels at temperature 2.
    #[schemars(length(max = 16))]
    pub terms: Vec<ObjectiveTerm>,
}

impl ObjectiveSpec {
    pub(super) fn is_default(&self) -> bool {
        self.terms.is_empty()
    }
}

/// One term of the objective: exactly one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "[has(self.crossEntropy), has(self.meanSquaredError), has(self.softLabel), has(self.hiddenState), has(self.maskedLanguageModel), has(self.contrastive)].filter(b, b).size() == 1",
     "message": "a term is exactly one of crossEntropy, meanSquaredError, softLabel, hiddenState, maskedLanguageModel and contrastive"}]))]
pub struct ObjectiveTerm {
    /// Factor of the term.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub weight: f64,
    /// Between the outputs and the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross_entropy: Option<CrossEntropyTerm>,
    /// Between the output and the label's number; with classes between the student's and the teacher's logits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_squared_error: Option<NoSettings>,
    /// Between the student's and the teacher's probabilities (Hinton et al. 2015).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_label: Option<SoftLabelTerm>,
    /// Between hidden states of student and teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_state: Option<HiddenStateTerm>,
    /// Cross entropy of masked tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masked_language_model: Option<MaskedLanguageModelTerm>,
    /// The pair of a text against the other pairs of the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contrastive: Option<ContrastiveTerm>,
}

fn one() -> f64 {
    1.0
}

/// A kind of term without settings: `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NoSettings {}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CrossEntropyTerm {
    /// Share of the probability that is spread over all labels.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub label_smoothing: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SoftLabelTerm {
    /// Both logits are divided by it, and the term multiplied by its square, so that gradients keep their size.
    #[schemars(range(min = 0.1, max = 100.0))]
    pub temperature: f64,
    /// Which way the distance is measured.
    pub divergence: Divergence,
}

impl Default for SoftLabelTerm {
    fn default() -> Self {
        Self { temperature: 2.0, divergence: Divergence::ForwardKL }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Divergence {
    /// KL(teacher || student): the student covers all that the teacher thinks possible.
    #[default]
    ForwardKL,
    /// KL(student || teacher): the student keeps to what the teacher thinks likely.
    ReverseKL,
    /// The mean of both against their mixture: symmetric and bounded.
    JensenShannon,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HiddenStateTerm {
    /// Which states are compared; 0 is what the first layer reads, n what the n-th puts out.
    #[schemars(length(min = 1, max = 128))]
    pub layers: Vec<LayerPair>,
    /// How far two states are apart.
    #[serde(default)]
    pub loss: HiddenStateLoss,
    /// A learned matrix between the two widths. Needed where they differ; not part of the result.
    #[serde(default)]
    pub projection: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LayerPair {
    /// Layer of the student.
    #[schemars(range(min = 0, max = 128))]
    pub student: u32,
    /// Layer of the teacher.
    #[schemars(range(min = 0, max = 128))]
    pub teacher: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HiddenStateLoss {
    #[default]
    MSE,
    /// One minus the cosine of the two vectors of a token.
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MaskedLanguageModelTerm {
    /// Share of the tokens to predict: of these 80 % become the mask, 10 % another token, 10 % stay (Devlin et al. 2019).
    #[schemars(range(min = 0.01, max = 0.9))]
    pub probability: f64,
}

impl Default for MaskedLanguageModelTerm {
    fn default() -> Self {
        Self { probability: 0.15 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ContrastiveTerm {
    /// Cosines are divided by it before the cross entropy.
    #[schemars(range(min = 0.001, max = 10.0))]
    pub temperature: f64,
}

impl Default for ContrastiveTerm {
    fn default() -> Self {
        Self { temperature: 0.05 }
    }
}
