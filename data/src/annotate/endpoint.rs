//! One question to an OpenAI-compatible endpoint: what is tried again and what is not.

use std::time::{Duration, SystemTime};

use athanor_contract::train::EndpointAnnotator;
use backon::{ExponentialBuilder, Retryable};
use reqwest::{
    Client, ClientBuilder, Response, StatusCode,
    header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER},
    redirect,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::error::DataError;

/// Bytes of an answer that are read.
const BODY_LIMIT: usize = 1 << 20;
/// The longest pause that an endpoint may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Characters shown of what an endpoint says.
const SHOWN: usize = 300;

pub(super) struct Endpoint {
    http: Client,
    url: String,
    model: String,
    temperature: f64,
    timeout: Duration,
    /// Kept to take it out of what is shown.
    key: Option<String>,
    backoff: ExponentialBuilder,
}

/// What the model said, and what it cost.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    pub content: String,
    /// Tokens of prompt and answer, as the endpoint counts them; `None` if it does not tell.
    pub usage: Option<(u64, u64)>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Failure {
    /// May go well later: the kind, what is known about it, and the pause the endpoint asks for.
    Transient { reason: String, detail: String, pause: Option<Duration> },
    /// This question alone fails, now and later.
    Question { reason: String },
    /// No question will go well until the user changes something.
    Refused(String),
    /// Asking has been stopped.
    Stopped,
}

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    messages: [Message<'a>; 1],
    temperature: f64,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Content,
}

#[derive(Deserialize)]
struct Content {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl Endpoint {
    /// `shortest_pause` is the one before the first retry; each later one is twice as long, up to a minute, with jitter.
    pub(super) fn new(
        spec: &EndpointAnnotator,
        key: Option<String>,
        builder: ClientBuilder,
        shortest_pause: Duration,
    ) -> Result<Self, DataError> {
        athanor_store::settle_tls();
        let mut headers = HeaderMap::new();
        if let Some(key) = &key {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| DataError::User("the API key has characters that no HTTP header may have".into()))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let http = builder
            .default_headers(headers)
            // A key goes where the user said, nowhere else.
            .redirect(redirect::Policy::none())
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(|error| DataError::Other(format!("HTTP client: {error}")))?;
        let samples_differ = spec.samples > 1;
        Ok(Self {
            http,
            url: format!("{}/chat/completions", spec.url.trim_end_matches('/')),
            model: spec.model.clone(),
            temperature: spec.temperature.map_or(f64::from(samples_differ), |temperature| temperature.get()),
            timeout: Duration::from_secs(spec.timeout_seconds.into()),
            key,
            backoff: ExponentialBuilder::default()
                .with_min_delay(shortest_pause)
                .with_max_delay(Duration::from_secs(60))
                .with_max_times(spec.max_retries as usize)
                .with_jitter(),
        })
    }

    /// Asks until there is an answer, or no retry is left. `stop` ends pauses, not requests: those may be paid for already.
    /// `on_retry` is called before each pause.
    pub(super) async fn ask(
        &self,
        prompt: &str,
        stop: &CancellationToken,
        on_retry: impl Fn(),
    ) -> Result<Answer, Failure> {
        let attempt = || async { if stop.is_cancelled() { Err(Failure::Stopped) } else { self.attempt(prompt).await } };
        let stop_pause = stop.clone();
        attempt
            .retry(self.backoff)
            .sleep(move |pause| {
                let stop = stop_pause.clone();
                async move {
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = stop.cancelled() => {}
                    }
                }
            })
            .when(|failure| matches!(failure, Failure::Transient { .. }))
            .adjust(|failure, pause| match failure {
                Failure::Transient { pause: Some(asked), .. } => pause.map(|pause| pause.max(*asked)),
                _ => pause,
            })
            .notify(|failure, pause| {
                if let Failure::Transient { reason, detail, .. } = failure {
                    tracing::debug!(reason, detail, ?pause, "the endpoint is asked again");
                }
                on_retry();
            })
            .await
    }

    async fn attempt(&self, prompt: &str) -> Result<Answer, Failure> {
        let request = Request {
            model: &self.model,
            messages: [Message { role: "user", content: prompt }],
            temperature: self.temperature,
        };
        let sent = self.http.post(&self.url).timeout(self.timeout).json(&request).send().await;
        let response = sent.map_err(|error| self.broken(error))?;
        let status = response.status();
        if status.is_success() {
            return completion(&self.body(response).await?);
        }
        let again = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
        let pause = response.headers().get(RETRY_AFTER).and_then(retry_after);
        // The status is known; what comes with it is for people to read.
        let detail = self.body(response).await.unwrap_or_default();
        let detail = self.shown(&String::from_utf8_lossy(&detail));
        if again || status.is_server_error() {
            return Err(Failure::Transient { reason: format!("status {}", status.as_u16()), detail, pause });
        }
        Err(Failure::Refused(format!("{} answered {status}: {detail}", self.shown(&self.url))))
    }

    /// Reads the body up to its limit.
    async fn body(&self, mut response: Response) -> Result<Vec<u8>, Failure> {
        let too_large = || Failure::Question { reason: "the response is larger than 1 MiB".into() };
        if response.content_length().is_some_and(|length| length > BODY_LIMIT as u64) {
            return Err(too_large());
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.broken(error))? {
            if body.len() + chunk.len() > BODY_LIMIT {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// A request that ended without a whole response.
    fn broken(&self, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        if error.is_builder() {
            return Failure::Refused(format!("data.annotate.endpoint.url: {error}"));
        }
        let reason = if error.is_timeout() {
            "timed out"
        } else if error.is_connect() {
            "no connection"
        } else {
            "the connection broke off"
        };
        let mut detail = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            detail.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        Failure::Transient { reason: reason.into(), detail: self.shown(&detail), pause: None }
    }

    /// The start of what an endpoint said, without the key that it may repeat.
    pub(super) fn shown(&self, text: &str) -> String {
        let text = match self.key.as_deref().filter(|key| !key.is_empty()) {
            Some(key) => text.replace(key, "[API KEY]"),
            None => text.to_owned(),
        };
        text.chars().take(SHOWN).collect()
    }
}

/// The first choice of a chat completion.
fn completion(body: &[u8]) -> Result<Answer, Failure> {
    let broken = |detail: String| Failure::Transient {
        reason: "the response is not a chat completion".into(),
        detail,
        pause: None,
    };
    let completion: Completion = serde_json::from_slice(body).map_err(|error| broken(error.to_string()))?;
    let usage = completion.usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
    let choice = completion.choices.into_iter().next().ok_or_else(|| broken("it has no choices".into()))?;
    // A refusal has no content: it is an answer, though not a label.
    Ok(Answer { content: choice.message.content.unwrap_or_default(), usage })
}

/// Seconds or a date (RFC 9110, section 10.2.3).
fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let value = value.to_str().ok()?.trim();
    let pause = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = jiff::fmt::rfc2822::parse(value).ok()?;
            SystemTime::from(date.timestamp()).duration_since(SystemTime::now()).unwrap_or_default()
        }
    };
    Some(pause.min(LONGEST_PAUSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_seconds_or_dates_and_have_an_end() {
        let pause = |value: &'static str| retry_after(&HeaderValue::from_static(value));
        assert_eq!(pause("2"), Some(Duration::from_secs(2)));
        assert_eq!(pause("86400"), Some(LONGEST_PAUSE));
        assert_eq!(pause("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(pause("Tue, 31 Dec 2199 23:59:59 GMT"), Some(LONGEST_PAUSE));
        assert_eq!(pause("soon"), None);
    }
}
