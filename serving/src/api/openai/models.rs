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
use crate::service::Service;

pub async fn models(State(service): State<Arc<Service>>) -> Json<ModelList> {
    Json(ModelList { object: "list".into(), data: vec![describe(&service)] })
}

pub async fn model(
    State(service): State<Arc<Service>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(name) = path.map_err(|rejection| {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_path", rejection.body_text()).param("model")
    })?;
    service.check_model(Some(&name))?;
    Ok(Json(describe(&service)))
}

fn describe(service: &Service) -> Model {
    Model {
        id: service.model_name.clone(),
        object: "model".into(),
        created: service.created,
        owned_by: "athanor".into(),
        labels: service.labels().to_vec(),
        max_model_len: service.max_length(),
    }
}
