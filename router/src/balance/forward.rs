//! The retry loop, for HTTP and gRPC alike: try endpoints until one answers, within attempts and time.
//!
//! A classification changes nothing, so every attempt may be repeated. An endpoint that could not be reached, or says that it is
//! unavailable, is avoided for a while and costs no attempt; when none is left, the request waits a few seconds for one to appear before it fails.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use athanor_contract::serve::RouterLimits;

use super::{
    endpoints::{Endpoint, Outstanding, Registry, Revision, Snapshot},
    select::{self, Target},
};
use crate::analysis::{self, Analysis, Outcome, Tally};

/// How long an endpoint is avoided that could not be reached or said that it is unavailable.
pub const AVOID: Duration = Duration::from_secs(1);
/// How long an endpoint is avoided that dropped one request: it may have been that request's connection alone.
pub const AVOID_SHORTLY: Duration = Duration::from_millis(100);
/// How long a request that was refused by one endpoint does not try another one that has refused one.
const BUSY: Duration = Duration::from_millis(100);

/// How long an endpoint counts as full that has refused a request for at least [`LONG_WAIT`] seconds. Requests go to others, and while
/// all are full they are refused without asking one: under overload most of the servers' refusals are saved, and their processors compute
/// answers. Within this time a queue does not become empty for which one has to wait so long.
const FULL: Duration = Duration::from_millis(50);
const LONG_WAIT: u64 = 2;

/// Further attempts of a request that was lost: it may be what ends its servers.
const MOST_LOST: u32 = 1;

/// Bounds of one request.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Further attempts after the first, of those that a server took on.
    pub retries: u32,
    /// Time limit of the whole request.
    pub timeout: Duration,
    /// Time limit of one attempt, up to its answer, or up to the head of an answer that is a stream.
    pub attempt_timeout: Duration,
    /// How long a request waits, all in all, while there is no endpoint.
    pub wait: Duration,
    /// Whether it is not sent to a server that is full, and refused while all are.
    pub sheds: bool,
}

impl Policy {
    pub fn new(limits: &RouterLimits) -> Self {
        let timeout = Duration::from_secs(limits.request_timeout_seconds.max(1));
        // Half of it, so that a server that hangs leaves time for another.
        Self {
            retries: limits.retries,
            timeout,
            attempt_timeout: timeout / 2,
            wait: Duration::from_secs(5),
            sheds: false,
        }
    }

    /// The bounds of a request to a language model, which may take the whole time in its first attempt.
    pub fn generation(limits: &RouterLimits) -> Self {
        let timeout = Duration::from_secs(limits.max_request_seconds.max(1));
        Self { timeout, attempt_timeout: timeout, sheds: true, ..Self::new(limits) }
    }
}

/// The outcome of one attempt.
pub enum Attempt<T> {
    /// The answer to hand on.
    Answer { answer: T, worth: analysis::Answer },
    /// The server refuses this request, as any other would: the answer to hand on.
    Refused { answer: T },
    /// The server has too much to do: another may take it now, else this is the answer. `retry_after`: seconds, if it has said so.
    Busy { answer: T, retry_after: Option<u64> },
    /// The server has not loaded the revision's adapter: another may have it, or this one as another revision, else this is the
    /// answer.
    Lacking { answer: T },
    /// The server answered that it cannot: another should, else this is the answer.
    Unavailable { answer: T },
    /// The server answered, and the router has no memory left for the answer.
    Unheld { failure: String },
    /// The request was lost on its way or on the way back.
    Lost { failure: String },
    /// No server was reached.
    Unreached { failure: String },
}

/// An answer and where it came from.
#[derive(Debug)]
pub struct Forwarded<T> {
    pub answer: T,
    pub revision: Arc<str>,
    /// Latency of the last attempt.
    pub latency: Duration,
    /// Counts the request as load of the endpoint. It lives as long as the answer is being read.
    pub outstanding: Outstanding,
}

impl Forwarded<()> {
    fn with<T>(self, answer: T) -> Forwarded<T> {
        let Self { answer: (), revision, latency, outstanding } = self;
        Forwarded { answer, revision, latency, outstanding }
    }
}

/// Why there is no answer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// None was there, or none could be reached.
    #[error("no endpoint of revision {revision:?} or another is ready{}", failure.as_ref().map(|f| format!(": {f}")).unwrap_or_default())]
    NoEndpoint { revision: String, failure: Option<String> },
    #[error("no server answered: {failure}")]
    Failed { revision: String, failure: String },
    #[error("no answer within {seconds} s")]
    Timeout { revision: String, seconds: u64 },
    /// The router cannot hold the answer.
    #[error("{failure}")]
    Overloaded { revision: String, failure: String },
    /// None was asked, because all have just refused others.
    #[error("the servers have too much to do; try again in {retry_after} s")]
    Full { revision: String, retry_after: u64 },
}

impl ForwardError {
    /// The revision that should have answered.
    pub fn revision(&self) -> &str {
        match self {
            Self::NoEndpoint { revision, .. }
            | Self::Failed { revision, .. }
            | Self::Timeout { revision, .. }
            | Self::Overloaded { revision, .. }
            | Self::Full { revision, .. } => revision,
        }
    }
}

/// The outcomes of a request's attempts so far.
struct SoFar<'a, T> {
    /// The newest answer that is worth less than another attempt.
    fallback: Option<Forwarded<T>>,
    /// The newest failure.
    failure: Option<String>,
    /// The last server had too much to do, or lacked the adapter.
    busy: bool,
    /// The last server lacked the adapter.
    lacking: bool,
    /// Attempts that were lost after a server had been reached.
    lost: u32,
    /// What counts in the analysis.
    tally: Tally<'a>,
}

/// What follows an attempt.
enum Then<T> {
    /// This is what the client gets.
    End(Result<Forwarded<T>, ForwardError>),
    /// Another attempt. `was_taken_on`: the server took the request on.
    Another { was_taken_on: bool },
}

impl<T> SoFar<'_, T> {
    /// Whether nothing has been attempted yet.
    fn is_first(&self) -> bool {
        self.fallback.is_none() && self.failure.is_none()
    }

    /// Counts the revisions whose endpoints are all full as if they had been asked and had refused, up to the first one that is not.
    /// Returns the seconds after which to try again if there is none that is not. Endpoints that would not be asked are left out.
    fn shed(&mut self, revisions: &[&Revision], usable: impl Fn(&Endpoint) -> bool, now: Instant) -> Option<u64> {
        let is_open = |endpoint: &&Arc<Endpoint>| {
            usable(endpoint) && !endpoint.draining() && endpoint.avoided_until(now).is_none()
        };
        let mut soonest = None;
        for revision in revisions {
            for endpoint in revision.endpoints.iter().filter(is_open) {
                let retry_after = endpoint.full(now)?;
                soonest = Some(soonest.map_or(retry_after, |soonest: u64| soonest.min(retry_after)));
            }
            if revision.endpoints.iter().any(|endpoint| is_open(&endpoint)) {
                self.tally.add(&revision.name, Outcome::Busy);
            }
        }
        soonest
    }

    /// Counts an attempt and keeps what is to be known of it. `from`: where it went, and how long it took.
    fn record(&mut self, outcome: Attempt<T>, endpoint: &Endpoint, from: Forwarded<()>) -> Then<T> {
        self.busy = false;
        self.lacking = matches!(outcome, Attempt::Lacking { .. });
        let revision = from.revision.clone();
        match outcome {
            Attempt::Answer { answer, worth } => {
                self.tally.add(&revision, Outcome::Answered { latency: from.latency, answer: worth });
                return Then::End(Ok(from.with(answer)));
            }
            Attempt::Refused { answer } => {
                self.tally.add(&revision, Outcome::Rejected);
                return Then::End(Ok(from.with(answer)));
            }
            // The router's own trouble, which counts for no revision.
            Attempt::Unheld { failure } => {
                return Then::End(Err(ForwardError::Overloaded { revision: revision.to_string(), failure }));
            }
            Attempt::Busy { answer, retry_after } => {
                let now = Instant::now();
                endpoint.set_busy(now, BUSY);
                if let Some(seconds) = retry_after.filter(|&seconds| seconds >= LONG_WAIT) {
                    endpoint.set_full(now, FULL, seconds);
                }
                self.tally.add(&revision, Outcome::Busy);
                self.fallback = Some(from.with(answer));
                self.busy = true;
            }
            Attempt::Lacking { answer } => {
                self.tally.add(&revision, Outcome::Rejected);
                self.fallback = Some(from.with(answer));
                self.busy = true;
            }
            Attempt::Unavailable { answer } => {
                self.tally.add(&revision, Outcome::Unavailable);
                endpoint.avoid(Instant::now(), AVOID);
                self.fallback = Some(from.with(answer));
                // It has not begun, as a server that is starting or going: like one that was not reached.
                return Then::Another { was_taken_on: false };
            }
            Attempt::Lost { failure } => {
                self.tally.add(&revision, Outcome::Missing);
                endpoint.avoid(Instant::now(), AVOID_SHORTLY);
                self.failure = Some(failure);
                self.lost += 1;
            }
            Attempt::Unreached { failure } => {
                self.tally.add(&revision, Outcome::Missing);
                endpoint.avoid(Instant::now(), AVOID);
                self.failure = Some(failure);
                return Then::Another { was_taken_on: false };
            }
        }
        Then::Another { was_taken_on: true }
    }
}

/// Runs `attempt` on one endpoint after the other until there is an answer; it also takes the adapter of the revision that the
/// endpoint answers for. `usable` leaves endpoints out, such as those without
/// a gRPC port. The request is counted in `analysis`, once for each revision that took part; absent: nowhere, as of requests that do
/// not run the model.
pub async fn forward<T, F>(
    registry: &Registry,
    analysis: Option<&Analysis>,
    target: &Target,
    policy: Policy,
    usable: impl Fn(&Endpoint) -> bool,
    attempt: impl Fn(Arc<Endpoint>, Option<Arc<str>>) -> F,
) -> Result<Forwarded<T>, ForwardError>
where
    F: Future<Output = Attempt<T>>,
{
    let begin = Instant::now();
    let deadline = begin + policy.timeout;
    let mut snapshots = registry.subscribe();
    // With a revision: the endpoint lacks its adapter and may answer for another one.
    let mut tried: Vec<(Option<Arc<str>>, Arc<Endpoint>)> = Vec::new();
    let mut left = policy.retries;
    let mut give_up: Option<Instant> = None;
    let mut so_far =
        SoFar { fallback: None, failure: None, busy: false, lacking: false, lost: 0, tally: Tally::new(analysis) };
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let now = Instant::now();
        let sheds = policy.sheds && so_far.is_first();
        let revisions = select::revisions(&snapshot, target);
        if sheds && let Some(retry_after) = so_far.shed(&revisions, &usable, now) {
            return Err(ForwardError::Full { revision: first(&snapshot, target), retry_after });
        }
        let chosen = revisions.into_iter().find_map(|revision| {
            let concerns = |name: &Option<Arc<str>>| name.as_ref().is_none_or(|name| *name == revision.name);
            let tried = tried.iter().filter(|(name, _)| concerns(name)).map(|(_, endpoint)| endpoint.clone());
            let tried: Vec<Arc<Endpoint>> = tried.collect();
            let is_refused = so_far.busy && !so_far.lacking;
            let usable = |endpoint: &Endpoint| {
                let is_left_out = is_refused && endpoint.is_busy(now) || sheds && endpoint.full(now).is_some();
                usable(endpoint) && !is_left_out
            };
            let endpoint = select::endpoint(&revision.endpoints, usable, &tried, now, &mut rand::rng())?;
            Some((revision.name.clone(), revision.adapter.clone(), endpoint))
        });
        let Some((revision, adapter, endpoint)) = chosen else {
            let until = (*give_up.get_or_insert(now + policy.wait)).min(deadline);
            if so_far.busy || now >= until {
                let revision = first(&snapshot, target);
                if so_far.tally.is_empty() && snapshot.revision(&revision).is_some() {
                    so_far.tally.add(&revision.as_str().into(), Outcome::Missing);
                }
                return so_far.fallback.ok_or(ForwardError::NoEndpoint { revision, failure: so_far.failure });
            }
            tried.clear();
            let wake = soonest(&snapshot, target, now).unwrap_or(until).min(until);
            tokio::select! {
                _ = snapshots.changed() => {}
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            continue;
        };
        let outstanding = endpoint.begin();
        let limit = policy.attempt_timeout.min(deadline.saturating_duration_since(now));
        let outcome = tokio::time::timeout(limit, attempt(endpoint.clone(), adapter)).await.unwrap_or_else(|_| {
            Attempt::Lost { failure: format!("{} did not answer within {:.1} s", endpoint.http, limit.as_secs_f64()) }
        });
        let ended = Instant::now();
        let latency = ended.saturating_duration_since(now);
        let from = Forwarded { answer: (), revision: revision.clone(), latency, outstanding };
        let was_taken_on = match so_far.record(outcome, &endpoint, from) {
            Then::End(end) => return end,
            Then::Another { was_taken_on } => was_taken_on,
        };
        if ended >= deadline {
            let error = ForwardError::Timeout { revision: revision.to_string(), seconds: policy.timeout.as_secs() };
            return so_far.fallback.ok_or(error);
        }
        if was_taken_on {
            if left == 0 || so_far.lost > MOST_LOST {
                let failure = so_far.failure.unwrap_or_default();
                return so_far.fallback.ok_or(ForwardError::Failed { revision: revision.to_string(), failure });
            }
            left -= 1;
        }
        tracing::debug!(
            revision = &*revision,
            endpoint = %endpoint.http,
            failure = so_far.failure,
            busy = so_far.busy,
            "trying another endpoint"
        );
        metrics::counter!("athanor_router_retries_total").increment(1);
        tried.push((so_far.lacking.then_some(revision), endpoint));
    }
}

/// The revision that should have answered.
fn first(snapshot: &Snapshot, target: &Target) -> String {
    match target {
        Target::Pinned(name) => name.clone(),
        Target::Weighted(_) => {
            select::revisions(snapshot, target).first().map(|revision| revision.name.to_string()).unwrap_or_default()
        }
    }
}

/// When the first of the avoided endpoints may be used again.
fn soonest(snapshot: &Snapshot, target: &Target, now: Instant) -> Option<Instant> {
    select::revisions(snapshot, target)
        .iter()
        .flat_map(|revision| &revision.endpoints)
        .filter_map(|endpoint| endpoint.avoided_until(now))
        .min()
}
