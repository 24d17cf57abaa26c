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
    draw::{Draw, Threads},
    meters::Meters,
    request::{Event, Finished, GenerateError, Item, Message, Place, Progress},
    sampling::{LogitsError, Logprobs, Sampled},
    scheduler::{Plan, Scheduler, StepLimits, Work},
    sequence::{FinishReason, Sequence, SequenceId},
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
    scheduler: Scheduler,
    clients: HashMap<SequenceId, Client>,
    progress: Arc<Progress>,
    meters: Meters,
    usage: Usage,
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
            scheduler,
            clients: HashMap::new(),
            progress,
            meters,
            usage,
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
        let plan = self.scheduler.plan();
        // Otherwise the thread would spin for ever; see the scheduler for why each step makes progress.
        assert!(!plan.work.is_empty(), "a step without work while sequences wait");
        let started = Instant::now();
        if let Some(since) = self.backlog {
            self.rate.record(started.saturating_duration_since(since), plan.admitted.len(), before);
        }
        self.backlog = plan.is_backlogged.then_some(started);
        self.record_admissions(&plan, started);
        let answers = self.compute(&plan.work);
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

    fn compute(&mut self, work: &[Work]) -> Result<Vec<RowOutput>, BackendError> {
        let running = self.scheduler.running();
        let rows: Vec<Row<'_>> = work
            .iter()
            .map(|work| Row {
                tokens: &running[work.index].tokens[work.start..work.start + work.length],
                start: work.start,
                blocks: &running[work.index].table,
                wants_logits: work.wants_logits,
                targets: running[work.index].targets(work.start, work.length),
                top: running[work.index].prompt_logprobs.unwrap_or_default(),
                adapter: running[work.index].adapter,
            })
            .collect();
        metrics::histogram!("athanor_server_batch_inputs").record(rows.len() as f64);
        let answers = self.backend.step(&rows)?;
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
                true => self.prepare(work.index, output.logits, now),
                false => Ok(None),
            });
            match draw {
                Ok(draw) => draws.extend(draw),
                Err(error) => self.fail_running(work.index, error),
            }
        }
        let (running, vocabulary) = (self.scheduler.running(), self.limits.vocabulary);
        let drawn = self.threads.map(draws, |draw| {
            let sampled = draw.sample(&running[draw.index], vocabulary);
            (draw, sampled)
        });
        for (draw, sampled) in drawn {
            let index = draw.index;
            match sampled.map_err(GenerateError::from).and_then(|sampled| self.follow(draw, sampled)) {
                Ok((sampled, completes)) => self.push(index, sampled, completes, now),
                Err(error) => self.fail_running(index, error),
            }
        }
    }

    /// What the next token of a sequence is drawn from. None for a sequence that wants no token, which ends.
    fn prepare(&mut self, index: usize, logits: Logits, now: Instant) -> Result<Option<Draw>, GenerateError> {
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

    /// Follows an answer's constraint by its next token: returns whether the constraint ends the answer with it.
    fn follow(&mut self, draw: Draw, sampled: Sampled) -> Result<(Sampled, bool), GenerateError> {
        let sequence = &self.scheduler.running()[draw.index];
        let constraint = draw.constraint.filter(|_| !sequence.stopping.stop_tokens.contains(&sampled.token));
        let Some((mut constraint, _)) = constraint else { return Ok((sampled, false)) };
        let completes = constraint.accept(sampled.token)? == constraint::Progress::Complete;
        let is_last = completes || sequence.answer().len() + 1 >= sequence.stopping.max_tokens;
        if let (Some(client), Some(pool), false) = (self.clients.get_mut(&sequence.id), &self.pool, is_last) {
            client.guide = Some(pool.guide(constraint));
        }
        Ok((sampled, completes))
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

    fn publish(&mut self) {
        let (running, blocks) = (self.scheduler.running().len(), self.scheduler.blocks());
        self.progress.running.store(running, Ordering::Relaxed);
        self.progress.used_blocks.store(blocks.used(), Ordering::Relaxed);
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
