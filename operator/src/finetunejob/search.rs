//! The search for hyperparameters of a FineTuneJob, pure: which trials there are, from what the status says of them and from the
//! child FineTuneJobs, and what happens next.
//!
//! The status is the record; a child that it does not know yet carries its trial in an annotation. What comes next is a function of
//! the trials alone, so an operator that was killed between two writes goes on as if it had not been.

use athanor_contract::{
    Decimal,
    artifact::sha256_hex,
    train::{SearchSpec, TrainSpec, TrialOutcome},
};
use athanor_crds::{
    FineTuneJob, SearchStatus, TRIAL_ANNOTATION, TrialState as StatusState, TrialStatus, condition as types,
    schema::LONGEST_JOB_NAME,
};
use athanor_search::{Assignment, Next, Search, Trial, TrialState, apply};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use super::decide::{USER_ERROR, is_over};
use crate::condition;

/// `-`, ten digits, `-` and the rung.
const SUFFIX: usize = 13;
/// Characters of a failure's message that are kept.
const MESSAGE: usize = 300;

/// A child FineTuneJob to create.
#[derive(Clone, Debug, PartialEq)]
pub struct NewTrial {
    /// Its name.
    pub job: String,
    pub mark: Mark,
    /// What it trains.
    pub train: TrainSpec,
}

/// Which trial a child is of, and what for: the value of its annotation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mark {
    /// Place in the list of trials.
    pub index: usize,
    pub rung: usize,
    pub assignment: Assignment,
}

/// What is known and what follows.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub status: SearchStatus,
    pub start: Vec<NewTrial>,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Searching {
        message: String,
    },
    /// The job trains with the best trial's values.
    Chosen(Box<Found>),
    /// All trials failed, or one by the user's error, which the others have too.
    Failed {
        reason: &'static str,
        message: String,
    },
}

/// The result of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The job with the best trial's values.
    pub train: TrainSpec,
    pub trials: Vec<TrialOutcome>,
}

/// A trial with what only a user needs.
struct Record {
    trial: Trial,
    message: Option<String>,
}

/// The plan of a job that has a search.
///
/// # Errors
/// A status that says something else than this operator writes.
pub fn plan(job: &FineTuneJob, spec: &SearchSpec, children: &[FineTuneJob]) -> Result<Plan, String> {
    let train = &job.spec.train;
    let search = Search::new(spec, &train.hyperparameters)?.first_alone(train.data.endpoint_annotates());
    let recorded = job.status.as_ref().and_then(|status| status.search.clone()).unwrap_or_default();
    let mut records = recall(&recorded)?;
    let key = spec.objective.key(&train.hyperparameters);
    let mut refused = None;
    if !recorded.done {
        adopt(&mut records, children);
        for record in records.iter_mut().filter(|record| record.trial.is_running()) {
            if let Some(message) = settle(record, &job.name_any(), &key, children) {
                let Trial { assignment, .. } = &record.trial;
                refused.get_or_insert_with(|| format!("trial {} ({assignment}): {message}", record.trial.name()));
            }
        }
    }
    if let Some(message) = refused {
        let search = status(job, spec, &search, &records, false);
        return Ok(Plan {
            status: search,
            start: Vec::new(),
            outcome: Outcome::Failed { reason: USER_ERROR, message },
        });
    }
    let mut trials: Vec<Trial> = records.iter().map(|record| record.trial.clone()).collect();
    let best = loop {
        if recorded.done {
            break Some(trials.iter().position(|trial| Some(trial.name()) == recorded.best));
        }
        match search.next(&trials) {
            Next::Start(assignments) => trials.extend(assignments.into_iter().map(Trial::new)),
            Next::Promote { trial, .. } => trials[trial].promote(),
            Next::Wait => break None,
            Next::Done { best } => break Some(best),
        }
    };
    let messages = records.into_iter().map(|record| record.message).chain(std::iter::repeat(None));
    let records: Vec<Record> =
        trials.iter().cloned().zip(messages).map(|(trial, message)| Record { trial, message }).collect();

    let mut start = Vec::new();
    for (index, trial) in trials.iter().enumerate().filter(|(_, trial)| trial.is_running()) {
        let name = child_name(&job.name_any(), &trial.name(), trial.rung());
        if !children.iter().any(|child| child.name_any() == name) {
            let train = search.specification(&trial.assignment, trial.rung(), train)?;
            let mark = Mark { index, rung: trial.rung(), assignment: trial.assignment.clone() };
            start.push(NewTrial { job: name, mark, train });
        }
    }
    let status = status(job, spec, &search, &records, best.is_some());
    let outcome = match best {
        None => Outcome::Searching { message: status.text.clone() },
        Some(Some(best)) => {
            let train = apply(&trials[best].assignment, train)?;
            Outcome::Chosen(Box::new(Found { train, trials: Search::outcomes(&trials, best) }))
        }
        Some(None) => {
            let last = records.last().and_then(|record| record.message.as_deref()).unwrap_or("for an unknown reason");
            let message = format!("all {} trials failed, the last one: {last}", trials.len());
            Outcome::Failed { reason: "SearchFailed", message }
        }
    };
    Ok(Plan { status, start, outcome })
}

/// The trials that the status has.
fn recall(status: &SearchStatus) -> Result<Vec<Record>, String> {
    let records = status.trials.iter().map(|trial| {
        let state = match trial.state {
            StatusState::Running => TrialState::Running,
            StatusState::Finished => TrialState::Finished,
            StatusState::Failed => TrialState::Failed,
        };
        let assignment = Assignment::from_strings(&trial.parameters)?;
        let results = trial.results.iter().map(|result| result.get()).collect();
        Ok(Record { trial: Trial { assignment, results, state }, message: trial.message.clone() })
    });
    records.collect()
}

/// Takes in children that were made after the status was written.
fn adopt(records: &mut Vec<Record>, children: &[FineTuneJob]) {
    let mut marks: Vec<Mark> = children.iter().filter_map(mark).collect();
    marks.sort_by_key(|mark| (mark.rung, mark.index));
    for mark in marks {
        match records.iter_mut().find(|record| record.trial.assignment == mark.assignment) {
            None => records.push(Record { trial: Trial::new(mark.assignment), message: None }),
            Some(record) if record.trial.state == TrialState::Finished && record.trial.rung() == mark.rung => {
                record.trial.promote();
            }
            Some(_) => {}
        }
    }
}

fn mark(child: &FineTuneJob) -> Option<Mark> {
    serde_json::from_str(child.annotations().get(TRIAL_ANNOTATION)?).ok()
}

/// Notes how the child of a running trial has ended, if it has; the message of a user's error, which other trials would have too.
fn settle(record: &mut Record, parent: &str, key: &str, children: &[FineTuneJob]) -> Option<String> {
    let name = child_name(parent, &record.trial.name(), record.trial.rung());
    let child = children.iter().find(|child| child.name_any() == name)?;
    let status = child.status.as_ref().filter(|status| is_over(status))?;
    let metric = status.summary.as_ref().and_then(|summary| summary.metrics.get(key));
    let condition = condition::get(&status.conditions, types::SUCCEEDED)?;
    let failure = match metric {
        Some(metric) if condition.status == "True" => {
            record.trial.report(metric.get());
            return None;
        }
        _ if condition.status == "True" => format!("FineTuneJob {name} tells no {key}"),
        _ => format!("{}: {}", condition.reason, condition.message),
    };
    record.message = Some(failure.chars().take(MESSAGE).collect());
    record.trial.fail();
    (condition.reason == USER_ERROR).then(|| condition.message.clone())
}

fn status(job: &FineTuneJob, spec: &SearchSpec, search: &Search, records: &[Record], done: bool) -> SearchStatus {
    let trials: Vec<Trial> = records.iter().map(|record| record.trial.clone()).collect();
    let best = search.best(&trials).map(|best| &trials[best]);
    let over = trials.iter().filter(|trial| !trial.is_running()).count();
    let of_best = best.and_then(|best| Decimal::new(*best.results.last()?));
    let of_best = of_best
        .map(|value| format!(", best {} {value}", spec.objective.key(&job.spec.train.hyperparameters)))
        .unwrap_or_default();
    let count = if done { trials.len() } else { spec.max_trials as usize };
    let trial_status = |record: &Record| {
        let trial = &record.trial;
        // A trial that does not run has had its last child in the rung before.
        let rung = if trial.state == TrialState::Finished { trial.rung().saturating_sub(1) } else { trial.rung() };
        TrialStatus {
            name: trial.name(),
            parameters: trial.assignment.to_strings(),
            state: match trial.state {
                TrialState::Running => StatusState::Running,
                TrialState::Finished => StatusState::Finished,
                TrialState::Failed => StatusState::Failed,
            },
            results: trial.results.iter().filter_map(|result| Decimal::new(*result)).collect(),
            job: child_name(&job.name_any(), &trial.name(), rung),
            message: record.message.clone(),
        }
    };
    SearchStatus {
        text: format!("{over} of {count} trials{of_best}"),
        best: best.map(Trial::name),
        done,
        trials: records.iter().map(trial_status).collect(),
    }
}

/// Name of the FineTuneJob that trains a trial in a rung. A long name of the parent is cut, and hashed with the trial's.
pub fn child_name(parent: &str, trial: &str, rung: usize) -> String {
    let end = if rung == 0 { String::new() } else { format!("-{rung}") };
    match parent.get(..LONGEST_JOB_NAME - SUFFIX) {
        Some(cut) if cut.len() < parent.len() => {
            let digest = sha256_hex(format!("{parent}/{trial}").as_bytes());
            format!("{}-{}{end}", cut.trim_end_matches('-'), &digest[..10])
        }
        _ => format!("{parent}-{trial}{end}"),
    }
}
