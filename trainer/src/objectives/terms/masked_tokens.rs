//! Cross entropy of masked tokens (Devlin et al. 2019). Which tokens are masked is the task's choice
//! (`tasks::masking`).

use tch::Tensor;

use super::{
    cross_entropy::cross_entropy,
    term::{Pass, Term},
};
use crate::TrainError;

pub struct MaskedTokens;

impl Term for MaskedTokens {
    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        Ok(cross_entropy(pass.outputs, &pass.batch.targets, 0.0) * pass.batch.rows_per_target)
    }
}
