//! The local cluster's Prometheus, and the queries of the chart's dashboards.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub const ADDRESS: &str = "http://198.51.100.1:9090";

/// Samples that are numbers, over all series that a query returns for the time since `began`.
pub async fn samples(http: &reqwest::Client, query: &str, began: SystemTime) -> Result<usize> {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64().to_string());
    let answer: Value = http
        .get(format!("{ADDRESS}/api/v1/query_range"))
        .query(&[("query", query), ("start", &seconds(began)?), ("end", &seconds(SystemTime::now())?), ("step", "5")])
        .send()
        .await
        .context("Prometheus")?
        .json()
        .await
        .context("Prometheus did not answer JSON")?;
    ensure!(answer["status"] == "success", "{query}: {}", answer["error"]);
    let series = answer["data"]["result"].as_array().into_iter().flatten();
    let values = series.flat_map(|series| series["values"].as_array().into_iter().flatten());
    Ok(values.filter(|value| value[1].as_str().is_some_and(|number| number != "NaN")).count())
}

/// Every panel's query of every dashboard in a folder: (dashboard / panel, query) with variables filled in.
pub fn dashboard_queries(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut queries = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let dashboard: Value =
                serde_json::from_slice(&std::fs::read(&path)?).with_context(|| path.display().to_string())?;
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            collect(&name, &dashboard["panels"], &mut queries);
        }
    }
    ensure!(!queries.is_empty(), "{} has no dashboard", folder.display());
    Ok(queries)
}

fn collect(dashboard: &str, panels: &Value, queries: &mut Vec<(String, String)>) {
    for panel in panels.as_array().into_iter().flatten() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            if let Some(query) = target["expr"].as_str() {
                let query =
                    query.replace("$__rate_interval", "30s").replace("$__interval", "30s").replace("$namespace", ".*");
                queries.push((format!("{dashboard} / {}", panel["title"].as_str().unwrap_or("?")), query));
            }
        }
        collect(dashboard, &panel["panels"], queries);
    }
}
