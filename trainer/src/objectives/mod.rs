//! What is minimised: the weighted sum of the terms of `objective.terms`, with or without a teacher.
//!
//! - [`terms`]: each term as a function of tensors;
//! - [`masking`]: which tokens a masked language model has to predict;
//! - [`teacher`]: a trained model's answers, computed once or at each step.
//!
//! A term's value is a sum over the rows of a batch: the caller divides by the rows of the global batch, so that N ranks and any
//! accumulation give the gradients of one rank.

pub mod masking;
pub mod teacher;
pub mod terms;

use athanor_contract::train::{HiddenStateTerm, MaskedLanguageModelTerm, ObjectiveTerm, Task, WeightedTerm};
use athanor_models::Model;
use athanor_torch::{Autocast, ProcessGroup};
use tch::{Device, Kind, Tensor};

pub use teacher::Teacher;

use self::masking::Masked;
use crate::{
    TrainError,
    data::{Encoded, batches::inputs},
};

/// The terms of a job, with what they learn besides the model.
pub struct Objective {
    task: Task,
    terms: Vec<WeightedTerm>,
    /// Of hiddenState terms, by term and pair: [C of the teacher, C of the student]. Trained, and thrown away at the end.
    projections: Vec<(String, Tensor)>,
}

/// Rows of one forward pass, and the global batch that they are a part of.
pub struct Part<'a> {
    pub train: &'a Encoded,
    pub rows: &'a [usize],
    /// Rows of the whole optimizer step, over all ranks.
    pub batch: &'a [usize],
    /// 0 for a rank without rows of its own, which computes one that counts nothing.
    pub weight: f64,
    /// Of this step; the same on all ranks.
    pub seed: u64,
    pub group: Option<&'a ProcessGroup>,
    pub device: Device,
    pub bf16: bool,
}

impl Objective {
    /// The terms as they apply to a model and its teacher.
    ///
    /// # Errors
    /// Layers that a model does not have, and widths that differ without a projection, are the user's to mend.
    pub fn new(
        terms: Vec<WeightedTerm>,
        task: Task,
        model: &Model,
        teacher: Option<&Teacher>,
        seed: u64,
        device: Device,
    ) -> Result<Self, TrainError> {
        let mut projections = Vec::new();
        let user = |index: usize, message: String| TrainError::User(format!("objective.terms[{index}]: {message}"));
        for (index, term) in terms.iter().enumerate() {
            let compares_vectors = task == Task::Embedding && term.term == ObjectiveTerm::MeanSquaredError;
            if let Some(teacher) = teacher.and_then(Teacher::config).filter(|_| compares_vectors) {
                let (own, wanted) = (model.config().hidden_size, teacher.hidden_size);
                if own != wanted {
                    return Err(user(
                        index,
                        format!(
                            "the student's vectors have {own} numbers, the teacher's {wanted}: meanSquaredError compares them one by one"
                        ),
                    ));
                }
            }
            let ObjectiveTerm::HiddenState(hidden) = &term.term else { continue };
            let Some(teacher) = teacher.and_then(Teacher::config) else {
                return Err(user(index, "hiddenState needs a teacher whose outputs are Online".into()));
            };
            let config = model.config();
            for pair in &hidden.layers {
                for (whose, layer, config) in [("student", pair.student, config), ("teacher", pair.teacher, teacher)] {
                    if layer as usize > config.num_hidden_layers {
                        let layers = config.num_hidden_layers;
                        return Err(user(index, format!("the {whose} has no layer {layer}, it has {layers}")));
                    }
                }
            }
            let (own, wanted) = (config.hidden_size, teacher.hidden_size);
            if !hidden.projection && own != wanted {
                let widths = format!("the student's hidden states have {own} units, the teacher's {wanted}");
                return Err(user(index, format!("{widths}: hiddenState needs projection: true")));
            }
            if hidden.projection {
                projections.extend((0..hidden.layers.len()).map(|pair| {
                    (
                        format!("objective.{index}.projection.{pair}"),
                        projection(wanted, own, seed, index + pair, device),
                    )
                }));
            }
        }
        Ok(Self { task, terms, projections })
    }

    /// What is trained besides the model.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.projections
    }

    pub fn terms(&self) -> &[WeightedTerm] {
        &self.terms
    }

    /// The value of each term without its weight, a sum over the part's rows (FP32, with gradients).
    pub fn values(&self, model: &Model, teacher: Option<&Teacher>, part: &Part) -> Result<Vec<Tensor>, TrainError> {
        let _autocast = part.bf16.then(|| Autocast::bf16(part.device));
        let is_of_states = |term: &WeightedTerm| matches!(term.term, ObjectiveTerm::HiddenState(_));
        let every = self.terms.iter().any(is_of_states);
        let only_states = self.terms.iter().all(is_of_states);
        let pad_id = model.config().pad_token_id;
        let masked = match (self.task, &part.train.mask_tokens) {
            (Task::MaskedLanguageModel, Some(tokens)) => Some(Masked::new(part, tokens, self.mask_probability())),
            (Task::MaskedLanguageModel, None) => {
                return Err(TrainError::User(
                    "model.from: its tokenizer has no mask token, which the task needs".into(),
                ));
            }
            _ => None,
        };
        let texts: Vec<&[u32]> = match &masked {
            Some(masked) => masked.ids.iter().map(Vec::as_slice).collect(),
            None => part.rows.iter().map(|&row| &part.train.ids[row]).collect(),
        };
        let (ids, mask) = inputs(&texts, pad_id, part.device);
        let states = match every {
            true => model.hidden_states(&ids, mask.as_ref(), true, true),
            false => vec![model.head_states(&ids, mask.as_ref(), true)],
        };
        let last = &states[states.len() - 1];
        let of_teacher = teacher.map(|teacher| teacher.answer(part, &ids, mask.as_ref(), every, masked.as_ref()));
        let context = Context { model, part, last, mask: mask.as_ref(), masked: masked.as_ref() };
        let found = context.outputs(self.task);
        let mut projections = self.projections.iter().map(|(_, tensor)| tensor);
        self.terms
            .iter()
            .map(|term| {
                let answer = || of_teacher.as_ref().ok_or_else(|| TrainError::Other("there is no teacher".into()));
                Ok(match &term.term {
                    ObjectiveTerm::CrossEntropy(term) => {
                        terms::cross_entropy(&found, &context.labels(), term.label_smoothing)
                    }
                    ObjectiveTerm::SoftLabel(term) => {
                        let sum = terms::soft_label(&found, &answer()?.logits, term.temperature, term.divergence);
                        sum * context.per_token_factor()
                    }
                    ObjectiveTerm::HiddenState(term) => {
                        let sum = hidden_state(term, &states, &answer()?.states, mask.as_ref(), &mut projections);
                        // Where nothing else is learned, the head and the layers above have a gradient, of zeros.
                        if only_states { sum + found.sum(Kind::Float) * 0.0 } else { sum }
                    }
                    ObjectiveTerm::MaskedLanguageModel(_) => {
                        let labels = context.masked.map(|masked| masked.labels(part.device)).unwrap_or_default();
                        terms::cross_entropy(&found, &labels, 0.0) * context.per_token_factor()
                    }
                    ObjectiveTerm::Contrastive(term) => context.contrastive(&found, term.temperature)?,
                    ObjectiveTerm::MeanSquaredError => match self.task {
                        Task::TextRegression => terms::mean_squared_error(&found, &context.values()),
                        Task::Embedding => terms::mean_squared_error(&found, &answer()?.embedding()),
                        _ => terms::mean_squared_error(&found, &answer()?.logits),
                    },
                })
            })
            .collect()
    }

    /// Whether a term's value is the same on all ranks, instead of a part of the sum.
    pub fn is_shared(&self, index: usize) -> bool {
        matches!(self.terms[index].term, ObjectiveTerm::Contrastive(_))
    }

    fn mask_probability(&self) -> f64 {
        let of_term = |term: &WeightedTerm| match &term.term {
            ObjectiveTerm::MaskedLanguageModel(term) => Some(term.probability),
            _ => None,
        };
        self.terms.iter().find_map(of_term).unwrap_or_else(|| MaskedLanguageModelTerm::default().probability)
    }
}

/// One forward pass of the student.
struct Context<'a> {
    model: &'a Model,
    part: &'a Part<'a>,
    /// [B, T, C], or what the head reads of it.
    last: &'a Tensor,
    mask: Option<&'a Tensor>,
    masked: Option<&'a Masked>,
}

impl Context<'_> {
    /// What the task is about: logits of texts [B, L] or of masked tokens [N, V], numbers [B, 1], vectors [B, C].
    fn outputs(&self, task: Task) -> Tensor {
        match (task, self.masked) {
            (Task::Embedding, _) => self.model.embedding(self.last, self.mask),
            (_, Some(masked)) => self.model.vocabulary_logits(&masked.tokens(self.last)),
            _ => self.model.outputs(self.last, true),
        }
    }

    fn labels(&self) -> Tensor {
        let Part { train, rows, device, .. } = self.part;
        let labels: Vec<i64> = rows.iter().map(|&row| train.labels[row].map_or(terms::IGNORED, i64::from)).collect();
        Tensor::from_slice(&labels).to_device(*device)
    }

    fn values(&self) -> Tensor {
        let Part { train, rows, device, .. } = self.part;
        let values: Vec<f32> = rows.iter().map(|&row| train.values[row]).collect();
        Tensor::from_slice(&values).unsqueeze(1).to_device(*device)
    }

    /// Terms over masked tokens are means over the tokens of the whole batch: this turns their sums into sums over rows.
    fn per_token_factor(&self) -> f64 {
        self.masked.map_or(1.0, |masked| self.part.batch.len() as f64 / masked.of_batch.max(1) as f64)
    }

    /// Over the pairs of all ranks, of which each rank differentiates its own.
    fn contrastive(&self, anchors: &Tensor, temperature: f64) -> Result<Tensor, TrainError> {
        let Part { train, rows, device, group, .. } = self.part;
        let Some(pairs) = &train.pairs else {
            return Err(TrainError::User("data.sources[].columns.pair: contrastive terms need pairs of texts".into()));
        };
        let texts: Vec<&[u32]> = rows.iter().map(|&row| &pairs[row]).collect();
        let (ids, mask) = inputs(&texts, self.model.config().pad_token_id, *device);
        let last = self.model.last_hidden_state(&ids, mask.as_ref(), true);
        let positives = self.model.embedding(&last, mask.as_ref());
        let (anchors, positives) = match group {
            Some(group) if group.world() > 1 => {
                (gather(anchors, self.part, group)?, gather(&positives, self.part, group)?)
            }
            _ => (anchors.shallow_clone(), positives),
        };
        Ok(terms::contrastive(&anchors, &positives, temperature))
    }
}

/// The rows [B, C] of all ranks in the order of the batch; gradients flow to this rank's own.
fn gather(own: &Tensor, part: &Part, group: &ProcessGroup) -> Result<Tensor, TrainError> {
    let Part { rows, batch, weight, .. } = part;
    let places: Vec<i64> =
        rows.iter().filter_map(|row| batch.iter().position(|other| other == row).map(|place| place as i64)).collect();
    let places = Tensor::from_slice(&places).to_device(own.device());
    let empty = Tensor::zeros([batch.len() as i64, own.size()[1]], (Kind::Float, own.device()));
    let spread = empty.index_add(0, &places, &(own.to_kind(Kind::Float) * *weight));
    let all = spread.detach().copy();
    group.all_reduce_sum(&all)?;
    // The others' rows are constants; this rank's have the value they had, and their gradient.
    Ok(&all - spread.detach() + spread)
}

fn hidden_state<'a>(
    term: &HiddenStateTerm,
    student: &[Tensor],
    teacher: &[Tensor],
    mask: Option<&Tensor>,
    projections: &mut impl Iterator<Item = &'a Tensor>,
) -> Tensor {
    let parts = term.layers.iter().map(|pair| {
        let own = &student[pair.student as usize];
        let projected = match term.projection {
            true => projections.next().map(|matrix| own.linear::<Tensor>(matrix, None)),
            false => None,
        };
        let own = projected.as_ref().unwrap_or(own);
        terms::hidden_state(own, &teacher[pair.teacher as usize], mask, term.loss)
    });
    let sum = parts.reduce(|sum, part| sum + part).unwrap_or_else(|| Tensor::from(0_f32));
    sum / term.layers.len() as f64
}

/// Uniform in ±1 / sqrt(inputs), as libtorch begins linear layers.
fn projection(outputs: i64, inputs: i64, seed: u64, index: usize, device: Device) -> Tensor {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    let mut random = StdRng::seed_from_u64(crate::data::batches::mix(seed, index as u64));
    let bound = (inputs as f64).sqrt().recip();
    let values: Vec<f32> = (0..outputs * inputs).map(|_| random.random_range(-bound..bound) as f32).collect();
    Tensor::from_slice(&values).view([outputs, inputs]).to_device(device).set_requires_grad(true)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use athanor_contract::train::{HiddenStateLoss, ObjectiveTermSpec};
    use athanor_models::{Options, Shape};

    use super::{
        teacher::{Online, Student},
        *,
    };

    type Numbers = Vec<Vec<f64>>;

    fn numbers(matrix: &Tensor) -> Numbers {
        Vec::<Vec<f64>>::try_from(matrix.to_kind(Kind::Double)).unwrap()
    }

    /// The distance of some tokens' states in the student, projected, and in the teacher.
    fn naive(student: &Numbers, teacher: &Numbers, projection: &Numbers, loss: HiddenStateLoss) -> f64 {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let of_token = |own: &Vec<f64>, wanted: &Vec<f64>| {
            let projected: Vec<f64> = projection.iter().map(|row| dot(row, own)).collect();
            match loss {
                HiddenStateLoss::MSE => {
                    let squares = projected.iter().zip(wanted).map(|(a, b)| (a - b).powi(2));
                    squares.sum::<f64>() / wanted.len() as f64
                }
                HiddenStateLoss::Cosine => {
                    1.0 - dot(&projected, wanted) / (dot(&projected, &projected) * dot(wanted, wanted)).sqrt()
                }
            }
        };
        student.iter().zip(teacher).map(|(own, wanted)| of_token(own, wanted)).sum::<f64>() / student.len() as f64
    }

    #[test]
    fn projected_states_are_compared_as_by_hand_and_the_projections_learn() {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-bert");
        let labels = ["a".to_owned(), "b".to_owned()];
        let task = Task::TextClassification;
        let shape = Shape { layers: 1, hidden_size: 16, heads: 2, intermediate_size: 24 };
        let options = Options { fresh: Some(shape), seed: 3, ..Options::default() };
        let kind = athanor_models::Task::Classification(labels.to_vec());
        let model = Model::load(&folder, kind, &options, Device::Cpu).unwrap();
        let student = Student { task, labels: &labels, folder: &folder, by_token: true, max_length: 8 };
        let teacher = Teacher::Online(Box::new(Online::load(&folder, &student, Device::Cpu).unwrap()));
        let teacher_model = Model::load_trained(&folder, Device::Cpu).unwrap();
        let rows: [&[u32]; 3] = [&[2, 9, 8, 33, 3], &[2, 40, 3], &[2, 7, 90, 3]];
        let train = Encoded { ids: rows.iter().collect(), ..Encoded::blank(3) };
        let all = [0, 1, 2];
        let part = Part {
            train: &train,
            rows: &all,
            batch: &all,
            weight: 1.0,
            seed: 0,
            group: None,
            device: Device::Cpu,
            bf16: false,
        };
        // Of each row alone, so that nothing is padding: the states of every layer.
        let states = |model: &Model| -> Vec<Vec<Numbers>> {
            let of_row = |ids: &&[u32]| {
                let (ids, _) = inputs(&[ids], 0, Device::Cpu);
                let states = tch::no_grad(|| model.hidden_states(&ids, None, false, true));
                states.iter().map(|states| numbers(&states.squeeze_dim(0))).collect()
            };
            rows.iter().map(of_row).collect()
        };
        let (own, wanted) = (states(&model), states(&teacher_model));
        let pairs = [(1, 2), (0, 1)];
        for loss in [HiddenStateLoss::MSE, HiddenStateLoss::Cosine] {
            let term = serde_json::json!({"weight": 3.0, "hiddenState": {
                "layers": [{"student": 1, "teacher": 2}, {"student": 0, "teacher": 1}],
                "loss": format!("{loss:?}"), "projection": true,
            }});
            let term: ObjectiveTermSpec = serde_json::from_value(term).unwrap();
            let terms = vec![term.parse().unwrap()];
            let objective = Objective::new(terms, task, &model, Some(&teacher), 5, Device::Cpu).unwrap();
            let mut projections: Vec<Numbers> =
                objective.parameters().iter().map(|(_, tensor)| numbers(&tensor.detach())).collect();
            assert_eq!((projections.len(), projections[0].len(), projections[0][0].len()), (2, 32, 16));
            assert_ne!(projections[0], projections[1]);
            let by_hand = |projections: &[Numbers]| {
                let of_pair = |(&(student, teacher), projection): (&(usize, usize), &Numbers)| {
                    let of_row = |row: usize| naive(&own[row][student], &wanted[row][teacher], projection, loss);
                    (0..rows.len()).map(of_row).sum::<f64>()
                };
                pairs.iter().zip(projections).map(of_pair).sum::<f64>() / 2.0
            };
            let values = objective.values(&model, Some(&teacher), &part).unwrap();
            let (found, expected) = (values[0].double_value(&[]), by_hand(&projections));
            assert!((found - expected).abs() < 1e-4 * expected, "{loss:?}: {found} is not {expected}");
            values[0].backward();
            for (index, i, j) in [(0, 0, 0), (0, 31, 7), (1, 12, 15)] {
                let mut at = |change: f64| {
                    projections[index][i][j] += change;
                    let value = by_hand(&projections);
                    projections[index][i][j] -= change;
                    value
                };
                let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
                let found = objective.parameters()[index].1.grad().double_value(&[i as i64, j as i64]);
                assert!((found - expected).abs() < 1e-4 + 1e-3 * expected.abs(), "{loss:?}: {found} is not {expected}");
            }
        }
    }
}
