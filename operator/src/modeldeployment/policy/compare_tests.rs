use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

const SHARES: [f64; 3] = [0.1, 0.5, 1.0];

/// A rollout of three steps with so many requests each, looked at after every tenth of them. Returns whether it was
/// rolled back.
fn roll_out(random: &mut StdRng, [champion, candidate]: [f64; 2], limit: f64, requests: u64) -> bool {
    // The routers have counted the champion for a while.
    let mut so_far = RevisionCounts { requests: 2_000, ..RevisionCounts::default() };
    so_far.errors = (0..so_far.requests).map(|_| u64::from(random.random_bool(champion))).sum();
    for share in SHARES {
        let mut step = Step {
            candidate: RevisionCounts::default(),
            champion: RevisionCounts::default(),
            champion_so_far: so_far,
            share,
            limit,
            accuracy_loss: None,
            steps: SHARES.len(),
        };
        for number in 0..requests {
            let is_candidate = random.random_bool(share);
            let (outcomes, rate) =
                if is_candidate { (&mut step.candidate, candidate) } else { (&mut step.champion, champion) };
            outcomes.requests += 1;
            outcomes.errors += u64::from(random.random_bool(rate));
            if number % 10 == 9 && worse(&step).is_some() {
                return true;
            }
        }
        so_far = step.champion_so_far;
        so_far.requests += step.champion.requests;
        so_far.errors += step.champion.errors;
    }
    false
}

fn share_rolled_back(seed: u64, rollouts: usize, rates: [f64; 2], limit: f64, requests: u64) -> f64 {
    let mut random = StdRng::seed_from_u64(seed);
    let rolled_back = (0..rollouts).filter(|_| roll_out(&mut random, rates, limit, requests)).count();
    rolled_back as f64 / rollouts as f64
}

#[test]
fn a_candidate_as_good_as_the_champion_is_hardly_ever_rolled_back() {
    for (rate, limit) in [(0.001, 0.01), (0.01, 0.01), (0.02, 0.01), (0.1, 0.01), (0.3, 0.01), (0.0, 0.0)] {
        for requests in [100, 1_000] {
            let found = share_rolled_back(1, 400, [rate, rate], limit, requests);
            // 1 % is promised; 400 rollouts of that would have 2.5 % or more with a probability below 1 %.
            assert!(found < 0.025, "{rate} {requests}: {found}");
        }
    }
}

/// docs/canary.md has this table: the number of requests in each step after which 95 % of the candidates that fail three
/// times as often as the champion have been caught.
#[test]
fn a_candidate_that_fails_three_times_as_often_is_caught() {
    for (champion, requests) in [(0.1, 500), (0.01, 6_000), (0.001, 60_000)] {
        let rollouts = if requests > 10_000 { 40 } else { 200 };
        let found = share_rolled_back(2, rollouts, [champion, 3.0 * champion], 0.01, requests);
        println!("champion {champion}, {requests} requests in each step: {found} caught");
        assert!(found >= 0.95, "{champion}: {found} of {rollouts}");
    }
}

#[test]
fn a_candidate_that_always_fails_is_caught_by_a_few_requests() {
    let step = |candidate, champion, share| Step {
        candidate,
        champion,
        champion_so_far: champion,
        share,
        limit: 0.01,
        accuracy_loss: None,
        steps: 3,
    };
    let failed = |requests| RevisionCounts { requests, errors: requests, ..RevisionCounts::default() };
    let good = |requests| RevisionCounts { requests, ..RevisionCounts::default() };
    assert_eq!(worse(&step(failed(3), good(27), 0.1)), None);
    assert_eq!(worse(&step(failed(5), good(45), 0.1)), Some(Worse::Errors));
    assert_eq!(worse(&step(failed(4), good(0), 1.0)), Some(Worse::Limit));
    let refused = |refused| RevisionCounts { refused, ..RevisionCounts::default() };
    assert_eq!(worse(&step(refused(5), good(45), 0.1)), Some(Worse::Refusals));
    // Trouble that both have is not the candidate's.
    assert_eq!(worse(&step(failed(10), failed(90), 0.1)), None);
    // With a limit of 0 a single failure is one too many, unless the champion may have some.
    let strict = Step { limit: 0.0, ..step(RevisionCounts { errors: 1, ..good(100) }, good(0), 1.0) };
    assert_eq!((worse(&strict), is_within(&strict)), (Some(Worse::Limit), false));
}

#[test]
fn counts_that_cannot_be_are_no_evidence() {
    assert_eq!(excess(0.0, 5, 5), f64::NEG_INFINITY);
    assert_eq!(excess(1.0, 5, 0), f64::NEG_INFINITY);
    assert_eq!(above(1.0, RevisionCounts { requests: 5, errors: 5, ..RevisionCounts::default() }), f64::NEG_INFINITY);
    assert!(above(0.5, RevisionCounts { requests: 1, errors: 5, ..RevisionCounts::default() }).is_finite());
    assert!(excess(0.1, 0, 0).abs() < 1e-12);
}

/// A step of 10 % in which 100 answers of the candidate and 900 of the champion have feedback, at most.
fn judged(random: &mut StdRng, [champion, candidate]: [f64; 2], loss: f64) -> bool {
    let counts = RevisionCounts::default();
    let mut step = Step {
        candidate: counts,
        champion: counts,
        champion_so_far: counts,
        share: 0.1,
        limit: 0.01,
        accuracy_loss: Some(loss),
        steps: 3,
    };
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
    let mut share = |rates, loss| (0..200).filter(|_| judged(&mut random, rates, loss)).count() as f64 / 200.0;
    assert!(share([0.1, 0.1], 0.0) < 0.02, "equally good");
    assert!(share([0.3, 0.3], 0.0) < 0.02, "equally bad");
    assert!(share([0.1, 0.4], 0.05) > 0.95, "much worse");
    assert!(share([0.1, 0.2], 0.3) < 0.02, "within the loss that is allowed");
}
