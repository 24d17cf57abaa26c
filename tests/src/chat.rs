//! Clients of a language model's deployment: they ask, stream, post corrections, and count every failure.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use athanor_contract::process::header;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    finance::{Sentence, token_f1},
    traffic::Ids,
};

/// Tokens that an answer may have.
const MAX_TOKENS: u32 = 64;

/// An answer to one request.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub request_id: String,
    pub revision: String,
    pub text: String,
    pub tokens: u64,
}

/// What was sent and what went wrong, over all clones.
#[derive(Debug, Default)]
pub struct Counts {
    pub requests: AtomicU64,
    pub streams: AtomicU64,
    /// Requests and streams without a whole answer.
    pub failures: AtomicU64,
    pub feedback: AtomicU64,
    pub feedback_failures: AtomicU64,
    pub tokens: AtomicU64,
    /// Request ids of whole answers, and of the corrections that were accepted.
    pub answered: Ids,
    pub accepted: Ids,
}

/// How well a revision answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marks {
    pub sentences: usize,
    pub token_f1: f64,
    pub exact_match: f64,
}

/// A client of one deployment.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// `http://host:port`, without a path.
    base: String,
    model: String,
    key: Option<String>,
    pub counts: Arc<Counts>,
}

impl Client {
    pub fn new(base: impl Into<String>, model: impl Into<String>) -> Result<Self> {
        crate::settle_tls();
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(120)).build()?;
        Ok(Self { http, base: base.into(), model: model.into(), key: None, counts: Arc::default() })
    }

    /// Sends this API key with each request.
    pub fn with_key(self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self }
    }

    fn request(&self, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.post(format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Asks without a stream; `revision` pins the answer to one revision.
    pub async fn ask(&self, sentence: &Sentence, revision: Option<&str>) -> Result<Answer> {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        self.counted(self.try_ask(sentence, revision).await)
    }

    /// Asks and reads the answer token by token to its `[DONE]`.
    pub async fn stream(&self, sentence: &Sentence) -> Result<Answer> {
        self.counts.streams.fetch_add(1, Ordering::Relaxed);
        self.counted(self.try_stream(sentence).await)
    }

    fn counted(&self, answer: Result<Answer>) -> Result<Answer> {
        match &answer {
            Ok(answer) => {
                self.counts.answered.add(&answer.request_id);
                self.counts.tokens.fetch_add(answer.tokens, Ordering::Relaxed)
            }
            Err(_) => self.counts.failures.fetch_add(1, Ordering::Relaxed),
        };
        answer
    }

    async fn post(&self, body: &Value, revision: Option<&str>) -> Result<(reqwest::Response, Answer)> {
        let mut request = self.request("/v1/chat/completions").json(body);
        if let Some(revision) = revision {
            request = request.header(header::REVISION, revision);
        }
        let response = request.send().await?;
        let field = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        let answer =
            Answer { request_id: field(header::REQUEST_ID), revision: field(header::REVISION), ..Answer::default() };
        let status = response.status();
        if !status.is_success() {
            bail!("{status}: {}", response.text().await.unwrap_or_default());
        }
        if revision.is_some_and(|revision| revision != answer.revision) {
            bail!("asked revision {revision:?}, {} answered", answer.revision);
        }
        Ok((response, answer))
    }

    async fn try_ask(&self, sentence: &Sentence, revision: Option<&str>) -> Result<Answer> {
        let body = json!({
            "model": self.model, "messages": sentence.messages(), "temperature": 0, "max_tokens": MAX_TOKENS,
        });
        let (response, mut answer) = self.post(&body, revision).await?;
        let body: Value = response.json().await.context("the answer is not JSON")?;
        let text = body["choices"][0]["message"]["content"].as_str();
        text.with_context(|| format!("no content in {body}"))?.clone_into(&mut answer.text);
        answer.tokens = body["usage"]["completion_tokens"].as_u64().with_context(|| format!("no usage in {body}"))?;
        Ok(answer)
    }

    async fn try_stream(&self, sentence: &Sentence) -> Result<Answer> {
        let body = json!({
            "model": self.model, "messages": sentence.messages(), "temperature": 0, "max_tokens": MAX_TOKENS,
            "stream": true, "stream_options": {"include_usage": true},
        });
        let (response, mut answer) = self.post(&body, None).await?;
        let mut chunks = response.bytes_stream();
        let mut buffer = Vec::new();
        let mut finished = false;
        while let Some(chunk) = chunks.next().await {
            buffer.extend_from_slice(&chunk.context("the stream was cut")?);
            while let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let line = String::from_utf8(line).context("a line is not UTF-8")?;
                let Some(data) = line.trim().strip_prefix("data:").map(str::trim) else { continue };
                if data == "[DONE]" {
                    ensure!(finished, "[DONE] came before a finish_reason");
                    return Ok(answer);
                }
                let event: Value = serde_json::from_str(data).with_context(|| format!("not JSON: {data}"))?;
                ensure!(event.get("error").is_none(), "the stream ended with {data}");
                if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
                    answer.tokens = tokens;
                }
                let choice = &event["choices"][0];
                answer.text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
                finished |= choice["finish_reason"].is_string();
            }
        }
        bail!("the stream ended without [DONE]: {:?}", answer.text)
    }

    /// Posts the answer that would have been right.
    pub async fn correct(&self, request_id: &str, expected: &str) -> Result<()> {
        self.counts.feedback.fetch_add(1, Ordering::Relaxed);
        let body = json!({"request_id": request_id, "expected_text": expected});
        let sent = async {
            let response = self.request("/v1/feedback").json(&body).send().await?;
            let status = response.status();
            ensure!(status.is_success(), "feedback: {status}: {}", response.text().await.unwrap_or_default());
            Ok(())
        };
        let sent = sent.await;
        match &sent {
            Ok(()) => self.counts.accepted.add(request_id),
            Err(_) => {
                self.counts.feedback_failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        sent
    }

    /// Sends sentences, each second one as a stream, with corrections. Returns the marks and tokens a second.
    pub async fn replay(&self, sentences: &[Sentence], concurrency: usize, done: impl Fn()) -> Result<(Marks, f64)> {
        let done = &done;
        let began = Instant::now();
        let answers: Vec<Result<(Answer, &Sentence)>> = futures::stream::iter(sentences.iter().enumerate())
            .map(async |(index, sentence)| {
                let answer =
                    if index % 2 == 0 { self.ask(sentence, None).await? } else { self.stream(sentence).await? };
                self.correct(&answer.request_id, &sentence.answer).await?;
                done();
                Ok((answer, sentence))
            })
            .buffer_unordered(concurrency)
            .collect()
            .await;
        let answers = answers.into_iter().collect::<Result<Vec<_>>>()?;
        let tokens: u64 = answers.iter().map(|(answer, _)| answer.tokens).sum();
        Ok((marks(&answers), tokens as f64 / began.elapsed().as_secs_f64()))
    }

    /// The marks of one revision on sentences that it never saw.
    pub async fn exam(&self, sentences: &[Sentence], revision: &str) -> Result<Marks> {
        ensure!(!sentences.is_empty(), "an exam without sentences");
        let answers: Vec<Result<(Answer, &Sentence)>> = futures::stream::iter(sentences)
            .map(async |sentence| Ok((self.ask(sentence, Some(revision)).await?, sentence)))
            .buffer_unordered(8)
            .collect()
            .await;
        Ok(marks(&answers.into_iter().collect::<Result<Vec<_>>>()?))
    }

    /// Streams over and over, `at_once` at a time, until the token is cancelled; failures are counted and printed.
    pub fn background(&self, sentences: Vec<Sentence>, at_once: usize, stop: CancellationToken) -> JoinSet<()> {
        let mut streams = JoinSet::new();
        for first in 0..at_once {
            let (client, sentences, stop) = (self.clone(), sentences.clone(), stop.clone());
            streams.spawn(async move {
                for sentence in sentences.iter().cycle().skip(first).step_by(at_once) {
                    if stop.is_cancelled() {
                        return;
                    }
                    let started = Instant::now();
                    if let Err(error) = client.stream(sentence).await {
                        eprintln!("a stream failed after {:.1} s: {error:#}", started.elapsed().as_secs_f64());
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            });
        }
        streams
    }
}

fn marks(answers: &[(Answer, &Sentence)]) -> Marks {
    let rows = answers.len().max(1) as f64;
    let f1: f64 = answers.iter().map(|(answer, sentence)| token_f1(&answer.text, &sentence.answer)).sum();
    let exact = answers.iter().filter(|(answer, sentence)| answer.text.trim() == sentence.answer).count();
    Marks { sentences: answers.len(), token_f1: f1 / rows, exact_match: exact as f64 / rows }
}
