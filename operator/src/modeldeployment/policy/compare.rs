//! Whether a candidate fails, refuses, is wrong or is slow more often than the champion, or than a limit: tests that stay
//! valid however often they are looked at.
//!
//! Within a step each request goes to the candidate with the same probability, its share of the traffic. If both revisions
//! fail equally often, each failure is therefore the candidate's with that probability, whatever the rate of failures is. The
//! likelihood ratio of a larger probability is then a martingale with mean 1, as is a mixture of several; it exceeds
//! 1 / alpha at any time with a probability of at most alpha (Ville's inequality; Johari et al. 2017,
//! <https://arxiv.org/abs/1512.04922>). Limits are tested in the same way, request by request: a limit on failures, and one
//! on the share of answers that are slower than a limit on the 95th percentile of latency, which is 5 %. The tests take
//! requests for independent of each other.
//! docs/canary.md shows how many requests a verdict takes.

use athanor_crds::RevisionCounts;

/// Probability with which a candidate that is as good as the champion is rolled back, over all steps and tests of a rollout.
const FALSE_ROLLBACKS: f64 = 0.01;
/// Errors against the champion, errors against the limit, refusals against the champion. Wrong answers and slow ones are
/// further tests, if they count.
const TESTS: f64 = 3.0;
/// Share of answers that may be slower than a 95th percentile.
const SLOW: f64 = 0.05;
/// Ratios of the candidate's rate to the champion's, or to the limit, in the mixture.
const RATIOS: [f64; 7] = [1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0];
/// Standard errors by which the champion's rate may be above the one that was seen.
const DEVIATIONS: f64 = 3.0;

/// Number of requests with some property among all.
#[derive(Clone, Copy, Debug)]
struct Tally {
    number: u64,
    all: u64,
}

impl Tally {
    fn errors(counts: RevisionCounts) -> Self {
        Self { number: counts.errors, all: counts.requests }
    }

    fn slow(counts: RevisionCounts) -> Self {
        Self { number: counts.slow, all: counts.answered }
    }

    /// The share; 0 without requests.
    fn rate(self) -> f64 {
        if self.all == 0 { 0.0 } else { self.number as f64 / self.all as f64 }
    }

    /// A share that the true one exceeds only improbably: the upper end of Wilson's interval; 0 without requests.
    fn highest_rate(self) -> f64 {
        if self.all == 0 {
            return 0.0;
        }
        let (n, p, z) = (self.all as f64, self.rate(), DEVIATIONS);
        let spread = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        ((p + z * z / (2.0 * n) + spread) / (1.0 + z * z / n)).min(1.0)
    }
}

/// A step of a canary.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub candidate: RevisionCounts,
    /// The champion in the same step; nothing where the candidate has all of the traffic.
    pub champion: RevisionCounts,
    /// The champion as long as the routers remember.
    pub champion_so_far: RevisionCounts,
    /// Share of the traffic that the candidate is given, from 0 to 1.
    pub share: f64,
    /// Largest share of failed requests, from 0 to 1.
    pub limit: f64,
    /// Largest loss of accuracy, from 0 to 1. Absent: feedback is not looked at.
    pub accuracy_loss: Option<f64>,
    /// Whether the latency has a limit, which the counts of slow answers are about.
    pub has_latency_limit: bool,
    /// Steps of the rollout.
    pub steps: usize,
}

/// Why a candidate is rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Worse {
    Errors,
    Limit,
    Refusals,
    Accuracy,
    Latency,
}

/// Returns what the candidate is shown to do worse, if anything.
pub fn worse(step: &Step) -> Option<Worse> {
    let tests = TESTS + f64::from(u8::from(step.accuracy_loss.is_some()) + u8::from(step.has_latency_limit));
    let threshold = (tests * step.steps.max(1) as f64 / FALSE_ROLLBACKS).ln();
    let Step { candidate, champion, .. } = *step;
    // Retries may give the candidate more than its share.
    let share = |own: u64, other: u64| {
        let all = own + other;
        if all == 0 { step.share } else { step.share.max(own as f64 / all as f64) }
    };
    let all = |counts: RevisionCounts| counts.requests + counts.refused;
    if excess(share(candidate.requests, champion.requests), candidate.errors, champion.errors) > threshold {
        return Some(Worse::Errors);
    }
    if excess(share(all(candidate), all(champion)), candidate.refused, champion.refused) > threshold {
        return Some(Worse::Refusals);
    }
    if let Some(loss) = step.accuracy_loss {
        let wrong = |counts: RevisionCounts| counts.wrong as f64 / counts.judged.max(1) as f64;
        let evidence = excess(share(candidate.judged, champion.judged), candidate.wrong, champion.wrong);
        if champion.judged > 0 && wrong(candidate) - wrong(champion) > loss && evidence > threshold {
            return Some(Worse::Accuracy);
        }
    }
    let limit = step.limit.max(Tally::errors(step.champion_so_far).highest_rate());
    if above(limit, Tally::errors(candidate)) > threshold {
        return Some(Worse::Limit);
    }
    let limit = SLOW.max(Tally::slow(step.champion_so_far).highest_rate());
    let is_slow = step.has_latency_limit && above(limit, Tally::slow(candidate)) > threshold;
    is_slow.then_some(Worse::Latency)
}

/// Whether the candidate's share of failed requests is at most the limit, or the champion's.
pub fn is_within(step: &Step) -> bool {
    Tally::errors(step.candidate).rate() <= step.limit.max(Tally::errors(step.champion_so_far).rate())
}

/// Whether the candidate's 95th percentile of latency is at most the limit, or its share of slow answers the champion's.
pub fn is_fast(step: &Step) -> bool {
    let limit = SLOW.max(Tally::slow(step.champion_so_far).rate());
    !step.has_latency_limit || Tally::slow(step.candidate).rate() <= limit
}

/// The logarithm of the evidence that more events than its share are the candidate's.
fn excess(share: f64, candidate: u64, champion: u64) -> f64 {
    if share <= 0.0 || share >= 1.0 {
        return f64::NEG_INFINITY;
    }
    mean(RATIOS.map(|ratio| {
        // The share of the events that a candidate with this ratio of rates has.
        let theirs = share * ratio / (share * ratio + 1.0 - share);
        candidate as f64 * (theirs / share).ln() + champion as f64 * ((1.0 - theirs) / (1.0 - share)).ln()
    }))
}

/// The logarithm of the evidence that requests have the property with a larger probability than `limit`.
fn above(limit: f64, tally: Tally) -> f64 {
    if limit >= 1.0 {
        return f64::NEG_INFINITY;
    }
    let (number, rest) = (tally.number as f64, tally.all.saturating_sub(tally.number) as f64);
    if limit <= 0.0 {
        return if number > 0.0 { f64::INFINITY } else { f64::NEG_INFINITY };
    }
    mean(RATIOS.map(|ratio| {
        // Odds, so that every ratio is a probability.
        let rate = limit * ratio / (limit * ratio + 1.0 - limit);
        number * (rate / limit).ln() + rest * ((1.0 - rate) / (1.0 - limit)).ln()
    }))
}

/// The logarithm of the mean of numbers whose logarithms are given.
fn mean<const N: usize>(logarithms: [f64; N]) -> f64 {
    let largest = logarithms.into_iter().fold(f64::NEG_INFINITY, f64::max);
    if !largest.is_finite() {
        return largest;
    }
    largest + (logarithms.iter().map(|value| (value - largest).exp()).sum::<f64>() / N as f64).ln()
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;
