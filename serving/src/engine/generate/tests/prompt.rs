//! Log-probabilities of prompts.

use super::*;
use crate::engine::generate::sampling::Logprobs;

/// The log-probabilities of a prompt by their definition.
fn expected(prompt: &[u32], top: usize) -> Vec<Logprobs> {
    let one = |end: usize| {
        let logits = logits(prompt[..end].iter().copied().enumerate());
        sampling::logprobs(&logits, prompt[end] as usize, top)
    };
    (1..prompt.len()).map(one).collect()
}

/// The log-probabilities of the prompt if they came, the answer and its end.
async fn read_all(mut choice: Choice) -> (Option<Vec<Logprobs>>, Vec<u32>, Finished) {
    let (mut prompt, mut tokens) = (None, Vec::new());
    loop {
        match choice.recv().await.unwrap().unwrap() {
            Event::Admitted { .. } => {}
            Event::Prompt(logprobs) => {
                assert!(prompt.is_none() && tokens.is_empty(), "once, before the answer");
                prompt = Some(logprobs);
            }
            Event::Token(sampled) => tokens.push(sampled.token),
            Event::Finished(finished) => return (prompt, tokens, finished),
        }
    }
}

#[tokio::test]
async fn log_probabilities_of_prompts_do_not_depend_on_chunks_preemptions_or_the_cache() {
    let mut random = StdRng::seed_from_u64(5);
    let request = |index: usize| {
        let mut request = random_request(&mut random);
        request.prompt_logprobs = (!index.is_multiple_of(3)).then_some(index % 4);
        if index.is_multiple_of(5) && request.prompt_logprobs.is_some() {
            request.stopping.max_tokens = 0;
        }
        request
    };
    let requests: Vec<GenerateRequest> = (0..150).map(request).collect();
    // Few blocks, so that prompts are preempted in the middle; prompts of up to three steps.
    let (engine, _) = engine(13, limits(9, 6));
    let mut readers = Vec::new();
    for request in &requests {
        for (choice, receiver) in (0..).zip(submit(&engine, request.clone()).unwrap()) {
            readers.push((request, choice, tokio::spawn(read_all(receiver))));
        }
    }
    let mut cached = 0;
    for (request, choice, reader) in readers {
        let (prompt, tokens, finished) = reader.await.unwrap();
        assert_eq!(prompt, request.prompt_logprobs.map(|top| expected(&request.prompt, top)), "{request:?}");
        assert_eq!(tokens, alone(request, choice), "{request:?}");
        match request.prompt_logprobs {
            Some(_) => assert_eq!(finished.cached_tokens, 0),
            None => cached += finished.cached_tokens,
        }
        if request.stopping.max_tokens == 0 {
            assert_eq!(finished.reason, FinishReason::Length);
        }
    }
    assert!(cached > 0, "other requests use the cache");
}

#[tokio::test]
async fn a_prompt_of_one_token_has_no_log_probability_and_wrong_ones_fail_the_request() {
    let (engine, _) = engine(8, limits(9, 2));
    let scored =
        |prompt: &[u32], max_tokens| GenerateRequest { prompt_logprobs: Some(0), ..request(prompt, max_tokens) };
    let (prompt, tokens, _) = read_all(submit(&engine, scored(&[3], 0)).unwrap().remove(0)).await;
    assert_eq!((prompt, tokens), (Some(vec![]), vec![]));
    let error = run(&engine, scored(&[3, NOT_FINITE, 4], 1)).await.unwrap_err();
    assert_eq!(error, GenerateError::Logits(LogitsError::NotFinite { token: NOT_FINITE as usize }));
    let error = submit(&engine, GenerateRequest { prompt_logprobs: Some(21), ..request(&[3], 1) }).unwrap_err();
    assert!(matches!(&error, GenerateError::Invalid(invalid) if invalid.field == "logprobs"), "{error:?}");
}
