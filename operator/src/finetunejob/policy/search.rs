//! The search for hyperparameters: which trials there are, from the status and the child FineTuneJobs, and what happens
//! next.
//!
//! The status is the record. A child that is not in the status yet carries its trial in an annotation. What follows is
//! a function of the trials alone, so an operator that was killed between two writes continues where it was.

use std::sync::Arc;

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

use crate::{
    cluster::Identity,
    condition,
    finetunejob::attempt::{USER_ERROR, is_over},
};

/// Length of `-`, ten digits, `-` and the rung.
const SUFFIX: usize = 13;
/// Most characters of a failure's message that are kept.
const MESSAGE: usize = 300;

/// A child FineTuneJob to create.
#[derive(Clone, Debug, PartialEq)]
pub struct NewTrial {
    /// Name of the child.
    pub job: String,
    pub annotation: TrialAnnotation,
    /// Specification of the child's training.
    pub train: TrainSpec,
}

/// The trial that a child belongs to, as the value of its annotation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrialAnnotation {
    /// Index in the list of trials.
    pub index: usize,
    pub rung: usize,
    pub assignment: Assignment,
}

/// State of a search and what follows.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub status: SearchStatus,
    /// Trials to create.
    pub start: Vec<NewTrial>,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Searching {
        message: String,
    },
    /// The job trains with the values of the best trial.
    Chosen(Box<SearchResult>),
    /// All trials failed, or one of them by a user error, which the others have as well.
    Failed {
        reason: &'static str,
        message: String,
    },
}

/// The result of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchResult {
    /// The job's specification with the values of the best trial.
    pub train: TrainSpec,
    pub trials: Vec<TrialOutcome>,
}

/// A trial with the reason of its failure, which only users read.
struct Record {
    trial: Trial,
    message: Option<String>,
}

/// Decides how the search of a job goes on.
///
/// # Errors
/// The specification, or a status that this operator did not write, cannot be read.
pub fn decide(job: &FineTuneJob, spec: &SearchSpec, children: &[Arc<FineTuneJob>]) -> Result<Decision, String> {
    let train = &job.spec.train;
    let search = Search::new(spec, &train.hyperparameters)?.first_alone(train.data.endpoint_annotates());
    let recorded = job.status.as_ref().and_then(|status| status.search.clone()).unwrap_or_default();
    let mut records = recall(&recorded)?;
    if !recorded.done {
        adopt(&mut records, children);
        let key = spec.objective.key(&train.hyperparameters);
        if let Some(message) = settle_all(&mut records, &job.name_any(), &key, children) {
            let status = status(job, spec, &search, &records, false);
            let outcome = Outcome::Failed { reason: USER_ERROR, message };
            return Ok(Decision { status, start: Vec::new(), outcome });
        }
    }
    let mut trials: Vec<Trial> = records.iter().map(|record| record.trial.clone()).collect();
    let best = advance(&search, &mut trials, &recorded);
    let messages = records.into_iter().map(|record| record.message).chain(std::iter::repeat(None));
    let records: Vec<Record> =
        trials.iter().cloned().zip(messages).map(|(trial, message)| Record { trial, message }).collect();
    let start = missing(job, &search, &trials, children)?;
    let status = status(job, spec, &search, &records, best.is_some());
    let outcome = match best {
        None => Outcome::Searching { message: status.text.clone() },
        Some(Some(best)) => {
            let train = apply(&trials[best].assignment, train)?;
            Outcome::Chosen(Box::new(SearchResult { train, trials: Search::outcomes(&trials, best) }))
        }
        Some(None) => {
            let last = records.last().and_then(|record| record.message.as_deref()).unwrap_or("for an unknown reason");
            let message = format!("all {} trials failed, the last one: {last}", trials.len());
            Outcome::Failed { reason: "SearchFailed", message }
        }
    };
    Ok(Decision { status, start, outcome })
}

/// Returns the trials that are not over.
pub fn unfinished(trials: &[Arc<FineTuneJob>]) -> Vec<Identity> {
    let unfinished = trials
        .iter()
        .filter(|trial| trial.metadata.deletion_timestamp.is_none() && !trial.status.as_ref().is_some_and(is_over));
    unfinished.map(|trial| Identity::from_object(&**trial)).collect()
}

/// Adds and promotes trials as far as the search allows. Returns the index of the best one when the search is over;
/// `Some(None)` if no trial has a result.
fn advance(search: &Search, trials: &mut Vec<Trial>, recorded: &SearchStatus) -> Option<Option<usize>> {
    if recorded.done {
        return Some(trials.iter().position(|trial| Some(trial.name()) == recorded.best));
    }
    loop {
        match search.next(trials) {
            Next::Start(assignments) => trials.extend(assignments.into_iter().map(Trial::new)),
            Next::Promote { trial, .. } => trials[trial].promote(),
            Next::Wait => return None,
            Next::Done { best } => return Some(best),
        }
    }
}

/// Returns the running trials that have no child yet.
fn missing(
    job: &FineTuneJob,
    search: &Search,
    trials: &[Trial],
    children: &[Arc<FineTuneJob>],
) -> Result<Vec<NewTrial>, String> {
    let mut missing = Vec::new();
    for (index, trial) in trials.iter().enumerate().filter(|(_, trial)| trial.is_running()) {
        let name = child_name(&job.name_any(), &trial.name(), trial.rung());
        if !children.iter().any(|child| child.name_any() == name) {
            let train = search.specification(&trial.assignment, trial.rung(), &job.spec.train)?;
            let annotation = TrialAnnotation { index, rung: trial.rung(), assignment: trial.assignment.clone() };
            missing.push(NewTrial { job: name, annotation, train });
        }
    }
    Ok(missing)
}

/// Reads the trials that the status has.
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

/// Adds the trials of children that were created after the status was written.
fn adopt(records: &mut Vec<Record>, children: &[Arc<FineTuneJob>]) {
    let mut annotations: Vec<TrialAnnotation> = children.iter().filter_map(|child| annotation(child)).collect();
    annotations.sort_by_key(|annotation| (annotation.rung, annotation.index));
    for annotation in annotations {
        match records.iter_mut().find(|record| record.trial.assignment == annotation.assignment) {
            None => records.push(Record { trial: Trial::new(annotation.assignment), message: None }),
            Some(record) if record.trial.state == TrialState::Finished && record.trial.rung() == annotation.rung => {
                record.trial.promote();
            }
            Some(_) => {}
        }
    }
}

fn annotation(child: &FineTuneJob) -> Option<TrialAnnotation> {
    serde_json::from_str(child.annotations().get(TRIAL_ANNOTATION)?).ok()
}

/// Records the ends of running trials. Returns the message of a user error, which ends the search.
fn settle_all(records: &mut [Record], parent: &str, key: &str, children: &[Arc<FineTuneJob>]) -> Option<String> {
    let mut user_error = None;
    for record in records.iter_mut().filter(|record| record.trial.is_running()) {
        if let Some(message) = settle(record, parent, key, children) {
            let Trial { assignment, .. } = &record.trial;
            user_error.get_or_insert_with(|| format!("trial {} ({assignment}): {message}", record.trial.name()));
        }
    }
    user_error
}

/// Records how the child of a running trial ended, if it did. Returns the message of a user error.
fn settle(record: &mut Record, parent: &str, key: &str, children: &[Arc<FineTuneJob>]) -> Option<String> {
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
        _ if condition.status == "True" => format!("FineTuneJob {name} has no metric {key}"),
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
        // The last child of a trial that does not run was that of the rung before.
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

/// Returns the name of the FineTuneJob that trains a trial in a rung. A long name of the parent is cut and hashed with
/// the trial's.
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
