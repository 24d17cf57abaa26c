//! Time between two events, for deadlines and pauses.

use std::time::Duration;

use jiff::Timestamp;

/// Returns the time from `start` to `now`, or zero if `start` is later.
pub fn since(start: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(start)).unwrap_or_default()
}

/// Returns how much of `limit` is left at `now`, counted from `start`.
pub fn left(limit: Duration, start: Timestamp, now: Timestamp) -> Duration {
    limit.saturating_sub(since(start, now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_run_backwards() {
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(since(at(10), at(12)), Duration::from_secs(2));
        assert_eq!(since(at(12), at(10)), Duration::ZERO);
        assert_eq!(left(Duration::from_secs(5), at(10), at(12)), Duration::from_secs(3));
        assert_eq!(left(Duration::from_secs(5), at(10), at(20)), Duration::ZERO);
    }
}
