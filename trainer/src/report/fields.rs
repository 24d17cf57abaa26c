//! A struct as names and values, for tables of hyperparameters.

use serde::Serialize;

use crate::TrainError;

/// The fields of a struct with their values as text, sorted by name.
pub fn pairs(value: &impl Serialize) -> Result<Vec<(String, String)>, TrainError> {
    let serde_json::Value::Object(mut object) = serde_json::to_value(value).map_err(TrainError::other)? else {
        return Ok(Vec::new());
    };
    object.sort_keys();
    let text = |value: serde_json::Value| match value {
        serde_json::Value::String(text) => text,
        other => other.to_string(),
    };
    Ok(object.into_iter().map(|(name, value)| (name, text(value))).collect())
}
