//! PDFs in a process of their own. A hostile file may recurse without end or inflate to any size, which ends the process
//! that reads it; here this is a process with bounds on memory and processor time, so that the file is a mistake with a
//! reason and the job goes on to report it.
//!
//! The process is this very program, started again with an argument that [`serve_if_asked`] attends to. It reads one
//! document after the other, so that a thousand files start one process.

mod child;
mod limits;
mod message;
mod worker;

pub use child::serve_if_asked;
pub(crate) use message::Answer;
pub(crate) use worker::Worker;
