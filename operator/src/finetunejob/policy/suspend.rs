//! `suspend`: the pods stop and the checkpoints stay.

/// Returns the number of the attempt that follows a suspension. A number is never used for two Kubernetes Jobs, so the
/// next attempt does not have to wait until the suspended one's Job is gone.
pub fn next_attempt(attempt: u32, has_batch_job: bool) -> u32 {
    attempt + u32::from(has_batch_job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspended_attempt_is_not_used_again() {
        assert_eq!(next_attempt(3, true), 4);
        assert_eq!(next_attempt(4, false), 4, "a job that stays suspended does not count up");
    }
}
