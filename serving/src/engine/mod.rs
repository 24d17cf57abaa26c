//! Engines: a thread owns a model, and requests wait for it in a bounded queue. Engines work on token ids only.
//!
//! - [`backend`]: what an engine requires of a model;
//! - [`encode`]: one pass over each input, in shared batches;
//! - [`generate`]: answers token by token, over a paged cache.

pub mod backend;
pub mod encode;
pub mod generate;
