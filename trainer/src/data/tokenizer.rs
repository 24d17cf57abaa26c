//! The tokenizer of a job's model.

use std::{path::Path, sync::Arc};

use athanor_models::{DecoderTokenizer, Tokenizer};

use crate::TrainError;

/// The tokenizer of an encoder or of a decoder.
pub enum TaskTokenizer {
    Encoder(Box<Tokenizer>),
    Decoder(Arc<DecoderTokenizer>),
}

impl TaskTokenizer {
    /// Reads an encoder's tokenizer from its folder.
    ///
    /// # Errors
    /// A folder without a tokenizer that can be read.
    pub fn of_encoder(folder: &Path) -> Result<Self, TrainError> {
        Ok(Self::Encoder(Box::new(Tokenizer::load(folder)?)))
    }

    /// The tokenizer of an encoder's task.
    ///
    /// # Errors
    /// It is a decoder's, which no specification leads to.
    pub fn encoder(&self) -> Result<&Tokenizer, TrainError> {
        match self {
            Self::Encoder(tokenizer) => Ok(tokenizer),
            Self::Decoder(_) => Err(TrainError::Other("an encoder's tokenizer is required".into())),
        }
    }

    /// The tokenizer of a language model's task.
    ///
    /// # Errors
    /// It is an encoder's, which no specification leads to.
    pub fn decoder(&self) -> Result<&Arc<DecoderTokenizer>, TrainError> {
        match self {
            Self::Decoder(tokenizer) => Ok(tokenizer),
            Self::Encoder(_) => Err(TrainError::Other("a decoder's tokenizer is required".into())),
        }
    }
}
