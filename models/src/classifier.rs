//! A trained classifier for inference.

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use crate::{
    config::EncoderConfig,
    load::LoadError,
    model::{Model, Options, Task},
    quantize,
};

/// A model with its labels, without gradients. It is `Send`: one thread at a time uses it.
pub struct Classifier {
    model: Model,
    labels: Vec<String>,
    device: Device,
}

impl Classifier {
    /// Reads an artifact or another Hugging Face folder of a trained classifier. Quantized weights are computed with as such.
    pub fn load(folder: &Path, device: Device) -> Result<Self, LoadError> {
        let config = EncoderConfig::load(folder)?;
        let labels = Self::labels_of(folder, &config)?;
        let how = quantize::packing(&config);
        let mut model = Model::load(folder, Task::Classification(labels.clone()), &Options::default(), device)?;
        if device == Device::Cpu {
            model.pack_for_good(how)?;
        }
        Ok(Self { model, labels, device })
    }

    /// Class names of a folder's classifier with this configuration, in the order of the logits.
    ///
    /// # Errors
    /// The folder's model is no classifier.
    pub fn labels_of(folder: &Path, config: &EncoderConfig) -> Result<Vec<String>, LoadError> {
        let refused = |field: &str, message: &str| LoadError::Config {
            file: PathBuf::from(folder).join("config.json"),
            field: field.into(),
            message: message.into(),
        };
        config.labels().ok_or_else(|| {
            if config.is_regression() {
                refused("problem_type", "regression, so this is no classifier")
            } else if config.id2label.is_none() {
                refused("id2label", "missing, so this is not a trained classifier")
            } else {
                refused("architectures", "not a model for sequence classification, so this model has no trained head")
            }
        })
    }

    /// Class names in the order of the logits.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    pub fn config(&self) -> &EncoderConfig {
        self.model.config()
    }

    /// The model without the labels, for callers that batch by themselves.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Ids and mask [B, T] (i64) to logits [B, L] (f32, on the CPU).
    pub fn forward(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Tensor {
        tch::no_grad(|| {
            // Without padding attention needs no mask and takes the faster kernel.
            let padded = bool::try_from(attention_mask.eq(0).any()).unwrap_or(true);
            let mask = padded.then(|| attention_mask.to_device(self.device));
            self.model
                .forward(&input_ids.to_device(self.device), mask.as_ref(), false)
                .to_kind(Kind::Float)
                .to_device(Device::Cpu)
        })
    }
}
