//! Holding a model.

use std::sync::{Mutex, atomic::AtomicUsize};

/// What holds the model, and the batches that have come to it.
#[derive(Default)]
pub struct Gate {
    pub lock: Mutex<()>,
    pub batches: AtomicUsize,
    /// Texts and conversations that were tokenised.
    pub tokenised: AtomicUsize,
}
