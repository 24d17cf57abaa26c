//! The runtime of a router's and of a server's connections. Its threads yield to those of a model on the same processors.
//!
//! A model's threads wait for each other hundreds of times in a step, so one of them that is preempted holds up all. A
//! request that is passed on or refused takes little time and may be handled some milliseconds later.

use std::{io, thread};

use tokio::{runtime, sync::oneshot};

/// Added to the nice value of the runtime's threads.
const NICER: i32 = 5;

/// Builds the runtime. The thread that builds it and those that it starts keep their priority.
pub fn build() -> io::Result<runtime::Runtime> {
    let lower = || {
        // Always allowed; the limit of a nice value is 19, which is kept.
        let lowered = rustix::process::getpriority_process(None)
            .and_then(|nice| rustix::process::setpriority_process(None, nice + NICER));
        if let Err(error) = lowered {
            tracing::warn!(%error, "a thread keeps the priority of the model's threads");
        }
    };
    runtime::Builder::new_multi_thread().enable_all().on_thread_start(lower).build()
}

/// Runs `work` on a thread of its own, with the priority of the thread on which this future is polled first. Threads that
/// `work` starts inherit it.
///
/// # Errors
/// The thread cannot be started, or `work` panics.
pub async fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new().name("load".into()).spawn(move || {
        let _ = sender.send(work());
    })?;
    receiver.await.map_err(|_| io::Error::other("the thread ended by a panic"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nice() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[test]
    fn threads_of_the_runtime_yield_to_those_that_compute() {
        let own = nice();
        let lower = (own + NICER).min(19);
        let runtime = build().unwrap();
        let on_runtime = async {
            let blocking = tokio::task::spawn_blocking(nice).await.unwrap();
            (tokio::spawn(async { nice() }).await.unwrap(), blocking)
        };
        assert_eq!(runtime.block_on(on_runtime), (lower, lower));
        let computing = || (nice(), thread::spawn(nice).join().unwrap());
        assert_eq!(runtime.block_on(on_own_thread(computing)).unwrap(), (own, own));
        assert_eq!(nice(), own);
    }

    #[test]
    fn a_panic_is_an_error() {
        let failed = build().unwrap().block_on(on_own_thread::<()>(|| panic!("a fault of the test")));
        assert!(failed.is_err());
    }
}
