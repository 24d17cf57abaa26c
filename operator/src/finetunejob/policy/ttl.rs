//! `ttlSecondsAfterFinished`: when a job that is over is deleted.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::time;

/// Returns the time left before the job is deleted, zero if it is due; `None` if the job stays.
pub fn left(ttl_seconds: Option<u32>, completion: Option<&Time>, now: Timestamp) -> Option<Duration> {
    let (ttl, completion) = ttl_seconds.zip(completion)?;
    Some(time::left(Duration::from_secs(ttl.into()), completion.0, now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_to_live_counts_from_the_end() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let end = Time(at(100));
        assert_eq!(left(None, Some(&end), at(500)), None);
        assert_eq!(left(Some(10), None, at(500)), None);
        assert_eq!(left(Some(10), Some(&end), at(109)), Some(Duration::from_secs(1)));
        assert_eq!(left(Some(10), Some(&end), at(110)), Some(Duration::ZERO));
    }
}
