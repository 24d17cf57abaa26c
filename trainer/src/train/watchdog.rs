//! Ends a process in which nothing moves any more: a hung collective cannot be interrupted from inside.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A clock that work winds up; when it runs down, the action given to [`Watchdog::start`] runs.
#[derive(Clone)]
pub struct Watchdog {
    started: Instant,
    /// Milliseconds after `started` of the last beat; 0 means that nothing is watched now.
    last: Arc<AtomicU64>,
    /// What is watched now.
    watched: Arc<Mutex<Watched>>,
}

/// What a process does while it is watched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Watched {
    #[default]
    Steps,
    /// The first collective, in which the ranks connect; what to check if it hangs.
    Connecting { advice: String },
}

impl Watched {
    /// The message of a process that has been silent for this long.
    pub fn hung(&self, silent: Duration) -> String {
        let limit = format!("{} s (failurePolicy.hangSeconds)", silent.as_secs());
        match self {
            Self::Steps => format!("no step ended for {limit}"),
            Self::Connecting { advice } => {
                format!("the ranks found each other, but their first collective did not end in {limit}. {advice}")
            }
        }
    }
}

impl Watchdog {
    /// `on_hang` runs on a thread of its own and is expected to end the process. A limit of zero watches nothing.
    pub fn start(limit: Duration, on_hang: impl FnOnce(Duration, Watched) + Send + 'static) -> Self {
        let watchdog = Self { started: Instant::now(), last: Arc::default(), watched: Arc::default() };
        if !limit.is_zero() {
            let watch = watchdog.clone();
            std::thread::spawn(move || {
                loop {
                    std::thread::sleep((limit / 10).clamp(Duration::from_millis(10), Duration::from_secs(1)));
                    let last = watch.last.load(Ordering::Relaxed);
                    let silent = watch.started.elapsed().saturating_sub(Duration::from_millis(last));
                    if last > 0 && silent > limit {
                        return on_hang(silent, watch.watched().clone());
                    }
                }
            });
        }
        watchdog
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the watch of something else than steps, until the next [`Self::rest`].
    pub fn watch(&self, watched: Watched) {
        *self.watched() = watched;
        self.beat();
    }

    /// Something moved.
    pub fn beat(&self) {
        self.last.store((self.started.elapsed().as_millis() as u64).max(1), Ordering::Relaxed);
    }

    /// A beat of a thread that waits: it counts only if something is watched now, and begins no watch.
    pub fn beat_while_watched(&self) {
        let now = (self.started.elapsed().as_millis() as u64).max(1);
        let _ = self.last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| (last > 0).then_some(now));
    }

    /// Nothing has to move until the next beat.
    pub fn rest(&self) {
        self.last.store(0, Ordering::Relaxed);
        *self.watched() = Watched::Steps;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn barks_only_when_silent_and_not_at_rest() {
        let (sender, barked) = mpsc::channel();
        let watchdog =
            Watchdog::start(Duration::from_millis(200), move |silent, work| sender.send((silent, work)).unwrap());
        assert!(barked.recv_timeout(Duration::from_millis(400)).is_err(), "no beat yet");
        watchdog.beat();
        watchdog.rest();
        watchdog.beat_while_watched();
        assert!(barked.recv_timeout(Duration::from_millis(400)).is_err(), "at rest");
        watchdog.beat();
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(50));
            watchdog.beat_while_watched();
        }
        assert!(barked.try_recv().is_err(), "a thread that waits");
        let (silent, work) = barked.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(silent > Duration::from_millis(200));
        assert_eq!(work.hung(Duration::from_secs(600)), "no step ended for 600 s (failurePolicy.hangSeconds)");
    }
}
