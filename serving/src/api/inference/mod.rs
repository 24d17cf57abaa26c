//! The Open Inference Protocol v2 over gRPC for one model, with health and reflection: what tritonclient and KServe's clients speak.
//!
//! - [`contents`] reads and writes the contents of tensors; [`tensors`] has the tensors of classifiers and embedding models,
//!   [`generation`] those of language models;
//! - [`answers`] is one request to a model, [`stream`] the requests of `ModelStreamInfer`; [`errors`] maps errors to statuses.
//!
//! Left out: the protocol's optional extensions (repositories, shared memory, statistics).

pub mod answers;
pub mod contents;
pub mod errors;
pub mod generation;
pub mod protocol;
pub mod stream;
pub mod tensors;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Instant};

use athanor_telemetry::Readiness;
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{AsciiMetadataKey, MetadataMap, MetadataValue},
};
use tracing::Instrument;

use crate::{
    api::{headers, observe},
    capacity::Capacity,
    service::{Kind, Service},
};

use protocol::{
    DESCRIPTOR, ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
    ModelReadyResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse,
    ServerReadyRequest, ServerReadyResponse, grpc_inference_service_server::GrpcInferenceService,
};

/// The protocol over a [`Service`].
pub struct Inference {
    service: Arc<Service>,
    ready: Readiness,
}

impl Inference {
    pub fn new(service: Arc<Service>, ready: Readiness) -> Self {
        Self { service, ready }
    }
}

/// Puts the request's id and the revision, where they are known, into the metadata of an answer.
pub fn label(metadata: &mut MetadataMap, request_id: &str, revision: &str) {
    for (name, value) in [(headers::REQUEST_ID, request_id), (headers::REVISION, revision)] {
        if !value.is_empty()
            && let Ok(value) = MetadataValue::try_from(value)
        {
            let name = AsciiMetadataKey::from_bytes(name.as_str().as_bytes()).expect("both names are constants");
            metadata.insert(name, value);
        }
    }
}

/// Reflection (versions 1 and 1alpha) of the protocol and of health; the services themselves are added to it.
pub fn reflection() -> Result<tonic::service::Routes, tonic_reflection::server::Error> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTOR)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(tonic::service::Routes::new(builder().build_v1()?).add_service(builder().build_v1alpha()?))
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.ready.get() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        answers::select(&self.service, &request.name, request.version.as_deref(), &metadata.into_headers())?;
        Ok(Response::new(ModelReadyResponse { ready: self.ready.get() }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: "athanor-server".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: Vec::new(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let incoming = metadata.into_headers();
        let selection = answers::select(&self.service, &request.name, request.version.as_deref(), &incoming)?;
        let (inputs, outputs) = match self.service.kind() {
            Kind::Classifier => tensors::describe(self.service.labels().len()),
            Kind::Embedder => tensors::describe_embedding(self.service.embedder().map_err(errors::of_service)?.size()),
            Kind::Generator => generation::describe(),
        };
        let labels =
            serde_json::to_string(self.service.labels()).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(ModelMetadataResponse {
            name: selection.model,
            versions: vec![selection.revision],
            platform: "athanor_libtorch".into(),
            inputs,
            outputs,
            properties: [("labels".to_owned(), labels)].into(),
        }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let incoming = metadata.into_headers();
        let id = headers::request_id(&incoming);
        let id = id.to_str().unwrap_or_default();
        let span = answers::span(&self.service, "ModelInfer", id, &incoming);
        let started = Instant::now();
        let mut answer = answers::whole(&self.service, &request, &incoming).instrument(span).await.map(Response::new);
        let code = answer.as_ref().map_or_else(|status| format!("{:?}", status.code()), |_| "Ok".to_owned());
        observe::counted("ModelInfer", code);
        observe::timed("ModelInfer", started);
        let revision = answers::revision(&self.service, &incoming);
        let revision = revision.as_ref().map_or(self.service.revision.as_str(), |adapter| adapter.name());
        match &mut answer {
            Ok(response) => label(response.metadata_mut(), id, revision),
            Err(status) => label(status.metadata_mut(), id, revision),
        }
        answer
    }

    type ModelStreamInferStream = stream::Responses;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<stream::Responses>, Status> {
        let (metadata, extensions, requests) = request.into_parts();
        let incoming = metadata.into_headers();
        let id = headers::request_id(&incoming).to_str().unwrap_or_default().to_owned();
        let (service, ready) = (self.service.clone(), self.ready.clone());
        let revision = answers::revision(&service, &incoming);
        let opened =
            stream::Opened { service, request_id: id.clone(), incoming, ready, capacity: Capacity::of(&extensions) };
        let mut response = Response::new(stream::respond(opened, requests));
        let revision = revision.as_ref().map_or(self.service.revision.as_str(), |adapter| adapter.name());
        label(response.metadata_mut(), &id, revision);
        Ok(response)
    }
}
