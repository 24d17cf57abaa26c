//! Draws the next tokens of a step's sequences, several at a time: with many sequences and a large vocabulary the draws
//! would take a large share of a step on one thread.

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

use super::{
    constraint::{Constraint, TokenSet},
    sampling::{self, Context, LogitsError, Sampled},
    sequence::Sequence,
};
use crate::engine::backend::Logits;

/// Number of draws from which on other threads take part: waking them takes as long as a draw.
const MANY: usize = 4;

/// Largest number of threads.
const MOST_THREADS: usize = 16;

/// What a running sequence's next token is drawn from.
pub(super) struct Draw {
    /// Index of the sequence among the running ones.
    pub index: usize,
    pub logits: Logits,
    /// The constraint of the answer and its mask for this token.
    pub constraint: Option<(Box<dyn Constraint>, TokenSet)>,
}

impl Draw {
    pub(super) fn sample(&self, sequence: &Sequence, vocabulary: usize) -> Result<Sampled, LogitsError> {
        let context = Context {
            prompt: sequence.prompt(),
            answer: sequence.answer(),
            forbidden: sequence.forbidden(),
            allowed: self.constraint.as_ref().map(|(_, allowed)| allowed),
        };
        sampling::sample(&self.logits, vocabulary, &sequence.sampling, context)
    }
}

/// Threads that draw while the model's own wait.
pub(super) struct Threads(Option<rayon::ThreadPool>);

impl Threads {
    /// As many as the machine has cores. None on one core, or if they cannot be started: the caller draws by itself then.
    pub(super) fn start() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get()).min(MOST_THREADS);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|_| "draw".into());
        let pool = (threads > 1).then(|| pool.build()).transpose();
        Self(pool.inspect_err(|error| tracing::error!(%error, "no threads for draws could be started")).ok().flatten())
    }

    /// Calls `each` for all items. Results are in order.
    pub(super) fn map<T: Send, U: Send>(&self, items: Vec<T>, each: impl Fn(T) -> U + Send + Sync) -> Vec<U> {
        match &self.0 {
            Some(pool) if items.len() >= MANY => {
                pool.install(|| items.into_par_iter().with_max_len(1).map(each).collect())
            }
            _ => items.into_iter().map(each).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_on_one_thread_and_on_many() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for threads in [Threads(None), Threads(Some(pool))] {
            for count in [0, 1, MANY, 100] {
                let found = threads.map((0..count).collect(), |item| item * item);
                assert_eq!(found, (0..count).map(|item| item * item).collect::<Vec<_>>());
            }
        }
    }
}
