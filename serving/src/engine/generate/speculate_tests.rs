use super::*;

fn proposed(tokens: &[u32], most: usize) -> (Vec<u32>, usize) {
    let Proposal { tokens, matched, .. } = propose(tokens, &[], most);
    (tokens, matched)
}

#[test]
fn the_proposal_is_what_followed_the_longest_match_and_of_equal_ones_the_latest() {
    for (tokens, most, expected) in [
        (&[] as &[u32], 4, (vec![], 0)),
        (&[1], 4, (vec![], 0)),
        (&[1, 2, 3], 4, (vec![], 0)),
        // One token matches: the later of two occurrences.
        (&[5, 1, 7, 5, 2, 8, 5], 2, (vec![2, 8], 1)),
        // Two tokens match at the earlier place, one at the later.
        (&[4, 5, 1, 9, 5, 2, 4, 5], 2, (vec![1, 9], 2)),
        (&[1, 2, 3, 4, 1, 2, 3], 1, (vec![4], 3)),
        (&[1, 2, 3, 4, 1, 2, 3], 0, (vec![], 3)),
        // The text ends: the proposal goes on with itself.
        (&[1, 2, 3, 1, 2], 7, (vec![3, 1, 2, 3, 1, 2, 3], 2)),
        (&[6, 6, 6], 4, (vec![6, 6, 6, 6], 2)),
    ] {
        assert_eq!(proposed(tokens, most), expected, "{tokens:?}, at most {most}");
    }
    let long: Vec<u32> = (0..20).chain(0..20).collect();
    assert_eq!(proposed(&long, 3), (vec![0, 1, 2], LONGEST));
}

#[test]
fn an_example_is_read_as_if_it_stood_before_the_tokens() {
    let example = [7, 8, 1, 2, 3, 4];
    for (tokens, expected) in [
        (&[9_u32, 1, 2] as &[u32], (vec![3, 4], 2)),
        // As long a match in the tokens themselves comes first, a longer one in the example before it.
        (&[1, 2, 6, 1, 2], (vec![6, 1], 2)),
        (&[2, 6, 1, 2], (vec![3, 4], 2)),
        (&[3, 4], (vec![], 0)),
        (&[2, 3], (vec![4], 2)),
    ] {
        let found = propose(tokens, &example, 2);
        assert_eq!((found.tokens, found.matched), expected, "{tokens:?}");
    }
}

#[test]
fn a_proposal_ends_before_a_stop_token() {
    let (mut history, all) = (History::default(), Record::default());
    let candidate = history.propose(&[1, 2, 9, 3, 1, 2], 5, &[3], &all);
    assert_eq!((candidate.gains.len(), history.proposed(5)), (1, &[9][..]));
    assert!(history.propose(&[1, 2, 9, 3, 1, 2], 5, &[9], &all).gains.is_empty());
    assert_eq!(history.propose(&[7; 30], 100, &[], &all).gains.len(), MOST);
}

#[test]
fn forced_tokens_come_first_and_the_text_goes_on_behind_them() {
    let (mut history, mut all) = (History::default(), Record::default());
    // Behind 1, 2 the text has gone on with 9, but 3 and 4 are forced; behind 2, 3, 4 it has gone on with 5 and 6.
    let tokens = [2, 3, 4, 5, 6, 1, 2, 9, 1, 2];
    let cases: [(usize, &[u32]); 4] = [(4, &[3, 4, 5, 6]), (2, &[3, 4]), (1, &[3]), (0, &[])];
    for (most, expected) in cases {
        history.force(vec![3, 4]);
        let candidate = history.propose(&tokens, most, &[], &all);
        assert_eq!((history.proposed(9), candidate.gains.len()), (expected, expected.len()), "at most {most}");
    }
    assert_eq!(history.propose(&tokens, 1, &[], &all).gains.len(), 1, "what was forced holds for one step");
    assert_eq!(history.proposed(9), [9]);
    // What is forced is probable before anything was checked, and no longer so once it was drawn in other tokens.
    let chance = |history: &mut History, all: &Record| {
        history.force(vec![3, 4]);
        history.propose(&tokens, 4, &[], all).gains[0]
    };
    assert!(chance(&mut history, &all) > 0.85);
    for _ in 0..20 {
        chance(&mut history, &all);
        history.learn([7].into_iter(), 0.0, &mut all);
    }
    assert!(chance(&mut history, &all) < 0.3);
    history.force(vec![3]);
    history.pass();
    assert_eq!(history.propose(&tokens, 1, &[], &all).gains.len(), 1);
    assert_eq!(history.proposed(9), [9], "a step without proposals forgets it");
}

/// Learns `count` times whether the token that followed is the one that stands there.
fn learned(history: &mut History, all: &mut Record, is_right: bool, count: usize) -> f64 {
    for _ in 0..count {
        history.propose(&[1, 2, 3, 1, 2], 4, &[], all);
        history.learn([if is_right { 3 } else { 4 }].into_iter(), 0.0, all);
    }
    history.propose(&[1, 2, 3, 1, 2], 4, &[], all).gains[0]
}

#[test]
fn the_chance_of_a_proposal_follows_what_was_right_also_where_nothing_was_computed() {
    let (mut history, mut all) = (History::default(), Record::default());
    let first = history.propose(&[1, 2, 3, 1, 2], 4, &[], &all).gains;
    assert!(first.windows(2).all(|pair| pair[0] > pair[1]), "{first:?}");
    assert!(learned(&mut history, &mut all, true, 20) > 0.9);
    // A sequence learns faster than the engine.
    assert!(learned(&mut history, &mut all, false, 10) < 0.4);
    assert!(learned(&mut history, &mut all, true, 20) > 0.8);
    // A new sequence begins with what others have shown.
    let mut poor = Record::default();
    learned(&mut History::default(), &mut poor, false, 100);
    let new = History::default().propose(&[1, 2, 3, 1, 2], 4, &[], &poor).gains[0];
    assert!(new < 0.05 && new < first[0], "{new}");
}

#[test]
fn tokens_behind_a_wrong_one_are_not_counted() {
    let (mut history, mut all) = (History::default(), Record::default());
    history.propose(&[1, 2, 3, 1, 2], 3, &[], &all);
    history.learn([3, 9, 2].into_iter(), 0.5, &mut all);
    assert_eq!((all.right[1], all.checked[1]), (1.0, 1.0));
    assert_eq!((all.right[2], all.checked[2]), (0.0, 1.0));
    assert_eq!(all.checked[3], 0.0);
    assert_eq!(history.ahead, 1.5, "two tokens gained, half a step lost");
    history.pass();
    assert!(history.proposed(3).is_empty());
}

/// Costs of a model whose step takes `fixed` and each of its rows `row`.
fn costs(fixed: f64, row: f64, measured: &[usize]) -> Costs {
    let mut costs = Costs::default();
    for _ in 0..20 {
        measured.iter().for_each(|&rows| costs.add(rows, fixed + row * rows as f64));
    }
    costs
}

#[test]
fn times_of_steps_are_those_measured_and_a_line_between_them() {
    let costs = costs(3.0, 1.0, &[1, 5]);
    for (rows, expected) in [(1, 4.0), (5, 8.0), (3, 6.0), (9, 12.0)] {
        let found = costs.seconds(rows);
        assert!((found - expected).abs() < 0.1 * expected, "{rows} rows: {found}");
    }
    assert!(costs.knows(1) && costs.knows(5) && !costs.knows(2) && !costs.knows(0) && !costs.knows(1000));
}

#[test]
fn a_step_that_something_else_delays_changes_little_and_old_steps_are_forgotten() {
    let mut costs = costs(3.0, 1.0, &[1, 5]);
    costs.add(1, 400.0);
    assert!(costs.seconds(1) < 5.0, "{}", costs.seconds(1));
    for _ in 0..300 {
        costs.add(5, 16.0);
    }
    assert!((costs.seconds(5) - 16.0).abs() < 0.1);
    assert!(!costs.knows(1), "it has to be measured again");
    costs.add(1, 8.0);
    assert!(costs.knows(1));
}

fn candidate(chance: f64, length: i32, ahead: f64) -> Candidate {
    Candidate { gains: (1..=length).map(|place| chance.powi(place)).collect(), ahead }
}

#[test]
fn one_sequence_has_as_many_proposed_tokens_as_pay() {
    // A row costs a fifth of a step, as for SmolLM2 with four bits.
    let costs = costs(4.0, 1.0, &[1, 4, 16]);
    for (chance, expected) in [(0.1, 0..=0), (0.2, 0..=0), (0.5, 1..=2), (0.8, 3..=6), (0.97, 12..=15)] {
        let found = choose(&[candidate(chance, 15, 0.0)], &costs, 512)[0];
        assert!(expected.contains(&found), "{chance}: {found}");
    }
    assert_eq!(choose(&[candidate(0.97, 2, 0.0)], &costs, 512), [2]);
    assert_eq!(choose(&[candidate(0.97, 15, 0.0)], &costs, 4), [3], "the step has room for four rows");
    assert_eq!(choose(&[], &costs, 512), [0; 0]);
}

#[test]
fn nothing_is_proposed_where_rows_cost_what_they_gain_or_plain_steps_were_not_measured() {
    let heavy = costs(0.1, 1.0, &[1, 2, 4, 8, 16]);
    assert_eq!(choose(&[candidate(0.97, 15, 0.0)], &heavy, 512), [0]);
    let eight = vec![candidate(0.8, 15, 0.0); 8];
    assert_eq!(choose(&eight, &costs(1.0, 1.0, &[1, 8, 16]), 512), [0; 8]);
    let light = costs(10.0, 0.1, &[1, 8]);
    assert_eq!(choose(&[candidate(0.9, 4, 0.0); 1], &light, 512), [4]);
    assert_eq!(choose(&vec![candidate(0.9, 4, 0.0); 2], &light, 512), [0, 0]);
    assert_eq!(choose(&vec![candidate(0.9, 4, 0.0); 9], &costs(10.0, 0.1, &[9]), 512), [0; 9]);
}

#[test]
fn no_sequence_is_slowed_for_another_unless_it_is_ahead() {
    let costs = costs(4.0, 1.0, &[2, 3, 6, 12]);
    let likely = candidate(0.9, 15, 0.0);
    assert_eq!(choose(&[likely.clone(), candidate(0.1, 15, 0.0)], &costs, 512), [0, 0]);
    let both = choose(&[likely.clone(), candidate(0.9, 15, 0.0)], &costs, 512);
    assert!(both[0] >= 3 && both[1] >= 3, "{both:?}");
    // One that has gained before waits for the other now.
    let found = choose(&[likely.clone(), candidate(0.0, 0, 3.0)], &costs, 512);
    assert!(found[0] >= 3 && found[1] == 0, "{found:?}");
    let delayed = choose(&[likely, candidate(0.0, 0, 0.4)], &costs, 512);
    assert!((1..=2).contains(&delayed[0]), "it is delayed by no more than it is ahead: {delayed:?}");
}

/// Numbers in [0, 1) that a seed determines (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// One of `count` tokens, low ones far more often than high ones.
    fn token(&mut self, count: f64) -> u32 {
        count.powf(self.next()) as u32
    }
}

/// A prompt of 250 tokens and an answer of 160, of which `copied` is the share that repeats the prompt.
fn text(numbers: &mut Numbers, copied: f64) -> (Vec<u32>, Vec<u32>) {
    let prompt: Vec<u32> = (0..250).map(|_| numbers.token(3000.0)).collect();
    let one = |place: usize| if numbers.next() < copied { prompt[20 + place] } else { numbers.token(3000.0) };
    let answer = (0..160).map(one).collect();
    (prompt, answer)
}

/// Milliseconds of a step of SmolLM2 with four bits on two cores, more or less, next to other work.
fn milliseconds(rows: usize, noise: f64, numbers: &mut Numbers) -> f64 {
    const FEW: [f64; 8] = [4.1, 5.3, 6.9, 8.0, 9.3, 9.9, 11.2, 10.9];
    let still = FEW.get(rows - 1).copied().unwrap_or(10.9 + 0.62 * (rows as f64 - 8.0));
    let delay = if numbers.next() < 0.02 { 3.0 * numbers.next() } else { 0.0 };
    still * (1.0 + noise * (numbers.next() - 0.5 + delay))
}

/// Milliseconds that the answers of `count` sequences with such texts take, several times one after the other.
fn simulated(copied: f64, count: usize, noise: f64, speculates: bool) -> f64 {
    let (mut texts, mut times) = (Numbers(7), Numbers(11));
    let (mut costs, mut all, mut time) = (Costs::default(), Record::default(), 0.0);
    for _ in 0..6 {
        let mut running: Vec<_> = (0..count).map(|_| (text(&mut texts, copied), 0, History::default())).collect();
        while !running.is_empty() {
            let propose = |((tokens, answer), at, history): &mut ((Vec<u32>, Vec<u32>), usize, History)| {
                let most = if speculates { answer.len() - *at - 1 } else { 0 };
                history.propose(tokens, most, &[], &all)
            };
            let candidates: Vec<Candidate> = running.iter_mut().map(propose).collect();
            let lengths = choose(&candidates, &costs, 512);
            let (plain, rows) = (running.len(), running.len() + lengths.iter().sum::<usize>());
            let step = milliseconds(rows, noise, &mut times);
            costs.add(rows, step);
            time += step;
            let delay = if rows > plain { costs.seconds(rows) / costs.seconds(plain) - 1.0 } else { 0.0 };
            for (((tokens, answer), at, history), length) in running.iter_mut().zip(lengths) {
                let right = iter::zip(history.proposed(length), &answer[*at..]).take_while(|(a, b)| a == b).count();
                let drawn = &answer[*at..=*at + right];
                tokens.extend(drawn);
                history.learn(drawn.iter().copied(), delay, &mut all);
                *at += drawn.len();
            }
            running.retain(|((_, answer), at, _)| *at < answer.len());
        }
    }
    time
}

#[test]
fn answers_that_repeat_their_prompt_are_faster_and_no_others_are_slower() {
    for noise in [0.0, 0.3, 1.0] {
        for count in [1, 2, 4, 8] {
            let gain = |copied| simulated(copied, count, noise, false) / simulated(copied, count, noise, true);
            for copied in [0.0, 0.3, 0.6, 0.8, 0.95] {
                let gain = gain(copied);
                assert!(gain > 0.97, "{count} sequences, {copied} copied, noise {noise}: {gain}");
            }
            let least = [1.8, 1.5, 1.4, 1.15][count.ilog2() as usize];
            let gain = gain(0.95);
            assert!(gain > least, "{count} sequences, noise {noise}: {gain}");
        }
    }
}
