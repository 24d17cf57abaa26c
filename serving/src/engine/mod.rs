//! Engines: a thread owns a model, and requests wait for it in a bounded queue. Engines work on token ids only.
//!
//! - [`backend`]: what an engine requires of a model;
//! - [`encode`]: one pass over each input, in shared batches.

pub mod backend;
pub mod encode;
