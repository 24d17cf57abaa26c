//! Tokenizing, reranking and shorter vectors, with models by a rule.

use axum::Router;
use serde_json::{Value, json};

use super::{
    app,
    generate_tests::{application, ask, limits, send},
};
use crate::test_support::{self, BEGIN, LONGEST};

async fn refused(app: &Router, path: &str, body: Value, param: &str, part: &str) {
    let (parts, text) = send(app, path, &body).await;
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(parts.status, 400, "{body}: {text}");
    assert_eq!(error["error"]["param"], param, "{body}: {text}");
    assert!(error["error"]["message"].as_str().unwrap().contains(part), "{body}: {text}");
}

#[tokio::test]
async fn a_language_model_tokenizes_prompts_and_conversations() {
    let (app, _, _) = application(limits());
    let path = "/v1/tokenize";
    let body = ask(&app, path, json!({"model": "writer", "prompt": "ab"})).await;
    assert_eq!(body, json!({"count": 3, "max_model_len": LONGEST, "tokens": [97, 98, BEGIN], "token_strs": null}));
    let body = ask(&app, path, json!({"prompt": "ab", "add_special_tokens": false, "return_token_strs": true})).await;
    assert_eq!((&body["tokens"], &body["token_strs"]), (&json!([97, 98]), &json!(["a", "b"])));
    let messages = json!([{"role": "user", "content": "x"}]);
    let with = ask(&app, path, json!({"messages": messages})).await;
    assert_eq!(with["count"], "user: x\n".len() + 1);
    let without = ask(&app, path, json!({"messages": messages, "add_generation_prompt": false})).await;
    assert_eq!(without["count"], "user: x\n".len());
    // What a prompt costs is what it is counted as.
    let answer = ask(&app, "/v1/chat/completions", json!({"messages": messages, "max_tokens": 1})).await;
    assert_eq!(answer["usage"]["prompt_tokens"], with["count"]);

    for (request, param, part) in [
        (json!({}), "prompt", "prompt or messages"),
        (json!({"prompt": "a", "messages": messages}), "messages", "exclude"),
        (json!({"prompt": 1}), "prompt", "string"),
        (json!({"prompt": "a", "add_generation_prompt": true}), "add_generation_prompt", "no such"),
        (json!({"messages": []}), "messages", "empty"),
        (json!({"messages": messages, "add_special_tokens": true}), "add_special_tokens", "template"),
        (json!({"messages": messages, "continue_final_message": true}), "continue_final_message", "not supported"),
    ] {
        refused(&app, path, request, param, part).await;
    }
    assert_eq!(ask(&app, "/v1/detokenize", json!({"tokens": [104, 105, 256]})).await, json!({"prompt": "hi<end>"}));
    refused(&app, "/v1/detokenize", json!({"tokens": [1, 9999]}), "tokens[1]", "9999").await;
    refused(&app, "/v1/detokenize", json!({"tokens": ["a"]}), "tokens[0]", "string").await;
    refused(&app, "/v1/detokenize", json!({}), "tokens", "missing").await;
}

#[tokio::test]
async fn other_models_tokenize_texts() {
    let classifier = app(test_support::service().0, Router::new());
    let vectors = app(test_support::embedding_model(), Router::new());
    for app in [&classifier, &vectors] {
        let body = ask(app, "/v1/tokenize", json!({"prompt": "a bcd"})).await;
        assert_eq!((&body["tokens"], &body["count"]), (&json!([0, 1, 3]), &json!(3)));
        let body = ask(app, "/v1/tokenize", json!({"prompt": "a bcd", "add_special_tokens": false})).await;
        assert_eq!(body["tokens"], json!([1, 3]));
        assert_eq!(ask(app, "/v1/detokenize", json!({"tokens": [1, 3]})).await, json!({"prompt": "x xxx"}));
        let request = json!({"messages": [{"role": "user", "content": "x"}]});
        refused(app, "/v1/tokenize", request, "messages", "without a chat template").await;
    }
}

#[tokio::test]
async fn documents_are_ranked_by_cosine() {
    let app = app(test_support::embedding_model(), Router::new());
    let path = "/v1/rerank";
    // The vectors are (3, 4), (3, 0) and (6, 8): cosines 0.6 and 1.
    let query = "aaa bbbb";
    let request = json!({"model": "vectors", "query": query, "documents": ["aaa", {"text": "aaaaaa bbbbbbbb"}]});
    let body = ask(&app, path, request).await;
    let results = body["results"].as_array().unwrap();
    let found: Vec<(u64, f64)> = results
        .iter()
        .map(|result| (result["index"].as_u64().unwrap(), result["relevance_score"].as_f64().unwrap()))
        .collect();
    assert_eq!((found[0].0, found[1].0), (1, 0), "{body}");
    assert!((found[0].1 - 1.0).abs() < 1e-6 && (found[1].1 - 0.6).abs() < 1e-6, "{body}");
    assert!(results.iter().all(|result| result.get("document").is_none()), "{body}");
    assert_eq!((&body["model"], &body["usage"]["total_tokens"]), (&json!("vectors"), &json!(5)));
    let request = json!({"query": query, "documents": ["aaa", "aaa bbbb"], "top_n": 1, "return_documents": true});
    let body = ask(&app, path, request).await;
    let results = body["results"].as_array().unwrap();
    assert_eq!((results.len(), &results[0]["index"]), (1, &json!(1)));
    assert_eq!(results[0]["document"], json!({"text": "aaa bbbb"}));

    for (request, param, part) in [
        (json!({"documents": ["a"]}), "query", "missing"),
        (json!({"query": "a"}), "documents", "missing"),
        (json!({"query": "a", "documents": []}), "documents", "empty"),
        (json!({"query": "", "documents": ["a"]}), "query", "empty"),
        (json!({"query": "a", "documents": ["a", ""]}), "documents[1]", "empty"),
        (json!({"query": "a", "documents": ["a", 1]}), "documents[1]", "text"),
        (json!({"query": "a", "documents": ["a", "b", "c"]}), "documents", "at most 2"),
        (json!({"query": "a", "documents": ["a"], "top_n": 0}), "top_n", "less than 1"),
        (json!({"query": "a", "documents": ["a"], "topn": 1}), "topn", "no such"),
    ] {
        refused(&app, path, request, param, part).await;
    }
    for service in [test_support::service().0, test_support::language_model(limits()).0] {
        let (parts, text) = send(&super::app(service, Router::new()), path, json!({"query": "a"})).await;
        assert_eq!(parts.status, 404, "{text}");
        assert!(text.contains("wrong_model_kind"), "{text}");
    }
}

#[tokio::test]
async fn shorter_vectors_have_length_one() {
    let app = app(test_support::embedding_model(), Router::new());
    for (dimensions, expected) in
        [(json!(null), json!([3.0, 4.0])), (json!(1), json!([1.0])), (json!(2), json!([0.6, 0.8]))]
    {
        let body = ask(&app, "/v1/embeddings", json!({"input": "aaa bbbb", "dimensions": dimensions})).await;
        let found = body["data"][0]["embedding"].as_array().unwrap();
        assert_eq!(found.len(), expected.as_array().unwrap().len());
        for (found, expected) in found.iter().zip(expected.as_array().unwrap()) {
            assert!((found.as_f64().unwrap() - expected.as_f64().unwrap()).abs() < 1e-6, "{body}");
        }
    }
    for dimensions in [0, 3] {
        let request = json!({"input": "a", "dimensions": dimensions});
        refused(&app, "/v1/embeddings", request, "dimensions", "between 1 and 2").await;
    }
}
