//! The text of an answer, piece by piece, to content and calls of functions. What comes out, joined, does not depend on
//! how the text is cut.
//!
//! A text is a call if it has the form of one and names a known function; anything else stays content. A model that is
//! free may begin a call and write something else, so its calls are given out when they are complete. A model that
//! follows a grammar cannot, so the arguments of its calls are given out as they grow.

use std::{ops::Range, sync::Arc};

use serde_json::Value;

use super::{CallFormat, Function};

const BLOCK: &str = "```json";
const TAG: &str = "<tool_call>";
const END_TAG: &str = "</tool_call>";
const PYTHON: &str = "<|python_tag|>";

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Content(String),
    /// A call begins.
    Call {
        name: String,
    },
    /// Further text of the arguments of the last call, which is JSON in the end.
    Arguments(String),
}

/// How an answer is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    pub format: CallFormat,
    /// Functions that may be called.
    pub functions: Arc<[Function]>,
    /// Whether the answer follows [`CallFormat::grammar`], so that it consists of calls.
    pub enforced: bool,
    /// Whether calls after the first one count.
    pub several: bool,
}

/// Reads one answer.
#[derive(Clone, Debug)]
pub struct CallParser {
    reading: Reading,
    state: State,
    /// Text that is not decided yet.
    held: String,
    calls: usize,
    /// Whether the arguments of a grammar's call have begun and not ended.
    is_cut: bool,
    /// Whether a call may begin without a mark: at the beginning, and after such a call.
    may_be_bare: bool,
}

/// What surrounds the JSON of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Tag,
    Python,
    Block,
    None,
}

/// What follows one mark: a call, several, or a list of them.
#[derive(Clone, Debug)]
struct Marked {
    mark: Mark,
    /// Where the mark ends in `held`, which begins with space and the mark.
    from: usize,
    /// Whether a list has begun and not ended.
    in_list: bool,
    /// Names and arguments of the complete calls.
    calls: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
enum State {
    Content,
    /// The object of the next call is read.
    Object {
        marked: Marked,
        scan: Scan,
    },
    /// The last call's object, or the list, ends at `end`.
    After {
        marked: Marked,
        end: usize,
    },
    /// A grammar's call, whose arguments begin `held`.
    Arguments {
        given: usize,
        scan: Scan,
    },
    /// A grammar's call whose arguments are complete: its end follows.
    Closing,
}

impl State {
    /// A mark ends at `from` in `held`.
    fn marked(mark: Mark, from: usize) -> Self {
        let marked = Marked { mark, from, in_list: false, calls: Vec::new() };
        Self::Object { marked, scan: Scan::new(from) }
    }
}

/// Whether a character may stand between calls.
fn separates(c: char) -> bool {
    c.is_whitespace() || c == ';'
}

/// What a look at the held text decided.
enum Step {
    Again,
    Wait,
}

impl CallParser {
    pub fn new(reading: Reading) -> Self {
        Self { reading, state: State::Content, held: String::new(), calls: 0, is_cut: false, may_be_bare: true }
    }

    /// Number of calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Whether the arguments of the last call are not complete.
    pub fn is_within_call(&self) -> bool {
        self.is_cut
    }

    /// Adds a piece of text.
    pub fn push(&mut self, piece: &str) -> Vec<Part> {
        self.held.push_str(piece);
        let mut parts = Vec::new();
        while let Step::Again = self.step(&mut parts) {}
        joined(parts)
    }

    /// The rest, when no more text comes.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        loop {
            match std::mem::replace(&mut self.state, State::Content) {
                State::Content => break,
                // A grammar's call was given out as far as it goes.
                State::Arguments { .. } | State::Closing => self.held.clear(),
                State::After { marked, .. } => {
                    self.held.clear();
                    self.give(marked.calls, &mut parts);
                }
                State::Object { marked, .. } => self.refuse(&marked, &mut parts),
            }
            while let Step::Again = self.step(&mut parts) {}
        }
        let rest = std::mem::take(&mut self.held);
        // What separates calls is not content.
        if self.calls == 0 || !rest.trim_matches(separates).is_empty() {
            self.content(rest, &mut parts);
        }
        joined(parts)
    }

    fn step(&mut self, parts: &mut Vec<Part>) -> Step {
        if self.calls > 0 && !self.reading.several && matches!(self.state, State::Content) {
            self.held.clear();
            return Step::Wait;
        }
        match std::mem::replace(&mut self.state, State::Content) {
            State::Content => self.look(parts),
            State::Object { marked, scan } => self.object(marked, scan, parts),
            State::After { marked, end } => self.after(marked, end, parts),
            State::Arguments { given, scan } => self.arguments(given, scan, parts),
            State::Closing => self.closing(),
        }
    }

    fn marks(&self) -> &'static [(Mark, &'static str)] {
        match self.reading.format {
            CallFormat::Hermes => &[(Mark::Tag, TAG), (Mark::Block, BLOCK)],
            CallFormat::Llama3 => &[(Mark::Python, PYTHON), (Mark::Block, BLOCK)],
            CallFormat::Fenced => &[(Mark::Block, BLOCK)],
        }
    }

    /// Looks for the beginning of a call, and gives out the content before it.
    fn look(&mut self, parts: &mut Vec<Part>) -> Step {
        if self.may_be_bare {
            let rest = if self.calls > 0 { self.held.trim_start_matches(separates) } else { self.held.trim_start() };
            if rest.is_empty() {
                return Step::Wait;
            }
            if rest.starts_with(['{', '[']) {
                self.state = State::marked(Mark::None, self.held.len() - rest.len());
                return Step::Again;
            }
        }
        let found = self.marks().iter().filter_map(|&(mark, text)| Some((self.held.find(text)?, mark, text.len())));
        if let Some((at, mark, length)) = found.min_by_key(|(at, ..)| *at) {
            // The space before a call is not content, but before something else it is.
            let given = self.held[..at].trim_end().len();
            let before: String = self.held.drain(..given).collect();
            self.content(before, parts);
            self.state = State::marked(mark, at - given + length);
            return Step::Again;
        }
        // What may be the beginning of a mark is held, and so is the space that would be before a call.
        let beginning = |text: &str| (1..text.len()).rev().find(|&bytes| self.held.ends_with(&text[..bytes]));
        let kept = self.marks().iter().filter_map(|(_, text)| beginning(text)).max().unwrap_or(0);
        let given = self.held[..self.held.len() - kept].trim_end().len();
        let content: String = self.held.drain(..given).collect();
        self.content(content, parts);
        Step::Wait
    }

    fn content(&mut self, text: String, parts: &mut Vec<Part>) {
        // A grammar's answer has calls only, with space between them.
        let is_separator = self.reading.enforced && text.trim().is_empty();
        if !text.is_empty() && !is_separator {
            self.may_be_bare = false;
            parts.push(Part::Content(text));
        }
    }

    /// What began like a call is content after all: its mark is, and the rest is looked at once more.
    fn refuse(&mut self, marked: &Marked, parts: &mut Vec<Part>) {
        self.state = State::Content;
        self.may_be_bare = false;
        let length = if marked.mark == Mark::None { marked.from + 1 } else { marked.from };
        let text: String = self.held.drain(..length).collect();
        self.content(text, parts);
    }

    fn object(&mut self, mut marked: Marked, mut scan: Scan, parts: &mut Vec<Part>) -> Step {
        if self.reading.enforced {
            return self.head(marked, scan, parts);
        }
        let rest = self.held[scan.position..].trim_start();
        if marked.calls.is_empty() && !marked.in_list && scan.depth == 0 && rest.starts_with('[') {
            marked.in_list = true;
            scan = Scan::new(self.held.len() - rest.len() + 1);
        }
        scan.advance(&self.held);
        if scan.failed || !self.is_plausible(&scan) {
            self.refuse(&marked, parts);
            return Step::Again;
        }
        let Some(end) = scan.end else {
            self.state = State::Object { marked, scan };
            return Step::Wait;
        };
        match self.call(&scan) {
            Some(call) => {
                marked.calls.push(call);
                self.state = State::After { marked, end };
            }
            None => self.refuse(&marked, parts),
        }
        Step::Again
    }

    /// Whether an object that is not complete may be a call: the members so far are those of one.
    fn is_plausible(&self, scan: &Scan) -> bool {
        let text = |range: &Range<usize>| self.held[range.clone()].trim();
        let keys = scan.members.iter().map(|(key, _)| key).chain(scan.key.as_ref());
        keys.into_iter().all(|key| ["\"name\"", "\"arguments\"", "\"parameters\"", "\"type\""].contains(&text(key)))
            && scan
                .members
                .iter()
                .filter(|(key, _)| text(key) == "\"name\"")
                .all(|(_, value)| serde_json::from_str::<String>(text(value)).is_ok_and(|name| self.is_function(&name)))
    }

    fn is_function(&self, name: &str) -> bool {
        self.reading.functions.iter().any(|function| function.name == name)
    }

    /// Name and arguments of a complete object.
    fn call(&self, scan: &Scan) -> Option<(String, String)> {
        let text = |range: &Range<usize>| self.held[range.clone()].trim();
        let member = |names: &[&str]| {
            let found = scan.members.iter().find(|(key, _)| names.contains(&text(key).trim_matches('"')));
            found.map(|(_, value)| text(value))
        };
        let name: String = serde_json::from_str(member(&["name"])?).ok()?;
        let arguments = match member(&["arguments", "parameters"]) {
            None => "{}".to_owned(),
            Some(json) => match serde_json::from_str(json).ok()? {
                Value::Object(_) => json.to_owned(),
                // Some models write them as OpenAI does, as JSON in a string.
                Value::String(inner) => {
                    let is_object = serde_json::from_str::<Value>(&inner).is_ok_and(|value| value.is_object());
                    is_object.then_some(inner)?
                }
                _ => return None,
            },
        };
        self.is_function(&name).then_some((name, arguments))
    }

    /// Waits for the end of complete calls, or for another one.
    fn after(&mut self, mut marked: Marked, end: usize, parts: &mut Vec<Part>) -> Step {
        let (close, separator): (&str, fn(char) -> bool) = match marked.mark {
            _ if marked.in_list => ("]", char::is_whitespace),
            Mark::Tag => (END_TAG, |c| separates(c) || c == ','),
            Mark::Block => ("```", |c| separates(c) || c == ','),
            Mark::None | Mark::Python => ("", char::is_whitespace),
        };
        let rest = self.held[end..].trim_start_matches(separator);
        let at = self.held.len() - rest.len();
        let next = match rest.chars().next() {
            Some(',') if marked.in_list => Some(at + 1),
            Some('{') if !marked.in_list && !close.is_empty() => Some(at),
            _ => None,
        };
        if let Some(next) = next {
            self.state = State::Object { marked, scan: Scan::new(next) };
            return Step::Again;
        }
        let is_over = match close {
            // Nothing but another call may follow.
            "" => rest.starts_with([';', '{']) || rest.starts_with(PYTHON),
            close => rest.starts_with(close),
        };
        if is_over && marked.in_list {
            marked.in_list = false;
            self.state = State::After { marked, end: at + close.len() };
            return Step::Again;
        }
        if is_over {
            self.held.drain(..at + close.len());
            self.give(marked.calls, parts);
            return Step::Again;
        }
        if rest.is_empty() || close.starts_with(rest) || (close.is_empty() && PYTHON.starts_with(rest)) {
            self.state = State::After { marked, end };
            return Step::Wait;
        }
        self.refuse(&marked, parts);
        Step::Again
    }

    fn give(&mut self, calls: Vec<(String, String)>, parts: &mut Vec<Part>) {
        for (name, arguments) in calls {
            if self.calls == 0 || self.reading.several {
                self.calls += 1;
                parts.extend([Part::Call { name }, Part::Arguments(arguments)]);
            }
        }
        self.may_be_bare = true;
    }

    /// Waits for the beginning of a grammar's call, up to its arguments.
    fn head(&mut self, marked: Marked, scan: Scan, parts: &mut Vec<Part>) -> Step {
        let text = self.held[marked.from..].trim_start();
        let head = |function: &Function| (function.name.clone(), self.reading.format.head(&function.name));
        let begun = self.reading.functions.iter().map(head).find(|(_, head)| text.starts_with(head));
        let Some((name, head)) = begun else {
            self.state = State::Object { marked, scan };
            return Step::Wait;
        };
        let length = self.held.len() - text.len() + head.len();
        self.held.drain(..length);
        self.calls += 1;
        self.is_cut = true;
        parts.push(Part::Call { name });
        self.state = State::Arguments { given: 0, scan: Scan::new(0) };
        Step::Again
    }

    fn arguments(&mut self, given: usize, mut scan: Scan, parts: &mut Vec<Part>) -> Step {
        scan.advance(&self.held);
        let end = scan.end.unwrap_or(self.held.len());
        parts.push(Part::Arguments(self.held[given..end].to_owned()));
        if scan.end.is_none() {
            self.state = State::Arguments { given: end, scan };
            return Step::Wait;
        }
        self.held.drain(..end);
        self.is_cut = false;
        self.state = State::Closing;
        Step::Again
    }

    fn closing(&mut self) -> Step {
        let close = format!("}}{}", self.reading.format.close());
        if !self.held.starts_with(&close) {
            self.state = State::Closing;
            return Step::Wait;
        }
        self.held.drain(..close.len());
        self.may_be_bare = true;
        Step::Again
    }
}

/// Adjacent parts of one kind as one.
fn joined(parts: Vec<Part>) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::new();
    for part in parts {
        match (joined.last_mut(), part) {
            (Some(Part::Content(text)), Part::Content(more)) | (Some(Part::Arguments(text)), Part::Arguments(more)) => {
                text.push_str(&more);
            }
            (_, Part::Content(text) | Part::Arguments(text)) if text.is_empty() => {}
            (_, part) => joined.push(part),
        }
    }
    joined
}

/// Looks for the end of a JSON object and for its members; whether they are JSON is checked by whoever uses them.
#[derive(Clone, Debug)]
struct Scan {
    position: usize,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    /// Beginning of the member that is being read.
    begin: usize,
    /// Key of the member whose value is being read.
    key: Option<Range<usize>>,
    /// Keys, with their quotes, and values.
    members: Vec<(Range<usize>, Range<usize>)>,
    end: Option<usize>,
    /// Whether no object begins here.
    failed: bool,
}

impl Scan {
    fn new(position: usize) -> Self {
        Self {
            position,
            depth: 0,
            in_string: false,
            is_escaped: false,
            begin: position,
            key: None,
            members: Vec::new(),
            end: None,
            failed: false,
        }
    }

    /// Reads on in a text that has grown.
    fn advance(&mut self, text: &str) {
        while let (Some(&byte), None, false) = (text.as_bytes().get(self.position), self.end, self.failed) {
            self.byte(byte);
            self.position += 1;
        }
    }

    fn byte(&mut self, byte: u8) {
        if self.in_string {
            self.in_string = self.is_escaped || byte != b'"';
            self.is_escaped = !self.is_escaped && byte == b'\\';
            return;
        }
        match byte {
            b'{' if self.depth == 0 => (self.depth, self.begin) = (1, self.position + 1),
            byte if self.depth == 0 => self.failed = !byte.is_ascii_whitespace(),
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b':' if self.depth == 1 && self.key.is_none() => {
                self.key = Some(self.begin..self.position);
                self.begin = self.position + 1;
            }
            b',' if self.depth == 1 => self.member(),
            b'}' | b']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    self.member();
                    self.end = Some(self.position + 1);
                }
            }
            _ => {}
        }
    }

    fn member(&mut self) {
        if let Some(key) = self.key.take() {
            self.members.push((key, self.begin..self.position));
        }
        self.begin = self.position + 1;
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
