//! The routes of servers, all of which are passed on.

use athanor_contract::serve::ServeLimits;
use athanor_serving::{
    api::openai::{self, openapi, paths},
    service::Service,
};

use super::*;

/// Routes that run no model.
const PLAIN: [&str; 5] = [paths::TOKENIZE, paths::DETOKENIZE, paths::MODELS, paths::MODEL, paths::OPENAPI];

fn request_of(path: &str) -> Value {
    match path {
        paths::CHAT => json!({"messages": [{"role": "user", "content": "[a]"}]}),
        paths::COMPLETIONS | paths::TOKENIZE => json!({"prompt": "[a]"}),
        paths::DETOKENIZE => json!({"tokens": [1]}),
        paths::RERANK => json!({"query": "a", "documents": ["a"]}),
        _ => json!({"input": "[a]"}),
    }
}

#[tokio::test]
async fn every_documented_route_of_a_server_is_passed_on_and_those_with_a_model_are_counted() {
    let services: [Arc<Service>; 3] = [
        test_support::service().0,
        test_support::embedding_model(),
        test_support::language_model(ServeLimits::default()).0,
    ];
    for service in services {
        let document = openapi::document(&service);
        let (address, _server) = serve(([127, 0, 0, 1], 0).into(), openai::app(service.clone(), Router::new())).await;
        let gateway = gateway(config(&[("a", 100)]), &[("a", &[address])]);
        let mut counted = 0;
        for (path, item) in document["paths"].as_object().unwrap() {
            let builder = Request::builder().uri(path.replace("{model}", &service.model_name));
            let (parts, body) = match item.get("get") {
                Some(_) => send(&gateway, builder, "").await,
                None => {
                    let builder = builder.method(Method::POST).header("content-type", "application/json");
                    send(&gateway, builder, &request_of(path).to_string()).await
                }
            };
            assert_eq!(parts.status, StatusCode::OK, "{path}: {body}");
            assert_eq!(parts.headers["x-athanor-revision"], "a", "{path}");
            if path == paths::OPENAPI {
                assert_eq!(body, document);
            }
            counted += u64::from(!PLAIN.contains(&path.as_str()));
        }
        let analysis = gateway.analysis.read().revisions["a"].clone();
        assert!(counted > 0);
        assert_eq!((analysis.requests, analysis.errors, analysis.refused), (counted, 0, 0), "{}", service.model_name);
    }
}
