//! Who may use the router: API keys of named callers, their scopes and their limits.
//!
//! The router has the SHA-256 of each key, never the key. A Secret of the user's is mounted as a folder with a file for each caller;
//! a line of it is `sha256:` and 64 hexadecimal digits, and several lines are several valid keys, so that a key can be replaced
//! without an interruption. Who may do what, and how often, is in the deployment's specification.

mod bucket;
mod meter;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use athanor_contract::{
    hexadecimal,
    serve::{AccessConfig, Caller as CallerConfig, Scope},
};
use athanor_serving::api::openai::ApiError;
use axum::{
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{AUTHORIZATION, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use sha2::{Digest, Sha256};

use bucket::Bucket;
pub use meter::Meter;

/// What begins a line with the hash of a key.
const PREFIX: &str = "sha256:";
/// Between two looks at the files.
const PERIOD: Duration = Duration::from_secs(10);

type Hash = [u8; 32];

/// A caller that is let in.
#[derive(Debug)]
pub struct Caller {
    pub name: Arc<str>,
    scopes: Vec<Scope>,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

impl Caller {
    fn new(config: &CallerConfig) -> Self {
        let bucket = |limit: Option<u32>| limit.map(Bucket::new);
        Self {
            name: config.name.as_str().into(),
            scopes: config.scopes.clone(),
            requests: bucket(config.requests_per_minute),
            tokens: bucket(config.tokens_per_minute),
        }
    }

    /// Whether tokens are counted for this caller.
    pub fn has_token_limit(&self) -> bool {
        self.tokens.is_some()
    }

    fn use_tokens(&self, tokens: u64) {
        if let Some(bucket) = &self.tokens {
            bucket.take(tokens as f64, Instant::now());
        }
    }
}

/// The callers of a deployment.
#[derive(Debug)]
pub struct Access {
    callers: Vec<Arc<Caller>>,
    folder: PathBuf,
    keys: RwLock<Keys>,
}

/// What the files say.
#[derive(Debug, Default)]
struct Keys {
    /// Content of each caller's file; an error is its text.
    files: Vec<Result<String, String>>,
    by_hash: HashMap<Hash, Arc<Caller>>,
}

/// Why a request is not let in.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Denied {
    #[error("an API key is required; send it in the header \"Authorization: Bearer <key>\"")]
    NoKey,
    #[error("the API key is not valid")]
    UnknownKey,
    #[error("the API key of {caller:?} does not have the scope {:?}", scope.name())]
    Scope { caller: Arc<str>, scope: Scope },
    #[error("the API key of {caller:?} has used its {what} of this minute; try again in {} s", seconds(*wait))]
    Limit { caller: Arc<str>, what: &'static str, wait: Duration },
}

impl Denied {
    /// Value of the label `reason` of the metric that counts it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoKey => "no_key",
            Self::UnknownKey => "unknown_key",
            Self::Scope { .. } => "scope",
            Self::Limit { what, .. } => what,
        }
    }
}

fn seconds(wait: Duration) -> u64 {
    wait.as_secs_f64().ceil().max(1.0) as u64
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        let (status, code) = match &self {
            Self::NoKey | Self::UnknownKey => (StatusCode::UNAUTHORIZED, "invalid_api_key"),
            Self::Scope { .. } => (StatusCode::FORBIDDEN, "insufficient_scope"),
            Self::Limit { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded"),
        };
        let mut response = ApiError::new(status, code, self.to_string()).into_response();
        match self {
            Self::NoKey | Self::UnknownKey => {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::Limit { wait, .. } => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds(wait)));
            }
            Self::Scope { .. } => {}
        }
        response
    }
}

impl Access {
    /// The callers of a configuration, with the keys in `folder`. A caller without a file, or with lines that are no hashes, is
    /// reported and is not let in.
    pub fn new(config: &AccessConfig, folder: PathBuf) -> Self {
        let callers: Vec<Arc<Caller>> = config.callers.iter().map(|caller| Arc::new(Caller::new(caller))).collect();
        let access = Self { callers, folder, keys: RwLock::default() };
        access.read_again();
        access
    }

    /// Reads the folder again every ten seconds, for as long as the process lives.
    pub async fn follow(self: Arc<Self>) {
        loop {
            tokio::time::sleep(PERIOD).await;
            self.read_again();
        }
    }

    fn read_again(&self) {
        let file = |caller: &Arc<Caller>| std::fs::read_to_string(self.folder.join(&*caller.name));
        let files: Vec<Result<String, String>> =
            self.callers.iter().map(|caller| file(caller).map_err(|error| error.to_string())).collect();
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        // What is wrong with them was reported when they changed.
        if keys.files != files {
            *keys = Keys { by_hash: by_hash(&self.callers, &files), files };
        }
    }

    /// The caller that the key of a request names.
    ///
    /// # Errors
    /// The request has no valid key, or its caller may not do this.
    pub fn identify(&self, headers: &HeaderMap, scope: Scope) -> Result<Arc<Caller>, Denied> {
        let header = headers.get(AUTHORIZATION).ok_or(Denied::NoKey)?;
        let key = bearer(header).ok_or(Denied::NoKey)?;
        let hash: Hash = Sha256::digest(key.as_bytes()).into();
        let caller = self.keys.read().unwrap_or_else(PoisonError::into_inner).by_hash.get(&hash).cloned();
        let caller = caller.ok_or(Denied::UnknownKey)?;
        if !caller.scopes.contains(&scope) {
            return Err(Denied::Scope { caller: caller.name.clone(), scope });
        }
        Ok(caller)
    }

    /// The caller of a request, which is counted.
    ///
    /// # Errors
    /// The request has no valid key, its caller may not do this, or has done it too often.
    pub fn admit(&self, headers: &HeaderMap, scope: Scope) -> Result<Arc<Caller>, Denied> {
        let caller = self.identify(headers, scope)?;
        let now = Instant::now();
        let limit = |what, wait| Denied::Limit { caller: caller.name.clone(), what, wait };
        // Tokens are taken when the answer is over; until then only their lack counts.
        let tokens = caller.tokens.as_ref().filter(|_| scope == Scope::Infer);
        tokens.map_or(Ok(()), |bucket| bucket.has(now)).map_err(|wait| limit("tokens", wait))?;
        caller
            .requests
            .as_ref()
            .map_or(Ok(()), |bucket| bucket.try_take(now))
            .map_err(|wait| limit("requests", wait))?;
        Ok(caller)
    }
}

/// The token of an `Authorization: Bearer` header.
fn bearer(header: &HeaderValue) -> Option<&str> {
    let (scheme, token) = header.to_str().ok()?.split_once(' ')?;
    Some(token.trim()).filter(|token| scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
}

fn by_hash(callers: &[Arc<Caller>], files: &[Result<String, String>]) -> HashMap<Hash, Arc<Caller>> {
    let mut keys: HashMap<Hash, Arc<Caller>> = HashMap::new();
    for (caller, file) in callers.iter().zip(files) {
        let text = match file {
            Ok(text) => text,
            Err(error) => {
                tracing::error!(error, caller = &*caller.name, "the caller's keys cannot be read; it is not let in");
                continue;
            }
        };
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        for (number, line) in lines {
            match line.trim().strip_prefix(PREFIX).and_then(hexadecimal::decode) {
                Some(hash) => {
                    let other = keys.insert(hash, caller.clone()).filter(|other| other.name != caller.name);
                    if let Some(other) = other {
                        tracing::error!(caller = &*caller.name, other = &*other.name, "two callers have the same key");
                    }
                }
                // The line itself may be a key in clear text.
                None => tracing::error!(
                    caller = &*caller.name,
                    line = number + 1,
                    "the line is not {PREFIX} and 64 hexadecimal digits; it is left out"
                ),
            }
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use athanor_contract::artifact::sha256_hex;

    use super::*;

    fn line(key: &str) -> String {
        format!("{PREFIX}{}\n", sha256_hex(key.as_bytes()))
    }

    fn access(folder: &std::path::Path, callers: &str) -> Access {
        Access::new(&serde_json::from_str(callers).unwrap(), folder.into())
    }

    fn admit(access: &Access, authorization: &str, scope: Scope) -> Result<String, Denied> {
        let headers = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(authorization).unwrap())]);
        access.admit(&headers, scope).map(|caller| caller.name.to_string())
    }

    #[test]
    fn a_key_lets_its_caller_do_what_its_scopes_say() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("app"), line("one") + &line("two")).unwrap();
        std::fs::write(folder.path().join("reviewer"), format!("\n{}\nin-clear-text\n", line("three"))).unwrap();
        std::fs::write(folder.path().join("unnamed"), line("four")).unwrap();
        let access = access(
            folder.path(),
            r#"{"callers": [{"name": "app"}, {"name": "reviewer", "scopes": ["feedback"]}, {"name": "absent"}]}"#,
        );
        let scope = |caller: &str, scope| Err(Denied::Scope { caller: caller.into(), scope });
        for (authorization, wanted, expected) in [
            ("Bearer one", Scope::Infer, Ok("app".to_owned())),
            ("bearer  two", Scope::Feedback, Ok("app".into())),
            ("Bearer three", Scope::Feedback, Ok("reviewer".into())),
            ("Bearer three", Scope::Infer, scope("reviewer", Scope::Infer)),
            ("Bearer in-clear-text", Scope::Feedback, Err(Denied::UnknownKey)),
            ("Bearer four", Scope::Infer, Err(Denied::UnknownKey)),
            ("Bearer One", Scope::Infer, Err(Denied::UnknownKey)),
            ("Bearer ", Scope::Infer, Err(Denied::NoKey)),
            ("Basic one", Scope::Infer, Err(Denied::NoKey)),
            ("one", Scope::Infer, Err(Denied::NoKey)),
        ] {
            assert_eq!(admit(&access, authorization, wanted), expected, "{authorization}");
        }
        assert_eq!(access.admit(&HeaderMap::new(), Scope::Infer).unwrap_err(), Denied::NoKey);
        // A key is withdrawn by its line.
        std::fs::write(folder.path().join("app"), line("two")).unwrap();
        access.read_again();
        assert_eq!(admit(&access, "Bearer one", Scope::Infer), Err(Denied::UnknownKey));
        assert_eq!(admit(&access, "Bearer two", Scope::Infer), Ok("app".into()));
    }

    #[test]
    fn limits_are_each_callers_own() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["few", "many", "tokens"] {
            std::fs::write(folder.path().join(name), line(name)).unwrap();
        }
        let access = access(
            folder.path(),
            r#"{"callers": [{"name": "few", "requestsPerMinute": 2}, {"name": "many"}, {"name": "tokens", "tokensPerMinute": 100}]}"#,
        );
        assert!(admit(&access, "Bearer few", Scope::Infer).is_ok());
        assert!(admit(&access, "Bearer few", Scope::Feedback).is_ok());
        let denied = admit(&access, "Bearer few", Scope::Infer).unwrap_err();
        let Denied::Limit { what: "requests", wait, .. } = &denied else { panic!("{denied:?}") };
        assert!(*wait <= Duration::from_secs(30), "{wait:?}");
        let response = denied.into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        let after: u64 = response.headers()[RETRY_AFTER].to_str().unwrap().parse().unwrap();
        assert!((29..=30).contains(&after), "{after}");
        assert!((0..1_000).all(|_| admit(&access, "Bearer many", Scope::Infer).is_ok()));

        let headers = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static("Bearer tokens"))]);
        let caller = access.admit(&headers, Scope::Infer).unwrap();
        caller.use_tokens(160);
        let denied = admit(&access, "Bearer tokens", Scope::Infer).unwrap_err();
        let Denied::Limit { what: "tokens", wait, .. } = denied else { panic!("{denied:?}") };
        // 60 tokens too many are 36 seconds; one more token is needed.
        assert!((Duration::from_secs(35)..Duration::from_secs(38)).contains(&wait), "{wait:?}");
        assert!(admit(&access, "Bearer tokens", Scope::Feedback).is_ok(), "feedback costs no tokens");
    }
}
