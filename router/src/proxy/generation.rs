//! The routes of language and embedding models: passed on like a classification up to the head of the answer, whose body is then
//! passed on as it arrives ([`super::stream`]).

use std::{sync::Arc, time::Instant};

use athanor_serving::api::{
    headers,
    openai::{body, paths},
};
use axum::{
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};

use super::{
    pass::{self, ApiErrorOf, ProvenId, Way},
    stream::{self, Passing},
};
use crate::{
    access::Meter,
    balance::forward::Policy,
    gateway::Gateway,
    record::generation::{Answers, Recorder, choices},
};

/// Routes whose answers are not recorded: there is nothing to learn from a vector or an order.
const UNRECORDED: [&str; 2] = [paths::EMBEDDINGS, paths::RERANK];

/// Routes of language models.
pub const GENERATING: [&str; 3] = [paths::CHAT, paths::COMPLETIONS, paths::RESPONSES];

/// Passes a request to a language or embedding model on.
pub async fn pass(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let running = gateway.running.begin();
    let (parts, body) = request.into_parts();
    let answer = async {
        body::check_content_type(&parts.headers)?;
        let limits = gateway.limits();
        let body = body::read(&parts.headers, body, limits.max_body_bytes).await?;
        let id = pass::id(&parts)?;
        let began = Instant::now();
        let policy = Policy::generation(&limits);
        let send = |request| gateway.client.open(request);
        let selects = pass::selects_adapter(&gateway, &body);
        let way = Way { policy, is_counted: true, selects };
        let forwarded = pass::pass_on(&gateway, &parts, &id, &body, way, send).await?;
        Ok::<_, ApiErrorOf>((id, body, began, way, forwarded))
    };
    let (id, body, began, way, forwarded) = match answer.await {
        Ok(answered) => answered,
        Err(error) => return error.into_response(),
    };
    let status = forwarded.answer.status();
    let is_recorded = status == StatusCode::OK && !UNRECORDED.contains(&parts.uri.path());
    let meter = Meter::of(pass::caller(&parts), body.len()).filter(|_| status.is_success());
    let recorded = gateway.records().filter(|_| is_recorded).zip(choices(&body));
    let recorder = recorded.map(|(config, choices)| Recorder {
        config,
        id,
        request_id: gateway.ids.prove(id, choices),
        request: body,
        answers: Answers::default(),
        trace_parent: athanor_telemetry::propagation::current_traceparent(),
    });
    let proven = recorder.as_ref().map(|recorder| ProvenId(recorder.request_id.clone()));
    let revision = forwarded.revision.clone();
    let passing = Passing {
        gateway,
        revision: forwarded.revision,
        // A head with an error status has been counted as what it is; a request for one revision or for an adapter is not
        // counted at all.
        is_counted: status.is_success() && !way.selects && !parts.headers.contains_key(headers::REVISION),
        recorder,
        meter,
        began,
        limit: way.policy.timeout,
        outstanding: forwarded.outstanding,
        running,
    };
    let mut response = pass::by(stream::respond(forwarded.answer, passing), revision);
    if let Some(proven) = proven {
        response.extensions_mut().insert(proven);
    }
    response
}
