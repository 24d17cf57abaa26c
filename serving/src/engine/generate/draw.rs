//! Draws the tokens of a step on several threads. A draw depends on its own sequence only, so the number of threads changes
//! no token.

use std::thread;

use rayon::{
    ThreadPool, ThreadPoolBuilder,
    iter::{IntoParallelIterator, ParallelIterator},
};

use super::{
    constraint::{Constraint, TokenSet},
    sampling::{self, Context, LogitsError, Sampled},
    sequence::Sequence,
};
use crate::engine::backend::Logits;

/// Fewer draws than this take less time than waking a thread.
const FEW: usize = 4;

/// What the next token of a sequence is drawn from.
pub(super) struct Draw {
    /// The sequence's place among the running ones.
    pub index: usize,
    /// [vocabulary].
    pub logits: Logits,
    /// What restricts the answer, and the tokens that it allows next.
    pub constraint: Option<(Box<dyn Constraint>, TokenSet)>,
}

impl Draw {
    /// Draws the token.
    ///
    /// # Errors
    /// The logits cannot be drawn from.
    pub fn sample(&self, sequence: &Sequence, vocabulary: usize) -> Result<Sampled, LogitsError> {
        let context = Context {
            prompt: sequence.prompt(),
            answer: sequence.answer(),
            forbidden: sequence.forbidden(),
            allowed: self.constraint.as_ref().map(|(_, allowed)| allowed),
        };
        sampling::sample(&self.logits, vocabulary, &sequence.sampling, context)
    }
}

/// Threads that share the draws of a step.
pub(super) struct Threads(Option<ThreadPool>);

impl Threads {
    /// Starts a thread for each core. With one core, or if none can be started, the calling thread draws alone.
    pub fn start() -> Self {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        if cores == 1 {
            return Self(None);
        }
        let pool = ThreadPoolBuilder::new().num_threads(cores).thread_name(|index| format!("draw-{index}")).build();
        Self(pool.inspect_err(|error| tracing::error!(%error, "no threads for draws could be started")).ok())
    }

    /// Maps items, in their order.
    pub fn map<T: Send, U: Send>(&self, items: Vec<T>, one: impl Fn(T) -> U + Send + Sync) -> Vec<U> {
        match &self.0 {
            Some(pool) if items.len() >= FEW => pool.install(|| items.into_par_iter().map(one).collect()),
            _ => items.into_iter().map(one).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_keep_their_order_on_any_number_of_threads() {
        let expected: Vec<usize> = (0..100).map(|item| item * item).collect();
        for threads in [None, Some(1), Some(3)] {
            let pool = threads.map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
            assert_eq!(Threads(pool).map((0..100).collect(), |item| item * item), expected);
        }
    }
}
