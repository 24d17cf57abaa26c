//! `router.json`: parsed, and checked where serde cannot.

use std::collections::HashSet;

use athanor_contract::{process::file, serve::RouterConfig};

/// Key of the ConfigMap.
pub const KEY: &str = file::ROUTER;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("router.json, {path}: {message}")]
    Json { path: String, message: String },
    #[error("router.json, revisions: there is none")]
    NoRevision,
    #[error("router.json, revisions[{index}].name: {name:?} is there twice")]
    Twice { index: usize, name: String },
    #[error("router.json, revisions: the weights add up to {sum}, not 100")]
    Weights { sum: u64 },
}

/// Parses `router.json`; the error names the field.
pub fn parse(text: &str) -> Result<RouterConfig, ConfigError> {
    let config: RouterConfig = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
        .map_err(|error| ConfigError::Json { path: error.path().to_string(), message: error.inner().to_string() })?;
    if config.revisions.is_empty() {
        return Err(ConfigError::NoRevision);
    }
    let mut names = HashSet::new();
    for (index, revision) in config.revisions.iter().enumerate() {
        if !names.insert(&revision.name) {
            return Err(ConfigError::Twice { index, name: revision.name.clone() });
        }
    }
    let sum = config.revisions.iter().map(|revision| u64::from(revision.weight)).sum();
    if sum != 100 {
        return Err(ConfigError::Weights { sum });
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_configuration_is_refused_by_field() {
        let with = |revisions: &str| format!(r#"{{"namespace": "n", "deployment": "d", "revisions": [{revisions}]}}"#);
        let a = r#"{"name": "a", "service": "a", "weight": 100}"#;
        assert_eq!(parse(&with(a)).unwrap().revisions[0].weight, 100);
        for (text, part) in [
            (with(""), "there is none"),
            (with(&format!("{a}, {a}")), "revisions[1].name"),
            (with(r#"{"name": "a", "service": "a", "weight": 90}"#), "add up to 90"),
            (with(r#"{"name": "a", "service": "a", "weight": "all"}"#), "revisions[0].weight"),
            ("{".into(), "router.json"),
        ] {
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
