//! Counts the tokens of one answer for its caller.

use std::sync::Arc;

use serde::Deserialize;

use super::Caller;

/// Bytes at the end of a whole answer that are searched for its usage.
const TAIL: usize = 1 << 10;
/// Bytes of text that count as one token where the server reports none.
const BYTES_OF_A_TOKEN: usize = 4;
const FIELD: &[u8] = br#""usage":"#;

/// Counts an answer as it passes, and takes its tokens from the caller's when it is dropped: also if the client has left.
///
/// An answer that reports its usage has that many tokens. A stream without it counts one for each event and one for each four bytes
/// of the request.
#[derive(Debug)]
pub struct Meter {
    caller: Arc<Caller>,
    request_bytes: usize,
    events: u64,
    usage: Option<u64>,
    /// The end of an answer that is not a stream.
    tail: Vec<u8>,
}

#[derive(Deserialize)]
struct Usage {
    total_tokens: u64,
}

impl Meter {
    /// A meter for a caller with a limit; `None` for others.
    pub fn of(caller: Option<&Arc<Caller>>, request_bytes: usize) -> Option<Self> {
        let caller = caller.filter(|caller| caller.has_token_limit())?.clone();
        Some(Self { caller, request_bytes, events: 0, usage: None, tail: Vec::new() })
    }

    /// Takes the data of one event of a stream.
    pub fn event(&mut self, data: &[u8]) {
        self.events += 1;
        self.usage = usage(data).or(self.usage);
    }

    /// Takes a piece of a whole answer.
    pub fn piece(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(&bytes[bytes.len().saturating_sub(TAIL)..]);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL));
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
        let estimated = match self.events {
            // An error, or an answer of a kind that has no tokens.
            0 => 0,
            events => events + (self.request_bytes / BYTES_OF_A_TOKEN) as u64,
        };
        self.usage.or_else(|| usage(&self.tail)).unwrap_or(estimated)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.caller.use_tokens(self.tokens());
    }
}

/// `usage.total_tokens` of a JSON object, or of the end of one.
fn usage(json: &[u8]) -> Option<u64> {
    let at = json.windows(FIELD.len()).rposition(|window| window == FIELD)?;
    let mut values = serde_json::Deserializer::from_slice(&json[at + FIELD.len()..]).into_iter::<Usage>();
    values.next()?.ok().map(|usage| usage.total_tokens)
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
    }
}
