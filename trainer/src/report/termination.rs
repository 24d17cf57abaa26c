//! The termination message: how a result reaches an operator that was away.

use std::path::{Path, PathBuf};

use athanor_contract::{
    process::{self, variable::TERMINATION_LOG},
    train::{TrainResult, TrainSummary, exit_code},
};

use crate::TrainError;

/// What the kubelet keeps.
const LIMIT: usize = 4096;

/// Where the message goes, if anywhere.
pub fn path(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    match variable(TERMINATION_LOG) {
        Some(path) => Some(path.into()),
        None => Some(PathBuf::from(process::path::TERMINATION_LOG)).filter(|path| path.exists()),
    }
}

/// Writes the final result.
pub fn write_result(path: &Path, result: &TrainResult) -> std::io::Result<()> {
    std::fs::write(path, fit(result.clone()))
}

/// Writes why this rank failed. The processes of a pod share the file: one that lost its peer does not overwrite the
/// cause.
pub fn write_failure(path: &Path, error: &TrainError) -> std::io::Result<()> {
    let is_effect = [exit_code::LOST_PEER, exit_code::STOPPED].contains(&error.exit_code());
    if is_effect && std::fs::metadata(path).is_ok_and(|meta| meta.len() > 0) {
        return Ok(());
    }
    write_result(path, &TrainResult::Failed { message: error.to_string() })
}

/// The message in at most 4,096 bytes: what can be looked up in the artifact is left out first, then words are cut.
fn fit(mut result: TrainResult) -> String {
    for attempt in 0.. {
        let text = serde_json::to_string(&result).unwrap_or_default();
        if text.len() <= LIMIT || attempt > 3 {
            return text;
        }
        match &mut result {
            TrainResult::Succeeded(summary) | TrainResult::GateFailed(summary) => shorten(summary, attempt),
            TrainResult::Failed { message } => {
                let cut = LIMIT / 4;
                *message = format!("{}...", message.chars().take(cut).collect::<String>());
            }
        }
    }
    String::new()
}

fn shorten(summary: &mut TrainSummary, attempt: usize) {
    match attempt {
        0 => drop(summary.chosen.remove("labels")),
        1 => summary.metrics.retain(|name, _| {
            !name.contains('/')
                || matches!(name.as_str(), "baseline/accuracy" | "baseline/macroF1" | "teacher/accuracy")
                || name.starts_with("validation/")
                || name.starts_with("crossValidation/")
        }),
        2 => {
            summary.failed_gates =
                summary.failed_gates.iter().take(4).map(|gate| gate.chars().take(300).collect()).collect()
        }
        _ => summary.chosen.clear(),
    }
}

#[cfg(test)]
mod tests {
    use athanor_contract::Decimal;

    use super::*;

    #[test]
    fn the_message_always_fits() {
        let one = Decimal::new(1.0).unwrap();
        let mut summary = TrainSummary { artifact: "file:///a".into(), ..TrainSummary::default() };
        summary.metrics =
            (0..200).map(|i| (format!("source-{i}/accuracy"), one)).chain([("accuracy".into(), one)]).collect();
        summary.failed_gates = vec!["accuracy ".repeat(100); 32];
        summary.chosen.insert("labels".into(), "label".repeat(1000));
        for result in [TrainResult::GateFailed(summary), TrainResult::Failed { message: "ü\n".repeat(4000) }] {
            let text = fit(result);
            assert!(text.len() <= LIMIT, "{}", text.len());
            let again: TrainResult = serde_json::from_str(&text).unwrap();
            if let TrainResult::GateFailed(summary) = again {
                assert!(summary.metrics.contains_key("accuracy") && !summary.failed_gates.is_empty());
            }
        }
    }

    #[test]
    fn an_effect_does_not_overwrite_its_cause() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = || std::fs::read_to_string(file.path()).unwrap();
        write_failure(file.path(), &TrainError::LostPeer("x".into())).unwrap();
        assert!(read().contains("lost a peer"));
        write_failure(file.path(), &TrainError::User("row 3 is empty".into())).unwrap();
        write_failure(file.path(), &TrainError::LostPeer("y".into())).unwrap();
        assert!(read().contains("row 3 is empty"));
    }
}
