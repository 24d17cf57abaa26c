//! What each hyperparameter may be, read from the schema that the API server checks too: bounds are written down once.

use std::sync::LazyLock;

use athanor_contract::train::{Hyperparameters, ParameterName};
use serde_json::{Map, Value};

use crate::Setting;

/// What a hyperparameter may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limits {
    /// A number between two, whole or not.
    Number { minimum: f64, maximum: f64, whole: bool },
    /// One of a few names, which deserialization knows.
    Name,
}

static FIELDS: LazyLock<Map<String, Value>> =
    LazyLock::new(|| match schemars::schema_for!(Hyperparameters).get("properties") {
        Some(Value::Object(fields)) => fields.clone(),
        _ => Map::new(),
    });

impl Limits {
    /// The limits of a hyperparameter.
    ///
    /// # Errors
    /// A name that is no field of the hyperparameters.
    pub fn of(name: ParameterName) -> Result<Self, String> {
        let field = FIELDS.get(&name.to_string()).ok_or_else(|| format!("{name} is no hyperparameter"))?;
        // An optional field has a list of types.
        let has_type = |wanted: &str| match &field["type"] {
            Value::String(found) => found == wanted,
            Value::Array(found) => found.iter().any(|found| found == wanted),
            _ => false,
        };
        let whole = has_type("integer");
        if !whole && !has_type("number") {
            return Ok(Self::Name);
        }
        let bound = |key: &str, otherwise: f64| field[key].as_f64().unwrap_or(otherwise);
        // Beyond this not every whole number is an f64.
        let largest = (1_u64 << 53) as f64;
        Ok(Self::Number { minimum: bound("minimum", -largest), maximum: bound("maximum", largest), whole })
    }

    /// Whether the setting is one that the hyperparameter may have; names are left to deserialization.
    pub fn check(&self, name: ParameterName, setting: &Setting) -> Result<(), String> {
        match (self, setting) {
            (Self::Number { minimum, maximum, whole }, Setting::Number(number)) => {
                if !(*minimum..=*maximum).contains(number) {
                    Err(format!("{name}: {number} is not between {minimum} and {maximum}"))
                } else if *whole && number.fract() != 0.0 {
                    Err(format!("{name}: {number} is not a whole number"))
                } else {
                    Ok(())
                }
            }
            (Self::Name, Setting::Name(_)) => Ok(()),
            (Self::Number { .. }, Setting::Name(text)) => Err(format!("{name}: {text:?} is not a number")),
            (Self::Name, Setting::Number(number)) => Err(format!("{name}: {number} is a number, not a name")),
        }
    }
}
