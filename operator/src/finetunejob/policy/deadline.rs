//! `activeDeadlineSeconds`: the time from the start in which a job must be over.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::time;

/// Added to a wait for the deadline, so that the deadline has passed when the wait is over.
const MARGIN: Duration = Duration::from_millis(100);

/// Deadline of a job that has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    limit: u32,
    left: Duration,
}

impl Deadline {
    /// Returns the deadline of a job, if it has one and has started.
    pub fn new(limit: Option<u32>, start: Option<&Time>, now: Timestamp) -> Option<Self> {
        let (limit, start) = limit.zip(start)?;
        Some(Self { limit, left: time::left(Duration::from_secs(limit.into()), start.0, now) })
    }

    pub fn has_passed(self) -> bool {
        self.left.is_zero()
    }

    /// Returns the time after which the deadline has passed.
    pub fn wait(self) -> Duration {
        self.left + MARGIN
    }

    pub fn message(self) -> String {
        format!("the job was not over {} s after its start (activeDeadlineSeconds)", self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_counts_from_the_start() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let start = Time(at(100));
        let deadline = |limit, start, now| Deadline::new(limit, start, at(now));
        assert_eq!(deadline(None, Some(&start), 500), None, "no limit");
        assert_eq!(deadline(Some(60), None, 500), None, "not started");
        let before = deadline(Some(60), Some(&start), 159).unwrap();
        assert_eq!((before.has_passed(), before.wait()), (false, Duration::from_millis(1100)));
        assert!(deadline(Some(60), Some(&start), 160).unwrap().has_passed());
    }
}
