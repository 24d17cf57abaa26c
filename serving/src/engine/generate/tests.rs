mod adapters;
mod metrics;
mod prompt;
mod speculation;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::engine::{
    backend::{AdapterId, AdapterWeights, BackendError, LowRank, Row, RowOutput},
    generate::{
        sampling::{Context, LogitsError, Sampling},
        sequence::{FinishReason, Stopping},
    },
};

const VOCABULARY: usize = 24;
/// Prompts that contain this token make the model fail; the next one makes it panic, the one after it makes its logits
/// NaN.
const FAILS: u32 = 21;
const PANICS: u32 = 22;
const NOT_FINITE: u32 = 23;

/// Logits are a hash of the whole prefix, which is read back through the block table: a wrong table, a wrong position
/// or the block of another prefix gives other tokens.
struct Fake {
    limits: GenerateLimits,
    /// `(position, token)` of each slot.
    slots: Vec<Option<(usize, u32)>>,
    seen: Arc<Seen>,
    checks_proposals: bool,
    /// What a step and each of its rows take, by a clock of the model's own: the tests do not depend on the machine.
    step_time: Duration,
    row_time: Duration,
    now: Instant,
    logits: fn(&[(usize, u32)]) -> Vec<f32>,
}

impl Fake {
    fn new(blocks: usize, seen: Arc<Seen>) -> Self {
        Self {
            limits: GenerateLimits { blocks, block_size: 4, max_length: 64, vocabulary: VOCABULARY },
            slots: vec![None; blocks * 4],
            seen,
            checks_proposals: false,
            step_time: Duration::from_micros(300),
            row_time: Duration::from_micros(10),
            now: Instant::now(),
            logits: |prefix| logits(prefix.iter().copied()),
        }
    }
}

#[derive(Default)]
struct Seen {
    /// A test that holds it stops the model before its next step.
    gate: Mutex<()>,
    steps: AtomicU64,
    tokens: AtomicU64,
    /// Rows that wanted logits of several tokens.
    several: AtomicU64,
    /// Adapters that the model has.
    adapters: Mutex<BTreeSet<AdapterId>>,
}

/// What is added to the positions of a sequence with an adapter, so that its keys and values are its own.
fn offset(adapter: Option<AdapterId>) -> usize {
    adapter.map_or(0, |id| 1000 * (id.0 as usize + 1))
}

fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) ^ (mixed >> 32)
}

/// The logits after a prefix of `(position, token)`.
fn logits(prefix: impl Iterator<Item = (usize, u32)>) -> Vec<f32> {
    let hash = prefix.fold(1, |hash, (position, token)| mix(mix(hash, position as u64), u64::from(token)));
    let logit = |token: u64| match token < u64::from(FAILS) {
        true => (mix(hash, token) % 1000) as f32 / 150.0,
        // The model never chooses the faults.
        false => -1000.0,
    };
    (0..VOCABULARY as u64).map(logit).collect()
}

impl GenerateBackend for Fake {
    fn limits(&self) -> GenerateLimits {
        self.limits
    }

    fn load_adapter(&mut self, id: AdapterId, adapter: AdapterWeights) -> Result<(), BackendError> {
        if adapter.modules.is_empty() {
            return Err(BackendError("it has no module".into()));
        }
        self.seen.adapters.lock().unwrap().insert(id);
        Ok(())
    }

    fn unload_adapter(&mut self, id: AdapterId) {
        self.seen.adapters.lock().unwrap().remove(&id);
    }

    fn checks_proposals(&self) -> bool {
        self.checks_proposals
    }

    fn now(&self) -> Instant {
        self.now
    }

    fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<RowOutput>, BackendError> {
        let _gate = self.seen.gate.lock();
        let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
        self.now += self.step_time + self.row_time * tokens as u32;
        self.seen.steps.fetch_add(1, Ordering::SeqCst);
        let size = self.limits.block_size;
        let slot = |blocks: &[u32], position: usize| blocks[position / size] as usize * size + position % size;
        for row in rows {
            assert!(!row.tokens.contains(&PANICS), "a fault of the test");
            if row.tokens.contains(&FAILS) {
                return Err(BackendError("out of memory".into()));
            }
            self.seen.tokens.fetch_add(row.tokens.len() as u64, Ordering::SeqCst);
            self.seen.several.fetch_add(u64::from(row.logits > 1), Ordering::SeqCst);
            for (position, token) in (row.start..).zip(row.tokens) {
                self.slots[slot(row.blocks, position)] = Some((position + offset(row.adapter), *token));
            }
            if let Some(id) = row.adapter {
                assert!(self.seen.adapters.lock().unwrap().contains(&id), "the adapter is gone");
            }
        }
        // The logits behind the first `end` tokens.
        let behind = |row: &Row<'_>, end: usize| {
            if row.tokens.contains(&NOT_FINITE) {
                return vec![f32::NAN; VOCABULARY];
            }
            // A slot that was never written reads as something that no prefix has.
            let read = |position| self.slots[slot(row.blocks, position)].unwrap_or((usize::MAX, 0));
            (self.logits)(&(0..end).map(read).collect::<Vec<_>>())
        };
        let answer = |row: &Row<'_>| RowOutput {
            logits: (0..row.logits).rev().map(|back| behind(row, row.start + row.tokens.len() - back).into()).collect(),
            targets: (row.start + 1..)
                .zip(row.targets)
                .map(|(end, &token)| sampling::logprobs(&behind(row, end), token as usize, row.top))
                .collect(),
        };
        Ok(rows.iter().map(answer).collect())
    }
}

fn engine(blocks: usize, limits: EngineLimits) -> (Engine, Arc<Seen>) {
    let seen = Arc::<Seen>::default();
    (Engine::start(Fake::new(blocks, seen.clone()), limits, "fake").unwrap(), seen)
}

fn limits(tokens: usize, sequences: usize) -> EngineLimits {
    EngineLimits { queue: 1000, wait: Duration::MAX, step: StepLimits { tokens, sequences } }
}

fn request(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_vec(),
        choices: 1,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stopping: Stopping { max_tokens, min_tokens: 0, stop_tokens: vec![] },
        constraint: None,
        prompt_logprobs: None,
        adapter: None,
    }
}

/// The answer written from its definition: one prefix, no engine, no cache.
fn alone(request: &GenerateRequest, choice: u64) -> Vec<u32> {
    let sampling = Sampling { seed: request.sampling.seed.wrapping_add(choice), ..request.sampling.clone() };
    let mut answer = Vec::new();
    let offset = offset(request.adapter.as_ref().map(Adapter::id));
    while answer.len() < request.stopping.max_tokens {
        let tokens = request.prompt.iter().chain(&answer).copied();
        let logits = logits((offset..).zip(tokens));
        let forbidden = match answer.len() < request.stopping.min_tokens {
            true => request.stopping.stop_tokens.clone(),
            false => vec![],
        };
        let context = Context { prompt: &request.prompt, answer: &answer, forbidden: &forbidden, allowed: None };
        let token = sampling::sample(&logits, VOCABULARY, &sampling, context).unwrap().token;
        answer.push(token);
        if request.stopping.stop_tokens.contains(&token) {
            break;
        }
    }
    answer
}

async fn read(mut choice: Choice) -> Result<(Vec<u32>, Finished), GenerateError> {
    let mut tokens = Vec::new();
    loop {
        match choice.recv().await.unwrap_or(Err(GenerateError::Stopped))? {
            Event::Admitted { .. } | Event::Prompt(_) => {}
            Event::Token(sampled) => tokens.push(sampled.token),
            Event::Finished(finished) => {
                assert!(choice.recv().await.is_none(), "nothing follows the end");
                return Ok((tokens, finished));
            }
        }
    }
}

/// Reserves and submits.
fn submit(engine: &Engine, request: GenerateRequest) -> Result<Vec<Choice>, GenerateError> {
    let mut places = engine.reserve(request.choices)?;
    engine.submit(&mut places, request)
}

async fn run(engine: &Engine, request: GenerateRequest) -> Result<(Vec<u32>, Finished), GenerateError> {
    read(submit(engine, request)?.pop().unwrap()).await
}

async fn until(engine: &Engine, what: &str, reached: impl Fn(Load) -> bool) {
    for _ in 0..5000 {
        if reached(engine.load()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{what}: {:?}", engine.load());
}

const IDLE: Load = Load { waiting: 0, running: 0, used_blocks: 0 };

/// Prompts share beginnings, so that prefixes are found again; every kind of sampling occurs.
fn random_request(random: &mut StdRng) -> GenerateRequest {
    let shared = random.random_range(0..3u32);
    let common = random.random_range(0..13usize);
    let mut prompt: Vec<u32> = (0..common as u32).map(|index| (shared * 7 + index) % 20).collect();
    prompt.extend((0..random.random_range(1..8)).map(|_| random.random_range(0..20u32)));
    let drawn = random.random_bool(0.7);
    let max_tokens = random.random_range(1..24);
    GenerateRequest {
        prompt,
        choices: random.random_range(1..4),
        sampling: Sampling {
            temperature: if drawn { 0.9 } else { 0.0 },
            top_p: if random.random_bool(0.5) { 0.9 } else { 1.0 },
            top_k: random.random_range(0..10),
            repetition_penalty: if random.random_bool(0.3) { 1.2 } else { 1.0 },
            frequency_penalty: if random.random_bool(0.3) { 0.5 } else { 0.0 },
            seed: random.random(),
            ..Sampling::default()
        },
        stopping: Stopping { max_tokens, min_tokens: random.random_range(0..4), stop_tokens: vec![0, 1] },
        constraint: None,
        prompt_logprobs: None,
        adapter: None,
    }
}

#[tokio::test]
async fn an_answer_does_not_depend_on_the_other_requests() {
    let mut random = StdRng::seed_from_u64(11);
    let requests: Vec<GenerateRequest> = (0..200).map(|_| random_request(&mut random)).collect();
    // 13 blocks of 4 positions: one sequence needs up to 11.
    let (engine, seen) = engine(13, limits(9, 6));
    let mut readers = Vec::new();
    for (index, request) in requests.iter().enumerate() {
        for (choice, receiver) in (0..).zip(submit(&engine, request.clone()).unwrap()) {
            readers.push((index, choice, tokio::spawn(read(receiver))));
        }
        if random.random_bool(0.3) {
            tokio::time::sleep(Duration::from_micros(random.random_range(0..300))).await;
        }
    }
    let (mut needed, mut cached) = (0, 0);
    for (index, choice, reader) in readers {
        let (tokens, finished) = reader.await.unwrap().unwrap();
        let request = &requests[index];
        assert_eq!(tokens, alone(request, choice), "request {index}, choice {choice}");
        let stopped = tokens.last().is_some_and(|token| [0, 1].contains(token));
        assert_eq!(finished.reason, if stopped { FinishReason::Stop } else { FinishReason::Length });
        needed += request.prompt.len() + tokens.len() - 1 - finished.cached_tokens;
        cached += finished.cached_tokens;
    }
    assert!(cached > 0, "no prefix was reused: the test shows nothing");
    let computed = seen.tokens.load(Ordering::SeqCst);
    assert!(computed > needed as u64, "no sequence was preempted: the test shows nothing ({computed}, {needed})");
    until(&engine, "everything is free", |load| load == IDLE).await;
}

#[tokio::test]
async fn the_choices_of_a_request_differ_by_their_seeds_and_share_its_prompt() {
    let (engine, seen) = engine(40, limits(100, 8));
    let mut request = request(&[5; 17], 4);
    request.choices = 3;
    request.sampling.temperature = 2.0;
    let mut answers = Vec::new();
    for (choice, receiver) in (0..).zip(submit(&engine, request.clone()).unwrap()) {
        let (tokens, finished) = read(receiver).await.unwrap();
        assert_eq!(tokens, alone(&request, choice));
        assert_eq!(finished.cached_tokens, if choice == 0 { 0 } else { 16 });
        answers.push(tokens);
    }
    assert_ne!(answers[0], answers[1]);
    assert_eq!(seen.tokens.load(Ordering::SeqCst), 17 + 2 + 3 * 3);
}

#[tokio::test]
async fn a_dropped_receiver_frees_its_blocks_running_or_waiting() {
    let (engine, seen) = engine(16, limits(100, 1));
    let gate = seen.gate.lock().unwrap();
    let running = submit(&engine, request(&[1, 2, 3], 60)).unwrap();
    let waiting = submit(&engine, request(&[1, 2, 3], 60)).unwrap();
    // The first is admitted, and the model stands still in its first step.
    while engine.load().waiting != 1 {
        thread::yield_now();
    }
    drop((running, waiting));
    drop(gate);
    until(&engine, "both are gone", |load| load == IDLE).await;
    // The longest answer needs every block.
    let longest = request(&[4, 5, 6], 61);
    assert_eq!(run(&engine, longest.clone()).await.unwrap().0, alone(&longest, 0));
    assert_eq!(seen.tokens.load(Ordering::SeqCst), 3 + 63, "the first ended after one step, the second never started");
}

#[tokio::test]
async fn a_reader_that_does_not_read_delays_nobody_and_loses_nothing() {
    let (engine, _) = engine(40, limits(100, 2));
    let slow = submit(&engine, request(&[1], 50)).unwrap().pop().unwrap();
    for _ in 0..3 {
        run(&engine, request(&[2], 50)).await.unwrap();
    }
    until(&engine, "the slow one is complete as well", |load| load == IDLE).await;
    assert_eq!(read(slow).await.unwrap().0, alone(&request(&[1], 50), 0));
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let (engine, seen) = engine(40, EngineLimits { queue: 2, ..limits(100, 1) });
    let gate = seen.gate.lock().unwrap();
    let first = submit(&engine, request(&[1], 9)).unwrap();
    // The first leaves the queue when it is admitted, before the model stands still.
    while engine.load().waiting > 0 {
        thread::yield_now();
    }
    let others = submit(&engine, GenerateRequest { choices: 2, ..request(&[2], 9) }).unwrap();
    assert_eq!(
        submit(&engine, request(&[3], 9)).unwrap_err(),
        GenerateError::QueueFull { capacity: 2, retry_after: 1 }
    );
    drop(gate);
    for choice in first.into_iter().chain(others) {
        read(choice).await.unwrap();
    }
    run(&engine, request(&[3], 9)).await.unwrap();
}

#[tokio::test]
async fn a_request_that_would_wait_too_long_is_refused_unless_nothing_waits() {
    let (engine, seen) = engine(40, EngineLimits { wait: Duration::ZERO, ..limits(100, 1) });
    let submitted =
        |count: usize| -> Vec<Choice> { (0..count).flat_map(|_| submit(&engine, request(&[1], 9)).unwrap()).collect() };
    // One waits for the other, so that the engine knows how long that takes.
    let gate = seen.gate.lock().unwrap();
    let first = submitted(2);
    drop(gate);
    for choice in first {
        read(choice).await.unwrap();
    }
    until(&engine, "nothing waits", |load| load == IDLE).await;
    let gate = seen.gate.lock().unwrap();
    let running = submitted(1);
    while engine.load().waiting > 0 {
        thread::yield_now();
    }
    // The engine had room for one before its step; another one waits for that.
    let waiting = submitted(2);
    let refused = submit(&engine, request(&[1], 9)).unwrap_err();
    assert!(matches!(refused, GenerateError::LongWait { limit: 0.0, retry_after: 1, .. }), "{refused}");
    drop(gate);
    for choice in running.into_iter().chain(waiting) {
        read(choice).await.unwrap();
    }
    until(&engine, "nothing waits", |load| load == IDLE).await;
    run(&engine, request(&[1], 9)).await.unwrap();
}

#[tokio::test]
async fn what_can_never_be_served_is_refused() {
    let (engine, _) = engine(8, limits(100, 4));
    assert_eq!(engine.max_length(), 32);
    let biased = Sampling { temperature: 3.0, ..Sampling::default() };
    for (request, message) in [
        (request(&[], 1), "the prompt is empty"),
        (request(&[1; 30], 3), "30 tokens of prompt and 3 of answer exceed the context of 32 tokens"),
        (
            request(&[1], usize::MAX),
            "1 tokens of prompt and 18446744073709551615 of answer exceed the context of 32 tokens",
        ),
        (request(&[24], 1), "prompt: token 24; the vocabulary has 24 tokens"),
        (request(&[1], 0), "max_tokens: 0 is less than 1"),
        (GenerateRequest { choices: 0, ..request(&[1], 1) }, "n: 0 is less than 1"),
        (GenerateRequest { sampling: biased, ..request(&[1], 1) }, "temperature: 3 is not between 0 and 2"),
    ] {
        assert_eq!(submit(&engine, request).unwrap_err().to_string(), message);
    }
    assert!(run(&engine, request(&[1; 30], 2)).await.is_ok(), "the longest that fits");
}

#[tokio::test]
async fn an_answer_ends_with_a_stop_token_but_not_before_its_minimum() {
    let (engine, _) = engine(40, limits(100, 4));
    let plain = run(&engine, request(&[3, 4], 20)).await.unwrap().0;
    let stop = plain[2];
    let mut stopping = request(&[3, 4], 20);
    stopping.stopping.stop_tokens = vec![stop];
    let (tokens, finished) = run(&engine, stopping.clone()).await.unwrap();
    let first = plain.iter().position(|token| *token == stop).unwrap();
    assert_eq!((tokens.as_slice(), finished.reason), (&plain[..=first], FinishReason::Stop));
    stopping.stopping.min_tokens = 6;
    let (tokens, _) = run(&engine, stopping.clone()).await.unwrap();
    assert!(tokens.len() > 6 && !tokens[..6].contains(&stop), "{tokens:?}");
    assert_eq!(tokens, alone(&stopping, 0));
}

#[tokio::test]
async fn a_failing_step_fails_its_requests_and_the_engine_continues() {
    let (engine, _) = engine(40, limits(100, 4));
    let failed = run(&engine, request(&[1, FAILS], 5)).await;
    assert_eq!(failed.unwrap_err(), GenerateError::Backend("out of memory".into()));
    let failed = run(&engine, request(&[1, NOT_FINITE], 5)).await;
    assert_eq!(failed.unwrap_err(), GenerateError::Logits(LogitsError::NotFinite { token: 0 }));
    until(&engine, "their blocks are free", |load| load == IDLE).await;
    assert_eq!(run(&engine, request(&[1], 5)).await.unwrap().0, alone(&request(&[1], 5), 0));
}

#[tokio::test]
async fn a_panic_stops_the_engine_and_every_request_learns_of_it() {
    let (engine, seen) = engine(40, limits(100, 4));
    let gate = seen.gate.lock().unwrap();
    let bad = submit(&engine, request(&[1, PANICS], 5)).unwrap().pop().unwrap();
    let good = submit(&engine, request(&[1], 5)).unwrap().pop().unwrap();
    drop(gate);
    assert_eq!(read(bad).await.unwrap_err(), GenerateError::Stopped);
    assert_eq!(read(good).await.unwrap_err(), GenerateError::Stopped);
    engine.stopped().await;
    assert_eq!(submit(&engine, request(&[1], 5)).unwrap_err(), GenerateError::Stopped);
}

#[tokio::test]
async fn a_prompt_that_was_seen_is_not_computed_again() {
    let (engine, seen) = engine(40, limits(100, 4));
    let mut counts = HashMap::new();
    for turn in 0..2 {
        let before = seen.tokens.load(Ordering::SeqCst);
        let (tokens, finished) = run(&engine, request(&[6; 13], 1)).await.unwrap();
        assert_eq!(tokens, alone(&request(&[6; 13], 1), 0));
        counts.insert(turn, (seen.tokens.load(Ordering::SeqCst) - before, finished.cached_tokens));
    }
    assert_eq!(counts, HashMap::from([(0, (13, 0)), (1, (1, 12))]));
}

#[path = "constraint_tests.rs"]
mod constrained;
