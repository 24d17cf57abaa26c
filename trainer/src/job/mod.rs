//! A job from its configuration to its artifact.
//!
//! - [`config`]: `train.json` of the operator, or the user's manifest on a laptop, whose fields `bounds` checks;
//! - [`context`]: the process that runs a job; `setup`: what a specification means with the data and the models at
//!   hand;
//! - [`run`]: one rank, from `prepare` to `outcome`; `cross_validation`: trainings on all folds but one before it;
//! - [`check`]: what a job would do, without doing it; [`search`]: trials on a laptop, where no operator starts them as
//!   jobs;
//! - [`memory`]: what the machine has left; [`work`]: folders of running processes; [`artifact`]: the result as a Hugging
//!   Face folder.

pub mod artifact;
mod bounds;
pub mod check;
pub mod config;
pub mod context;
pub mod cross_validation;
pub mod memory;
pub mod outcome;
pub mod prepare;
pub mod run;
pub mod search;
pub mod setup;
pub mod training_context;
pub mod work;
