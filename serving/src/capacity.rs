//! How much a process takes at once: bytes of bodies, and calls over HTTP/2. What is beyond is refused, and nothing waits for room.

use std::{error::Error, sync::Arc};

use axum::http::Extensions;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// Default number of bytes of bodies that a process holds. A router's pod has 1 GiB of memory by default, of which bodies,
/// with what is made of them, take up to about three times as much as this.
pub const BODY_MEMORY: usize = 128 << 20;
/// Most calls over HTTP/2 in progress at the same time, on all connections together.
const MOST_CALLS: usize = 4096;

/// What a process takes. Clones share it.
#[derive(Clone, Debug)]
pub struct Capacity {
    memory: usize,
    bytes: Arc<Semaphore>,
    calls: Arc<Semaphore>,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    #[error("there is no room for this body: at most {memory} bytes of bodies are held at the same time; try again")]
    Bytes { memory: usize },
    #[error("there are too many calls in progress; try again")]
    Calls,
}

/// Takes from a capacity until it is dropped.
#[derive(Debug, Default)]
pub struct Held(Option<OwnedSemaphorePermit>);

impl Default for Capacity {
    fn default() -> Self {
        Self::new(BODY_MEMORY)
    }
}

impl Capacity {
    /// A capacity for this number of bytes of bodies.
    pub fn new(memory: usize) -> Self {
        Self::with_calls(memory, MOST_CALLS)
    }

    pub(crate) fn with_calls(memory: usize, calls: usize) -> Self {
        let memory = memory.min(Semaphore::MAX_PERMITS);
        Self { memory, bytes: Arc::new(Semaphore::new(memory)), calls: Arc::new(Semaphore::new(calls)) }
    }

    /// The capacity of the process that a request arrived at: a listener puts it into the extensions of its requests.
    pub fn of(extensions: &Extensions) -> Option<Self> {
        extensions.get::<Self>().cloned()
    }

    /// Takes bytes.
    ///
    /// # Errors
    /// [`Full::Bytes`]: fewer are left.
    pub fn hold(&self, bytes: usize) -> Result<Held, Full> {
        let refused = || refused("bytes", Full::Bytes { memory: self.memory });
        let bytes = u32::try_from(bytes).map_err(|_| refused())?;
        let permit = self.bytes.clone().try_acquire_many_owned(bytes).map_err(|_| refused())?;
        Ok(Held(Some(permit)))
    }

    /// Takes the place of a call.
    ///
    /// # Errors
    /// [`Full::Calls`]: none is left.
    pub fn call(&self) -> Result<Held, Full> {
        let permit = self.calls.clone().try_acquire_owned().map_err(|_| refused("calls", Full::Calls))?;
        Ok(Held(Some(permit)))
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> (usize, usize) {
        (self.bytes.available_permits(), self.calls.available_permits())
    }
}

/// Counts a refusal.
fn refused(what: &'static str, full: Full) -> Full {
    metrics::counter!("athanor_overload_refusals_total", "what" => what).increment(1);
    full
}

impl Held {
    /// Takes over what another one holds of the same kind.
    pub fn add(&mut self, other: Self) {
        let Some(other) = other.0 else { return };
        match &mut self.0 {
            Some(permit) => permit.merge(other),
            own => *own = Some(other),
        }
    }
}

impl Full {
    /// The refusal that made reading a body fail, if that was the cause.
    pub fn cause_of(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(full) = error.downcast_ref::<Self>() {
                return Some(*full);
            }
            next = error.source();
        }
        None
    }
}

impl From<Full> for Status {
    fn from(full: Full) -> Self {
        Self::resource_exhausted(full.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_free_again_when_it_is_dropped() {
        let capacity = Capacity::with_calls(100, 1);
        let mut held = Held::default();
        held.add(capacity.hold(60).unwrap());
        held.add(capacity.hold(40).unwrap());
        assert_eq!(capacity.hold(1).unwrap_err(), Full::Bytes { memory: 100 });
        assert!(capacity.hold(0).is_ok());
        drop(held);
        assert_eq!(capacity.hold(101).unwrap_err(), Full::Bytes { memory: 100 });
        assert_eq!(capacity.hold(usize::MAX).unwrap_err(), Full::Bytes { memory: 100 });
        let call = capacity.call().unwrap();
        assert_eq!(capacity.clone().call().unwrap_err(), Full::Calls);
        drop(call);
        assert_eq!(capacity.free(), (100, 1));
    }
}
