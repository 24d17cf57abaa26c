//! `router.json`: parsed, and checked where serde cannot.

use std::{collections::HashSet, ops::Deref};

use athanor_contract::{
    process::file,
    redaction::{InvalidPattern, Redaction},
    serve::RouterConfig,
};

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
    #[error("router.json, events.samplePercent: {0} is not between 0 and 100")]
    Sample(u32),
    #[error("router.json, events.{0}")]
    Redact(#[from] InvalidPattern),
}

/// A checked `router.json` with its patterns compiled.
#[derive(Clone, Debug)]
pub struct Configuration {
    file: RouterConfig,
    pub redaction: Redaction,
}

impl Deref for Configuration {
    type Target = RouterConfig;

    fn deref(&self) -> &RouterConfig {
        &self.file
    }
}

/// Parses `router.json`; the error names the field.
pub fn parse(text: &str) -> Result<Configuration, ConfigError> {
    let config: RouterConfig = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
        .map_err(|error| ConfigError::Json { path: error.path().to_string(), message: error.inner().to_string() })?;
    check(config)
}

/// Checks what serde cannot.
pub fn check(config: RouterConfig) -> Result<Configuration, ConfigError> {
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
    let mut redaction = Redaction::default();
    if let Some(events) = &config.events {
        if events.sample_percent > 100 {
            return Err(ConfigError::Sample(events.sample_percent));
        }
        redaction = Redaction::compile(&events.redact)?;
    }
    Ok(Configuration { file: config, redaction })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_configuration_is_refused_by_field() {
        let with = |revisions: &str| format!(r#"{{"namespace": "n", "deployment": "d", "revisions": [{revisions}]}}"#);
        let a = r#"{"name": "a", "service": "a", "weight": 100}"#;
        let parsed = parse(&with(a)).unwrap();
        assert_eq!((parsed.revisions[0].weight, parsed.playground), (100, false));
        let events = |rest: &str| {
            let events = format!(r#""events": {{"bootstrapServers": "b", "topic": "t", {rest}}}, "revisions""#);
            with(a).replace(r#""revisions""#, &events)
        };
        assert!(parse(&events(r#""samplePercent": 5, "redact": ["b+"]"#)).is_ok());
        for (text, part) in [
            (with(""), "there is none"),
            (with(&format!("{a}, {a}")), "revisions[1].name"),
            (with(r#"{"name": "a", "service": "a", "weight": 90}"#), "add up to 90"),
            (with(r#"{"name": "a", "service": "a", "weight": "all"}"#), "revisions[0].weight"),
            ("{".into(), "router.json"),
            (events(r#""samplePercent": 101"#), "events.samplePercent: 101"),
            (events(r#""redact": ["a", "("]"#), "events.redact[1]: regex parse error"),
        ] {
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
