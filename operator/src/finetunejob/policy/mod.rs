//! One file for each policy of a FineTuneJob: functions of the specification, the status and the time, each with its
//! test.

pub mod deadline;
pub mod pace;
pub mod queue;
pub mod restart;
pub mod search;
#[cfg(test)]
mod search_tests;
pub mod suspend;
pub mod ttl;
