//! What happens next in a search, from its specification and its trials alone.

use athanor_contract::{
    Decimal,
    train::{
        DEFAULT_EPOCHS, Hyperparameters, ParameterName, SearchAlgorithm, SearchGoal, SearchSpec, TrainSpec,
        TrialOutcome,
        rules::{ASHA_ALONE, STEPS_OR_EPOCHS},
    },
};

use crate::{
    Assignment, Setting, Trial, apply, asha,
    assignment::with,
    random::Random,
    space::{Space, is_known},
    tpe,
};

/// Random trials before TPE has something to go by, if there are three times as many in all.
const STARTUP: u32 = 10;
/// Draws of an assignment that has not been tried yet, before the rest of the space is counted through.
const DRAWS: u64 = 32;

/// What the caller does next.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Start a trial with each of these; there are as many as may run beside those that do.
    Start(Vec<Assignment>),
    /// Start a trial again, with the budget of its next rung.
    Promote {
        /// Index of the trial.
        trial: usize,
        /// Steps or epochs, as [`Search::unit`] says, from the beginning.
        to: u64,
    },
    /// A trial has to end first.
    Wait,
    /// All is known: index of the best trial, or none when all failed.
    Done { best: Option<usize> },
}

/// What budgets are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Steps,
    Epochs,
}

/// A search. It has no state of its own.
pub struct Search {
    spec: SearchSpec,
    space: Space,
    /// Budgets of ASHA's rungs, smallest first; without ASHA there is one, the job's own.
    budgets: Vec<u64>,
    unit: Unit,
    first_alone: bool,
}

impl Search {
    /// `base` are the job's hyperparameters, whose length is the whole budget of a trial.
    ///
    /// # Errors
    /// Everything that is wrong with the specification, in words for the user.
    pub fn new(spec: &SearchSpec, base: &Hyperparameters) -> Result<Self, String> {
        let mut mistakes = Vec::new();
        for (is_wrong, mistake) in [
            (spec.max_trials == 0, "maxTrials must be at least 1"),
            (spec.parallelism == 0, "parallelism must be at least 1"),
            (spec.asha.is_some() && spec.algorithm != SearchAlgorithm::ASHA, &*ASHA_ALONE.message),
        ] {
            if is_wrong {
                mistakes.push(mistake.to_owned());
            }
        }
        let names: Vec<ParameterName> = spec.parameters.iter().map(|parameter| parameter.name).collect();
        for (name, other, is_set) in [
            (ParameterName::Epochs, ParameterName::MaxSteps, base.max_steps.is_some()),
            (ParameterName::MaxSteps, ParameterName::Epochs, base.epochs.is_some()),
        ] {
            if names.contains(&name) && (is_set || names.contains(&other)) {
                mistakes.push(format!("{name}: the job already has {other}"));
            }
            if names.contains(&name) && spec.algorithm == SearchAlgorithm::ASHA {
                mistakes.push(format!("{name}: ASHA chooses it"));
            }
        }
        for parameter in &spec.parameters {
            let choices = parameter.choices.iter().flatten().map(|choice| Setting::Name(choice.clone()));
            mistakes.extend(choices.filter_map(|choice| with(base, parameter.name, &choice).err()));
        }
        let (unit, budgets) = match budgets(spec, base) {
            Ok(budgets) => budgets,
            Err(mistake) => {
                mistakes.push(mistake);
                (Unit::Epochs, Vec::new())
            }
        };
        match Space::new(&spec.parameters) {
            Ok(space) if mistakes.is_empty() => {
                Ok(Self { spec: spec.clone(), space, budgets, unit, first_alone: false })
            }
            Ok(_) => Err(mistakes),
            Err(more) => Err(mistakes.into_iter().chain(more).collect()),
        }
        .map_err(|mistakes| {
            mistakes.into_iter().map(|mistake| format!("search: {mistake}")).collect::<Vec<_>>().join("; ")
        })
    }

    /// Runs one trial at a time until one has a result: the others find what it paid for.
    pub fn first_alone(self, first_alone: bool) -> Self {
        Self { first_alone, ..self }
    }

    /// Budget of each rung, smallest first; the last is the job's own length.
    pub fn budgets(&self) -> &[u64] {
        &self.budgets
    }

    /// What budgets are counted in.
    pub fn unit(&self) -> Unit {
        self.unit
    }

    /// What a trial trains in a rung: the assignment's values and, below the last rung, a shorter training.
    ///
    /// # Errors
    /// See [`apply`].
    pub fn specification(&self, assignment: &Assignment, rung: usize, spec: &TrainSpec) -> Result<TrainSpec, String> {
        let mut spec = apply(assignment, spec)?;
        if let Some(budget) = self.budgets.get(rung).filter(|_| rung + 1 < self.budgets.len()) {
            match self.unit {
                Unit::Steps => spec.hyperparameters.max_steps = Some(*budget),
                Unit::Epochs => spec.hyperparameters.epochs = u32::try_from(*budget).ok(),
            }
        }
        Ok(spec)
    }

    /// What happens next. The order of the trials is that of their start.
    pub fn next(&self, trials: &[Trial]) -> Next {
        let running = trials.iter().filter(|trial| trial.is_running()).count();
        let alone = self.first_alone && trials.iter().all(|trial| trial.results.is_empty());
        let parallelism = if alone { 1 } else { self.spec.parallelism as usize };
        let free = parallelism.saturating_sub(running);
        if free == 0 {
            return Next::Wait;
        }
        if let Some(trial) = self.promotable(trials) {
            return Next::Promote { trial, to: self.budgets[trials[trial].rung()] };
        }
        let fresh = self.fresh(trials, free.min((self.spec.max_trials as usize).saturating_sub(trials.len())));
        match (fresh.is_empty(), running) {
            (false, _) => Next::Start(fresh),
            (true, 0) => Next::Done { best: self.best(trials) },
            (true, _) => Next::Wait,
        }
    }

    /// Index of the best trial so far: of those that came to the highest rung the one with the best result, the earliest of equals.
    pub fn best(&self, trials: &[Trial]) -> Option<usize> {
        let rung =
            (0..self.budgets.len()).rev().find(|rung| trials.iter().any(|trial| trial.result(*rung).is_some()))?;
        let results = trials.iter().enumerate().filter_map(|(index, trial)| Some((index, trial.result(rung)?)));
        let best = results.reduce(|best, other| if self.is_better(other.1, best.1) { other } else { best });
        best.map(|(index, _)| index)
    }

    /// The trials for the report of the job that trains with the best one's values.
    pub fn outcomes(trials: &[Trial], best: usize) -> Vec<TrialOutcome> {
        let outcome = |(index, trial): (usize, &Trial)| TrialOutcome {
            name: trial.name(),
            parameters: trial.assignment.to_strings(),
            results: trial.results.iter().filter_map(|result| Decimal::new(*result)).collect(),
            failed: trial.state == crate::TrialState::Failed,
            best: index == best,
        };
        trials.iter().enumerate().map(outcome).collect()
    }

    fn is_better(&self, one: f64, other: f64) -> bool {
        match self.spec.objective.goal {
            SearchGoal::Maximize => one > other,
            SearchGoal::Minimize => one < other,
        }
    }

    fn promotable(&self, trials: &[Trial]) -> Option<usize> {
        let factor = self.spec.asha.unwrap_or_default().reduction_factor as usize;
        asha::promotable(trials, self.budgets.len(), factor, |one, other| self.is_better(one, other))
    }

    /// So many new assignments, each chosen as if the ones before it ran already.
    fn fresh(&self, trials: &[Trial], count: usize) -> Vec<Assignment> {
        let mut known = trials.to_vec();
        while known.len() < trials.len() + count {
            let Some(assignment) = self.draw(&known) else { break };
            known.push(Trial::new(assignment));
        }
        known.into_iter().skip(trials.len()).map(|trial| trial.assignment).collect()
    }

    /// An assignment that no trial has; `None` if all there are have been tried.
    fn draw(&self, known: &[Trial]) -> Option<Assignment> {
        let place = known.len() as u64;
        let mut draws = (0..DRAWS).map(|draw| {
            let mut random = Random::new(self.spec.seed, &[place, draw]);
            self.suggest(known, &mut random).unwrap_or_else(|| self.space.draw(&mut random))
        });
        let drawn = draws.find(|assignment| !is_known(known, assignment));
        drawn.or_else(|| self.space.unused(known, &mut Random::new(self.spec.seed, &[place, DRAWS])))
    }

    /// TPE's choice, once there are trials to go by.
    fn suggest(&self, known: &[Trial], random: &mut Random) -> Option<Assignment> {
        let startup = STARTUP.min(self.spec.max_trials.div_ceil(3)) as usize;
        if self.spec.algorithm != SearchAlgorithm::TPE || known.len() < startup {
            return None;
        }
        let mut ranked: Vec<(&Trial, f64)> = known.iter().filter_map(|trial| Some((trial, trial.result(0)?))).collect();
        match self.spec.objective.goal {
            SearchGoal::Maximize => ranked.sort_by(|(_, one), (_, other)| other.total_cmp(one)),
            SearchGoal::Minimize => ranked.sort_by(|(_, one), (_, other)| one.total_cmp(other)),
        }
        if ranked.len() < 2 {
            return None;
        }
        let good: Vec<&Assignment> =
            ranked.iter().take(tpe::good_count(ranked.len())).map(|(trial, _)| &trial.assignment).collect();
        // What failed, and what still runs: the next trial keeps away from both.
        let without = known.iter().filter(|trial| trial.result(0).is_none()).map(|trial| &trial.assignment);
        let bad: Vec<&Assignment> =
            ranked.iter().skip(good.len()).map(|(trial, _)| &trial.assignment).chain(without).collect();
        Some(tpe::suggest(&self.space, &good, &bad, random))
    }
}

/// The unit and the budget of each rung.
fn budgets(spec: &SearchSpec, base: &Hyperparameters) -> Result<(Unit, Vec<u64>), String> {
    let (unit, whole) = match (base.max_steps, base.epochs) {
        (Some(steps), _) => (Unit::Steps, steps),
        (None, epochs) => (Unit::Epochs, epochs.unwrap_or(DEFAULT_EPOCHS).into()),
    };
    if spec.algorithm != SearchAlgorithm::ASHA {
        return Ok((unit, vec![whole]));
    }
    let asha = spec.asha.unwrap_or_default();
    let minimum = match (unit, asha.minimum_steps, asha.minimum_epochs.map(u64::from)) {
        (_, Some(_), Some(_)) => return Err(format!("asha: {}", STEPS_OR_EPOCHS.message)),
        (Unit::Steps, None, Some(_)) => return Err("asha: the job has maxSteps, so set minimumSteps".into()),
        (Unit::Epochs, Some(_), None) => return Err("asha: the job has epochs, so set minimumEpochs".into()),
        (Unit::Steps, steps, None) => steps.unwrap_or(whole.div_ceil(100)),
        (Unit::Epochs, None, epochs) => epochs.unwrap_or(1),
    };
    if minimum == 0 || minimum > whole {
        return Err("asha: the minimum is at least 1 and at most the job's own length".into());
    }
    if asha.reduction_factor < 2 {
        return Err("asha: reductionFactor is at least 2".into());
    }
    Ok((unit, asha::budgets(minimum, whole, asha.reduction_factor.into())))
}
