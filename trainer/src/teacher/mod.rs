//! A trained model whose answers a student learns: computed at each step, or once for all rows and kept.

pub mod cached;
mod online;
mod tokens;

use athanor_models::EncoderConfig;
use tch::Tensor;

pub use online::{Answer, Online, Student};

use crate::data::{Batch, Part};

/// Answers for the training rows.
pub enum Teacher {
    /// Logits of all rows, [rows, L], in the student's order of labels.
    Cached(Tensor),
    Online(Box<Online>),
}

impl Teacher {
    /// Shape of the teacher that answers at each step.
    pub fn config(&self) -> Option<&EncoderConfig> {
        match self {
            Self::Cached(_) => None,
            Self::Online(online) => Some(online.config()),
        }
    }

    /// The answer for the rows of a part, which the student reads as `batch`; `every` asks for the hidden states of all
    /// layers.
    pub fn answer(&self, part: &Part, batch: &Batch, every: bool) -> Answer {
        match self {
            Self::Online(online) => online.answer(part, batch, every),
            Self::Cached(logits) => {
                let rows: Vec<i64> = part.rows.iter().map(|&row| row as i64).collect();
                let rows = Tensor::from_slice(&rows).to_device(part.device);
                Answer { outputs: logits.index_select(0, &rows), states: Vec::new() }
            }
        }
    }
}
