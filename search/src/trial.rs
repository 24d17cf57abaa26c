//! One assignment and what has become of it.

use serde::{Deserialize, Serialize};

use crate::Assignment;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrialState {
    /// It trains, or is about to, with the budget of rung `results.len()`.
    Running,
    /// It has a result for each rung it was given.
    Finished,
    /// It crashed or diverged: it is never chosen and never promoted.
    Failed,
}

/// A trial. The list of them, in the order in which they were started, is all the state a search has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trial {
    pub assignment: Assignment,
    /// The objective's metric on the validation rows after each rung; without ASHA there is one rung.
    #[serde(default)]
    pub results: Vec<f64>,
    pub state: TrialState,
}

impl Trial {
    /// A trial that runs from now on.
    pub fn new(assignment: Assignment) -> Self {
        Self { assignment, results: Vec::new(), state: TrialState::Running }
    }

    /// Its name, a hash of its assignment.
    pub fn name(&self) -> String {
        self.assignment.name()
    }

    /// The rung it runs in, or would run in next.
    pub fn rung(&self) -> usize {
        self.results.len()
    }

    /// The training of its rung has ended with this metric. One that is not finite is a failure.
    pub fn report(&mut self, metric: f64) {
        if metric.is_finite() {
            self.results.push(metric);
            self.state = TrialState::Finished;
        } else {
            self.fail();
        }
    }

    /// The training of its rung has failed for good.
    pub fn fail(&mut self) {
        self.state = TrialState::Failed;
    }

    /// It runs again, in its next rung.
    pub fn promote(&mut self) {
        self.state = TrialState::Running;
    }

    pub fn is_running(&self) -> bool {
        self.state == TrialState::Running
    }

    /// Its result after a rung; none for a trial that failed, then or later.
    pub fn result(&self, rung: usize) -> Option<f64> {
        let result = self.results.get(rung).copied().filter(|result| result.is_finite());
        result.filter(|_| self.state != TrialState::Failed)
    }
}
