//! Answers under a constraint, in a batch and with preemptions.

use super::*;
use crate::engine::generate::constraint::{Constraint, ConstraintError, Progress, TokenSet};

/// After an answer whose tokens sum to `sum` only tokens with the remainder `sum % 3` may come next, up to `length`
/// tokens. A token of `faults` has no mask behind it.
#[derive(Clone)]
struct Remainders {
    sum: u32,
    left: usize,
    faults: Option<(u32, Fault)>,
    last: u32,
}

#[derive(Clone, Copy)]
enum Fault {
    Error,
    Panic,
}

fn remainders(length: usize) -> Remainders {
    Remainders { sum: 0, left: length, faults: None, last: 0 }
}

fn allowed(sum: u32) -> TokenSet {
    let bits: u32 = (0..VOCABULARY as u32).filter(|token| token % 3 == sum % 3).map(|token| 1_u32 << token).sum();
    TokenSet::from_words(vec![bits])
}

impl Constraint for Remainders {
    fn mask(&mut self) -> Result<TokenSet, ConstraintError> {
        match self.faults.filter(|(after, _)| self.sum > 0 && *after == self.last) {
            Some((_, Fault::Error)) => Err(ConstraintError("too complex".into())),
            Some((_, Fault::Panic)) => panic!("a fault of the test"),
            None => Ok(allowed(self.sum)),
        }
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError> {
        (self.sum, self.left, self.last) = (self.sum + token, self.left - 1, token);
        Ok(if self.left == 0 { Progress::Complete } else { Progress::Continues })
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// The answer written from its definition, and why it ends.
fn constrained_alone(request: &GenerateRequest, choice: u64, length: usize) -> (Vec<u32>, FinishReason) {
    let sampling = Sampling { seed: request.sampling.seed.wrapping_add(choice), ..request.sampling.clone() };
    let mut answer: Vec<u32> = Vec::new();
    loop {
        let logits = logits(request.prompt.iter().chain(&answer).copied().enumerate());
        let allowed = allowed(answer.iter().sum());
        let context = Context { prompt: &request.prompt, answer: &answer, forbidden: &[], allowed: Some(&allowed) };
        let token = sampling::sample(&logits, VOCABULARY, &sampling, context).unwrap().token;
        answer.push(token);
        if request.stopping.stop_tokens.contains(&token) || answer.len() == length {
            return (answer, FinishReason::Stop);
        }
        if answer.len() == request.stopping.max_tokens {
            return (answer, FinishReason::Length);
        }
    }
}

#[tokio::test]
async fn a_constraint_holds_for_each_choice_in_a_batch_and_after_preemptions() {
    let mut random = StdRng::seed_from_u64(5);
    // One sequence needs up to 11 of the 13 blocks, so that others are preempted.
    let (engine, seen) = engine(13, limits(9, 6));
    let mut readers = Vec::new();
    let mut requests = Vec::new();
    for index in 0..100 {
        let mut request = random_request(&mut random);
        request.stopping.min_tokens = 0;
        let length = random.random_range(1..24);
        // Others in the batch have no constraint.
        if index % 4 != 0 {
            request.constraint = Some(Box::new(remainders(length)));
        }
        for (choice, receiver) in (0..).zip(submit(&engine, request.clone()).unwrap()) {
            readers.push((index, choice, tokio::spawn(read(receiver))));
        }
        requests.push((request, length));
    }
    let (mut needed, mut ends) = (0, [0, 0]);
    for (index, choice, reader) in readers {
        let (tokens, finished) = reader.await.unwrap().unwrap();
        let (request, length) = &requests[index];
        needed += request.prompt.len() + tokens.len() - 1 - finished.cached_tokens;
        if request.constraint.is_none() {
            assert_eq!(tokens, alone(request, choice), "request {index}, choice {choice}");
            continue;
        }
        let expected = constrained_alone(request, choice, *length);
        assert_eq!((tokens, finished.reason), expected, "request {index}, choice {choice}");
        ends[usize::from(finished.reason == FinishReason::Stop)] += 1;
    }
    assert!(ends.iter().all(|count| *count > 5), "both ends occur: {ends:?}");
    let computed = seen.tokens.load(Ordering::SeqCst);
    assert!(computed > needed as u64, "no sequence was preempted: the test shows nothing ({computed}, {needed})");
    until(&engine, "everything is free", |load| load == IDLE).await;
}

#[tokio::test]
async fn a_constraint_that_fails_fails_its_answer_alone() {
    let (engine, _) = engine(40, limits(100, 4));
    // The bias makes the token the first one; its mask has the fault.
    let failing = |token, fault| {
        let mut request = request(&[3, 4], 20);
        request.sampling.logit_bias = vec![(token, 100.0)];
        request.constraint = Some(Box::new(Remainders { faults: Some((token, fault)), ..remainders(20) }));
        request
    };
    for (fault, message) in [
        (Fault::Error, "the answer's format cannot be followed: too complex"),
        (Fault::Panic, "the answer's format cannot be followed: a fault in its mask"),
        (Fault::Panic, "the answer's format cannot be followed: a fault in its mask"),
        (Fault::Panic, "the answer's format cannot be followed: a fault in its mask"),
    ] {
        let error = run(&engine, failing(6, fault)).await.unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    // More faults than there are threads, and they are still there.
    let mut request = request(&[3, 4], 20);
    request.constraint = Some(Box::new(remainders(7)));
    let (tokens, finished) = run(&engine, request.clone()).await.unwrap();
    assert_eq!((tokens, finished.reason), constrained_alone(&request, 0, 7));
    until(&engine, "their blocks are free", |load| load == IDLE).await;
}
