//! The Open Inference Protocol through the router: `ModelInfer`, `ModelStreamInfer` ([`super::exchange`]) and the model's metadata are
//! passed on like HTTP requests, the server's own questions are answered here.

use std::{sync::Arc, time::Instant};

use athanor_serving::api::inference::{
    generation, label,
    protocol::{
        ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
        ModelReadyResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse,
        ServerReadyRequest, ServerReadyResponse, grpc_inference_service_server::GrpcInferenceService,
    },
};
use athanor_telemetry::Readiness;
use tonic::{Request, Response, Status, Streaming, metadata::KeyAndValueRef};

use super::{
    call::{self, Client, Passed, Route},
    exchange,
};
use crate::{
    balance::forward::{Forwarded, Policy},
    gateway::Gateway,
};

/// The protocol over the revisions of a [`Gateway`].
pub struct Passing {
    gateway: Arc<Gateway>,
    ready: Readiness,
}

impl Passing {
    pub fn new(gateway: Arc<Gateway>, ready: Readiness) -> Self {
        Self { gateway, ready }
    }

    /// Passes a call on that runs no model, and so does not count in the analysis of a canary.
    async fn plain<Q: Clone, A, F>(
        &self,
        name: &'static str,
        request: Request<Q>,
        call: impl Fn(Client, Request<Q>) -> F,
    ) -> Result<Response<A>, Status>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let (metadata, _, message) = request.into_parts();
        let policy = Policy::new(&self.gateway.limits());
        let route = Route { name, is_counted: false, policy, selects: false, is_generation: false };
        let Passed { id, result, .. } =
            call::pass_on(&self.gateway, route, &metadata.into_headers(), message, call).await;
        respond(&id.unproven(), result)
    }
}

/// The server's answer with this router's id, and without what belongs to the connection to the server.
fn respond<A>(
    id: &str,
    forwarded: Result<Forwarded<Result<Response<A>, Status>>, Status>,
) -> Result<Response<A>, Status> {
    let Forwarded { answer, revision, .. } = match forwarded {
        Ok(forwarded) => forwarded,
        Err(mut status) => {
            label(status.metadata_mut(), id, "");
            return Err(status);
        }
    };
    match answer {
        Ok(response) => {
            let mut clean = Response::new(response.into_inner());
            label(clean.metadata_mut(), id, &revision);
            Ok(clean)
        }
        Err(status) => {
            let mut clean = Status::new(status.code(), status.message());
            for entry in status.metadata().iter() {
                if let KeyAndValueRef::Ascii(key, value) = entry
                    && key.as_str().starts_with("x-")
                {
                    clean.metadata_mut().insert(key.clone(), value.clone());
                }
            }
            label(clean.metadata_mut(), id, &revision);
            Err(clean)
        }
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Passing {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.ready.get() }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: "athanor-router".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: Vec::new(),
        }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let call = |mut client: Client, request| async move { client.model_ready(request).await };
        self.plain("ModelReady", request, call).await
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let call = |mut client: Client, request| async move { client.model_metadata(request).await };
        self.plain("ModelMetadata", request, call).await
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let gateway = &self.gateway;
        let began = Instant::now();
        let (metadata, _, request) = request.into_parts();
        // A shutdown waits for answers of language models.
        let is_generation = generation::is_generation(&request);
        let _running = is_generation.then(|| gateway.running.begin());
        let (policy, selects) = (call::policy(gateway, &request), call::selects_adapter(gateway, &request));
        let route = Route { name: "ModelInfer", is_counted: true, policy, selects, is_generation };
        let call = |mut client: Client, request| async move { client.model_infer(request).await };
        let incoming = metadata.into_headers();
        let Passed { id, caller, result, .. } = call::pass_on(gateway, route, &incoming, request.clone(), call).await;
        let mut shown = id.unproven();
        if let Ok(Forwarded { answer: Ok(response), revision, latency, .. }) = &result {
            let response = response.get_ref();
            if let Some(mut meter) = call::meter(caller.as_ref(), &request) {
                meter.report(generation::reported_tokens(response).unwrap_or_default());
            }
            // There can be feedback to recorded answers only.
            if let Some(mut recorder) = call::recorder(gateway, &request, id) {
                shown.clone_from(&recorder.request_id);
                call::take(&mut recorder, response);
                gateway.record_generations(recorder, revision, began.elapsed());
            } else if let Some(config) = gateway.records() {
                let answer = (id, revision, *latency);
                let proven = call::record_classification(gateway, &config, &request, response, answer).await;
                shown = proven.unwrap_or(shown);
            }
        }
        respond(&shown, result)
    }

    type ModelStreamInferStream = exchange::Responses;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<exchange::Responses>, Status> {
        exchange::open(self.gateway.clone(), self.ready.clone(), request)
    }
}
