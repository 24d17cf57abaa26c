//! `GET /v1/models`

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::StatusCode,
};

use super::{
    error::ApiError,
    types::{Model, ModelList},
};
use crate::{engine::generate::Adapter, service::Service};

pub async fn models(State(service): State<Arc<Service>>) -> Json<ModelList> {
    let adapters = service.adapters();
    let data = std::iter::once(None).chain(adapters.iter().map(Some)).map(|adapter| describe(&service, adapter));
    Json(ModelList { object: "list".into(), data: data.collect() })
}

pub async fn model(
    State(service): State<Arc<Service>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(name) = path.map_err(|rejection| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_path", rejection.body_text()).param("model")
    })?;
    let selection = service.select(Some(&name), None)?;
    Ok(Json(describe(&service, selection.adapter.as_ref())))
}

/// The model, or an adapter of it.
fn describe(service: &Service, adapter: Option<&Adapter>) -> Model {
    Model {
        id: adapter.map_or(service.model_name.clone(), |adapter| adapter.name().to_string()),
        object: "model".into(),
        created: adapter.map_or(service.created, Adapter::created),
        owned_by: "athanor".into(),
        parent: adapter.map(|_| service.model_name.clone()),
        labels: service.labels().to_vec(),
        max_model_len: service.max_length(),
    }
}
