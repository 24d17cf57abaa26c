//! Which weights answer a request: the model's own, or those of an adapter.

use super::{
    Model, Service,
    adapters::{AdapterError, Adapters},
    error::ServiceError,
};
use crate::engine::{backend::AdapterWeights, generate::Adapter};

/// The weights that answer a request, and the names that its response has.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Absent: the model's own weights.
    pub adapter: Option<Adapter>,
    /// Name in `model` of the response.
    pub model: String,
    /// Name of the revision that answers.
    pub revision: String,
}

impl Service {
    fn known_adapters(&self) -> Option<&Adapters> {
        match &self.model {
            Model::Generator(generator) => Some(generator.adapters()),
            Model::Classifier(_) | Model::Embedder(_) => None,
        }
    }

    /// Loads an adapter of a language model; see [`Adapters::load`].
    ///
    /// # Errors
    /// The model is of another kind, the name cannot be an adapter's, or the adapter does not fit the model.
    pub async fn load_adapter(&self, name: &str, weights: AdapterWeights) -> Result<(), AdapterError> {
        self.known_adapters().ok_or(AdapterError::WrongKind)?.load(name, weights).await
    }

    /// Removes an adapter; see [`Adapters::unload`].
    pub fn unload_adapter(&self, name: &str) {
        if let Some(adapters) = self.known_adapters() {
            adapters.unload(name);
        }
    }

    /// The adapter of this name.
    pub fn adapter(&self, name: &str) -> Option<Adapter> {
        self.known_adapters()?.get(name)
    }

    /// All adapters, in the order of their names.
    pub fn adapters(&self) -> Vec<Adapter> {
        self.known_adapters().map(Adapters::all).unwrap_or_default()
    }

    /// Chooses the weights for a request whose `model` is `asked`. `revision`: the adapter that answers as a revision of
    /// the model; it takes precedence over the one that `model` names.
    ///
    /// # Errors
    /// [`ServiceError::UnknownModel`]: `asked` is neither the model nor one of its adapters.
    pub fn select(&self, asked: Option<&str>, revision: Option<Adapter>) -> Result<Selection, ServiceError> {
        let named = self.named(asked)?;
        let own = |adapter| Selection { adapter, model: self.model_name.clone(), revision: self.revision.clone() };
        Ok(match (revision, named) {
            (Some(adapter), _) => Selection { revision: adapter.name().to_string(), ..own(Some(adapter)) },
            (None, Some(adapter)) => Selection { model: adapter.name().to_string(), ..own(Some(adapter)) },
            (None, None) => own(None),
        })
    }

    /// The adapter that `asked` names. None for this model's own name, without a name, and for a name that is accepted although
    /// nothing has it.
    pub(super) fn named(&self, asked: Option<&str>) -> Result<Option<Adapter>, ServiceError> {
        let Some(asked) = asked.filter(|asked| *asked != self.model_name) else { return Ok(None) };
        match self.adapter(asked) {
            None if !self.accepts_any_model => Err(ServiceError::UnknownModel {
                asked: asked.chars().take(256).collect(),
                known: self.model_name.clone(),
            }),
            adapter => Ok(adapter),
        }
    }
}
