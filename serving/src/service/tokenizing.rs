//! Bounds of tokenization: texts are cut or refused by their bytes first, and few of them are tokenised at a time.

use std::{num::NonZero, sync::Arc, thread};

use tokio::sync::Semaphore;

use super::error::ServiceError;

/// Texts up to this many bytes together are tokenised where they arrive; more goes to a blocking thread.
const INLINE_BYTES: usize = 4096;

/// Largest number of bytes of a text for each token that the model reads: tokens of common vocabularies are shorter.
const BYTES_PER_TOKEN: usize = 256;

/// Largest number of bytes that a text of this many tokens may have.
pub(super) fn most_bytes(tokens: usize) -> usize {
    tokens.saturating_mul(BYTES_PER_TOKEN)
}

/// Runs tokenizations on blocking threads, a bounded number at a time. Those that wait have a place in the engine's queue,
/// so their number is bounded as well.
pub(super) struct Tokenizing(Arc<Semaphore>);

impl Default for Tokenizing {
    /// One tokenization for each core.
    fn default() -> Self {
        Self::new(thread::available_parallelism().map_or(1, NonZero::get))
    }
}

impl Tokenizing {
    fn new(most: usize) -> Self {
        Self(Arc::new(Semaphore::new(most)))
    }

    /// Runs `work`, which tokenises texts of this many bytes together.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ServiceError> + Send + 'static,
    ) -> Result<T, ServiceError> {
        if bytes <= INLINE_BYTES {
            return work();
        }
        let failed = |error: &dyn std::error::Error| ServiceError::Tokenizer(error.to_string());
        let permit = self.0.clone().acquire_owned().await.map_err(|error| failed(&error))?;
        // The permit goes with the work, which continues when the request goes away.
        let work = move || {
            let _permit = permit;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| failed(&error))?
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use futures::future::join_all;

    use super::*;

    #[tokio::test]
    async fn few_texts_are_tokenised_at_a_time() {
        let tokenizing = Tokenizing::new(2);
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let work = || {
            let (running, most) = (running.clone(), most.clone());
            move || {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(20));
                running.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            }
        };
        for answer in join_all((0..8).map(|_| tokenizing.run(INLINE_BYTES + 1, work()))).await {
            answer.unwrap();
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }
}
