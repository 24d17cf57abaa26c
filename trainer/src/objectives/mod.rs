//! What is minimised: the weighted sum of the terms of `objective.terms`, with or without a teacher.
//!
//! [`terms`] has one file for each kind of term. A term's value is a sum over the rows of a batch: the caller divides
//! by the rows of the global batch, so that N ranks and any accumulation give the gradients of one rank.

pub mod terms;

use athanor_contract::train::{Task, WeightedTerm};
use athanor_torch::Autocast;
use tch::{Device, Kind, Tensor};

pub use crate::{data::Part, teacher::Teacher};

use self::terms::{Models, Pass, Term};
use crate::{TrainError, network::ModelRef, tasks};

/// The terms of a job, with the parameters that they train next to the model's.
pub struct Objective {
    task: &'static dyn tasks::Task,
    specs: Vec<WeightedTerm>,
    terms: Vec<Box<dyn Term>>,
    parameters: Vec<(String, Tensor)>,
}

impl Objective {
    /// The terms as they apply to a model and its teacher.
    ///
    /// # Errors
    /// Layers that a model does not have, and widths that differ without a projection, are user errors.
    pub fn new<'m>(
        specs: Vec<WeightedTerm>,
        task: Task,
        model: impl Into<ModelRef<'m>>,
        teacher: Option<&Teacher>,
        seed: u64,
        device: Device,
    ) -> Result<Self, TrainError> {
        let task = tasks::of(task);
        let student = match model.into() {
            ModelRef::Encoder(model) => Some(model.config()),
            ModelRef::Decoder(_) => None,
        };
        let teacher = teacher.and_then(Teacher::config);
        let mut terms = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let user = |message: String| TrainError::User(format!("objective.terms[{index}]: {message}"));
            let mut term = terms::of(&spec.term);
            term.prepare(&Models { index, task, student, teacher, seed, device }).map_err(user)?;
            terms.push(term);
        }
        let own = terms.iter().flat_map(|term| term.parameters());
        let parameters = own.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Ok(Self { task, specs, terms, parameters })
    }

    /// What is trained besides the model.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        &self.parameters
    }

    pub fn terms(&self) -> &[WeightedTerm] {
        &self.specs
    }

    /// The value of each term without its weight, a sum over the part's rows (FP32, with gradients).
    pub fn values<'m>(
        &self,
        model: impl Into<ModelRef<'m>>,
        teacher: Option<&Teacher>,
        part: &Part,
    ) -> Result<Vec<Tensor>, TrainError> {
        let _autocast = part.bf16.then(|| Autocast::bf16(part.device));
        let model = model.into();
        let pad_id = match model {
            ModelRef::Encoder(model) => model.config().pad_token_id,
            // Nothing is padding.
            ModelRef::Decoder(_) => 0,
        };
        let batch = part.train.columns.collate(part, &self.specs, pad_id)?;
        let every = self.terms.iter().any(|term| term.needs_states());
        let states = match (model, &batch.sequences) {
            (ModelRef::Decoder(model), Some(sequences)) => vec![model.forward(sequences, None, true)],
            (model, _) => {
                let model = model.encoder()?;
                match every || self.task.reads_every_token() {
                    true => model.hidden_states(&batch.ids, batch.mask.as_ref(), true, every),
                    false => vec![model.head_states(&batch.ids, batch.mask.as_ref(), true)],
                }
            }
        };
        let answer = teacher.map(|teacher| teacher.answer(part, &batch, every));
        let last = &states[states.len() - 1];
        let outputs = match model {
            ModelRef::Encoder(model) => self.task.outputs(model, &batch, last, true),
            // The logits over the vocabulary are computed in parts, where the term needs them.
            ModelRef::Decoder(_) => last.shallow_clone(),
        };
        let (states, outputs, answer) = (&states[..], &outputs, answer.as_ref());
        let pass = Pass { task: self.task, model, part, batch: &batch, states, outputs, answer };
        let mut values = self.terms.iter().map(|term| term.value(&pass)).collect::<Result<Vec<_>, _>>()?;
        // If no term reads the outputs, the head and the layers above still get a gradient, of zeros.
        if self.terms.iter().all(|term| term.needs_states())
            && let Some(first) = values.first_mut()
        {
            *first = &*first + outputs.sum(Kind::Float) * 0.0;
        }
        Ok(values)
    }

    /// Whether a term's value is the same on all ranks, instead of a part of the sum.
    pub fn is_shared(&self, index: usize) -> bool {
        self.terms[index].is_shared()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use athanor_contract::train::{HiddenStateLoss, ObjectiveTermSpec};
    use athanor_models::{Model, Options, Shape};

    use super::*;
    use crate::{
        data::{Encoded, batches::inputs},
        tasks::classification::Labels,
        teacher::{Online, Student},
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
        let train =
            Encoded { ids: rows.iter().collect(), sources: vec![0; 3], columns: Box::new(Labels(vec![None; 3])) };
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
        // The states of every layer, for each row alone, so that nothing is padding.
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
