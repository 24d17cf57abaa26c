//! `POST /v1/classify`

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};

use super::{
    body,
    error::ApiError,
    types::{ClassifyRequest, ClassifyResponse, ClassifyResult, LabelScore, Usage},
};
use crate::{
    api::observe,
    service::{Classified, Service},
};

pub async fn classify(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<Json<ClassifyResponse>, ApiError> {
    let classifier = service.classifier()?;
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let request: ClassifyRequest = body::parse(&bytes)?;
    service.check_model(request.model.as_deref())?;
    let classified = classifier.classify(request.input.0).await?;
    observe::classified(&classified);
    Ok(Json(response(&service, classified)))
}

fn response(service: &Service, classified: Classified) -> ClassifyResponse {
    let labels = service.labels();
    let data = classified.results.into_iter().zip(0..).map(|(result, index)| ClassifyResult {
        index,
        label: labels[result.label].clone(),
        score: result.probabilities[result.label],
        probabilities: labels
            .iter()
            .zip(&result.probabilities)
            .map(|(label, score)| LabelScore { label: label.clone(), score: *score })
            .collect(),
    });
    ClassifyResponse {
        object: "list".into(),
        model: service.model_name.clone(),
        data: data.collect(),
        usage: Usage { prompt_tokens: classified.tokens, total_tokens: classified.tokens },
    }
}
