//! Server-sent events as they pass: whole lines at a time, so that a stream that breaks off never ends in half an event.
//!
//! Only what OpenAI's streams use is understood: one `data` field of JSON for each event.

use bytes::{Bytes, BytesMut};

/// Most bytes of one line.
const LONGEST_LINE: usize = 8 << 20;

/// The lines of a stream.
#[derive(Debug)]
pub struct Lines {
    /// The beginning of a line.
    unfinished: BytesMut,
    /// Whether an event has ended and no other has begun in the lines so far.
    between_events: bool,
}

/// A line is too long to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line of the stream has more than {LONGEST_LINE} bytes")]
pub struct LineTooLong;

impl Default for Lines {
    fn default() -> Self {
        Self { unfinished: BytesMut::new(), between_events: true }
    }
}

impl Lines {
    /// Takes what arrived and returns the lines that are whole by now.
    pub fn push(&mut self, arrived: Bytes) -> Result<Bytes, LineTooLong> {
        let whole = arrived.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut lines = arrived;
        let rest = lines.split_off(whole);
        if whole > 0 && !self.unfinished.is_empty() {
            self.unfinished.extend_from_slice(&lines);
            lines = self.unfinished.split().freeze();
        }
        self.unfinished.extend_from_slice(&rest);
        if self.unfinished.len() > LONGEST_LINE {
            return Err(LineTooLong);
        }
        if let Some(last) = split(&lines).last() {
            self.between_events = last.is_empty();
        }
        Ok(lines)
    }

    /// What arrived after the last line. It is handed on only if the stream ended as it should.
    pub fn rest(&mut self) -> Bytes {
        self.unfinished.split().freeze()
    }

    /// An event to end the stream with instead of its unfinished line.
    pub fn last_event(&self, data: &str) -> Bytes {
        let end_of_event = if self.between_events { "" } else { "\n" };
        Bytes::from(format!("{end_of_event}data: {data}\n\n"))
    }
}

/// The values of the `data` fields in whole lines.
pub fn data(lines: &[u8]) -> impl Iterator<Item = &[u8]> {
    split(lines).filter_map(|line| line.strip_prefix(b"data:")).map(<[u8]>::trim_ascii)
}

/// What an event says about the answer that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// A part of the answer.
    Part,
    /// The answer is whole.
    End,
    /// The model failed.
    Failure,
}

/// Reads the data of an event: chats and completions end with `[DONE]`, responses with an event that has the type of
/// their end.
pub fn meaning(data: &[u8]) -> Meaning {
    if data == b"[DONE]" || has_type(data, br#""response.completed""#) || has_type(data, br#""response.incomplete""#) {
        Meaning::End
    } else if is_error(data) || has_type(data, br#""response.failed""#) {
        Meaning::Failure
    } else {
        Meaning::Part
    }
}

/// Whether the JSON has a member `type` with this value, which is in quotation marks. A text cannot look like one, because
/// its quotation marks are escaped.
fn has_type(data: &[u8], value: &[u8]) -> bool {
    let is_type = |before: &[u8]| {
        let name = before.trim_ascii_end().strip_suffix(b":");
        name.is_some_and(|name| name.trim_ascii_end().ends_with(br#""type""#))
    };
    data.windows(value.len()).enumerate().any(|(at, window)| window == value && is_type(&data[..at]))
}

/// Whether the JSON begins with a member `error`, as OpenAI's errors do, or is an error of older versions of vLLM:
/// `{"object": "error", ...}`.
fn is_error(data: &[u8]) -> bool {
    let error = after(data, &[b"{", br#""error""#, b":"]);
    error.is_some_and(|value| !value.starts_with(b"null"))
        || after(data, &[b"{", br#""object""#, b":", br#""error""#]).is_some()
}

/// What follows these tokens at the beginning of a JSON text.
fn after<'a>(json: &'a [u8], tokens: &[&[u8]]) -> Option<&'a [u8]> {
    let rest = tokens.iter().try_fold(json, |rest, token| rest.trim_ascii_start().strip_prefix(*token));
    rest.map(<[u8]>::trim_ascii_start)
}

/// Lines without their ends.
fn split(lines: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = lines.split_inclusive(|&byte| byte == b'\n');
    lines.map(|line| line.strip_suffix(b"\n").unwrap_or(line)).map(|line| line.strip_suffix(b"\r").unwrap_or(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let text = "data: {\"a\": 1}\n\n: comment\r\ndata:[DONE]\r\n\r\n";
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let mut passed = Vec::new();
            for chunk in text.as_bytes().chunks(size) {
                let whole = lines.push(Bytes::copy_from_slice(chunk)).unwrap();
                assert!(whole.is_empty() || whole.ends_with(b"\n"), "{whole:?}");
                passed.extend_from_slice(&whole);
            }
            assert_eq!(passed, text.as_bytes());
            assert_eq!(data(&passed).collect::<Vec<_>>(), [&b"{\"a\": 1}"[..], b"[DONE]"]);
            assert!(lines.rest().is_empty());
            assert_eq!(lines.last_event("x"), "data: x\n\n");
        }
    }

    #[test]
    fn the_end_of_an_answer_is_seen_in_both_kinds_of_streams() {
        for (data, expected) in [
            ("[DONE]", Meaning::End),
            (r#"{"response":{"output":[]},"sequence_number":9,"type":"response.completed"}"#, Meaning::End),
            (r#"{"type":"response.incomplete","response":{}}"#, Meaning::End),
            (r#"{"type": "response.completed", "response": {}}"#, Meaning::End),
            (r#"{"error":{"message":"out of memory"}}"#, Meaning::Failure),
            (r#"{ "error" : {"message": "out of memory"}}"#, Meaning::Failure),
            (r#"{"object": "error", "message": "out of memory", "code": 500}"#, Meaning::Failure),
            (r#"{"error":null,"choices":[]}"#, Meaning::Part),
            (r#"{"object":"chat.completion.chunk","choices":[]}"#, Meaning::Part),
            (r#"{"delta":"a","kind":"response.completed"}"#, Meaning::Part),
            (r#"{"response":{"error":{"message":"x"}},"type":"response.failed"}"#, Meaning::Failure),
            (r#"{"response":{"error":null},"type":"response.created"}"#, Meaning::Part),
            (r#"{"delta":"\"type\":\"response.completed\"","type":"response.output_text.delta"}"#, Meaning::Part),
            (r#"{"choices":[{"delta":{"content":"[DONE]"}}]}"#, Meaning::Part),
        ] {
            assert_eq!(meaning(data.as_bytes()), expected, "{data}");
        }
    }

    #[test]
    fn a_last_event_follows_whole_lines_only() {
        let mut lines = Lines::default();
        assert_eq!(lines.push("data: 1\n\ndata: 2\ndata: {\"ha".into()), Ok("data: 1\n\ndata: 2\n".into()));
        assert_eq!(lines.last_event("end"), "\ndata: end\n\n");
        assert_eq!(lines.push(Bytes::from(vec![b'x'; LONGEST_LINE])), Err(LineTooLong));
    }
}
