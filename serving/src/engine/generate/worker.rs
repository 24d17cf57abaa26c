//! The thread that owns the model: takes requests in, runs steps, sends tokens out.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    adapters::{Adapter, Usage},
    blocks::Blocks,
    constraint::{self, ConstraintError, Guide, Pool},
    draw::{Draw, Drawn, Threads},
    meters::Meters,
    request::{Event, Finished, GenerateError, Item, Message, Place, Progress},
    sampling::{LogitsError, Logprobs, Sampled},
    scheduler::{Plan, Scheduler, StepLimits, Work},
    sequence::{FinishReason, Sequence, SequenceId},
    speculate::{self, Costs, History, Record},
    wait::{AdmissionRate, Queue},
};
use crate::engine::backend::{BackendError, GenerateBackend, GenerateLimits, Logits, Row, RowOutput};

/// Threads that compute masks. A mask takes far less than a step, so that few are busy at a time.
const MASK_THREADS: usize = 2;

/// The request behind a sequence.
struct Client {
    reply: mpsc::Sender<Result<Event, GenerateError>>,
    place: Option<Place>,
    /// Log-probabilities of the prompt so far, if they are wanted and were not sent yet.
    prompt: Option<Vec<Logprobs>>,
    since: Instant,
    admitted: Option<Instant>,
    last_token: Option<Instant>,
    /// What restricts the next token. Like the tokens so far, it outlives a preemption.
    guide: Option<Guide>,
    history: History,
    /// Kept, so that the model keeps the adapter until the answer ends.
    adapter: Option<Adapter>,
}

impl Client {
    /// The channel has room for the longest answer and its end, so sending fails only if the client is gone; the next
    /// step sees that.
    fn send(&self, event: Result<Event, GenerateError>) {
        let _ = self.reply.try_send(event);
    }

    fn record_token(&mut self, now: Instant, meters: &Meters) {
        match self.last_token.replace(now) {
            Some(last) => {
                let seconds = now.saturating_duration_since(last).as_secs_f64();
                metrics::histogram!("athanor_server_inter_token_seconds").record(seconds);
                meters.token(false, seconds);
            }
            None => {
                let seconds = now.saturating_duration_since(self.since).as_secs_f64();
                metrics::histogram!("athanor_server_time_to_first_token_seconds").record(seconds);
                meters.token(true, seconds);
            }
        }
    }
}

pub(super) struct Worker<B> {
    backend: B,
    receiver: mpsc::UnboundedReceiver<Message>,
    limits: GenerateLimits,
    /// Largest number of tokens in a step.
    step_tokens: usize,
    scheduler: Scheduler,
    clients: HashMap<SequenceId, Client>,
    progress: Arc<Progress>,
    meters: Meters,
    usage: Usage,
    /// How often proposed tokens were right in all answers, and the times of steps.
    record: Record,
    costs: Costs,
    /// Started with the first request that has a constraint.
    pool: Option<Pool>,
    threads: Threads,
    sequences: SequenceId,
    requests: u64,
    rate: AdmissionRate,
    /// When the last step began, if it left sequences that wait for room.
    backlog: Option<Instant>,
}

impl<B: GenerateBackend> Worker<B> {
    pub(super) fn new(
        backend: B,
        receiver: mpsc::UnboundedReceiver<Message>,
        limits: GenerateLimits,
        step: StepLimits,
        progress: Arc<Progress>,
        (meters, usage): (Meters, Usage),
    ) -> Self {
        let scheduler = Scheduler::new(Blocks::new(limits.blocks, limits.block_size), step);
        Self {
            backend,
            receiver,
            limits,
            step_tokens: step.tokens,
            scheduler,
            clients: HashMap::new(),
            progress,
            meters,
            usage,
            record: Record::default(),
            costs: Costs::default(),
            pool: None,
            threads: Threads::start(),
            sequences: 0,
            requests: 0,
            rate: AdmissionRate::default(),
            backlog: None,
        }
    }

    /// Runs until all handles are gone and all answers are complete.
    pub(super) fn run(mut self) {
        loop {
            if self.scheduler.is_idle() {
                match self.receiver.blocking_recv() {
                    Some(message) => self.receive(message),
                    None => return,
                }
            }
            while let Ok(message) = self.receiver.try_recv() {
                self.receive(message);
            }
            self.remove_closed();
            if !self.scheduler.is_idle() {
                self.step();
            }
            if self.scheduler.waiting() == 0 {
                self.backlog = None;
            }
            self.publish();
        }
    }

    fn receive(&mut self, message: Message) {
        match message {
            Message::Request(item) => self.accept(*item),
            Message::Load { id, weights, reply } => {
                let loaded = self.backend.load_adapter(id, weights);
                if loaded.is_ok() {
                    self.usage.begin();
                }
                // Without a receiver its handle is gone as well, which unloads the adapter.
                let _ = reply.send(loaded);
            }
            Message::Unload(id) => self.backend.unload_adapter(id),
        }
    }

    fn accept(&mut self, item: Item) {
        self.requests += 1;
        let constraint = item.request.constraint;
        if constraint.is_some() && self.pool.is_none() {
            self.pool = Pool::start(MASK_THREADS)
                .inspect_err(|error| tracing::error!(%error, "no thread for masks could be started"))
                .ok();
        }
        for (index, (reply, place)) in (0u64..).zip(item.replies) {
            let mut sampling = item.request.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index);
            self.sequences += 1;
            let (prompt, stopping) = (item.request.prompt.clone(), item.request.stopping.clone());
            let mut sequence = Sequence::new(self.sequences, self.requests, prompt, sampling, stopping);
            sequence.prompt_logprobs = item.request.prompt_logprobs;
            sequence.adapter = item.request.adapter.as_ref().map(Adapter::id);
            let mut guide = None;
            if let Some(constraint) = &constraint {
                let Some(pool) = &self.pool else {
                    let _ = reply.try_send(Err(ConstraintError("no thread could be started".into()).into()));
                    continue;
                };
                // The first mask is computed while the model reads the prompt.
                guide = Some(pool.guide(constraint.clone()));
            }
            let client = Client {
                reply,
                place: Some(place),
                prompt: item.request.prompt_logprobs.map(|_| Vec::new()),
                since: item.since,
                admitted: None,
                last_token: None,
                guide,
                history: History::new(constraint.as_ref().map(|one| one.example()).unwrap_or_default()),
                adapter: item.request.adapter.clone(),
            };
            self.clients.insert(self.sequences, client);
            self.scheduler.add(sequence);
        }
    }

    /// Removes the sequences whose reader is gone, waiting ones included.
    fn remove_closed(&mut self) {
        let before = self.clients.len();
        self.clients.retain(|_, client| !client.reply.is_closed());
        if self.clients.len() < before {
            metrics::counter!("athanor_server_cancelled_sequences_total")
                .increment((before - self.clients.len()) as u64);
            self.remove_ended();
        }
    }

    /// Frees the blocks of sequences without a client.
    fn remove_ended(&mut self) {
        let clients = &self.clients;
        self.scheduler.retain(|sequence| clients.contains_key(&sequence.id));
    }

    fn step(&mut self) {
        let before = self.scheduler.running().len();
        let mut plan = self.scheduler.plan();
        // Otherwise the thread would spin for ever; see the scheduler for why each step makes progress.
        assert!(!plan.work.is_empty(), "a step without work while sequences wait");
        let started = Instant::now();
        if let Some(since) = self.backlog {
            self.rate.record(started.saturating_duration_since(since), plan.admitted.len(), before);
        }
        self.backlog = plan.is_backlogged.then_some(started);
        self.publish_use();
        self.record_admissions(&plan, started);
        let speculates = self.propose(&mut plan.work);
        let answers = self.compute(&plan.work, speculates);
        metrics::histogram!("athanor_server_batch_seconds").record(started.elapsed().as_secs_f64());
        match answers {
            Ok(answers) => self.take(&plan.work, answers),
            Err(error) => {
                tracing::error!(%error, sequences = plan.work.len(), "a step failed");
                for work in &plan.work {
                    self.fail(self.scheduler.running()[work.index].id, error.clone().into());
                }
            }
        }
        self.remove_ended();
    }

    fn record_admissions(&mut self, plan: &Plan, now: Instant) {
        metrics::counter!("athanor_server_preemptions_total").increment(plan.preempted as u64);
        self.meters.preempted(plan.preempted);
        for sequence in self.scheduler.running().iter().filter(|sequence| plan.admitted.contains(&sequence.id)) {
            let cached_tokens = sequence.cached();
            tokens("cached").increment(cached_tokens as u64);
            tokens("prompt").increment((sequence.prompt_length - cached_tokens) as u64);
            if let Some(client) = self.clients.get_mut(&sequence.id) {
                client.place.take();
                client.admitted = Some(now);
                client.send(Ok(Event::Admitted { cached_tokens }));
                let queued = now.saturating_duration_since(client.since).as_secs_f64();
                metrics::histogram!("athanor_server_queue_seconds").record(queued);
                self.meters.admitted(sequence.prompt_length, queued);
            }
        }
    }

    /// Proposes tokens for a step in which every sequence computes its last token, and adds them to its work where that is
    /// expected to be faster. Returns whether the step is of this kind.
    fn propose(&mut self, work: &mut [Work]) -> bool {
        let decodes = |work: &Work| work.wants_logits && work.length == 1;
        if !self.backend.checks_proposals() || work.len() > speculate::MOST_SEQUENCES || !work.iter().all(decodes) {
            self.clients.values_mut().for_each(|client| client.history.pass());
            return false;
        }
        let mut candidates = Vec::with_capacity(work.len());
        for work in &*work {
            let sequence = &self.scheduler.running()[work.index];
            let Some(client) = self.clients.get_mut(&sequence.id) else { return false };
            let most = sequence.stopping.max_tokens.saturating_sub(sequence.answer().len() + 1);
            let (tokens, stop_tokens) = (&sequence.tokens, &sequence.stopping.stop_tokens);
            candidates.push(client.history.propose(tokens, most, stop_tokens, &self.record));
        }
        let lengths = speculate::choose(&candidates, &self.costs, self.step_tokens);
        for (work, length) in work.iter_mut().zip(lengths).filter(|(_, length)| *length > 0) {
            let id = self.scheduler.running()[work.index].id;
            if let Some(client) = self.clients.get(&id) {
                self.scheduler.propose(work, client.history.proposed(length));
            }
        }
        true
    }

    /// `speculates`: see [`Self::propose`].
    fn compute(&mut self, work: &[Work], speculates: bool) -> Result<Vec<RowOutput>, BackendError> {
        let running = self.scheduler.running();
        let own = |work: &Work| &running[work.index].tokens[work.start..work.start + work.length];
        let with_proposed: Vec<Vec<u32>> = work
            .iter()
            .map(|work| match work.proposed {
                0 => Vec::new(),
                _ => [own(work), &running[work.index].proposed].concat(),
            })
            .collect();
        let rows: Vec<Row<'_>> = std::iter::zip(work, &with_proposed)
            .map(|(work, with_proposed)| Row {
                tokens: if work.proposed > 0 { with_proposed } else { own(work) },
                start: work.start,
                blocks: &running[work.index].table,
                logits: if work.wants_logits { 1 + work.proposed } else { 0 },
                targets: running[work.index].targets(work.start, work.length),
                top: running[work.index].prompt_logprobs.unwrap_or_default(),
                adapter: running[work.index].adapter,
            })
            .collect();
        metrics::histogram!("athanor_server_batch_inputs").record(rows.len() as f64);
        let started = self.backend.now();
        let answers = self.backend.step(&rows)?;
        if speculates {
            let seconds = self.backend.now().saturating_duration_since(started).as_secs_f64();
            self.costs.add(rows.iter().map(|row| row.tokens.len()).sum(), seconds);
        }
        if answers.len() != rows.len() {
            return Err(BackendError(format!("{} rows of logits for {} rows of tokens", answers.len(), rows.len())));
        }
        Ok(answers)
    }

    /// Keeps the log-probabilities of prompt tokens that a step computed. Those that were computed before a preemption are
    /// there already.
    fn score(&mut self, work: &Work, computed: Vec<Logprobs>) -> Result<(), GenerateError> {
        let sequence = &self.scheduler.running()[work.index];
        let targets = sequence.targets(work.start, work.length);
        if computed.len() != targets.len() {
            let message = format!("{} log-probabilities for {} tokens", computed.len(), targets.len());
            return Err(GenerateError::Backend(message));
        }
        if let Some(index) = computed.iter().position(|one| !one.chosen.is_finite()) {
            return Err(LogitsError::NotFinite { token: targets[index] as usize }.into());
        }
        let known = sequence.scored.saturating_sub(work.start);
        if let Some(prompt) = self.clients.get_mut(&sequence.id).and_then(|client| client.prompt.as_mut()) {
            prompt.extend(computed.into_iter().skip(known));
        }
        Ok(())
    }

    /// Takes what a step computed. Tokens are drawn on several threads and sent in the order of the sequences.
    fn take(&mut self, work: &[Work], answers: Vec<RowOutput>) {
        let now = Instant::now();
        let mut draws = Vec::with_capacity(work.len());
        for (work, output) in work.iter().zip(answers) {
            let scored = self.score(work, output.targets);
            self.scheduler.advance(work);
            let draw = scored.and_then(|()| match work.wants_logits {
                true => self.prepare(work, output.logits, now),
                false => Ok(None),
            });
            match draw {
                Ok(draw) => draws.extend(draw),
                Err(error) => self.fail_running(work.index, error),
            }
        }
        let (running, vocabulary) = (self.scheduler.running(), self.limits.vocabulary);
        let drawn = self.threads.map(draws, |draw| {
            let index = draw.index;
            draw.sample(&running[index], vocabulary)
        });
        let proposed = work.iter().map(|work| work.proposed).sum::<usize>();
        let delay = self.costs.seconds(work.len() + proposed) / self.costs.seconds(work.len()) - 1.0;
        for drawn in drawn {
            self.follow(drawn, if proposed > 0 { delay } else { 0.0 }, now);
        }
    }

    /// What the next token of a sequence is drawn from. None for a sequence that wants no token, which ends.
    fn prepare(&mut self, work: &Work, logits: Vec<Logits>, now: Instant) -> Result<Option<Draw>, GenerateError> {
        let index = work.index;
        if logits.len() != 1 + work.proposed {
            let message = format!("{} rows of logits for {} tokens", logits.len(), 1 + work.proposed);
            return Err(GenerateError::Backend(message));
        }
        let sequence = &self.scheduler.running()[index];
        let mut client = self.clients.get_mut(&sequence.id);
        if let Some(client) = &mut client
            && let Some(prompt) = client.prompt.take()
        {
            client.send(Ok(Event::Prompt(prompt)));
        }
        if sequence.stopping.max_tokens == 0 {
            self.end(index, FinishReason::Length, now);
            return Ok(None);
        }
        let guide = client.and_then(|client| client.guide.take());
        let constraint = guide.map(Guide::mask).transpose()?;
        Ok(Some(Draw { index, logits, constraint }))
    }

    /// Appends the drawn tokens to their sequence. `delay`: what proposed tokens added to the step, as a share of it.
    fn follow(&mut self, drawn: Drawn, delay: f64, now: Instant) {
        let (index, count) = (drawn.index, drawn.tokens.len());
        let sequence = &self.scheduler.running()[index];
        if let Some(client) = self.clients.get_mut(&sequence.id) {
            client.history.learn(drawn.tokens.iter().map(|sampled| sampled.token), delay, &mut self.record);
            if let (Some(pool), Some(constraint)) = (&self.pool, drawn.constraint) {
                if self.backend.checks_proposals() && self.scheduler.running().len() <= speculate::MOST_SEQUENCES {
                    client.history.force(constraint::forced(&*constraint));
                }
                client.guide = Some(pool.guide(constraint));
            }
        }
        let right = count.saturating_sub(1);
        if !sequence.proposed.is_empty() {
            self.meters.proposed(1, sequence.proposed.len(), right);
        }
        for (place, sampled) in (1..).zip(drawn.tokens) {
            self.push(index, sampled, drawn.completes && place == count, now);
        }
        self.scheduler.settle(index, right);
        if let Some(error) = drawn.error {
            self.fail_running(index, error);
        }
    }

    /// Appends a token to a sequence and sends it, with the end if it is the last one.
    fn push(&mut self, index: usize, sampled: Sampled, completes: bool, now: Instant) {
        self.scheduler.push(index, sampled.token);
        tokens("completion").increment(1);
        let sequence = &self.scheduler.running()[index];
        let id = sequence.id;
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.record_token(now, &self.meters);
        client.send(Ok(Event::Token(sampled)));
        if let Some(reason) = completes.then_some(FinishReason::Stop).or_else(|| sequence.finished()) {
            self.end(index, reason, now);
        }
    }

    /// Reports the end of a complete sequence.
    fn end(&mut self, index: usize, reason: FinishReason, now: Instant) {
        let sequence = &self.scheduler.running()[index];
        let Some(client) = self.clients.remove(&sequence.id) else { return };
        self.meters.finished(reason, now.saturating_duration_since(client.since).as_secs_f64());
        let admitted = client.admitted.unwrap_or(client.since);
        client.send(Ok(Event::Finished(Finished {
            reason,
            cached_tokens: sequence.cached(),
            queued: admitted.saturating_duration_since(client.since),
            computed: now.saturating_duration_since(admitted),
        })));
    }

    fn fail_running(&mut self, index: usize, error: GenerateError) {
        tracing::error!(%error, "a sequence failed");
        self.fail(self.scheduler.running()[index].id, error);
    }

    fn fail(&mut self, id: SequenceId, error: GenerateError) {
        if let Some(client) = self.clients.remove(&id) {
            client.send(Err(error));
        }
    }

    /// Before a step as well: a sequence is running from the moment in which it no longer waits.
    fn publish_use(&self) {
        self.progress.running.store(self.scheduler.running().len(), Ordering::Relaxed);
        self.progress.used_blocks.store(self.scheduler.blocks().used(), Ordering::Relaxed);
    }

    fn publish(&mut self) {
        self.publish_use();
        let (running, blocks) = (self.scheduler.running().len(), self.scheduler.blocks());
        let usage = blocks.used() as f64 / blocks.count().max(1) as f64;
        let waiting = self.scheduler.waiting();
        let free = if self.backlog.is_some() { 0 } else { self.scheduler.most_running().saturating_sub(running) };
        let queue = Queue { waiting, free, interval: self.rate.interval() };
        self.progress.free.store(free, Ordering::Relaxed);
        self.progress.interval.store(queue.interval.to_bits(), Ordering::Relaxed);
        metrics::gauge!("athanor_server_expected_wait_seconds").set(queue.expected_wait().as_secs_f64());
        self.meters.state(running, waiting, usage);
        let adapters =
            self.clients.values().filter_map(|client| Some((client.admitted.is_some(), client.adapter.as_ref()?)));
        self.usage.record(adapters);
        metrics::gauge!("athanor_server_running_sequences").set(running as f64);
        metrics::gauge!("athanor_server_waiting_sequences").set(waiting as f64);
        metrics::gauge!("athanor_server_kv_cache_used_blocks").set(blocks.used() as f64);
        metrics::gauge!("athanor_server_kv_cache_usage_ratio").set(usage);
    }
}

/// Counts tokens: `prompt` those of prompts that were computed, `cached` those that the prefix cache had, `completion`
/// those of answers.
fn tokens(kind: &'static str) -> metrics::Counter {
    metrics::counter!("athanor_server_tokens_total", "kind" => kind)
}
