//! `GET /openapi.json`: an OpenAPI 3.1 document of the routes that the served model has, with schemas from the types.
//!
//! It describes this API. The operations port's routes on the same port (`/metrics`, `/healthz`, `/readyz`, `/health`) and a
//! router's `/v1/feedback` are not part of it.

pub mod answers;
pub mod requests;

use std::sync::Arc;

use axum::{Json, extract::State};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{error::ErrorBody, paths, types};
use crate::service::{Kind, Service};

/// One operation of the API.
struct Operation {
    path: &'static str,
    summary: &'static str,
    /// Kinds of models that have it.
    kinds: &'static [Kind],
    /// Absent for `GET`.
    request: Option<SchemaOf>,
    /// Absent for a document of any shape.
    answer: Option<SchemaOf>,
    /// Whether the answer may be a stream of events.
    streams: bool,
}

type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

const EVERY: &[Kind] = &[Kind::Classifier, Kind::Embedder, Kind::Generator];

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

const OPERATIONS: &[Operation] = &[
    Operation {
        path: paths::CLASSIFY,
        summary: "Labels of texts with their probabilities",
        kinds: &[Kind::Classifier],
        request: Some(of::<types::ClassifyRequest>),
        answer: Some(of::<types::ClassifyResponse>),
        streams: false,
    },
    Operation {
        path: paths::EMBEDDINGS,
        summary: "Vectors of texts",
        kinds: &[Kind::Embedder],
        request: Some(of::<requests::EmbeddingRequest>),
        answer: Some(of::<answers::Embeddings>),
        streams: false,
    },
    Operation {
        path: paths::RERANK,
        summary: "Documents in order of their similarity with a query",
        kinds: &[Kind::Embedder],
        request: Some(of::<requests::RerankRequest>),
        answer: Some(of::<answers::Ranking>),
        streams: false,
    },
    Operation {
        path: paths::CHAT,
        summary: "Answers to a conversation",
        kinds: &[Kind::Generator],
        request: Some(of::<requests::ChatRequest>),
        answer: Some(of::<answers::ChatCompletion>),
        streams: true,
    },
    Operation {
        path: paths::COMPLETIONS,
        summary: "Continuations of texts",
        kinds: &[Kind::Generator],
        request: Some(of::<requests::CompletionRequest>),
        answer: Some(of::<answers::Completion>),
        streams: true,
    },
    Operation {
        path: paths::RESPONSES,
        summary: "A response to a text or a conversation",
        kinds: &[Kind::Generator],
        request: Some(of::<requests::ResponseRequest>),
        answer: Some(of::<answers::ResponseObject>),
        streams: true,
    },
    Operation {
        path: paths::TOKENIZE,
        summary: "Tokens of a text or a conversation",
        kinds: EVERY,
        request: Some(of::<requests::TokenizeRequest>),
        answer: Some(of::<answers::Tokens>),
        streams: false,
    },
    Operation {
        path: paths::DETOKENIZE,
        summary: "The text of tokens",
        kinds: EVERY,
        request: Some(of::<requests::DetokenizeRequest>),
        answer: Some(of::<answers::Detokenized>),
        streams: false,
    },
    Operation {
        path: paths::MODELS,
        summary: "The model that is served, and its adapters",
        kinds: EVERY,
        request: None,
        answer: Some(of::<types::ModelList>),
        streams: false,
    },
    Operation {
        path: paths::MODEL,
        summary: "The model that is served",
        kinds: EVERY,
        request: None,
        answer: Some(of::<types::Model>),
        streams: false,
    },
    Operation {
        path: paths::OPENAPI,
        summary: "This document",
        kinds: EVERY,
        request: None,
        answer: None,
        streams: false,
    },
];

pub async fn openapi(State(service): State<Arc<Service>>) -> Json<Value> {
    Json(document(&service))
}

/// The document of the API for the model of a service.
pub fn document(service: &Service) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let error = of::<ErrorBody>(&mut generator);
    let kind = service.kind();
    let operations = OPERATIONS.iter().filter(|operation| operation.kinds.contains(&kind));
    let paths: Map<String, Value> =
        operations.map(|operation| (operation.path.to_owned(), path_item(operation, &error, &mut generator))).collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": format!("Athanor: {}", service.model_name),
            "version": service.revision,
            "description": "The API of one model, in OpenAI's shapes.",
        },
        "paths": paths,
        "components": {"schemas": generator.take_definitions(true)},
    })
}

fn path_item(operation: &Operation, error: &Schema, generator: &mut SchemaGenerator) -> Value {
    let body = |schema: Value| json!({"application/json": {"schema": schema}});
    let answer = operation.answer.map_or_else(|| json!({"type": "object"}), |answer| json!(answer(generator)));
    let mut content = body(answer);
    if operation.streams {
        content["text/event-stream"] = json!({"schema": {"type": "string"}});
    }
    let mut described = json!({
        "operationId": operation.path.trim_matches('/').replace(['/', '.'], "_").replace(['{', '}'], ""),
        "summary": operation.summary,
        "responses": {
            "200": {"description": operation.summary, "content": content},
            "default": {"description": "Why there is no answer", "content": body(json!(error))},
        },
    });
    if operation.path.ends_with('}') {
        described["parameters"] =
            json!([{"name": "model", "in": "path", "required": true, "schema": {"type": "string"}}]);
    }
    match operation.request {
        Some(request) => {
            let request = json!(request(generator));
            described["requestBody"] = json!({"required": true, "content": body(request)});
            json!({"post": described})
        }
        None => json!({"get": described}),
    }
}
