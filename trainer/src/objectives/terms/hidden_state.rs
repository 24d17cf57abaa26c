//! The distance between hidden states of student and teacher, token by token, through a trained projection where the
//! widths differ.

use athanor_contract::train::{HiddenStateLoss, HiddenStateTerm};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};

use super::term::{Models, Pass, Term};
use crate::{TrainError, data::batches::mix};

pub struct HiddenState {
    spec: HiddenStateTerm,
    /// A matrix [C of the teacher, C of the student] for each pair of layers; empty without projection. Trained, not
    /// part of the result.
    projections: Vec<(String, Tensor)>,
}

impl HiddenState {
    pub fn new(spec: HiddenStateTerm) -> Self {
        Self { spec, projections: Vec::new() }
    }
}

impl Term for HiddenState {
    fn needs_states(&self) -> bool {
        true
    }

    fn prepare(&mut self, models: &Models) -> Result<(), String> {
        let Some(teacher) = models.teacher else {
            return Err("hiddenState needs a teacher whose outputs are Online".into());
        };
        let Some(student) = models.student else { return Err("hiddenState needs an encoder".into()) };
        for pair in &self.spec.layers {
            for (whose, layer, config) in [("student", pair.student, student), ("teacher", pair.teacher, teacher)] {
                let layers = config.num_hidden_layers;
                if layer as usize > layers {
                    return Err(format!("the {whose} has no layer {layer}, it has {layers}"));
                }
            }
        }
        let (own, wanted) = (student.hidden_size, teacher.hidden_size);
        if !self.spec.projection && own != wanted {
            return Err(format!(
                "the student's hidden states have {own} units, the teacher's {wanted}: hiddenState needs \
                 projection: true"
            ));
        }
        if self.spec.projection {
            let (index, seed, device) = (models.index, models.seed, models.device);
            let matrix = |pair: usize| projection(wanted, own, mix(seed, (index + pair) as u64), device);
            let pairs = 0..self.spec.layers.len();
            self.projections =
                pairs.map(|pair| (format!("objective.{index}.projection.{pair}"), matrix(pair))).collect();
        }
        Ok(())
    }

    fn parameters(&self) -> &[(String, Tensor)] {
        &self.projections
    }

    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        let teacher = &pass.answer()?.states;
        let distances = self.spec.layers.iter().enumerate().map(|(index, pair)| {
            let own = &pass.states[pair.student as usize];
            let projected = self.projections.get(index).map(|(_, matrix)| own.linear::<Tensor>(matrix, None));
            let own = projected.as_ref().unwrap_or(own);
            hidden_state(own, &teacher[pair.teacher as usize], pass.batch.mask.as_ref(), self.spec.loss)
        });
        let sum = distances.reduce(|sum, distance| sum + distance).unwrap_or_else(|| Tensor::from(0_f32));
        Ok(sum / self.spec.layers.len() as f64)
    }
}

/// The distance of two layers' hidden states [B, T, C]: for a token the mean over units (MSE) or one minus the cosine,
/// for a row the mean over tokens. `mask` [B, T] is 1 where a token is.
pub fn hidden_state(student: &Tensor, teacher: &Tensor, mask: Option<&Tensor>, loss: HiddenStateLoss) -> Tensor {
    let (student, teacher) = (student.to_kind(Kind::Float), teacher.to_kind(Kind::Float));
    let tokens = match loss {
        HiddenStateLoss::MSE => (student - teacher).square().mean_dim([-1_i64].as_slice(), false, Kind::Float),
        HiddenStateLoss::Cosine => 1.0 - Tensor::cosine_similarity(&student, &teacher, -1, 1e-8),
    };
    let Some(mask) = mask else {
        return tokens.mean_dim([1_i64].as_slice(), false, Kind::Float).sum(Kind::Float);
    };
    let mask = mask.to_kind(Kind::Float);
    let rows = (tokens * &mask).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float)
        / mask.sum_dim_intlist([1_i64].as_slice(), false, Kind::Float).clamp_min(1.0);
    rows.sum(Kind::Float)
}

/// Uniform in ±1 / sqrt(inputs), as libtorch initialises linear layers.
fn projection(outputs: i64, inputs: i64, seed: u64, device: Device) -> Tensor {
    let mut random = StdRng::seed_from_u64(seed);
    let bound = (inputs as f64).sqrt().recip();
    let values: Vec<f32> = (0..outputs * inputs).map(|_| random.random_range(-bound..bound) as f32).collect();
    Tensor::from_slice(&values).view([outputs, inputs]).to_device(device).set_requires_grad(true)
}
