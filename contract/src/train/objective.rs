//! What is minimised, and the teacher that is learned from.

use std::borrow::Cow;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Task, rules::Rule};

/// A trained model whose outputs the model learns from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TeacherSpec {
    /// Folder of a model that was trained for the same task and labels, such as another job's artifact.
    #[schemars(
        length(min = 1, max = 2048),
        regex(pattern = r"^((s3|gs|az|http|https|file)://|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?/).+")
    )]
    pub from: String,
    /// When the teacher's outputs are computed. Absent: once where they are small (they are then kept next to the
    /// output, for later epochs, restarts and trials), otherwise at each step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs: Option<TeacherOutputs>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TeacherOutputs {
    /// Outputs are computed once, before training.
    Cached,
    /// Outputs are computed at each step; hiddenState terms require it.
    Online,
}

/// What is minimised: the weighted sum of the terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectiveSpec {
    /// Terms of the sum. Absent: the task's own loss; with a teacher and the task TextClassification or
    /// MaskedLanguageModel half of it and half soft labels at temperature 2, with the task Embedding also the squared
    /// error between the vectors.
    #[schemars(length(max = 16))]
    pub terms: Vec<ObjectiveTermSpec>,
}

impl ObjectiveSpec {
    pub(super) fn is_default(&self) -> bool {
        self.terms.is_empty()
    }

    /// The terms that a training minimises, with the defaults of the task. An entry that is not exactly one kind of
    /// term is skipped; [`mistakes`](super::mistakes) reports it.
    pub fn terms_of(&self, task: Task, has_teacher: bool) -> Vec<WeightedTerm> {
        if !self.terms.is_empty() {
            return self.terms.iter().filter_map(ObjectiveTermSpec::parse).collect();
        }
        let own = match task {
            Task::TextClassification => ObjectiveTerm::CrossEntropy(Default::default()),
            Task::TextRegression => ObjectiveTerm::MeanSquaredError,
            Task::MaskedLanguageModel => ObjectiveTerm::MaskedLanguageModel(Default::default()),
            Task::Embedding => ObjectiveTerm::Contrastive(Default::default()),
            Task::CausalLanguageModel => ObjectiveTerm::NextToken,
        };
        let (own_weight, of_teacher) = match task {
            Task::TextClassification | Task::MaskedLanguageModel if has_teacher => {
                let soft_label = ObjectiveTerm::SoftLabel(Default::default());
                (DISTILLATION.0, Some(WeightedTerm { weight: DISTILLATION.1, term: soft_label }))
            }
            Task::Embedding if has_teacher => {
                (1.0, Some(WeightedTerm { weight: 1.0, term: ObjectiveTerm::MeanSquaredError }))
            }
            _ => (1.0, None),
        };
        [WeightedTerm { weight: own_weight, term: own }].into_iter().chain(of_teacher).collect()
    }

    /// Whether a term compares hidden states with the teacher's, token by token.
    pub fn compares_hidden_states(&self) -> bool {
        self.terms.iter().any(|term| term.hidden_state.is_some())
    }
}

/// Weights of the task's own loss and of soft labels where `objective.terms` is absent and there is a teacher.
const DISTILLATION: (f64, f64) = (0.5, 0.5);

/// A kind of term with its settings: what [`ObjectiveTermSpec`] says in seven options.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ObjectiveTerm {
    CrossEntropy(CrossEntropyTerm),
    MeanSquaredError,
    SoftLabel(SoftLabelTerm),
    HiddenState(HiddenStateTerm),
    MaskedLanguageModel(MaskedLanguageModelTerm),
    Contrastive(ContrastiveTerm),
    NextToken,
}

impl ObjectiveTerm {
    /// The kind's name as manifests have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::CrossEntropy(_) => "crossEntropy",
            Self::MeanSquaredError => "meanSquaredError",
            Self::SoftLabel(_) => "softLabel",
            Self::HiddenState(_) => "hiddenState",
            Self::MaskedLanguageModel(_) => "maskedLanguageModel",
            Self::Contrastive(_) => "contrastive",
            Self::NextToken => "nextToken",
        }
    }

    /// Whether the term compares the model with a teacher.
    pub fn needs_teacher(&self, task: Task) -> bool {
        match self {
            Self::SoftLabel(_) | Self::HiddenState(_) => true,
            Self::MeanSquaredError => task != Task::TextRegression,
            Self::CrossEntropy(_) | Self::MaskedLanguageModel(_) | Self::Contrastive(_) | Self::NextToken => false,
        }
    }
}

/// A term and the factor it has in the sum.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedTerm {
    pub weight: f64,
    pub term: ObjectiveTerm,
}

impl WeightedTerm {
    /// See [`ObjectiveTerm::name`].
    pub fn name(&self) -> &'static str {
        self.term.name()
    }
}

/// One term of the objective: exactly one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [exactly_one_kind()]))]
pub struct ObjectiveTermSpec {
    /// Factor of the term in the sum.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub weight: f64,
    /// Cross entropy between the model's outputs and the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross_entropy: Option<CrossEntropyTerm>,
    /// Squared error: for TextRegression between the output and the label's number; for TextClassification between the
    /// logits of student and teacher; for Embedding between their vectors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_squared_error: Option<NoSettings>,
    /// Divergence between the probabilities of student and teacher (Hinton et al. 2015).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_label: Option<SoftLabelTerm>,
    /// Distance between hidden states of student and teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden_state: Option<HiddenStateTerm>,
    /// Cross entropy of masked tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masked_language_model: Option<MaskedLanguageModelTerm>,
    /// Cross entropy of a text's own pair against the other pairs of the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contrastive: Option<ContrastiveTerm>,
    /// Cross entropy of each next token: of the assistant's messages, the completion, or the whole text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_token: Option<NoSettings>,
}

impl ObjectiveTermSpec {
    /// The kinds in the order of the options. This is the only place that lists the options; the CEL rule follows from
    /// it.
    pub(super) fn kinds(&self) -> [(&'static str, Option<ObjectiveTerm>); 7] {
        [
            ("crossEntropy", self.cross_entropy.map(ObjectiveTerm::CrossEntropy)),
            ("meanSquaredError", self.mean_squared_error.map(|NoSettings {}| ObjectiveTerm::MeanSquaredError)),
            ("softLabel", self.soft_label.map(ObjectiveTerm::SoftLabel)),
            ("hiddenState", self.hidden_state.clone().map(ObjectiveTerm::HiddenState)),
            ("maskedLanguageModel", self.masked_language_model.map(ObjectiveTerm::MaskedLanguageModel)),
            ("contrastive", self.contrastive.map(ObjectiveTerm::Contrastive)),
            ("nextToken", self.next_token.map(|NoSettings {}| ObjectiveTerm::NextToken)),
        ]
    }

    /// The term; `None` unless it is exactly one kind.
    pub fn parse(&self) -> Option<WeightedTerm> {
        let mut kinds = self.kinds().into_iter().filter_map(|(_, term)| term);
        let term = kinds.next()?;
        kinds.next().is_none().then_some(WeightedTerm { weight: self.weight, term })
    }

    /// A term of no kind, which `kinds` gives the names of.
    pub(super) fn empty() -> Self {
        Self {
            weight: one(),
            cross_entropy: None,
            mean_squared_error: None,
            soft_label: None,
            hidden_state: None,
            masked_language_model: None,
            contrastive: None,
            next_token: None,
        }
    }
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
    /// Share of the target probability that is spread evenly over all labels.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub label_smoothing: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SoftLabelTerm {
    /// Divisor of the logits of student and teacher. The term is multiplied by its square, so that gradients keep their
    /// size.
    #[schemars(range(min = 0.1, max = 100.0))]
    pub temperature: f64,
    /// Divergence between the two distributions.
    pub divergence: Divergence,
}

impl Default for SoftLabelTerm {
    fn default() -> Self {
        Self { temperature: 2.0, divergence: Divergence::ForwardKL }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Divergence {
    /// KL(teacher || student): the student covers everything that the teacher finds possible.
    #[default]
    ForwardKL,
    /// KL(student || teacher): the student concentrates on what the teacher finds likely.
    ReverseKL,
    /// Jensen-Shannon divergence: the mean KL of both against their mixture; symmetric and bounded.
    JensenShannon,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HiddenStateTerm {
    /// Pairs of layers whose hidden states are compared: 0 is the input of the first layer, n the output of the n-th.
    #[schemars(length(min = 1, max = 128))]
    pub layers: Vec<LayerPair>,
    /// Distance between two hidden states.
    #[serde(default)]
    pub loss: HiddenStateLoss,
    /// Whether a learned matrix projects the student's states to the teacher's width. Required where the widths differ;
    /// the matrix is not part of the artifact.
    #[serde(default)]
    pub projection: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LayerPair {
    /// Index of the student's layer.
    #[schemars(range(min = 0, max = 128))]
    pub student: u32,
    /// Index of the teacher's layer.
    #[schemars(range(min = 0, max = 128))]
    pub teacher: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HiddenStateLoss {
    /// Mean squared error.
    #[default]
    MSE,
    /// One minus the cosine similarity of a token's two states.
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MaskedLanguageModelTerm {
    /// Share of the tokens that are predicted. Of these 80 % are replaced by the mask token, 10 % by another token, and
    /// 10 % stay (Devlin et al. 2019).
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
    /// Divisor of the cosine similarities before the cross entropy.
    #[schemars(range(min = 0.001, max = 10.0))]
    pub temperature: f64,
}

impl Default for ContrastiveTerm {
    fn default() -> Self {
        Self { temperature: 0.05 }
    }
}

/// A term has exactly one kind. Both texts list the options of [`ObjectiveTermSpec`].
pub fn exactly_one_kind() -> Rule {
    let names = ObjectiveTermSpec::empty().kinds().map(|(name, _)| name);
    let given = names.map(|name| format!("has(self.{name})")).join(", ");
    let (last, others) = names.split_last().expect("there are kinds");
    Rule {
        rule: Cow::Owned(format!("[{given}].filter(b, b).size() == 1")),
        message: Cow::Owned(format!("set exactly one of {} and {last}", others.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_term_is_exactly_one_kind_and_keeps_its_name() {
        let mut fields: Vec<String> =
            serde_json::to_value(schemars::schema_for!(ObjectiveTermSpec)).unwrap()["properties"]
                .as_object()
                .unwrap()
                .keys()
                .filter(|name| *name != "weight")
                .cloned()
                .collect();
        let mut names: Vec<&str> = Vec::new();
        for (name, _) in ObjectiveTermSpec::empty().kinds() {
            let settings = if name == "hiddenState" { json!({"layers": []}) } else { json!({}) };
            let spec: ObjectiveTermSpec = serde_json::from_value(json!({"weight": 2.0, name: settings})).unwrap();
            let term = spec.parse().unwrap();
            assert_eq!((term.weight, term.name()), (2.0, name));
            let written = serde_json::to_value(&term.term).unwrap();
            assert!(written == *name || written.get(name).is_some(), "{written}");
            names.push(name);
        }
        fields.sort();
        names.sort_unstable();
        assert_eq!(fields, names, "each option is a kind");
        for text in ["{}", r#"{"crossEntropy": {}, "softLabel": {}}"#] {
            assert_eq!(serde_json::from_str::<ObjectiveTermSpec>(text).unwrap().parse(), None, "{text}");
        }
    }

    #[test]
    fn defaults_are_the_tasks_own_loss_and_half_of_it_beside_a_teacher() {
        let names = |task, has_teacher| -> Vec<(f64, &str)> {
            let terms = ObjectiveSpec::default().terms_of(task, has_teacher);
            terms.iter().map(|term| (term.weight, term.name())).collect()
        };
        assert_eq!(names(Task::TextClassification, false), [(1.0, "crossEntropy")]);
        assert_eq!(names(Task::TextClassification, true), [(0.5, "crossEntropy"), (0.5, "softLabel")]);
        assert_eq!(names(Task::MaskedLanguageModel, true), [(0.5, "maskedLanguageModel"), (0.5, "softLabel")]);
        assert_eq!(names(Task::TextRegression, true), [(1.0, "meanSquaredError")]);
        assert_eq!(names(Task::Embedding, true), [(1.0, "contrastive"), (1.0, "meanSquaredError")]);
    }
}
