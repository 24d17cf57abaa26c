//! `POST /v1/rerank`: documents in order of their similarity with a query, in the shape that Cohere and Jina share.
//! The score is the cosine of an embedding model's vectors.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    body,
    error::ApiError,
    fields::{Fields, invalid, typed},
};
use crate::service::{Inputs, Service};

/// A document as clients send it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or an object with the string \"text\" is expected")]
enum Document {
    Text(String),
    Object { text: String },
}

pub async fn rerank(State(service): State<Arc<Service>>, request: Request) -> Result<Json<Value>, ApiError> {
    let embedder = service.embedder()?;
    let bytes = body::json(request, service.limits.max_body_bytes).await?;
    let mut fields = Fields::parse(&bytes)?;
    service.check_model(fields.take::<String>("model")?.as_deref())?;
    let query: String = typed("query", fields.require("query")?)?;
    let documents: Vec<Document> = typed("documents", fields.require("documents")?)?;
    let top_n = fields.take::<usize>("top_n")?;
    let returns_documents = fields.take::<bool>("return_documents")?.unwrap_or(false);
    fields.ignore(&["user"]);
    fields.finish()?;
    if top_n == Some(0) {
        return Err(invalid("top_n", "0 is less than 1"));
    }
    let mut texts = vec![query];
    texts.extend(documents.into_iter().map(|document| match document {
        Document::Text(text) | Document::Object { text } => text,
    }));
    check(&texts, service.limits.max_inputs)?;
    let embedded = embedder.embed(Inputs::Texts(texts.clone())).await?;
    let mut scores: Vec<(usize, f32)> = embedded.cosines().into_iter().enumerate().collect();
    scores.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    scores.truncate(top_n.unwrap_or(usize::MAX));
    let result = |(index, score): (usize, f32)| {
        let mut result = json!({"index": index, "relevance_score": score});
        if returns_documents {
            result["document"] = json!({"text": texts[index + 1]});
        }
        result
    };
    Ok(Json(json!({
        "id": format!("rerank-{}", uuid::Uuid::now_v7().simple()),
        "model": service.model_name,
        "results": scores.into_iter().map(result).collect::<Vec<_>>(),
        "usage": {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens},
    })))
}

/// Checks the query, which comes first, and the documents.
fn check(texts: &[String], limit: usize) -> Result<(), ApiError> {
    let documents = texts.len() - 1;
    if documents == 0 {
        return Err(invalid("documents", "the list is empty"));
    }
    // The query is an input as well.
    if texts.len() > limit {
        let most = limit.saturating_sub(1);
        return Err(invalid("documents", format!("{documents} documents; at most {most} in one request")));
    }
    match texts.iter().position(String::is_empty) {
        Some(0) => Err(invalid("query", "the text is empty")),
        Some(index) => Err(invalid(format!("documents[{}]", index - 1), "the text is empty")),
        None => Ok(()),
    }
}
