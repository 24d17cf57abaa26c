//! Log-probabilities of tokens as chats and responses write them.

use serde_json::{Value, json};

use crate::service::answer::{TokenLogprob, TokenText};

/// One entry for each token.
pub fn tokens(logprobs: &[TokenLogprob]) -> Vec<Value> {
    let one = |token: &TokenText, logprob: Option<f32>| json!({"token": token.text, "bytes": token.bytes, "logprob": logprob});
    let entry = |entry: &TokenLogprob| {
        let mut shown = one(&entry.token, entry.logprob);
        shown["top_logprobs"] = entry.top.iter().map(|(token, logprob)| one(token, Some(*logprob))).collect();
        shown
    };
    logprobs.iter().map(entry).collect()
}
