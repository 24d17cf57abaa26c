//! Proposed tokens: answers, their log-probabilities and the cache are the same as without them.

use std::pin::Pin;

use super::*;
use crate::engine::generate::{
    constraint::{Constraint, ConstraintError, Progress, TokenSet},
    sampling::Sampled,
};

/// The next token follows mostly from the last one, so that answers repeat themselves; every token before it changes the
/// logits a little, so that a wrong one in the cache changes log-probabilities.
fn repeating(prefix: &[(usize, u32)]) -> Vec<f32> {
    let last = logits(prefix.last().map(|&(_, token)| (0, token)).into_iter());
    let all = logits(prefix.iter().copied());
    last.into_iter().zip(all).map(|(last, all)| if last < 0.0 { last } else { last + all * 1e-3 }).collect()
}

fn repeating_engine(checks_proposals: bool, blocks: usize, sequences: usize, name: &str) -> (Engine, Arc<Seen>) {
    let seen = Arc::<Seen>::default();
    let backend = Fake { checks_proposals, logits: repeating, ..Fake::new(blocks, seen.clone()) };
    (Engine::start(backend, limits(20, sequences), name).unwrap(), seen)
}

/// After an answer whose tokens sum to `sum` the tokens with the remainder `sum % 5` may not come next. It ends the answer
/// behind `length` tokens, and fails behind the token `fails`.
#[derive(Clone)]
struct Others {
    sum: u32,
    left: usize,
    fails: Option<u32>,
    last: Option<u32>,
}

impl Constraint for Others {
    fn mask(&mut self) -> Result<TokenSet, ConstraintError> {
        if self.fails.is_some() && self.fails == self.last {
            return Err(ConstraintError("too complex".into()));
        }
        let allowed = (0..VOCABULARY as u32).filter(|token| token % 5 != self.sum % 5);
        Ok(TokenSet::from_words(vec![allowed.map(|token| 1_u32 << token).sum()]))
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError> {
        (self.sum, self.left, self.last) = (self.sum + token, self.left - 1, Some(token));
        Ok(if self.left == 0 { Progress::Complete } else { Progress::Continues })
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// Every kind of sampling, stopping and constraint occurs; answers are long enough to repeat themselves.
fn random_repeating(random: &mut StdRng) -> GenerateRequest {
    let mut request = random_request(random);
    request.stopping.max_tokens = random.random_range(1..44);
    request.stopping.min_tokens = random.random_range(0..30);
    request.stopping.stop_tokens.retain(|_| random.random_bool(0.5));
    request.sampling.temperature = [0.0, 0.0, 0.3, 1.0][random.random_range(0..4)];
    request.sampling.logprobs = random.random_bool(0.5).then_some(2);
    request.sampling.presence_penalty = [0.0, 0.2][random.random_range(0..2)];
    if random.random_bool(0.3) {
        request.sampling.logit_bias = vec![(random.random_range(0..4), 2.0)];
    }
    if random.random_bool(0.3) {
        let fails = random.random_bool(0.5).then(|| random.random_range(0..20));
        let length = random.random_range(1..50);
        request.stopping.min_tokens = 0;
        request.constraint = Some(Box::new(Others { sum: 0, left: length, fails, last: None }));
    }
    if random.random_bool(0.1) {
        request.prompt_logprobs = Some(1);
    }
    request
}

/// What a reader sees: tokens with log-probabilities, and why the answer ends.
type Whole = (Vec<Sampled>, Result<FinishReason, GenerateError>);

async fn whole(mut choice: Choice) -> Whole {
    let mut tokens = Vec::new();
    loop {
        match choice.recv().await.unwrap_or(Err(GenerateError::Stopped)) {
            Ok(Event::Admitted { .. } | Event::Prompt(_)) => {}
            Ok(Event::Token(sampled)) => tokens.push(sampled),
            Ok(Event::Finished(finished)) => return (tokens, Ok(finished.reason)),
            Err(error) => return (tokens, Err(error)),
        }
    }
}

async fn answers(engine: &Engine, requests: &[GenerateRequest], at_once: usize) -> Vec<Whole> {
    let mut found = Vec::new();
    for requests in requests.chunks(at_once) {
        let choices: Vec<Choice> = requests.iter().flat_map(|one| submit(engine, one.clone()).unwrap()).collect();
        let readers: Vec<Pin<Box<_>>> = choices.into_iter().map(|choice| Box::pin(whole(choice))).collect();
        for reader in readers {
            found.push(reader.await);
        }
    }
    found
}

fn counted(name: &str, model: &str) -> u64 {
    let text = athanor_telemetry::metrics().render();
    let line = format!("vllm:spec_decode_{name}_total{{model_name=\"{model}\"}} ");
    text.lines().find_map(|found| found.strip_prefix(&line)).unwrap().parse().unwrap()
}

#[tokio::test]
async fn an_answer_is_the_same_with_proposals_alone_in_a_batch_and_after_preemptions() {
    let _metrics = athanor_telemetry::metrics();
    let mut random = StdRng::seed_from_u64(3);
    let requests: Vec<GenerateRequest> = (0..120).map(|_| random_repeating(&mut random)).collect();
    let (plain, seen) = repeating_engine(false, 64, 6, "plain");
    let expected = answers(&plain, &requests, 1).await;
    assert_eq!(seen.several.load(Ordering::SeqCst), 0);
    assert!(expected.iter().any(|(tokens, end)| end.is_err() && tokens.len() > 4), "some fail in the middle");
    // One sequence needs up to 16 of the 20 blocks, so that others are preempted.
    for (at_once, blocks, name) in
        [(1, 64, "proposed-alone"), (4, 64, "proposed-batch"), (40, 20, "proposed-preempted")]
    {
        let (engine, seen) = repeating_engine(true, blocks, 6, name);
        let found = answers(&engine, &requests, at_once).await;
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{name}: answer {index}");
        }
        let (proposed, right) = (counted("num_draft_tokens", name), counted("num_accepted_tokens", name));
        assert!(right > 50, "{name}: nothing was gained, so that the test shows nothing: {right} of {proposed}");
        assert!(proposed > right + 20, "{name}: no proposed token was wrong: {right} of {proposed}");
        assert!(seen.several.load(Ordering::SeqCst) > 20);
        until(&engine, "everything is free", |load| load == IDLE).await;
    }
}

/// A conversation: each prompt is the former one with its answer and a new token. What the cache has of it is exactly what
/// it has without proposals, although wrong proposals were computed behind every answer.
#[tokio::test]
async fn the_prefix_cache_has_the_same_blocks_with_proposals() {
    let mut random = StdRng::seed_from_u64(8);
    let (plain, _) = repeating_engine(false, 200, 2, "cache-plain");
    let (engine, seen) = repeating_engine(true, 200, 2, "cache-proposed");
    for _ in 0..12 {
        let mut prompt: Vec<u32> = (0..6).map(|_| random.random_range(0..20)).collect();
        for _ in 0..3 {
            let request = request(&prompt, random.random_range(8..16));
            let expected = run(&plain, request.clone()).await.unwrap();
            let found = run(&engine, request).await.unwrap();
            assert_eq!(found.0, expected.0);
            assert_eq!(found.1.cached_tokens, expected.1.cached_tokens);
            prompt.extend(found.0);
            prompt.push(random.random_range(0..20));
        }
    }
    assert!(seen.several.load(Ordering::SeqCst) > 10, "nothing was proposed: the test shows nothing");
}

/// Dictates the answer but for every seventh token, which is free. Every fifth dictated token may be another one, as a text may be cut
/// into tokens in other ways than the usual one.
#[derive(Clone)]
struct Dictated {
    at: u64,
    /// Whether it says what it forces.
    says: bool,
}

impl Dictated {
    fn token(at: u64) -> Option<u32> {
        (!at.is_multiple_of(7)).then(|| (mix(77, at) % 20) as u32)
    }
}

impl Constraint for Dictated {
    fn mask(&mut self) -> Result<TokenSet, ConstraintError> {
        let bits = match Self::token(self.at) {
            None => (1 << FAILS) - 1,
            Some(token) if self.at.is_multiple_of(5) => 3 << token,
            Some(token) => 1 << token,
        };
        Ok(TokenSet::from_words(vec![bits]))
    }

    fn accept(&mut self, _: u32) -> Result<Progress, ConstraintError> {
        self.at += 1;
        Ok(Progress::Continues)
    }

    fn forced(&self) -> Vec<u32> {
        (self.at..).map_while(Self::token).filter(|_| self.says).collect()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// Steps of 20 answers of 56 tokens, one after the other, and the answers.
async fn dictated(checks_proposals: bool, says: bool, name: &str) -> (u64, Vec<Whole>) {
    let requests: Vec<GenerateRequest> = (0..20)
        .map(|seed| {
            let mut request = request(&[seed as u32, 3], 56);
            request.sampling = Sampling { temperature: 1.0, seed, logprobs: Some(1), ..Sampling::default() };
            request.constraint = Some(Box::new(Dictated { at: 1 + 11 * seed, says }));
            request
        })
        .collect();
    let seen = Arc::<Seen>::default();
    let backend = Fake { checks_proposals, ..Fake::new(64, seen.clone()) };
    let engine = Engine::start(backend, limits(20, 4), name).unwrap();
    let found = answers(&engine, &requests, 1).await;
    until(&engine, "everything is free", |load| load == IDLE).await;
    (seen.steps.load(Ordering::SeqCst), found)
}

#[tokio::test]
async fn what_a_grammar_forces_is_computed_in_fewer_steps() {
    let (plain, expected) = dictated(false, true, "dictated-plain").await;
    assert!(expected.iter().all(|(tokens, end)| tokens.len() == 56 && *end == Ok(FinishReason::Length)));
    let (looked_up, without) = dictated(true, false, "dictated-unsaid").await;
    let (forced, with) = dictated(true, true, "dictated-said").await;
    println!("steps of 1,120 tokens: {plain}, with prompt lookup {looked_up}, with forced tokens {forced}");
    assert_eq!(without, expected);
    assert_eq!(with, expected);
    assert_eq!(plain, 20 * 56);
    assert!(forced * 2 < plain && forced * 2 < looked_up, "{forced} of {plain} and {looked_up}");
}

#[tokio::test]
async fn a_dropped_receiver_frees_the_blocks_of_proposed_tokens() {
    let (engine, seen) = repeating_engine(true, 64, 4, "dropped");
    for round in 0..20 {
        let mut choices: Vec<Choice> =
            (0..4).flat_map(|index| submit(&engine, request(&[index, 7, round], 58)).unwrap()).collect();
        for _ in 0..20 + round {
            assert!(choices[0].recv().await.unwrap().is_ok());
        }
        drop(choices);
        until(&engine, "all are gone", |load| load == IDLE).await;
    }
    assert!(seen.several.load(Ordering::SeqCst) > 20, "nothing was proposed: the test shows nothing");
}

/// Rows that cost as much as steps: proposals cannot pay, and after a few tries none is computed any more.
#[tokio::test]
async fn nothing_is_proposed_where_a_row_costs_a_step() {
    let seen = Arc::<Seen>::default();
    let (step_time, row_time) = (Duration::ZERO, Duration::from_micros(400));
    let backend =
        Fake { checks_proposals: true, logits: repeating, step_time, row_time, ..Fake::new(64, seen.clone()) };
    let engine = Engine::start(backend, limits(20, 4), "slow").unwrap();
    let mut tokens = 0;
    for first in 0..10 {
        tokens += run(&engine, request(&[first, 7], 60)).await.unwrap().0.len() as u64;
    }
    let several = seen.several.load(Ordering::SeqCst);
    assert!(several * 10 < tokens, "{several} steps with proposals for {tokens} tokens");
}
