//! What may come next in an answer, such as JSON of a schema: the engine sees sets of tokens, never the rule behind them.
//!
//! The set for the next token depends on the tokens so far and not on the model. So it is computed on threads of its own
//! while the model computes the logits ([`Pool`], [`Guide`]).

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

/// A rule for the tokens of one answer. It moves with the answer: what is computed again after a preemption are keys and
/// values, not this.
pub trait Constraint: Send + 'static {
    /// Tokens that may come next.
    fn mask(&mut self) -> Result<TokenSet, ConstraintError>;

    /// Takes the chosen token, which is in the last mask and is no stop token.
    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError>;

    /// A text like those that follow the rule, such as the names of a schema's fields: answers may repeat parts of it.
    fn example(&self) -> Arc<[u32]> {
        Arc::default()
    }

    /// Tokens of the text that has to come next, if the rule allows no other text. They need not be the only tokens of that text:
    /// the masks may allow other divisions of it.
    fn forced(&self) -> Vec<u32> {
        Vec::new()
    }

    /// The same rule in the same state, for another answer to the same prompt.
    fn fork(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.as_ref().fork()
    }
}

impl std::fmt::Debug for dyn Constraint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Constraint")
    }
}

/// Whether an answer can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Continues,
    /// Nothing can follow: the answer ends here.
    Complete,
}

/// The rule cannot be followed any further, such as one that became too complex.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer's format cannot be followed: {0}")]
pub struct ConstraintError(pub String);

/// A set of token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSet {
    /// Bit `id % 32` of word `id / 32` says whether the set has the token.
    words: Vec<u32>,
}

impl TokenSet {
    /// A set from its bits, the lowest id in the lowest bit of the first word. Ids beyond the words are not in it.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    pub fn contains(&self, token: usize) -> bool {
        self.words.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }
}

/// Threads that compute masks. They end when the pool is dropped.
pub(super) struct Pool {
    jobs: mpsc::Sender<Job>,
}

struct Job {
    constraint: Box<dyn Constraint>,
    reply: mpsc::Sender<Computed>,
}

type Computed = (Box<dyn Constraint>, Result<TokenSet, ConstraintError>);

impl Pool {
    pub(super) fn start(threads: usize) -> std::io::Result<Self> {
        let (jobs, receiver) = mpsc::channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..threads.max(1) {
            let receiver = receiver.clone();
            thread::Builder::new().name("masks".into()).spawn(move || {
                loop {
                    let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(Job { mut constraint, reply }) = next else { return };
                    let mask = mask(&mut *constraint);
                    // A cancelled answer does not wait for it.
                    let _ = reply.send((constraint, mask));
                }
            })?;
        }
        Ok(Self { jobs })
    }

    /// Begins to compute the mask for the next token.
    pub(super) fn guide(&self, constraint: Box<dyn Constraint>) -> Guide {
        let (reply, computed) = mpsc::channel();
        // Without threads the reply is dropped, which `Guide::mask` reports.
        let _ = self.jobs.send(Job { constraint, reply });
        Guide { computed }
    }
}

/// Computes a mask on the calling thread. A fault is that of one answer, not of the thread; the constraint is not used
/// again after it.
pub(super) fn mask(constraint: &mut dyn Constraint) -> Result<TokenSet, ConstraintError> {
    let mask = catch_unwind(AssertUnwindSafe(|| constraint.mask()));
    mask.unwrap_or_else(|_| Err(ConstraintError("a fault in its mask".into())))
}

/// The tokens that a constraint forces; none after a fault, which its mask reports.
pub(super) fn forced(constraint: &dyn Constraint) -> Vec<u32> {
    catch_unwind(AssertUnwindSafe(|| constraint.forced())).unwrap_or_default()
}

/// The mask of one answer that is being computed.
pub(super) struct Guide {
    computed: mpsc::Receiver<Computed>,
}

impl Guide {
    /// Waits for the mask.
    pub(super) fn mask(self) -> Result<(Box<dyn Constraint>, TokenSet), ConstraintError> {
        let (constraint, mask) =
            self.computed.recv().map_err(|_| ConstraintError("the threads that compute masks have ended".into()))?;
        Ok((constraint, mask?))
    }
}
