//! The optimizer step. Its calls are made here and nowhere else; the loop and `check` go through [`Update`].
//!
//! A step is, in this order:
//! 1. [`Update::begin`] drops the gradients of the step before and prepares what the global batch reads;
//! 2. for each part of the batch, after its forward pass, [`Update::backward`] with the part's share of the loss; ranks
//!    exchange gradients in the last part;
//! 3. [`Update::finish`] adds the gradient of the penalty (L1, L2), returns the 2-norm of the gradients of all
//!    parameters on all ranks, and scales them down to `clipNorm`. The penalty counts as a part of the loss, so it is
//!    clipped too;
//! 4. [`not_finite`] decides whether the parameters may change;
//! 5. [`Update::apply`] changes them.
//!
//! After a step that is not applied the next one starts with [`Update::begin`] as usual.

mod alone;
mod reducer;
mod sparse_embeddings;
mod step;

use athanor_contract::train::TrainSpec;
use athanor_torch::{ProcessGroup, Shard};
use tch::Device;

use crate::{TrainError, network::Network, objectives::Objective};
use alone::Alone;
use reducer::Reduced;
use sparse_embeddings::SparseEmbeddings;
pub use step::{Update, not_finite, trainable, trainable_of_model};

/// The update of one process, or of a rank of `group`.
pub fn new<'a>(
    model: &Network,
    objective: &Objective,
    spec: &TrainSpec,
    device: Device,
    group: Option<&'a ProcessGroup>,
) -> Result<Box<dyn Update + 'a>, TrainError> {
    let sharded = group.filter(|_| spec.distributed.shard_optimizer);
    let shard = sharded.map_or(Shard::WHOLE, |group| Shard { rank: group.rank(), world: group.world() });
    build(model, objective, spec, device, shard, group)
}

/// The work of one of `world` ranks, without the others, to measure it.
pub fn of_one_rank(
    model: &Network,
    objective: &Objective,
    spec: &TrainSpec,
    device: Device,
    world: usize,
) -> Result<Box<dyn Update>, TrainError> {
    let shard = if spec.distributed.shard_optimizer { Shard { rank: 0, world } } else { Shard::WHOLE };
    build(model, objective, spec, device, shard, None)
}

fn build<'a>(
    model: &Network,
    objective: &Objective,
    spec: &TrainSpec,
    device: Device,
    shard: Shard,
    group: Option<&'a ProcessGroup>,
) -> Result<Box<dyn Update + 'a>, TrainError> {
    let mut parameters = trainable(model, objective);
    // The embedding table, if it is updated by rows, is none of the other updates' parameters.
    let embeddings = SparseEmbeddings::split_off(&mut parameters, model, spec, device)?;
    let alone = Alone::new(parameters, &spec.hyperparameters, shard)?;
    let update: Box<dyn Update + 'a> = match group {
        Some(group) => Box::new(Reduced::new(alone, group, device)?),
        None => Box::new(alone),
    };
    Ok(match embeddings {
        Some(embeddings) => Box::new(embeddings.around(update, group)),
        None => update,
    })
}
