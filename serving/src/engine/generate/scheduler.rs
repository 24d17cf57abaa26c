//! Which tokens of which sequences a step computes. No clock, no thread, no model.
//!
//! There is no prefill phase and no decode phase: the computed tokens of each sequence catch up with its tokens, under
//! one budget of tokens per step. Sequences that lack one token come first, so a long prompt delays no answer by more
//! than its share of a step.
//!
//! - Admission is first come, first served, and stops at the first sequence that does not fit, so none starves. A
//!   sequence is admitted with blocks for all of its tokens. One whose request has another sequence in the middle of
//!   its prompt waits until that prompt is in the cache, where it finds it.
//! - When an answer needs a block and none is free, the youngest running sequence gives up its blocks, returns to the
//!   front of the queue and is computed again later. The oldest is never the youngest unless it is alone, and alone
//!   every accepted sequence fits; so each step makes progress.
//! - Proposed tokens are added to a step that is planned already, where blocks are free. What the step computes of them is
//!   kept only as far as the answer continues with them: other positions are written again before they are read, their
//!   blocks are never sealed, and blocks beyond the answer are given up after the step.

use std::collections::VecDeque;

use super::{
    blocks::Blocks,
    sequence::{Sequence, SequenceId},
};

/// Bounds of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Largest number of tokens in a step. It is at least `sequences + 1` in effect, so that prompts advance while all
    /// others decode.
    pub tokens: usize,
    /// Largest number of sequences that run at once.
    pub sequences: usize,
}

/// Tokens of one running sequence that a step computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Index into [`Scheduler::running`].
    pub index: usize,
    pub start: usize,
    pub length: usize,
    /// Whether these are the last pending tokens, so that the next token can be chosen.
    pub wants_logits: bool,
    /// Number of proposed tokens behind them.
    pub proposed: usize,
}

/// What a step does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub work: Vec<Work>,
    /// Sequences that were admitted for the first time.
    pub admitted: Vec<SequenceId>,
    pub preempted: usize,
    /// Whether a sequence waits for room: for blocks, for an end of another one, or for its prompt's turn.
    pub is_backlogged: bool,
}

#[derive(Debug)]
pub struct Scheduler {
    limits: StepLimits,
    blocks: Blocks,
    waiting: VecDeque<Sequence>,
    /// Sequences in order of age.
    running: Vec<Sequence>,
}

impl Scheduler {
    pub fn new(blocks: Blocks, limits: StepLimits) -> Self {
        let sequences = limits.sequences.max(1);
        let limits = StepLimits { tokens: limits.tokens.max(sequences + 1), sequences };
        Self { limits, blocks, waiting: VecDeque::new(), running: Vec::new() }
    }

    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// Largest number of sequences that run at once.
    pub fn most_running(&self) -> usize {
        self.limits.sequences
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Queues a sequence. The caller has checked that its prompt and longest answer fit into all blocks together.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Chooses the tokens of the next step, and admits and preempts sequences for it.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        let mut budget = self.limits.tokens;
        let mut index = 0;
        while index < self.running.len() && budget > 0 {
            if self.running[index].pending() == 1 && self.make_room(index, &mut plan) {
                self.assign(index, &mut budget, &mut plan);
            }
            index += 1;
        }
        for index in 0..self.running.len() {
            if self.running[index].pending() > 1 {
                self.assign(index, &mut budget, &mut plan);
            }
        }
        plan.is_backlogged = match plan.preempted {
            0 => self.admit(&mut budget, &mut plan),
            _ => true,
        };
        plan
    }

    /// Extends the table of a running sequence to all of its tokens, and preempts younger ones as long as blocks are
    /// missing. Returns false if the sequence itself was the youngest.
    fn make_room(&mut self, index: usize, plan: &mut Plan) -> bool {
        loop {
            let sequence = &mut self.running[index];
            if self.blocks.extend(&mut sequence.table, sequence.tokens.len()) {
                return true;
            }
            self.preempt_youngest();
            plan.preempted += 1;
            if index >= self.running.len() {
                return false;
            }
        }
    }

    fn preempt_youngest(&mut self) {
        if let Some(mut youngest) = self.running.pop() {
            self.blocks.release(&mut youngest.table);
            (youngest.computed, youngest.sealed, youngest.prefix) = (0, 0, youngest.root());
            self.waiting.push_front(youngest);
        }
    }

    fn assign(&self, index: usize, budget: &mut usize, plan: &mut Plan) {
        let sequence = &self.running[index];
        let length = sequence.pending().min(*budget);
        if length == 0 {
            return;
        }
        *budget -= length;
        let wants_logits = length == sequence.pending();
        plan.work.push(Work { index, start: sequence.computed, length, wants_logits, proposed: 0 });
    }

    /// Returns whether a sequence is left that waits for room, and not only for a prompt that it shares.
    fn admit(&mut self, budget: &mut usize, plan: &mut Plan) -> bool {
        let mut next = 0;
        while *budget > 0 && self.running.len() < self.limits.sequences && next < self.waiting.len() {
            if self.shares_a_prompt_in_progress(&self.waiting[next]) {
                next += 1;
                continue;
            }
            let (root, tokens) = (self.waiting[next].root(), &self.waiting[next].tokens);
            let mut shared = self.blocks.find(root, tokens);
            shared.truncate(self.waiting[next].reusable() / self.blocks.size());
            let Some(table) = self.blocks.allocate(&shared, tokens.len()) else { break };
            let Some(mut sequence) = self.waiting.remove(next) else { break };
            sequence.table = table;
            sequence.computed = shared.len() * self.blocks.size();
            (sequence.sealed, sequence.prefix) = (shared.len(), self.blocks.prefix(root, &shared));
            if sequence.cached.is_none() {
                sequence.cached = Some(sequence.computed);
                plan.admitted.push(sequence.id);
            }
            self.running.push(sequence);
            self.assign(self.running.len() - 1, budget, plan);
        }
        next < self.waiting.len()
    }

    /// Whether another sequence of the same request still computes blocks of the prompt that this one will share.
    fn shares_a_prompt_in_progress(&self, sequence: &Sequence) -> bool {
        let shared = (sequence.prompt_length - 1) / self.blocks.size();
        self.running.iter().any(|other| other.request == sequence.request && other.sealed < shared)
    }

    /// Adds proposed tokens to work that wants logits, as many as free blocks have room for: no sequence is preempted for
    /// them. The caller sees to it that the answer may have one more token than these.
    pub fn propose(&mut self, work: &mut Work, tokens: &[u32]) {
        let sequence = &mut self.running[work.index];
        let length = sequence.tokens.len();
        self.blocks.extend(&mut sequence.table, length + tokens.len());
        let room = sequence.table.len() * self.blocks.size() - length;
        sequence.proposed = tokens[..tokens.len().min(room)].to_vec();
        work.proposed = sequence.proposed.len();
    }

    /// Keeps what was computed for the first `right` proposed tokens, which the sequence has by now, and gives up the rest.
    pub fn settle(&mut self, index: usize, right: usize) {
        let sequence = &mut self.running[index];
        if std::mem::take(&mut sequence.proposed).is_empty() {
            return;
        }
        sequence.computed += right;
        self.blocks.trim(&mut sequence.table, sequence.computed);
        self.seal(index);
    }

    /// Records that the work was computed, without proposed tokens: full blocks become available to other sequences.
    pub fn advance(&mut self, work: &Work) {
        let sequence = &mut self.running[work.index];
        let targets = sequence.targets(work.start, work.length).len();
        if targets > 0 {
            sequence.scored = sequence.scored.max(work.start + targets);
        }
        sequence.computed = work.start + work.length;
        self.seal(work.index);
    }

    fn seal(&mut self, index: usize) {
        let (sequence, size) = (&mut self.running[index], self.blocks.size());
        while (sequence.sealed + 1) * size <= sequence.computed {
            let first = sequence.sealed * size;
            let tokens = &sequence.tokens[first..first + size];
            sequence.prefix = self.blocks.seal(sequence.table[sequence.sealed], sequence.prefix, tokens);
            sequence.sealed += 1;
        }
    }

    /// Appends a chosen token to a running sequence.
    pub fn push(&mut self, index: usize, token: u32) {
        self.running[index].tokens.push(token);
    }

    /// Removes every sequence that is not to be kept, running or waiting, and frees its blocks.
    pub fn retain(&mut self, mut keep: impl FnMut(&Sequence) -> bool) {
        let blocks = &mut self.blocks;
        self.running.retain_mut(|sequence| {
            let kept = keep(sequence);
            if !kept {
                blocks.release(&mut sequence.table);
            }
            kept
        });
        self.waiting.retain(keep);
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
