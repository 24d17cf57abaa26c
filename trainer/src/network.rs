//! The model that a job trains: an encoder with the head of its task, or a decoder.

use athanor_models::{CausalLanguageModel, Model};
use tch::Tensor;

use crate::TrainError;

/// A model in training or evaluation. What the loop, the optimizer and checkpoints need is the same for both kinds; a
/// task uses the kind that it is for.
pub enum Network {
    Encoder(Box<Model>),
    Decoder(Box<CausalLanguageModel>),
}

impl Network {
    /// The encoder of an encoder's task.
    ///
    /// # Errors
    /// See [`ModelRef::encoder`].
    pub fn encoder(&self) -> Result<&Model, TrainError> {
        ModelRef::from(self).encoder()
    }

    /// The parameters that training may change, by name: all of an encoder; of a decoder the adapters, or all without
    /// adapters.
    pub fn parameters(&self) -> &[(String, Tensor)] {
        match self {
            Self::Encoder(model) => model.parameters(),
            Self::Decoder(model) => model.trainable(),
        }
    }

    /// Marks the parameters that train.
    pub fn set_trainable(&mut self) {
        match self {
            Self::Encoder(model) => model.set_trainable(),
            Self::Decoder(model) => model.set_trainable(),
        }
    }

    /// Number of all parameters, those included that do not train.
    pub fn size(&self) -> usize {
        let parameters = match self {
            Self::Encoder(model) => model.parameters(),
            Self::Decoder(model) => model.parameters(),
        };
        parameters.iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// Family, layers and hidden size, in words.
    pub fn describe(&self) -> String {
        let (family, layers, size) = match self {
            Self::Encoder(model) => {
                let config = model.config();
                (config.model_type.name.to_owned(), config.num_hidden_layers as u64, config.hidden_size as u64)
            }
            Self::Decoder(model) => {
                let config = model.config();
                let number =
                    |names: [&str; 2]| names.iter().find_map(|name| config[*name].as_u64()).unwrap_or_default();
                let family = config["model_type"].as_str().unwrap_or_default().to_owned();
                (family, number(["num_hidden_layers", "n_layer"]), number(["hidden_size", "n_embd"]))
            }
        };
        format!("{family}, {layers} layers of {size}")
    }
}

impl From<Model> for Network {
    fn from(model: Model) -> Self {
        Self::Encoder(Box::new(model))
    }
}

impl From<CausalLanguageModel> for Network {
    fn from(model: CausalLanguageModel) -> Self {
        Self::Decoder(Box::new(model))
    }
}

/// A model that is only read.
#[derive(Clone, Copy)]
pub enum ModelRef<'a> {
    Encoder(&'a Model),
    Decoder(&'a CausalLanguageModel),
}

impl<'a> ModelRef<'a> {
    /// The encoder of an encoder's task.
    ///
    /// # Errors
    /// The model is a decoder, which no specification leads to.
    pub fn encoder(self) -> Result<&'a Model, TrainError> {
        match self {
            Self::Encoder(model) => Ok(model),
            Self::Decoder(_) => Err(TrainError::Other("an encoder is required, the model is a decoder".into())),
        }
    }

    /// The decoder of a language model's task.
    ///
    /// # Errors
    /// The model is an encoder, which no specification leads to.
    pub fn decoder(self) -> Result<&'a CausalLanguageModel, TrainError> {
        match self {
            Self::Decoder(model) => Ok(model),
            Self::Encoder(_) => Err(TrainError::Other("a decoder is required, the model is an encoder".into())),
        }
    }
}

impl<'a> From<&'a Network> for ModelRef<'a> {
    fn from(network: &'a Network) -> Self {
        match network {
            Network::Encoder(model) => Self::Encoder(model),
            Network::Decoder(model) => Self::Decoder(model),
        }
    }
}

impl<'a> From<&'a Model> for ModelRef<'a> {
    fn from(model: &'a Model) -> Self {
        Self::Encoder(model)
    }
}
