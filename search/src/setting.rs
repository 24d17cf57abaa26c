//! A value of one hyperparameter, as JSON and as text.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

/// A value of one hyperparameter.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Setting {
    Number(f64),
    Name(String),
}

impl Setting {
    /// The value in JSON; a whole number has no fraction, since fields of whole numbers accept none.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Number(number) if number.fract() == 0.0 && number.abs() < (1_u64 << 53) as f64 => {
                Value::from(*number as i64)
            }
            Self::Number(number) => Value::from(*number),
            Self::Name(name) => Value::from(name.as_str()),
        }
    }
}

impl Serialize for Setting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl fmt::Display for Setting {
    /// The shortest text that is the same number when read again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl From<&str> for Setting {
    /// Parses the text that `Display` wrote.
    fn from(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Number)
    }
}
