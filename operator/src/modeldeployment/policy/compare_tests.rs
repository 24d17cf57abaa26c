use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

const SHARES: [f64; 3] = [0.1, 0.5, 1.0];

/// Nothing has been counted.
const START: Step = Step {
    candidate: NOTHING,
    champion: NOTHING,
    champion_so_far: NOTHING,
    share: 0.1,
    limit: 0.01,
    accuracy_loss: None,
    has_latency_limit: false,
    steps: SHARES.len(),
};
const NOTHING: RevisionCounts =
    RevisionCounts { requests: 0, errors: 0, refused: 0, judged: 0, wrong: 0, answered: 0, slow: 0 };

/// A rollout of three steps.
#[derive(Clone, Copy, Debug)]
struct Rollout {
    /// Probabilities of the event for the champion and the candidate.
    rates: [f64; 2],
    /// Requests in each step, of both together.
    requests: u64,
    limit: f64,
    /// Whether the event is a slow answer; otherwise it is a failure.
    is_latency: bool,
}

impl Rollout {
    fn count(self, counts: &mut RevisionCounts, rate: f64, random: &mut StdRng) {
        let happened = u64::from(random.random::<f64>() < rate);
        counts.requests += 1;
        counts.answered += 1;
        if self.is_latency {
            counts.slow += happened;
        } else {
            counts.errors += happened;
        }
    }

    /// Runs it once. It is looked at after every request, and in a long step after every 300th part of its requests.
    /// Returns whether it was rolled back.
    fn is_rolled_back(self, random: &mut StdRng) -> bool {
        let [champion, candidate] = self.rates;
        let every = (self.requests / 300).max(1);
        let mut step = Step { limit: self.limit, has_latency_limit: self.is_latency, ..START };
        // The routers have counted the champion for a while.
        for _ in 0..2_000 {
            self.count(&mut step.champion_so_far, champion, random);
        }
        for share in SHARES {
            (step.candidate, step.champion, step.share) = (NOTHING, NOTHING, share);
            for number in 1..=self.requests {
                if random.random::<f64>() < share {
                    self.count(&mut step.candidate, candidate, random);
                } else {
                    self.count(&mut step.champion, champion, random);
                }
                if number % every == 0 && worse(&step).is_some() {
                    return true;
                }
            }
            step.champion_so_far.requests += step.champion.requests;
            step.champion_so_far.answered += step.champion.answered;
            step.champion_so_far.errors += step.champion.errors;
            step.champion_so_far.slow += step.champion.slow;
        }
        false
    }

    /// Returns how many of so many rollouts are rolled back.
    fn rolled_back(self, seed: u64, rollouts: u64) -> u64 {
        let mut random = StdRng::seed_from_u64(seed);
        (0..rollouts).map(|_| u64::from(self.is_rolled_back(&mut random))).sum()
    }
}

/// The largest number of `trials` with an event of probability `rate` that is exceeded with a probability of at most 0.1 %.
fn largest_count(trials: u64, rate: f64) -> u64 {
    let (mut probability, mut below, mut count) = ((1.0 - rate).powi(trials as i32), 0.0, 0);
    loop {
        below += probability;
        if 1.0 - below <= 0.001 || count == trials {
            return count;
        }
        probability *= (trials - count) as f64 / (count + 1) as f64 * rate / (1.0 - rate);
        count += 1;
    }
}

#[test]
fn counts_are_bounded_by_the_binomial_distribution() {
    // By exact sums of binomial coefficients.
    assert_eq!([(1, 0.5), (2_000, 0.01), (1_000, 0.01), (100, 0.01)].map(|(n, p)| largest_count(n, p)), [1, 35, 21, 5]);
}

/// Rollouts by requests in a step.
const TRAFFIC: [(u64, u64); 4] = [(50, 2_000), (500, 1_000), (5_000, 300), (100_000, 60)];

/// Checks that at most 1 % of the rollouts are rolled back: at each traffic as well as the number of rollouts can show, and
/// over all of them.
fn is_hardly_ever_rolled_back(rates: &[([f64; 2], f64)], is_latency: bool) {
    let (mut found, mut all) = (0, 0);
    for &(rates, limit) in rates {
        let counts = TRAFFIC.map(|(requests, rollouts)| {
            let number = Rollout { rates, requests, limit, is_latency }.rolled_back(1, rollouts);
            assert!(number <= largest_count(rollouts, FALSE_ROLLBACKS), "{rates:?} {requests}: {number} of {rollouts}");
            all += rollouts;
            number
        });
        println!("{rates:?}, limit {limit}: {counts:?} rolled back of {TRAFFIC:?}");
        found += counts.iter().sum::<u64>();
    }
    println!("{found} of {all}");
    assert!(found as f64 <= FALSE_ROLLBACKS * all as f64, "{found} of {all}");
}

#[test]
fn a_candidate_as_good_as_the_champion_is_hardly_ever_rolled_back() {
    let rates = [(0.001, 0.01), (0.01, 0.01), (0.02, 0.01), (0.1, 0.01), (0.3, 0.01), (0.0, 0.0)];
    is_hardly_ever_rolled_back(&rates.map(|(rate, limit)| ([rate, rate], limit)), false);
}

#[test]
fn a_candidate_that_is_fast_enough_is_hardly_ever_rolled_back() {
    // It may be slower than the champion, up to the limit, and as slow as the champion beyond it.
    let rates = [[0.001, 0.05], [0.05, 0.05], [0.1, 0.1], [0.5, 0.5]];
    is_hardly_ever_rolled_back(&rates.map(|rates| (rates, 0.01)), true);
}

/// docs/canary.md has this table: the number of requests in each step after which 95 % of the candidates that fail three
/// times as often as the champion have been caught.
#[test]
fn a_candidate_that_fails_three_times_as_often_is_caught() {
    for (champion, requests) in [(0.1, 500), (0.01, 6_000), (0.001, 60_000)] {
        is_caught([champion, 3.0 * champion], requests, false);
    }
}

/// As well in docs/canary.md.
#[test]
fn a_candidate_that_is_slower_than_the_limit_is_caught() {
    for (candidate, requests) in [(0.1, 1_000), (0.15, 300), (0.3, 60)] {
        is_caught([0.01, candidate], requests, true);
    }
}

fn is_caught(rates: [f64; 2], requests: u64, is_latency: bool) {
    let rollouts = 200;
    let found = Rollout { rates, requests, limit: 0.01, is_latency }.rolled_back(2, rollouts);
    println!("champion and candidate {rates:?}, {requests} requests in each step: {found} of {rollouts} caught");
    assert!(found * 100 >= 95 * rollouts, "{rates:?}: {found} of {rollouts}");
}

#[test]
fn a_candidate_that_always_fails_is_caught_by_a_few_requests() {
    let step = |candidate, champion, share| Step { candidate, champion, champion_so_far: champion, share, ..START };
    let failed = |requests| RevisionCounts { requests, errors: requests, ..NOTHING };
    let good = |requests| RevisionCounts { requests, ..NOTHING };
    assert_eq!(worse(&step(failed(3), good(27), 0.1)), None);
    assert_eq!(worse(&step(failed(5), good(45), 0.1)), Some(Worse::Errors));
    assert_eq!(worse(&step(failed(4), good(0), 1.0)), Some(Worse::Limit));
    let refused = |refused| RevisionCounts { refused, ..NOTHING };
    assert_eq!(worse(&step(refused(5), good(45), 0.1)), Some(Worse::Refusals));
    // Trouble that both have is not the candidate's.
    assert_eq!(worse(&step(failed(10), failed(90), 0.1)), None);
    // With a limit of 0 a single failure is one too many, unless the champion may have some.
    let strict = Step { limit: 0.0, ..step(RevisionCounts { errors: 1, ..good(100) }, good(0), 1.0) };
    assert_eq!((worse(&strict), is_within(&strict)), (Some(Worse::Limit), false));
}

#[test]
fn slow_answers_count_where_there_is_a_limit() {
    let slow = |answered, slow| RevisionCounts { answered, slow, ..NOTHING };
    let step = Step { candidate: slow(10, 10), champion: slow(90, 0), has_latency_limit: true, ..START };
    assert_eq!((worse(&step), is_fast(&step)), (Some(Worse::Latency), false));
    let without = Step { has_latency_limit: false, ..step };
    assert_eq!((worse(&without), is_fast(&without)), (None, true));
    // As many of the champion's are slow.
    let both = Step { champion_so_far: slow(90, 90), ..step };
    assert_eq!((worse(&both), is_fast(&both)), (None, true));
    let some = Step { candidate: slow(100, 6), ..step };
    assert_eq!((worse(&some), is_fast(&some)), (None, false));
    assert!(is_fast(&Step { candidate: slow(100, 5), ..step }) && is_fast(&Step { candidate: NOTHING, ..step }));
}

#[test]
fn counts_that_cannot_be_are_no_evidence() {
    assert_eq!(excess(0.0, 5, 5), f64::NEG_INFINITY);
    assert_eq!(excess(1.0, 5, 0), f64::NEG_INFINITY);
    assert_eq!(above(1.0, Tally { number: 5, all: 5 }), f64::NEG_INFINITY);
    assert!(above(0.5, Tally { number: 5, all: 1 }).is_finite());
    assert!(excess(0.1, 0, 0).abs() < 1e-12);
}

/// A step of 10 % in which 100 answers of the candidate and 900 of the champion have feedback, at most.
fn judged(random: &mut StdRng, [champion, candidate]: [f64; 2], loss: f64) -> bool {
    let mut step = Step { accuracy_loss: Some(loss), ..START };
    for number in 0..3_000 {
        let is_candidate = random.random_bool(0.1);
        let (counts, rate) =
            if is_candidate { (&mut step.candidate, candidate) } else { (&mut step.champion, champion) };
        counts.requests += 1;
        counts.judged += 1;
        counts.wrong += u64::from(random.random_bool(rate));
        if number % 10 == 9 && worse(&step) == Some(Worse::Accuracy) {
            return true;
        }
    }
    false
}

#[test]
fn feedback_condemns_a_candidate_that_is_wrong_more_often_than_allowed() {
    let mut random = StdRng::seed_from_u64(3);
    let mut rolled_back = |rates, loss| (0..400).map(|_| u64::from(judged(&mut random, rates, loss))).sum::<u64>();
    let few = largest_count(400, FALSE_ROLLBACKS);
    assert!(rolled_back([0.1, 0.1], 0.0) <= few, "equally good");
    assert!(rolled_back([0.3, 0.3], 0.0) <= few, "equally bad");
    assert!(rolled_back([0.1, 0.4], 0.05) > 380, "much worse");
    assert!(rolled_back([0.1, 0.2], 0.3) <= few, "within the loss that is allowed");
}
