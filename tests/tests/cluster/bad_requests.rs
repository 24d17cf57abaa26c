//! Requests to a classifier that are the client's mistakes.

use anyhow::{Context, Result, ensure};
use athanor_tests::traffic::Client;
use serde_json::json;

/// Requests that cannot be answered get a 4xx and a reason, and leave the server well.
pub async fn check(base: &str) -> Result<()> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    let post = async |path: &str, body: Vec<u8>| {
        let response =
            http.post(format!("{base}{path}")).header("content-type", "application/json").body(body).send().await?;
        let status = response.status().as_u16();
        Ok::<_, anyhow::Error>((status, response.text().await?))
    };
    let big = json!({"input": "x".repeat(3 << 20)}).to_string().into_bytes();
    let many = json!({"input": vec!["x"; 5000]}).to_string().into_bytes();
    for (path, body, statuses, reason) in [
        ("/v1/classify", b"{\"input\": ".to_vec(), &[400][..], ""),
        ("/v1/classify", b"{\"inputs\": \"x\"}".to_vec(), &[400, 422], "input"),
        ("/v1/classify", b"{\"input\": 7}".to_vec(), &[400, 422], "input"),
        ("/v1/classify", b"{\"input\": []}".to_vec(), &[400, 422], "input"),
        ("/v1/classify", b"{\"input\": \"\xff\xfe\"}".to_vec(), &[400], "UTF-8"),
        ("/v1/classify", big, &[413], ""),
        ("/v1/classify", many, &[400, 413, 422], ""),
        ("/v1/classify", br#"{"input": "x", "model": "another"}"#.to_vec(), &[404], "another"),
        ("/v1/nothing", b"{}".to_vec(), &[404], ""),
    ] {
        let (status, text) = post(path, body).await?;
        ensure!(statuses.contains(&status), "{path}: {status} {text}");
        ensure!(text.contains("error") && text.contains(reason), "{path}: {status}: no reason in {text}");
    }
    // Whether the answer overtakes the body is a matter of luck: many tries.
    let big = json!({"input": "x".repeat(8 << 20)}).to_string().into_bytes();
    for attempt in 0..20 {
        let (status, _) = post("/v1/classify", big.clone()).await.with_context(|| format!("attempt {attempt}"))?;
        ensure!(status == 413, "attempt {attempt}: {status}");
    }
    let client = Client::new(base)?;
    client.classify("Still well?", None).await.context("after the bad requests")?;
    Ok(())
}
