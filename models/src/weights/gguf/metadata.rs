//! The values of a GGUF header, by key.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::LoadError;

/// A value of the header. Integers of every width are one of two variants.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::F32(_) | Self::F64(_) => "a number with a fraction",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Array(_) => "an array",
        }
    }

    fn integer(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }
}

/// All values of a header. The typed accessors return `None` for a key that is absent.
///
/// # Errors
/// [`LoadError::Config`], which names file and key, if the value has another type.
#[derive(Debug)]
pub struct Metadata {
    file: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(super) fn new(file: &Path, values: BTreeMap<String, Value>) -> Self {
        Self { file: file.to_owned(), values }
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    pub fn integer(&self, key: &str) -> Result<Option<u64>, LoadError> {
        self.typed(key, "a whole number that is not negative", Value::integer)
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        // The number that was meant: 0.00001 is stored as the FP32 next to it, whose digits as FP64 are
        // 0.00000999999974...
        self.typed(key, "a number", |value| match value {
            Value::F32(value) => value.to_string().parse().ok(),
            Value::F64(value) => Some(*value),
            _ => None,
        })
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>, LoadError> {
        self.typed(key, "a string", |value| match value {
            Value::String(value) => Some(value.as_str()),
            _ => None,
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, LoadError> {
        self.array(key, "an array of strings", |value| match value {
            Value::String(value) => Some(value.as_str()),
            _ => None,
        })
    }

    pub fn integers(&self, key: &str) -> Result<Option<Vec<u64>>, LoadError> {
        self.array(key, "an array of whole numbers that are not negative", Value::integer)
    }

    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, LoadError> {
        self.array(key, "an array of FP32 numbers", |value| match value {
            Value::F32(value) => Some(*value),
            _ => None,
        })
    }

    /// An error about the value of a key.
    pub fn error(&self, key: &str, message: impl Into<String>) -> LoadError {
        LoadError::Config { file: self.file.clone(), field: key.to_owned(), message: message.into() }
    }

    fn array<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        item: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, LoadError> {
        self.typed(key, wanted, |value| match value {
            Value::Array(values) => values.iter().map(item).collect(),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let wrong = || self.error(key, format!("must be {wanted}, but is {}", value.kind()));
        read(value).map(Some).ok_or_else(wrong)
    }
}
