//! Cross entropy of each next token (Radford et al. 2018), over the targets of the global batch.

use tch::Tensor;

use super::term::{Pass, Term};
use crate::TrainError;

/// Rows of logits that exist at a time: of a vocabulary of 150,000 tokens they take 300 MB.
pub const CHUNK: i64 = 512;

pub struct NextToken;

impl Term for NextToken {
    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        let loss = pass.model.decoder()?.next_token_loss(pass.outputs, &pass.batch.targets, CHUNK)?;
        Ok(loss.sum * pass.batch.rows_per_target)
    }
}
