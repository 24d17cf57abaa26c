//! Clients of a deployment: they classify texts, post feedback, and count every failure.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use athanor_contract::process::header;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::sentiment::Text;

/// Whether a request failed because its connection was refused or broke, and not by an answer or by a time limit.
pub fn is_of_connection(error: &anyhow::Error) -> bool {
    let Some(error) = error.downcast_ref::<reqwest::Error>() else { return false };
    let mut causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    // A whole body that is not JSON is an answer.
    !error.is_timeout() && !error.is_status() && !causes.any(|cause| cause.is::<serde_json::Error>())
}

/// An answer to one text.
#[derive(Clone, Debug)]
pub struct Answer {
    pub request_id: String,
    pub revision: String,
    pub label: String,
}

/// What was sent and what went wrong, over all clones.
#[derive(Debug, Default)]
pub struct Counts {
    pub requests: AtomicU64,
    pub failures: AtomicU64,
    pub feedback: AtomicU64,
    pub feedback_failures: AtomicU64,
    /// Request ids of the answers, and of the feedback that was accepted.
    pub answered: Ids,
    pub accepted: Ids,
}

/// Request ids in the order in which they came.
#[derive(Debug, Default)]
pub struct Ids(Mutex<Vec<String>>);

impl Ids {
    pub fn add(&self, id: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(id.to_owned());
    }

    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A client of one deployment.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// `http://host:port`, without a path.
    base: String,
    key: Option<String>,
    pub counts: Arc<Counts>,
}

impl Client {
    pub fn new(base: impl Into<String>) -> Result<Self> {
        crate::settle_tls();
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(40)).build()?;
        Ok(Self { http, base: base.into(), key: None, counts: Arc::default() })
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

    /// Classifies one text; `revision` pins the answer to one revision.
    pub async fn classify(&self, text: &str, revision: Option<&str>) -> Result<Answer> {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        let answer = self.try_classify(text, revision).await;
        match &answer {
            Ok(answer) => self.counts.answered.add(&answer.request_id),
            Err(_) => {
                self.counts.failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        answer
    }

    /// The labels of several texts in one request to one revision.
    async fn classify_all(&self, texts: &[Text], revision: &str) -> Result<Vec<String>> {
        let input: Vec<&str> = texts.iter().map(|text| text.text.as_str()).collect();
        let request = self.request("/v1/classify").header(header::REVISION, revision);
        let response = request.json(&json!({"input": input})).send().await?;
        let status = response.status();
        let body: Value = response.json().await.context("the answer is not JSON")?;
        ensure!(status.is_success(), "{status}: {body}");
        let data = body["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(data.len() == texts.len(), "{} answers to {} texts", data.len(), texts.len());
        data.iter().map(|one| one["label"].as_str().map(str::to_owned).context("no label")).collect()
    }

    async fn try_classify(&self, text: &str, revision: Option<&str>) -> Result<Answer> {
        let mut request = self.request("/v1/classify").json(&json!({"input": text}));
        if let Some(revision) = revision {
            request = request.header(header::REVISION, revision);
        }
        let response = request.send().await?;
        let status = response.status();
        let field = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
        };
        let (request_id, answered_by) = (field(header::REQUEST_ID), field(header::REVISION));
        let body: Value = response.json().await.context("the answer is not JSON")?;
        ensure!(status.is_success(), "{status}: {body}");
        let label = body["data"][0]["label"].as_str().with_context(|| format!("no label in {body}"))?.to_owned();
        if revision.is_some_and(|revision| revision != answered_by) {
            bail!("asked revision {revision:?}, {answered_by} answered");
        }
        Ok(Answer { request_id, revision: answered_by, label })
    }

    /// Posts the true label of a request.
    pub async fn feedback(&self, request_id: &str, label: &str) -> Result<()> {
        self.counts.feedback.fetch_add(1, Ordering::Relaxed);
        let body = json!({"request_id": request_id, "expected_label": label});
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

    /// Sends texts `concurrency` at a time, with the true label of every one of which `labelled` says so. Calls `done` after each.
    /// Returns the share of right answers.
    pub async fn replay(
        &self,
        texts: &[Text],
        concurrency: usize,
        labelled: impl Fn(usize) -> bool,
        done: impl Fn(),
    ) -> Result<f64> {
        let (labelled, done) = (&labelled, &done);
        let right: Vec<Result<bool>> = futures::stream::iter(texts.iter().enumerate())
            .map(async |(index, text)| {
                let answer = self.classify(&text.text, None).await?;
                if labelled(index) {
                    self.feedback(&answer.request_id, text.label).await?;
                }
                done();
                Ok(answer.label == text.label)
            })
            .buffer_unordered(concurrency)
            .collect()
            .await;
        let right = right.into_iter().collect::<Result<Vec<bool>>>()?;
        Ok(right.iter().filter(|right| **right).count() as f64 / right.len().max(1) as f64)
    }

    /// Accuracy of one revision on texts it never saw.
    pub async fn exam(&self, texts: &[Text], revision: &str) -> Result<f64> {
        ensure!(!texts.is_empty(), "an exam without texts");
        let right: Vec<Result<usize>> = futures::stream::iter(texts.chunks(32))
            .map(async |texts| {
                let labels = self.classify_all(texts, revision).await?;
                Ok(std::iter::zip(labels, texts).filter(|(label, text)| label == text.label).count())
            })
            .buffer_unordered(2)
            .collect()
            .await;
        let right: usize = right.into_iter().sum::<Result<usize>>()?;
        Ok(right as f64 / texts.len() as f64)
    }

    /// Sends texts over and over, `per_second` of them, until [`Background::finish`]. Failures are counted and printed.
    pub fn background(&self, texts: Vec<Text>, per_second: u32) -> Background {
        let client = self.clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second.max(1));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            let mut requests = JoinSet::new();
            for text in texts.iter().cycle() {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = stopped.cancelled() => break,
                }
                while requests.try_join_next().is_some() {}
                let (client, text) = (client.clone(), text.text.clone());
                requests.spawn(async move {
                    let started = Instant::now();
                    if let Err(error) = client.classify(&text, None).await {
                        eprintln!("request failed after {:.1} s: {error:#}", started.elapsed().as_secs_f64());
                    }
                });
            }
            // One that still waits may yet fail, and would not be counted.
            requests.join_all().await;
        });
        Background { stop, task }
    }
}

/// Traffic that goes on until it is finished or dropped.
pub struct Background {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Background {
    /// Sends no more, and waits for the answers that are due.
    pub async fn finish(mut self) {
        self.stop.cancel();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A client of a server that answers its one connection with these bytes and closes it.
    async fn failure(answer: &'static [u8]) -> anyhow::Error {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client::new(format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let answering = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let read = stream.read(&mut [0; 4096]).await.unwrap();
            assert!(read > 0);
            stream.write_all(answer).await.unwrap();
        });
        let error = client.classify("text", None).await.unwrap_err();
        answering.await.unwrap();
        error
    }

    #[tokio::test]
    async fn a_broken_connection_is_told_from_an_answer() {
        assert!(is_of_connection(&failure(b"").await));
        let cut = b"HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{\"data\": ";
        assert!(is_of_connection(&failure(cut).await));
        let unavailable = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}";
        assert!(!is_of_connection(&failure(unavailable).await));
        assert!(!is_of_connection(&failure(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 3\r\n\r\nno!").await));
        let refused = Client::new("http://127.0.0.1:1").unwrap().classify("text", None).await.unwrap_err();
        assert!(is_of_connection(&refused));
    }
}
