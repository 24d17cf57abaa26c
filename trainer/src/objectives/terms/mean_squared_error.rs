//! Squared error: between the output and the label's number, or between the outputs of student and teacher.

use tch::{Kind, Tensor};

use super::term::{Models, Pass, Term};
use crate::TrainError;

pub struct MeanSquaredError;

impl Term for MeanSquaredError {
    fn prepare(&mut self, models: &Models) -> Result<(), String> {
        let teacher = models.teacher.filter(|_| models.task.outputs_are_vectors());
        let Some((student, teacher)) = models.student.zip(teacher) else { return Ok(()) };
        let (own, wanted) = (student.hidden_size, teacher.hidden_size);
        if own == wanted {
            return Ok(());
        }
        Err(format!(
            "the student's vectors have {own} numbers, the teacher's {wanted}: meanSquaredError compares them \
             one by one"
        ))
    }

    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        let wanted = if pass.task.labels_are_numbers() { &pass.batch.targets } else { &pass.answer()?.outputs };
        Ok(mean_squared_error(pass.outputs, wanted))
    }
}

/// Squared differences, the mean over the outputs of a row. Both [B, L].
pub fn mean_squared_error(found: &Tensor, wanted: &Tensor) -> Tensor {
    let width = found.size().last().copied().unwrap_or(1).max(1) as f64;
    (found.to_kind(Kind::Float) - wanted.to_kind(Kind::Float)).square().sum(Kind::Float) / width
}
