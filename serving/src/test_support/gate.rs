//! Holding a model.

use std::{
    collections::BTreeSet,
    sync::{Mutex, atomic::AtomicUsize},
};

use crate::engine::backend::AdapterId;

/// What holds the model, and the batches that have come to it.
#[derive(Default)]
pub struct Gate {
    pub lock: Mutex<()>,
    pub batches: AtomicUsize,
    /// Texts and conversations that were tokenised.
    pub tokenised: AtomicUsize,
    /// Adapters that the model has.
    pub adapters: Mutex<BTreeSet<AdapterId>>,
}
