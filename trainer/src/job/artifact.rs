//! The result as a Hugging Face model folder.

use std::path::Path;

use athanor_contract::artifact::{ClassReference, REFERENCE};
use athanor_models::Model;

use crate::TrainError;

/// Files of the parent that describe the tokenizer, which training does not change.
const TOKENIZER_FILES: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"];

/// Writes the model's files into the local folder `to`. `quantized`: in eight bits, and whether inputs are rounded too.
pub fn write(
    to: &Path,
    model: &Model,
    quantized: Option<bool>,
    parent: &Path,
    reference: &ClassReference,
) -> Result<(), TrainError> {
    std::fs::create_dir_all(to).map_err(TrainError::at(to))?;
    match quantized {
        None => model.save(to).map_err(TrainError::other)?,
        Some(activations) => model.save_quantized(to, activations).map_err(TrainError::other)?,
    }
    for name in TOKENIZER_FILES {
        match std::fs::copy(parent.join(name), to.join(name)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(TrainError::Other(format!("{name}: {error}"))),
        }
    }
    let text = serde_json::to_vec(reference).map_err(TrainError::other)?;
    let path = to.join(REFERENCE);
    std::fs::write(&path, text).map_err(TrainError::at(&path))
}
