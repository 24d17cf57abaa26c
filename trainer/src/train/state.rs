//! The state of a training, which the loop changes and `saving` keeps.

use std::collections::BTreeSet;

use super::{
    checkpoint::Best, named::Named, roll_back::RollBack, schedule::LearningRate, session::Session, update::Update,
};
use crate::{data::batches::Batches, report::History};

/// A training in progress on one rank.
pub(super) struct Loop<'a> {
    pub session: Session<'a>,
    pub rank: usize,
    pub world: usize,
    /// The parameters that training changes, sharing memory with the model and the objective.
    pub trainable: Named,
    pub update: Box<dyn Update + 'a>,
    pub learning_rate: LearningRate,
    pub lengths: Vec<usize>,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
    /// Steps taken.
    pub step: u64,
    /// Number and batches of the current epoch.
    pub epoch: Option<(u64, Batches)>,
    pub best: Option<Best>,
    /// The model's weights at the best validation, in the host's memory; rank 0's, the other ranks get them at the end.
    pub best_weights: Option<Named>,
    /// Under the policy RollBack.
    pub roll_back: Option<RollBack>,
    /// Steps, counted from 1, that are left out since a roll-back.
    pub skipped: BTreeSet<u64>,
    pub history: History,
    /// The last step's value of each term, without weights; a mean over the batch.
    pub terms: Vec<f64>,
    pub loss_log: Option<std::fs::File>,
}
