//! Asynchronous successive halving: Li et al. 2018, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2.

use crate::{Trial, TrialState};

/// More rungs than this would begin with trainings that say nothing.
const MOST_RUNGS: usize = 10;

/// Budgets of the rungs, smallest first: each is the next one over the reduction factor, rounded up, and none is below the minimum
/// but the largest.
pub fn budgets(minimum: u64, maximum: u64, reduction_factor: u64) -> Vec<u64> {
    let mut budgets = vec![maximum];
    let mut divisor = 1_u64;
    while budgets.len() < MOST_RUNGS {
        divisor = divisor.saturating_mul(reduction_factor);
        let budget = maximum.div_ceil(divisor);
        // A rung as long as the next one would decide nothing.
        if budget < minimum || budgets.last() == Some(&budget) || budget == 0 {
            break;
        }
        budgets.push(budget);
        if budget == 1 {
            break;
        }
    }
    budgets.reverse();
    budgets
}

/// A trial that is to go on in its next rung: it is among the best of its rung, one in `reduction_factor` of those with a result there,
/// and has not gone on yet. Higher rungs come first. `is_better` compares two results.
pub fn promotable(
    trials: &[Trial],
    rungs: usize,
    reduction_factor: usize,
    is_better: impl Fn(f64, f64) -> bool,
) -> Option<usize> {
    (0..rungs.saturating_sub(1)).rev().find_map(|rung| {
        let mut ranked: Vec<(usize, f64)> =
            trials.iter().enumerate().filter_map(|(index, trial)| Some((index, trial.result(rung)?))).collect();
        // Stable: of equals the earlier one.
        ranked.sort_by(|(_, one), (_, other)| match (is_better(*one, *other), is_better(*other, *one)) {
            (true, _) => std::cmp::Ordering::Less,
            (_, true) => std::cmp::Ordering::Greater,
            _ => std::cmp::Ordering::Equal,
        });
        let top = ranked.len() / reduction_factor.max(1);
        let stays = |index: usize| trials[index].state == TrialState::Finished && trials[index].rung() == rung + 1;
        ranked[..top].iter().map(|(index, _)| *index).find(|index| stays(*index))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Assignment;

    #[test]
    fn budgets_end_with_the_whole_and_keep_the_minimum() {
        for (minimum, maximum, factor, expected) in [
            (1, 27, 3, vec![1, 3, 9, 27]),
            (2, 27, 3, vec![3, 9, 27]),
            (1, 5, 3, vec![1, 2, 5]),
            (10, 1000, 4, vec![16, 63, 250, 1000]),
            (1, 1, 3, vec![1]),
            (5, 3, 3, vec![3]),
            (1, 2, 2, vec![1, 2]),
        ] {
            assert_eq!(budgets(minimum, maximum, factor), expected, "{minimum} {maximum} {factor}");
        }
        assert_eq!(budgets(1, 100_000_000, 2).len(), MOST_RUNGS);
    }

    #[test]
    fn one_in_eta_is_promoted_from_the_highest_rung_first() {
        let trial =
            |results: &[f64], state| Trial { assignment: Assignment::default(), results: results.to_vec(), state };
        let better = |one: f64, other: f64| one > other;
        let finished = TrialState::Finished;
        let mut trials: Vec<Trial> = [0.5, 0.9].iter().map(|result| trial(&[*result], finished)).collect();
        assert_eq!(promotable(&trials, 3, 3, better), None, "a third of two is none");
        trials.push(trial(&[0.7], finished));
        assert_eq!(promotable(&trials, 3, 3, better), Some(1));
        assert_eq!(promotable(&trials, 3, 3, |one, other| one < other), Some(0), "minimized");
        trials[1].promote();
        assert_eq!(promotable(&trials, 3, 3, better), None, "it runs already");
        trials[1].report(0.95);
        assert_eq!(promotable(&trials, 3, 3, better), None, "the next third is not there yet");
        trials[1].fail();
        trials.push(trial(&[0.1], finished));
        assert_eq!(promotable(&trials, 3, 3, better), Some(2), "one that failed later leaves its place");
        // Three in rung 1: the best of them before anything of rung 0.
        let high = [0.3, 0.4, 0.2].map(|result| trial(&[0.99, result], finished));
        let low = [0.1; 9].map(|result| trial(&[result], finished));
        let trials: Vec<Trial> = low.into_iter().chain(high).collect();
        assert_eq!(promotable(&trials, 3, 3, better), Some(10));
        assert_eq!(promotable(&trials, 2, 3, better), Some(0), "rung 1 is the last: of equals the first goes on");
    }
}
