//! Cross entropy of each next token (Radford et al. 2018), over the targets of the global batch.

use athanor_models::heads::causal::LOGIT_ROWS;
use tch::Tensor;

use super::term::{Pass, Term};
use crate::TrainError;

pub struct NextToken;

impl Term for NextToken {
    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        let loss = pass.model.decoder()?.next_token_loss(pass.outputs, &pass.batch.targets, LOGIT_ROWS)?;
        Ok(loss.sum * pass.batch.rows_per_target)
    }
}
