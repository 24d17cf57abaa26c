//! The adapters of a language model by name.

use std::{
    collections::BTreeMap,
    sync::{PoisonError, RwLock},
};

use crate::engine::{
    backend::AdapterWeights,
    generate::{Adapter, Engine, GenerateError},
};

/// Longest name of an adapter, in bytes.
const LONGEST_NAME: usize = 253;

/// Adapters that requests can name.
pub struct Adapters {
    engine: Engine,
    loaded: RwLock<BTreeMap<String, Adapter>>,
}

/// Why an adapter is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error("the name {0:?} is not 1 to 253 letters, digits, \"-\", \"_\" and \".\"")]
    Name(String),
    #[error("the name {0:?} is that of the model itself")]
    ModelName(String),
    #[error("only language models take adapters")]
    WrongKind,
    #[error(transparent)]
    Engine(#[from] GenerateError),
}

impl Adapters {
    pub(super) fn new(engine: Engine) -> Self {
        Self { engine, loaded: RwLock::default() }
    }

    /// Loads an adapter, or replaces the one of this name. Answers in progress keep the replaced one until they end.
    ///
    /// # Errors
    /// The name cannot be an adapter's, or the adapter does not fit the model.
    pub async fn load(&self, name: &str, weights: AdapterWeights) -> Result<(), AdapterError> {
        let is_usable = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=LONGEST_NAME).contains(&name.len()) || !name.bytes().all(is_usable) {
            return Err(AdapterError::Name(name.chars().take(LONGEST_NAME).collect()));
        }
        if name == &**self.engine.model() {
            return Err(AdapterError::ModelName(name.to_owned()));
        }
        let adapter = self.engine.load_adapter(name, weights).await?;
        self.loaded.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), adapter);
        Ok(())
    }

    /// Removes an adapter: requests no longer find it, and the model drops it when the last answer that uses it ends.
    pub fn unload(&self, name: &str) {
        self.loaded.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    pub fn get(&self, name: &str) -> Option<Adapter> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All adapters, in the order of their names.
    pub fn all(&self) -> Vec<Adapter> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
