//! Distillation of probabilities (Hinton et al. 2015, <https://arxiv.org/abs/1503.02531>).

use athanor_contract::train::{Divergence, SoftLabelTerm};
use tch::{Kind, Tensor};

use super::term::{Pass, Term};
use crate::TrainError;

pub struct SoftLabel(pub SoftLabelTerm);

impl Term for SoftLabel {
    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        let sum = soft_label(pass.outputs, &pass.answer()?.outputs, self.0.temperature, self.0.divergence);
        Ok(sum * pass.batch.rows_per_target)
    }
}

/// The divergence of the student's probabilities from the teacher's at a temperature, times its square. Both logits [B,
/// L].
pub fn soft_label(student: &Tensor, teacher: &Tensor, temperature: f64, divergence: Divergence) -> Tensor {
    let log = |logits: &Tensor| (logits.to_kind(Kind::Float) / temperature).log_softmax(-1, Kind::Float);
    let (student, teacher) = (log(student), log(teacher));
    // KL(p || q) from both logarithms, summed over rows and labels.
    let kl = |p: &Tensor, q: &Tensor| (p.exp() * (p - q)).sum(Kind::Float);
    let sum = match divergence {
        Divergence::ForwardKL => kl(&teacher, &student),
        Divergence::ReverseKL => kl(&student, &teacher),
        Divergence::JensenShannon => {
            let mixture = student.logaddexp(&teacher) - std::f64::consts::LN_2;
            (kl(&student, &mixture) + kl(&teacher, &mixture)) * 0.5
        }
    };
    sum * (temperature * temperature)
}
