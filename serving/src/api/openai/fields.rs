//! The fields of a request's JSON object, taken one by one: each error names its field, and a field that nobody takes
//! is an error.

use std::str::FromStr;

use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{body, error::ApiError};
use crate::service::Inputs;

/// The fields that were not taken yet.
pub struct Fields(Map<String, Value>);

/// An error about a field.
pub fn invalid(param: impl Into<String>, message: impl std::fmt::Display) -> ApiError {
    let param = param.into();
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_field", format!("{param}: {message}")).param(param)
}

/// An error about a field whose value is valid at OpenAI, but not supported here.
pub fn unsupported(param: impl Into<String>, message: impl std::fmt::Display) -> ApiError {
    let param = param.into();
    ApiError::new(StatusCode::BAD_REQUEST, "unsupported_parameter", format!("{param}: {message}")).param(param)
}

impl Fields {
    pub fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        body::parse(bytes).map(Self)
    }

    /// The fields of an object that was no body of HTTP.
    pub fn of(object: Map<String, Value>) -> Self {
        Self(object)
    }

    /// The field as it is; `None` if it is absent or null.
    pub fn take_value(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// The field; `None` if it is absent or null.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        self.take_value(name).map(|value| typed(name, value)).transpose()
    }

    /// The field without taking it.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// Takes the field if its value is the wanted one, and returns whether it is.
    pub fn take_if(&mut self, name: &str, is_wanted: impl Fn(&Value) -> bool) -> bool {
        let found = self.0.get(name).is_some_and(is_wanted);
        if found {
            self.0.remove(name);
        }
        found
    }

    pub fn require(&mut self, name: &str) -> Result<Value, ApiError> {
        self.take_value(name).ok_or_else(|| invalid(name, "missing"))
    }

    /// Takes fields that have no effect here.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.0.remove(*name);
        }
    }

    /// Takes a field that may only have values which ask for nothing.
    pub fn refuse(&mut self, name: &str, asks: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take_value(name) {
            Some(value) if asks(&value) => Err(unsupported(name, "not supported")),
            _ => Ok(()),
        }
    }

    /// Refuses fields that were not taken.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.0.into_iter().next() {
            Some((name, _)) => Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "unknown_field",
                format!("{name}: there is no such parameter"),
            )
            .param(name)),
            None => Ok(()),
        }
    }
}

/// A value as a type; errors have the path of the wrong part.
pub fn typed<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let param = match path.as_str() {
            "." => name.to_owned(),
            path if path.starts_with('[') => format!("{name}{path}"),
            path => format!("{name}.{path}"),
        };
        invalid(param, error.inner())
    })
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
pub fn inputs(name: &str, value: Value) -> Result<Inputs, ApiError> {
    let wrong = |param: String| invalid(param, "a string, a list of strings, or token ids are expected");
    let list = match value {
        Value::String(text) => return Ok(Inputs::Texts(vec![text])),
        Value::Array(list) => list,
        _ => return Err(wrong(name.to_owned())),
    };
    match list.first() {
        None => {
            Err(ApiError::new(StatusCode::BAD_REQUEST, "input_empty", format!("{name}: the list is empty")).param(name))
        }
        Some(Value::String(_)) => typed(name, Value::Array(list)).map(Inputs::Texts),
        Some(Value::Number(_)) => typed(name, Value::Array(list)).map(|row| Inputs::Tokens(vec![row])),
        Some(Value::Array(_)) => typed(name, Value::Array(list)).map(Inputs::Tokens),
        Some(_) => Err(wrong(format!("{name}[0]"))),
    }
}

/// Whether a field asks for something that is not there: neither false, 0, empty nor a word for nothing.
pub fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => f64::from_str(&number.to_string()) != Ok(0.0),
        Value::String(text) => !matches!(text.as_str(), "" | "none" | "auto"),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}
