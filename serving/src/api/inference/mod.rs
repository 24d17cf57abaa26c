//! The Open Inference Protocol v2 over gRPC for one model, with health and reflection: what tritonclient and KServe's clients speak.
//!
//! Left out: the protocol's optional extensions (repositories, shared memory, statistics).

pub mod protocol;
pub mod tensors;

use std::sync::Arc;

use athanor_telemetry::Readiness;
use tonic::{
    Request, Response, Status,
    metadata::{AsciiMetadataKey, MetadataMap, MetadataValue},
};
use tracing::Instrument;

use crate::{
    api::{headers, observe},
    engine::encode::EngineError,
    service::{Service, ServiceError},
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

    fn check(&self, model: &str, version: Option<&str>) -> Result<(), ServiceError> {
        self.service.check_model(Some(model))?;
        match version {
            Some(version) if !version.is_empty() && version != self.service.revision => {
                Err(ServiceError::UnknownModel {
                    asked: format!("{model}:{version}"),
                    known: format!("{model}:{}", self.service.revision),
                })
            }
            _ => Ok(()),
        }
    }

    async fn infer(&self, request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
        self.check(&request.model_name, request.model_version.as_deref()).map_err(status)?;
        let classifier = self.service.classifier().map_err(status)?;
        let invalid = |error: tensors::TensorError| Status::invalid_argument(error.to_string());
        tensors::check_outputs(&request).map_err(invalid)?;
        let texts = tensors::decode_texts(&request).map_err(invalid)?;
        let classified = classifier.classify(texts).await.map_err(status)?;
        observe::classified(&classified);
        let mut response = ModelInferResponse {
            model_name: self.service.model_name.clone(),
            model_version: self.service.revision.clone(),
            id: request.id.clone(),
            ..Default::default()
        };
        tensors::encode(&request, &classifier.labels, &classified.results, &mut response).map_err(invalid)?;
        Ok(response)
    }
}

/// The one place where an error of the service becomes a gRPC status.
fn status(error: ServiceError) -> Status {
    let message = error.to_string();
    match error {
        ServiceError::UnknownModel { .. } => Status::not_found(message),
        ServiceError::WrongKind { .. } => Status::unimplemented(message),
        ServiceError::NoInput
        | ServiceError::TooManyInputs { .. }
        | ServiceError::TooManyAnswers { .. }
        | ServiceError::EmptyInput { .. }
        | ServiceError::LongInput { .. }
        | ServiceError::LongText { .. }
        | ServiceError::UnknownToken { .. }
        | ServiceError::NoToken { .. }
        | ServiceError::Conversation(_)
        | ServiceError::Grammar(_) => Status::invalid_argument(message),
        ServiceError::Engine(EngineError::QueueFull { .. }) => Status::resource_exhausted(message),
        ServiceError::Engine(EngineError::Stopped) | ServiceError::Draining => Status::unavailable(message),
        // The protocol has no route to a language model's engine.
        ServiceError::Engine(EngineError::Backend(_))
        | ServiceError::NotFinite { .. }
        | ServiceError::Tokenizer(_)
        | ServiceError::Generate(_) => Status::internal(message),
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
        let request = request.into_inner();
        self.check(&request.name, request.version.as_deref()).map_err(status)?;
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
        let request = request.into_inner();
        self.check(&request.name, request.version.as_deref()).map_err(status)?;
        // Other models than classifiers have no tensors here.
        let (inputs, outputs) = self
            .service
            .classifier()
            .map_or_else(|_| Default::default(), |classifier| tensors::describe(classifier.labels.len()));
        let labels =
            serde_json::to_string(self.service.labels()).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(ModelMetadataResponse {
            name: self.service.model_name.clone(),
            versions: vec![self.service.revision.clone()],
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
        let span = observe::classification(id, &self.service.revision, &incoming);
        let started = std::time::Instant::now();
        let mut answer = self.infer(request).instrument(span).await.map(Response::new);
        let code = answer.as_ref().map_or_else(|status| format!("{:?}", status.code()), |_| "Ok".to_owned());
        observe::counted("ModelInfer", code);
        observe::timed("ModelInfer", started);
        match &mut answer {
            Ok(response) => label(response.metadata_mut(), id, &self.service.revision),
            Err(status) => label(status.metadata_mut(), id, &self.service.revision),
        }
        answer
    }
}
