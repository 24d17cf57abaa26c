//! A token bucket: so many units in a minute, at most a minute's worth at once.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Units that are there and refill with time. What is taken may exceed them; then none are there until the lack has refilled.
#[derive(Debug)]
pub struct Bucket {
    per_minute: f64,
    level: Mutex<Level>,
}

#[derive(Debug)]
struct Level {
    units: f64,
    /// When `units` were there; `None` before the first use.
    at: Option<Instant>,
}

impl Bucket {
    /// A full bucket.
    pub fn new(per_minute: u32) -> Self {
        let per_minute = f64::from(per_minute);
        Self { per_minute, level: Mutex::new(Level { units: per_minute, at: None }) }
    }

    fn refilled(&self, now: Instant) -> MutexGuard<'_, Level> {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = level.at {
            let passed = now.saturating_duration_since(at).as_secs_f64();
            level.units = (level.units + passed / 60.0 * self.per_minute).min(self.per_minute);
        }
        level.at = level.at.max(Some(now));
        level
    }

    /// The wait until there is a unit, if there is none.
    fn wait(&self, units: f64) -> Result<(), Duration> {
        if units >= 1.0 { Ok(()) } else { Err(Duration::from_secs_f64((1.0 - units) / self.per_minute * 60.0)) }
    }

    /// Whether there is a unit.
    ///
    /// # Errors
    /// The wait until there is one.
    pub fn has(&self, now: Instant) -> Result<(), Duration> {
        self.wait(self.refilled(now).units)
    }

    /// Takes one unit.
    ///
    /// # Errors
    /// The wait until there is one.
    pub fn try_take(&self, now: Instant) -> Result<(), Duration> {
        let mut level = self.refilled(now);
        self.wait(level.units)?;
        level.units -= 1.0;
        Ok(())
    }

    /// Takes units whether they are there or not.
    pub fn take(&self, units: f64, now: Instant) {
        self.refilled(now).units -= units;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_worth_at_once_and_then_at_the_rate() {
        let (bucket, start) = (Bucket::new(60), Instant::now());
        let after = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let taken = |at: f64| (0..1_000).take_while(|_| bucket.try_take(after(at)).is_ok()).count();
        assert_eq!(taken(0.0), 60);
        assert_eq!(taken(2.5), 2);
        assert_eq!(taken(1.0), 0, "a clock that goes back refills nothing");
        assert_eq!(taken(1_000.0), 60, "never more than a minute's worth");
        bucket.take(30.0, after(1_000.0));
        let wait = bucket.has(after(1_000.0)).unwrap_err();
        assert!((wait.as_secs_f64() - 31.0).abs() < 1e-6, "{wait:?}");
    }
}
