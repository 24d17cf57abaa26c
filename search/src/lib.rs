//! Search for hyperparameters: random, TPE and ASHA, for the operator (trials are child jobs) and for a trainer alone.
//!
//! Everything here is a function of the specification and the trials so far: a [`Search`] keeps no state, so that whoever drives it
//! may be killed at any moment and goes on identically from the list of trials. There is no I/O, no clock and no thread here; trials
//! are run by the caller.
//!
//! ```text
//! loop {
//!     match search.next(&trials) {
//!         Next::Start(assignments) => one running trial each, with the budget of rung 0,
//!         Next::Promote { trial, .. } => that trial again, with the larger budget,
//!         Next::Wait => until a running trial has ended: trial.report(metric) or trial.fail(),
//!         Next::Done { best } => train with the best,
//!     }
//! }
//! ```

mod asha;
mod assignment;
mod limits;
mod random;
mod search;
mod setting;
mod space;
mod summary;
#[cfg(test)]
mod tests;
mod tpe;
mod trial;

pub use assignment::{Assignment, apply};
pub use search::{Next, Search, Unit};
pub use setting::Setting;
pub use summary::{Spread, aggregate_folds, mean_and_deviation};
pub use trial::{Trial, TrialState};
