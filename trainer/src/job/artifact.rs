//! The result as a Hugging Face model folder.

use std::path::Path;

use athanor_contract::artifact::{REFERENCE, Reference};

use crate::{TrainError, data::TaskTokenizer, network::Network};

/// Files of the parent that describe the tokenizer, which training does not change.
const TOKENIZER_FILES: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"];
/// Folder of the adapters alone, as PEFT reads them.
const ADAPTER: &str = "adapter";

/// What an artifact is made from.
pub struct Artifact<'a> {
    pub network: &'a Network,
    /// Absent: in the trained digits. Else an encoder in eight bits, and whether inputs are rounded too.
    pub quantized: Option<bool>,
    pub tokenizer: &'a TaskTokenizer,
    /// Folder of the model that training began with.
    pub parent: &'a Path,
    pub reference: &'a Reference,
}

impl Artifact<'_> {
    /// Writes the model's files into the local folder `to`: the weights with adapters merged, its configuration, its
    /// tokenizer, and what the monitor compares live traffic with.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn write(&self, to: &Path) -> Result<(), TrainError> {
        std::fs::create_dir_all(to).map_err(TrainError::at(to))?;
        match self.network {
            Network::Encoder(model) => match self.quantized {
                None => model.save(to).map_err(TrainError::other)?,
                Some(activations) => model.save_quantized(to, activations).map_err(TrainError::other)?,
            },
            Network::Decoder(model) => {
                model.save(to).map_err(TrainError::other)?;
                if model.has_adapters() {
                    let folder = to.join(ADAPTER);
                    std::fs::create_dir_all(&folder).map_err(TrainError::at(&folder))?;
                    model.save_adapter(&folder).map_err(TrainError::other)?;
                }
            }
        }
        match self.tokenizer {
            TaskTokenizer::Encoder(_) => self.copy_tokenizer(to)?,
            TaskTokenizer::Decoder(tokenizer) => tokenizer.save(to).map_err(TrainError::other)?,
        }
        let text = serde_json::to_vec(self.reference).map_err(TrainError::other)?;
        let path = to.join(REFERENCE);
        std::fs::write(&path, text).map_err(TrainError::at(&path))
    }

    fn copy_tokenizer(&self, to: &Path) -> Result<(), TrainError> {
        for name in TOKENIZER_FILES {
            match std::fs::copy(self.parent.join(name), to.join(name)) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(TrainError::Other(format!("{name}: {error}"))),
            }
        }
        Ok(())
    }
}
