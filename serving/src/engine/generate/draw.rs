//! Draws the tokens of a step on several threads. A draw depends on its own sequence only, so the number of threads changes
//! no token.

use std::{borrow::Cow, thread};

use rayon::{
    ThreadPool, ThreadPoolBuilder,
    iter::{IntoParallelIterator, ParallelIterator},
};

use super::{
    constraint::{self, Constraint, Progress, TokenSet},
    request::GenerateError,
    sampling::{self, Context, Sampled},
    sequence::Sequence,
};
use crate::engine::backend::Logits;

/// Fewer draws than this take less time than waking a thread.
const FEW: usize = 4;

/// What the next tokens of a sequence are drawn from.
pub(super) struct Draw {
    /// The sequence's place among the running ones.
    pub index: usize,
    /// [1 + proposed tokens, vocabulary]: those behind the last token, and behind each proposed one.
    pub logits: Vec<Logits>,
    /// What restricts the answer, and the tokens that it allows next.
    pub constraint: Option<(Box<dyn Constraint>, TokenSet)>,
}

/// The next tokens of a sequence.
pub(super) struct Drawn {
    /// The sequence's place among the running ones.
    pub index: usize,
    /// All but the last are the first proposed tokens.
    pub tokens: Vec<Sampled>,
    /// What restricts the answer behind these tokens; absent if they are the last ones.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whether the constraint ends the answer with these tokens.
    pub completes: bool,
    /// Why no token could be drawn behind these.
    pub error: Option<GenerateError>,
}

impl Draw {
    /// Draws the next token, and as long as the drawn tokens are the proposed ones, the token behind them.
    pub fn sample(self, sequence: &Sequence, vocabulary: usize) -> Drawn {
        let Self { index, logits, constraint } = self;
        let (mut constraint, mut allowed) = constraint.unzip();
        let mut drawn = Drawn { index, tokens: Vec::with_capacity(1), constraint: None, completes: false, error: None };
        let known = match sequence.proposed.is_empty() {
            true => Cow::Borrowed(&sequence.tokens),
            false => Cow::Owned([sequence.tokens.as_slice(), &sequence.proposed].concat()),
        };
        for (place, logits) in logits.iter().enumerate() {
            if place > 0
                && let Some(constraint) = &mut constraint
            {
                match constraint::mask(&mut **constraint) {
                    Ok(mask) => allowed = Some(mask),
                    Err(error) => return Drawn { error: Some(error.into()), ..drawn },
                }
            }
            let answer = &known[sequence.prompt_length..sequence.tokens.len() + place];
            let (prompt, forbidden) = (sequence.prompt(), sequence.forbidden(answer.len()));
            let context = Context { prompt, answer, forbidden, allowed: allowed.as_ref() };
            let sampled = match sampling::sample(logits, vocabulary, &sequence.sampling, context) {
                Ok(sampled) => sampled,
                Err(error) => return Drawn { error: Some(error.into()), ..drawn },
            };
            let token = sampled.token;
            let stops = sequence.stopping.stop_tokens.contains(&token);
            if !stops && let Some(constraint) = &mut constraint {
                match constraint.accept(token) {
                    Ok(progress) => drawn.completes = progress == Progress::Complete,
                    Err(error) => return Drawn { error: Some(error.into()), ..drawn },
                }
            }
            drawn.tokens.push(sampled);
            if stops || drawn.completes || answer.len() + 1 >= sequence.stopping.max_tokens {
                return drawn;
            }
            if sequence.proposed.get(place) != Some(&token) {
                break;
            }
        }
        Drawn { constraint, ..drawn }
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
