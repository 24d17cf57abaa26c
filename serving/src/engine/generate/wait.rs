//! How long a request waits before it runs: an estimate from the rate at which waiting sequences were admitted. Without clock or thread.

use std::time::Duration;

/// Time constant, in seconds with a backlog, with which the past is forgotten.
const MEMORY: f64 = 30.0;
/// Largest number of seconds after which a refused request should come back.
const LATEST: u64 = 3600;

/// The rate at which sequences are admitted while others wait for room. Only such time is counted: at other times the rate
/// is that of the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AdmissionRate {
    /// Seconds with a backlog, the past ones with less weight.
    seconds: f64,
    /// Sequences that were admitted in them, with the same weights.
    admitted: f64,
}

impl AdmissionRate {
    /// Counts a time of backlog, at whose end `admitted` sequences were admitted.
    ///
    /// `running`: sequences that ran in that time. Until the first of them end nothing is known but that each takes at
    /// least as long as it has run. So the estimate begins as if they had all been admitted in the first backlog.
    pub fn record(&mut self, elapsed: Duration, admitted: usize, running: usize) {
        if self.seconds == 0.0 {
            self.admitted = running as f64;
        }
        let elapsed = elapsed.as_secs_f64();
        let kept = (-elapsed / MEMORY).exp();
        self.seconds = self.seconds * kept + elapsed;
        self.admitted = self.admitted * kept + admitted as f64;
    }

    /// Mean time between two admissions, in seconds; 0 before anything was recorded.
    pub fn interval(&self) -> f64 {
        if self.seconds == 0.0 { 0.0 } else { self.seconds / self.admitted.max(f64::MIN_POSITIVE) }
    }
}

/// What a request finds when it arrives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Queue {
    /// Sequences that were accepted and do not run yet.
    pub waiting: usize,
    /// How many of them can run at once; 0 while sequences wait for room.
    pub free: usize,
    /// Mean time between two admissions, in seconds.
    pub interval: f64,
}

impl Queue {
    /// Expected time until a sequence that arrives now is next. Zero if none waits for room.
    pub fn expected_wait(&self) -> Duration {
        match self.waiting.saturating_sub(self.free) {
            0 => Duration::ZERO,
            ahead => Duration::try_from_secs_f64(ahead as f64 * self.interval).unwrap_or(Duration::MAX),
        }
    }

    /// Seconds after which a refused request should come back: when those that wait now will have been admitted. At
    /// least 1, at most an hour.
    pub fn retry_after(&self) -> u64 {
        (self.expected_wait().as_secs_f64().ceil() as u64).clamp(1, LATEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// A rate after `count` steps with a backlog.
    fn after(count: usize, step: f64, admitted: usize, running: usize) -> AdmissionRate {
        let mut rate = AdmissionRate::default();
        for _ in 0..count {
            rate.record(seconds(step), admitted, running);
        }
        rate
    }

    fn close(found: f64, expected: f64) -> bool {
        (found / expected - 1.0).abs() < 0.05
    }

    #[test]
    fn a_request_waits_for_those_ahead_that_have_no_room() {
        for (waiting, free, interval, expected) in [
            (0, 0, 0.5, 0.0),
            (10, 0, 0.5, 5.0),
            // Ten were accepted since the last step, which left room for eight.
            (10, 8, 0.5, 1.0),
            (10, 16, 0.5, 0.0),
            // Nothing is known yet.
            (10, 0, 0.0, 0.0),
        ] {
            let queue = Queue { waiting, free, interval };
            assert_eq!(queue.expected_wait(), seconds(expected), "{queue:?}");
        }
    }

    #[test]
    fn retry_after_is_the_expected_wait_in_whole_seconds() {
        for (waiting, interval, expected) in [(0, 1.0, 1), (1, 0.2, 1), (4, 0.5, 2), (5, 0.5, 3), (1, f64::MAX, LATEST)]
        {
            let queue = Queue { waiting, free: 0, interval };
            assert_eq!(queue.retry_after(), expected, "{queue:?}");
        }
    }

    #[test]
    fn the_interval_becomes_that_of_the_admissions() {
        assert_eq!(AdmissionRate::default().interval(), 0.0);
        // A step of 20 ms admits one sequence: 50 a second. The first estimate weighs little after four minutes.
        let rate = after(12_000, 0.02, 1, 16);
        assert!(close(rate.interval(), 0.02), "{}", rate.interval());
    }

    #[test]
    fn the_rate_follows_a_change_within_some_minutes() {
        let mut rate = after(6_000, 0.02, 1, 16);
        for step in 0..12_000 {
            rate.record(seconds(0.02), usize::from(step % 10 == 0), 16);
        }
        assert!(close(rate.interval(), 0.2), "{}", rate.interval());
    }

    #[test]
    fn before_the_first_end_the_rate_is_bounded_by_the_age_of_the_answers() {
        // 16 sequences have run for two seconds and none has ended: at most eight a second will.
        let rate = after(100, 0.02, 0, 16);
        assert!(close(rate.interval(), 2.0 / 16.0), "{}", rate.interval());
        // A burst that comes before that is not refused.
        let rate = after(1, 0.02, 0, 16);
        assert!(Queue { waiting: 2000, free: 0, interval: rate.interval() }.expected_wait() < seconds(3.0));
    }

    #[test]
    fn an_engine_that_stands_still_is_expected_to_take_ever_longer() {
        let mut rate = after(6_000, 0.02, 1, 16);
        let before = rate.interval();
        rate.record(seconds(60.0), 0, 16);
        assert!(rate.interval() > 5.0 * before, "{} after {before}", rate.interval());
        rate.record(seconds(1e9), 0, 16);
        assert_eq!(Queue { waiting: 0, free: 0, interval: rate.interval() }.expected_wait(), Duration::ZERO);
        assert!(Queue { waiting: 1, free: 0, interval: rate.interval() }.expected_wait() > seconds(1e9));
    }
}
