use proptest::prelude::*;

use super::*;
use crate::engine::generate::{blocks::Prefix, sampling::Sampling, sequence::Stopping};

fn sequence(id: u64, request: u64, prompt: &[u32], answer: usize) -> Sequence {
    let stopping = Stopping { max_tokens: answer, min_tokens: 0, stop_tokens: vec![] };
    Sequence::new(id, request, prompt.to_vec(), Sampling::default(), stopping)
}

fn scheduler(blocks: usize, size: usize, tokens: usize, sequences: usize) -> Scheduler {
    Scheduler::new(Blocks::new(blocks, size), StepLimits { tokens, sequences })
}

/// `(id, start, length, wants logits)` of a step, after which each sequence that wants one has a further token and full
/// answers are gone.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize, bool)> {
    let plan = scheduler.plan();
    let ids: Vec<_> = plan.work.iter().map(|work| scheduler.running()[work.index].id).collect();
    for work in &plan.work {
        scheduler.advance(work);
        if work.wants_logits {
            scheduler.push(work.index, 9);
        }
    }
    scheduler.retain(|sequence| sequence.finished().is_none());
    plan.work.iter().zip(ids).map(|(work, id)| (id, work.start, work.length, work.wants_logits)).collect()
}

#[test]
fn a_long_prompt_is_computed_in_chunks_behind_the_answers_in_progress() {
    let mut scheduler = scheduler(100, 4, 5, 3);
    scheduler.add(sequence(1, 1, &[1, 2], 9));
    assert_eq!(step(&mut scheduler), [(1, 0, 2, true)]);
    scheduler.add(sequence(2, 2, &[5; 10], 9));
    scheduler.add(sequence(3, 3, &[6; 2], 9));
    assert_eq!(step(&mut scheduler), [(1, 2, 1, true), (2, 0, 4, false)]);
    assert_eq!(step(&mut scheduler), [(1, 3, 1, true), (2, 4, 4, false)]);
    // The end of one prompt and the start of the next share a step.
    assert_eq!(step(&mut scheduler), [(1, 4, 1, true), (2, 8, 2, true), (3, 0, 2, true)]);
    assert_eq!(step(&mut scheduler), [(1, 5, 1, true), (2, 10, 1, true), (3, 2, 1, true)]);
}

#[test]
fn no_more_sequences_run_than_allowed_and_the_first_come_is_the_first_served() {
    let mut scheduler = scheduler(100, 4, 100, 2);
    for id in 1..=4 {
        scheduler.add(sequence(id, id, &[id as u32], 2));
    }
    let ids = |work: Vec<(u64, usize, usize, bool)>| work.into_iter().map(|(id, ..)| id).collect::<Vec<_>>();
    assert_eq!(ids(step(&mut scheduler)), [1, 2]);
    assert_eq!(ids(step(&mut scheduler)), [1, 2]);
    assert_eq!(ids(step(&mut scheduler)), [3, 4]);
}

#[test]
fn a_backlog_is_what_waits_for_room() {
    let backlogged = |scheduler: &mut Scheduler| {
        let plan = scheduler.plan();
        plan.work.iter().for_each(|work| scheduler.advance(work));
        plan.is_backlogged
    };
    // Three that may run at a time, with blocks for all.
    let mut places = scheduler(100, 4, 100, 3);
    places.add(sequence(1, 1, &[1; 9], 9));
    // They share a prompt that is still computed.
    places.add(sequence(2, 2, &[2; 9], 9));
    places.add(sequence(3, 2, &[2; 9], 9));
    assert!(!backlogged(&mut places));
    places.add(sequence(4, 3, &[3], 9));
    assert!(backlogged(&mut places), "only three run");
    let mut blocks = scheduler(3, 4, 100, 3);
    blocks.add(sequence(1, 1, &[1; 9], 3));
    assert!(!backlogged(&mut blocks));
    blocks.add(sequence(2, 2, &[2; 9], 3));
    assert!(backlogged(&mut blocks), "the cache is full");
    let mut prompts = scheduler(100, 4, 5, 3);
    prompts.add(sequence(1, 1, &[1; 9], 9));
    prompts.add(sequence(2, 2, &[2; 9], 9));
    assert!(backlogged(&mut prompts), "the first prompt takes the whole step");
}

#[test]
fn admission_stops_at_the_first_that_does_not_fit() {
    let mut scheduler = scheduler(4, 2, 100, 8);
    scheduler.add(sequence(1, 1, &[1; 3], 5));
    scheduler.add(sequence(2, 2, &[2; 6], 2));
    scheduler.add(sequence(3, 3, &[3; 1], 1));
    assert_eq!(step(&mut scheduler), [(1, 0, 3, true)]);
    assert_eq!(scheduler.waiting(), 2, "the small one does not overtake the large one");
}

#[test]
fn the_youngest_is_preempted_and_comes_back_first_with_what_the_cache_kept() {
    let mut scheduler = scheduler(4, 2, 100, 8);
    scheduler.add(sequence(1, 1, &[1, 1, 1], 4));
    scheduler.add(sequence(2, 2, &[2, 2, 2, 2], 4));
    scheduler.add(sequence(3, 3, &[3], 1));
    assert_eq!(step(&mut scheduler), [(1, 0, 3, true), (2, 0, 4, true)]);
    // 2 needs a third block; none is free and it is itself the youngest.
    assert_eq!(step(&mut scheduler), [(1, 3, 1, true)]);
    assert_eq!((scheduler.running().len(), scheduler.waiting()), (1, 2));
    // Its five tokens need three blocks, the two sealed ones included; 1 takes one of these for itself.
    assert_eq!(step(&mut scheduler), [(1, 4, 1, true)]);
    assert_eq!(step(&mut scheduler), [(1, 5, 1, true)]);
    // 1 has ended. The first block of 2 is still cached; 3 has its turn in the same step.
    assert_eq!(step(&mut scheduler), [(2, 2, 3, true), (3, 0, 1, true)]);
}

#[test]
fn the_answers_of_one_request_share_the_blocks_of_its_prompt() {
    let mut scheduler = scheduler(8, 2, 100, 8);
    for id in 1..=3 {
        scheduler.add(sequence(id, 1, &[1, 2, 3, 4, 5], 4));
    }
    scheduler.add(sequence(4, 2, &[7], 4));
    assert_eq!(step(&mut scheduler), [(1, 0, 5, true), (4, 0, 1, true)], "the others wait for the prompt");
    assert_eq!(step(&mut scheduler), [(1, 5, 1, true), (4, 1, 1, true), (2, 4, 1, true), (3, 4, 1, true)]);
    // Two shared blocks, one of its own for each of the three, one for the fourth sequence.
    assert_eq!(scheduler.blocks().used(), 6);
}

#[test]
fn a_prompt_with_log_probabilities_is_computed_although_the_cache_has_it() {
    let mut scheduler = scheduler(100, 4, 100, 8);
    scheduler.add(sequence(1, 1, &[5; 9], 1));
    assert_eq!(step(&mut scheduler), [(1, 0, 9, true)]);
    scheduler.add(sequence(2, 2, &[5; 9], 1));
    assert_eq!(step(&mut scheduler), [(2, 8, 1, true)]);
    let mut scored = sequence(3, 3, &[5; 9], 2);
    scored.prompt_logprobs = Some(0);
    assert_eq!(scored.targets(0, 5), [5; 5]);
    assert_eq!(scored.targets(5, 4), [5; 3], "the last token has no successor");
    scheduler.add(scored);
    assert_eq!(step(&mut scheduler), [(3, 0, 9, true)]);
    assert_eq!(scheduler.running()[0].targets(0, 9), [0_u32; 0], "all are there");
}

/// The plan's only work with these tokens proposed, of which the first `right` come next, and one more token.
fn step_with_proposed(scheduler: &mut Scheduler, proposed: &[u32], right: usize) -> usize {
    let mut work = scheduler.plan().work[0];
    scheduler.propose(&mut work, proposed);
    scheduler.advance(&work);
    let right = right.min(work.proposed);
    proposed[..right].iter().for_each(|&token| scheduler.push(work.index, token));
    scheduler.push(work.index, 9);
    scheduler.settle(work.index, right);
    work.proposed
}

#[test]
fn proposed_tokens_are_kept_as_far_as_they_are_right() {
    let mut scheduler = scheduler(8, 2, 100, 8);
    scheduler.add(sequence(1, 1, &[1, 2, 3], 20));
    assert_eq!(step(&mut scheduler), [(1, 0, 3, true)]);
    // Tokens 1 2 3 9; the last one is computed with three more, of which one is right.
    assert_eq!(step_with_proposed(&mut scheduler, &[4, 5, 6], 1), 3);
    assert_eq!(scheduler.running()[0].tokens, [1, 2, 3, 9, 4, 9]);
    assert_eq!((scheduler.running()[0].pending(), scheduler.blocks().used()), (1, 3));
    assert_eq!(scheduler.blocks().find(Prefix::Empty(None), &[1, 2, 3, 9, 4, 5, 6]).len(), 2);
    assert_eq!(step_with_proposed(&mut scheduler, &[5, 6], 0), 2);
    assert_eq!(scheduler.running()[0].tokens, [1, 2, 3, 9, 4, 9, 9]);
    assert_eq!(scheduler.blocks().find(Prefix::Empty(None), &[1, 2, 3, 9, 4, 9, 0]).len(), 3);
    assert_eq!(scheduler.blocks().find(Prefix::Empty(None), &[1, 2, 3, 9, 4, 5, 6]).len(), 2);
}

#[test]
fn no_sequence_is_preempted_for_proposed_tokens() {
    let mut scheduler = scheduler(5, 2, 100, 8);
    scheduler.add(sequence(1, 1, &[1, 2, 3], 6));
    scheduler.add(sequence(2, 2, &[4, 5, 6], 6));
    step(&mut scheduler);
    // Each has two blocks and a place in the second one; one block is free.
    assert_eq!(step_with_proposed(&mut scheduler, &[7, 7, 7], 0), 0, "no room for all");
    assert_eq!((scheduler.running().len(), scheduler.blocks().used()), (2, 4));
    let mut work = scheduler.plan().work[0];
    scheduler.propose(&mut work, &[7]);
    assert_eq!((work.proposed, scheduler.blocks().used()), (1, 5), "the block that it needs itself has room");
}

#[test]
fn a_removed_sequence_frees_its_blocks_waiting_or_running() {
    let mut scheduler = scheduler(8, 2, 100, 1);
    scheduler.add(sequence(1, 1, &[1, 2, 3], 4));
    scheduler.add(sequence(2, 2, &[1, 2, 3], 4));
    step(&mut scheduler);
    scheduler.retain(|_| false);
    assert!(scheduler.is_idle());
    assert_eq!(scheduler.blocks().used(), 0);
}

/// Number of choices less one, prompt, longest answer, and whether an earlier sequence is cancelled at the same time.
fn arrival() -> impl Strategy<Value = (usize, Vec<u32>, usize, bool)> {
    (0usize..4, proptest::collection::vec(0u32..2, 1..10), 1usize..8, any::<bool>())
}

proptest! {
    /// Whatever comes and goes: each step has work within its bounds, no block is written by two sequences, every
    /// sequence ends, and at the end all blocks are free.
    #[test]
    fn every_sequence_ends_and_every_block_returns(
        arrivals in proptest::collection::vec(arrival(), 1..30),
        blocks in 6usize..12,
        tokens in 1usize..12,
        sequences in 1usize..6,
        // Numbers of proposed tokens, and of those that are right.
        proposals in proptest::collection::vec((0usize..6, 0usize..6), 1..20),
    ) {
        let mut scheduler = scheduler(blocks, 3, tokens, sequences);
        let mut id = 0;
        let mut most = 0;
        let mut arrivals = arrivals.into_iter();
        let mut proposals = proposals.into_iter().cycle();
        loop {
            for (choices, prompt, answer, cancel) in arrivals.by_ref().take(2) {
                // At most 9 + 7 tokens fit into 6 blocks of 3.
                for _ in 0..=choices {
                    id += 1;
                    scheduler.add(sequence(id, prompt.len() as u64, &prompt, answer));
                    most += prompt.len() + answer;
                }
                if cancel {
                    scheduler.retain(|sequence| sequence.id + 2 != id);
                }
            }
            if scheduler.is_idle() {
                break;
            }
            let mut plan = scheduler.plan();
            prop_assert!(!plan.work.is_empty(), "a step without work");
            prop_assert!(plan.work.iter().map(|work| work.length).sum::<usize>() <= tokens.max(sequences + 1));
            prop_assert!(scheduler.running().len() <= sequences);
            let running = scheduler.running().len();
            for work in plan.work.iter_mut().filter(|work| work.wants_logits && work.length == 1) {
                let sequence = &scheduler.running()[work.index];
                let left = sequence.stopping.max_tokens - sequence.answer().len() - 1;
                let length = proposals.next().map_or(0, |(length, _)| length).min(left);
                scheduler.propose(work, &vec![1; length]);
                prop_assert!(work.proposed <= length);
            }
            prop_assert_eq!(scheduler.running().len(), running);
            let size = scheduler.blocks().size();
            let mut written = std::collections::HashSet::new();
            for work in &plan.work {
                let sequence = &scheduler.running()[work.index];
                let end = work.start + work.length + work.proposed;
                prop_assert!(sequence.table.len() * size >= end);
                for block in &sequence.table[work.start / size..=(end - 1) / size] {
                    prop_assert_eq!(scheduler.blocks().references(*block), 1, "a shared block is written");
                    prop_assert!(written.insert(*block));
                }
            }
            for work in &plan.work {
                scheduler.advance(work);
                let right = proposals.next().map_or(0, |(_, right)| right).min(work.proposed);
                if work.wants_logits {
                    (0..=right).for_each(|_| scheduler.push(work.index, 1));
                }
                scheduler.settle(work.index, right);
                if work.proposed > 0 {
                    let sequence = &scheduler.running()[work.index];
                    prop_assert_eq!(sequence.pending(), 1);
                    prop_assert_eq!(sequence.table.len(), sequence.computed.div_ceil(size));
                }
            }
            scheduler.retain(|sequence| sequence.finished().is_none());
            // Preemptions cost steps, but never without bound: the oldest advances in every step.
            most -= 1;
            prop_assert!(most > 0, "more steps than tokens: a sequence starves");
        }
        prop_assert_eq!(scheduler.blocks().used(), 0);
    }
}
