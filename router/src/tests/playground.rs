//! The page at `/`.

use athanor_contract::serve::AccessConfig;
use axum::http::{HeaderMap, response::Parts};
use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};

use super::*;
use crate::access::Access;

fn with_playground() -> RouterConfig {
    RouterConfig { playground: true, ..config(&[("a", 100)]) }
}

async fn ask(gateway: &Arc<Gateway>, method: Method, path: &str) -> (Parts, String) {
    let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
    let (parts, body) = app(gateway.clone()).oneshot(request).await.unwrap().into_parts();
    (parts, String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap())
}

/// The text between an opening tag and the next closing one of the same name; both are in the page once.
fn inside<'a>(page: &'a str, open: &str, close: &str) -> &'a str {
    assert_eq!((page.matches(open).count(), page.matches(close).count()), (1, 1), "{open}");
    page.split_once(open).unwrap().1.split_once(close).unwrap().0
}

/// The sources of a directive of the Content-Security-Policy.
fn directive(headers: &HeaderMap, name: &str) -> String {
    let policy = headers["content-security-policy"].to_str().unwrap();
    let mut directives = policy.split("; ").filter_map(|directive| directive.split_once(' '));
    directives.find(|(found, _)| *found == name).unwrap_or_else(|| panic!("{name} is not in {policy}")).1.to_owned()
}

#[tokio::test]
async fn the_page_is_there_only_while_the_deployment_has_a_playground() {
    let gateway = gateway(config(&[("a", 100)]), &[]);
    for method in [Method::GET, Method::POST] {
        let (parts, body) = ask(&gateway, method.clone(), "/").await;
        assert_eq!(parts.status, StatusCode::NOT_FOUND, "{method}");
        assert!(body.contains("path_not_found"), "{body}");
    }
    gateway.registry.set_config(crate::config::check(with_playground()).unwrap());
    let (parts, page) = ask(&gateway, Method::GET, "/").await;
    assert_eq!(
        (parts.status, &parts.headers["content-type"]),
        (StatusCode::OK, &"text/html; charset=utf-8".parse().unwrap())
    );
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    let (parts, body) = ask(&gateway, Method::HEAD, "/").await;
    assert_eq!((parts.status, &*body), (StatusCode::OK, ""));
    let (parts, _) = ask(&gateway, Method::POST, "/").await;
    assert_eq!((parts.status, &parts.headers["allow"]), (StatusCode::METHOD_NOT_ALLOWED, &"GET,HEAD".parse().unwrap()));
    assert_eq!(ask(&gateway, Method::GET, "/playground").await.0.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_browser_runs_the_script_of_the_page_and_nothing_else() {
    let (parts, page) = ask(&gateway(with_playground(), &[]), Method::GET, "/").await;
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
    let script = inside(&page, "<script type=\"module\">", "</script>");
    assert!(script.contains("start();"));
    assert_eq!(directive(&parts.headers, "script-src"), hash(script));
    assert_eq!(directive(&parts.headers, "style-src"), hash(inside(&page, "<style>", "</style>")));
    for (name, sources) in [
        ("default-src", "'none'"),
        ("connect-src", "'self'"),
        ("base-uri", "'none'"),
        ("form-action", "'none'"),
        ("frame-ancestors", "'none'"),
    ] {
        assert_eq!(directive(&parts.headers, name), sources, "{name}");
    }
    assert_eq!(parts.headers["x-content-type-options"], "nosniff");
    assert_eq!(parts.headers["referrer-policy"], "no-referrer");
    // The policy would block them, and the page would not work.
    for name in ["src=", "style=\"", "onclick=", "http://", "https://", "url("] {
        assert!(!page.contains(name), "{name} is in the page");
    }
    // A model's answer could become elements by them.
    for name in
        ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "setHTML", "srcdoc", "DOMParser", "eval("]
    {
        assert!(!script.contains(name), "{name} is in the script");
    }
}

#[tokio::test]
async fn the_page_requires_no_key_and_its_requests_do() {
    let folder = tempfile::tempdir().unwrap();
    let callers: AccessConfig = serde_json::from_value(json!({"callers": [{"name": "app"}]})).unwrap();
    let mut guarded = unshared(with_playground(), &[]);
    guarded.access = Some(Arc::new(Access::new(&callers, folder.path().into())));
    let gateway = Arc::new(guarded);
    assert_eq!(ask(&gateway, Method::GET, "/").await.0.status, StatusCode::OK);
    for path in ["/v1/models", "/openapi.json", "/playground", "//"] {
        assert_eq!(ask(&gateway, Method::GET, path).await.0.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    gateway.registry.set_config(crate::config::check(config(&[("a", 100)])).unwrap());
    assert_eq!(ask(&gateway, Method::GET, "/").await.0.status, StatusCode::UNAUTHORIZED, "as other unknown paths");
}
