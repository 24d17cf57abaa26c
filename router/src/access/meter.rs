//! Counts the tokens of one answer for its caller.

use std::sync::Arc;

use serde::Deserialize;

use super::Caller;

/// Bytes at the beginning and at the end of a whole answer that are searched for its usage. llama.cpp's server has it before the
/// vectors of embeddings.
const SEARCHED: usize = 1 << 10;
/// Bytes of text that count as one token where the server reports none.
const BYTES_OF_A_TOKEN: usize = 4;
const FIELD: &[u8] = br#""usage""#;

/// Counts a successful answer as it passes, and takes its tokens from the caller's when it is dropped: also if the client has left.
///
/// An answer that reports its usage has that many tokens. A stream without it counts one for each event and one for each four bytes
/// of the request. A whole answer without it counts one for each four bytes of the request and of itself.
#[derive(Debug)]
pub struct Meter {
    caller: Arc<Caller>,
    request_bytes: usize,
    events: usize,
    usage: Option<u64>,
    /// Bytes of an answer that is not a stream, its beginning and its end.
    bytes: usize,
    head: Vec<u8>,
    tail: Vec<u8>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    total_tokens: Option<u64>,
    #[serde(default, alias = "input_tokens")]
    prompt_tokens: u64,
    #[serde(default, alias = "output_tokens")]
    completion_tokens: u64,
}

impl Meter {
    /// A meter for a caller with a limit; `None` for others.
    pub fn of(caller: Option<&Arc<Caller>>, request_bytes: usize) -> Option<Self> {
        let caller = caller.filter(|caller| caller.has_token_limit())?.clone();
        Some(Self { caller, request_bytes, events: 0, usage: None, bytes: 0, head: Vec::new(), tail: Vec::new() })
    }

    /// Takes the data of one event of a stream.
    pub fn event(&mut self, data: &[u8]) {
        self.events += 1;
        self.usage = usage(data).or(self.usage);
    }

    /// Takes a piece of a whole answer.
    pub fn piece(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        let missing = SEARCHED - self.head.len();
        self.head.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        self.tail.extend_from_slice(&bytes[bytes.len().saturating_sub(SEARCHED)..]);
        self.tail.drain(..self.tail.len().saturating_sub(SEARCHED));
    }

    /// Takes one part of a stream that is no JSON.
    pub fn part(&mut self) {
        self.events += 1;
    }

    /// Takes the number of tokens of the whole answer.
    pub fn report(&mut self, tokens: u64) {
        self.usage = Some(tokens);
    }

    fn tokens(&self) -> u64 {
        let reported = self.usage.or_else(|| usage(&self.tail)).or_else(|| usage(&self.head));
        reported.unwrap_or_else(|| {
            let estimated = match (self.events, self.bytes) {
                (0, 0) => 0,
                (0, bytes) => (self.request_bytes + bytes) / BYTES_OF_A_TOKEN,
                (events, _) => events + self.request_bytes / BYTES_OF_A_TOKEN,
            };
            estimated as u64
        })
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.caller.use_tokens(self.tokens());
    }
}

/// The tokens in `usage` of a JSON object, or of a part of one.
fn usage(json: &[u8]) -> Option<u64> {
    let at = json.windows(FIELD.len()).rposition(|window| window == FIELD)?;
    let value = json[at + FIELD.len()..].trim_ascii_start().strip_prefix(b":")?;
    let usage = serde_json::Deserializer::from_slice(value).into_iter::<Usage>().next()?.ok()?;
    Some(usage.total_tokens.unwrap_or(usage.prompt_tokens + usage.completion_tokens))
}

#[cfg(test)]
mod tests {
    use athanor_contract::serve::{Caller as CallerConfig, Scope};

    use super::*;

    fn meter() -> Meter {
        let config = CallerConfig {
            name: "a".into(),
            scopes: vec![Scope::Infer],
            requests_per_minute: None,
            tokens_per_minute: Some(10),
        };
        Meter::of(Some(&Arc::new(Caller::new(&config))), 40).unwrap()
    }

    #[test]
    fn tokens_are_those_of_the_usage_or_an_estimate() {
        assert_eq!(meter().tokens(), 0);
        let mut whole = meter();
        whole.piece(&vec![b'x'; 5_000]);
        whole.piece(br#"..."}],"usage":{"prompt_tokens":3,"completion_tokens":4,"#);
        whole.piece(br#""total_tokens":7}}"#);
        assert_eq!(whole.tokens(), 7);
        let mut stream = meter();
        for data in [r#"{"choices":[{}]}"#, r#"{"choices":[{}],"usage":null}"#, "[DONE]"] {
            stream.event(data.as_bytes());
        }
        assert_eq!(stream.tokens(), 3 + 10);
        stream.event(br#"{"choices":[],"usage":{"total_tokens":9}}"#);
        assert_eq!(stream.tokens(), 9);
        let mut parts = meter();
        parts.part();
        assert_eq!(parts.tokens(), 1 + 10);
        parts.report(8);
        assert_eq!(parts.tokens(), 8);
        // As Python writes it, and without a sum.
        stream.event(br#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}"#);
        assert_eq!(stream.tokens(), 11);
    }

    #[test]
    fn the_usage_of_a_whole_answer_may_come_first_or_be_missing() {
        let vector = |more: &str| format!(r#"{{"model":"m","object":"list",{more}"data":[{}]}}"#, "0.5,".repeat(2_000));
        let mut first = meter();
        let answer = vector(r#""usage":{"prompt_tokens":6,"total_tokens":6},"#);
        answer.as_bytes().chunks(700).for_each(|piece| first.piece(piece));
        assert_eq!(first.tokens(), 6);
        let mut missing = meter();
        let answer = vector("");
        answer.as_bytes().chunks(700).for_each(|piece| missing.piece(piece));
        assert_eq!(missing.tokens(), (40 + answer.len() as u64) / 4);
    }
}
