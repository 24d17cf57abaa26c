//! Which part of a status changed, and so how soon it is written.

use athanor_crds::FineTuneJobStatus;

use crate::{condition, pace::Change};

/// Returns the most urgent part of the change from the status that was read; `None` if they are the same.
pub fn change(before: Option<&FineTuneJobStatus>, next: &FineTuneJobStatus) -> Option<Change> {
    let Some(before) = before else { return Some(Change::Stage) };
    // As the API server has them: a time that was read has fewer digits than one of this process.
    let text = |status: &FineTuneJobStatus| serde_json::to_value(status).ok();
    let written = text(before);
    if text(next) == written {
        return None;
    }
    let mut next = next.clone();
    for condition in &mut next.conditions {
        if let Some(same) = condition::get(&before.conditions, &condition.type_) {
            condition.message.clone_from(&same.message);
        }
    }
    if text(&next) == written {
        return Some(Change::Message);
    }
    if let (Some(progress), Some(before)) = (&mut next.progress, &before.progress)
        && progress.stage == before.stage
    {
        progress.clone_from(before);
    }
    next.timeline.clone_from(&before.timeline);
    Some(if text(&next) == written { Change::Progress } else { Change::Stage })
}

#[cfg(test)]
mod tests {
    use athanor_contract::Decimal;
    use athanor_crds::{Progress, condition as types};
    use jiff::Timestamp;

    use super::*;
    use crate::condition::{State, Value, set};

    #[test]
    fn only_words_and_numbers_may_wait() {
        let now = Timestamp::from_second(100).unwrap();
        let says = |status: &mut FineTuneJobStatus, reason, message: &str| {
            let value = Value::new(State::Unknown, reason, message);
            set(&mut status.conditions, types::SUCCEEDED, &value, Some(1), now);
        };
        let mut before = FineTuneJobStatus::default();
        says(&mut before, "Pending", "0 of 4 pods are running");
        before.progress = Some(Progress { stage: "Training".into(), step: 3, ..Progress::default() });
        let changed = |change: &dyn Fn(&mut FineTuneJobStatus)| {
            let mut next = before.clone();
            change(&mut next);
            super::change(Some(&before), &next)
        };
        assert_eq!(super::change(None, &before), Some(Change::Stage), "the first status");
        assert_eq!(changed(&|_| {}), None);
        assert_eq!(changed(&|next| says(next, "Pending", "3 of 4 pods are running")), Some(Change::Message));
        assert_eq!(changed(&|next| says(next, "Running", "0 of 4 pods are running")), Some(Change::Stage));
        let progress = |stage: &str, step| Some(Progress { stage: stage.into(), step, ..Progress::default() });
        assert_eq!(changed(&|next| next.progress = progress("Training", 4)), Some(Change::Progress));
        assert_eq!(changed(&|next| next.progress = progress("Testing", 4)), Some(Change::Stage));
        assert_eq!(changed(&|next| next.progress = None), Some(Change::Stage));
        let mark = |next: &mut FineTuneJobStatus| {
            next.timeline.insert("firstStep".into(), Decimal::new(1.0).unwrap());
            says(next, "Pending", "3 of 4 pods are running");
        };
        assert_eq!(changed(&mark), Some(Change::Progress), "the more urgent of two");
        assert_eq!(changed(&|next| next.attempt = 1), Some(Change::Stage));
    }
}
