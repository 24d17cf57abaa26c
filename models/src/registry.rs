//! The families by `model_type` of config.json. A new family is one file in `families/` and one line here.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    builder,
    config::EncoderConfig,
    families::{
        Backbone, EncoderBackbone,
        bert::Bert,
        gpt2::{Gpt2, Gpt2Config},
        llama::{Llama, LlamaConfig},
        mpnet::MpNet,
    },
    load::LoadError,
    weights::builder::Builder,
};

/// A backbone with what the rest of a language model needs of its configuration.
pub struct Loaded {
    pub backbone: Box<dyn Backbone>,
    pub vocab_size: i64,
    pub hidden_size: i64,
    /// Tokens of the longest sequence.
    pub max_length: usize,
    /// The output head is the table of token embeddings.
    pub tied_head: bool,
}

type Load = fn(&mut Builder<'_>, &Value) -> Result<Loaded, LoadError>;

/// Model types that `families/llama.rs` loads.
const LLAMA: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

const FAMILIES: [(&[&str], Load); 2] = [(&["gpt2"], gpt2), (&LLAMA, llama)];

type LoadEncoder = fn(&mut builder::Builder<'_>, &EncoderConfig) -> Result<Box<dyn EncoderBackbone>, LoadError>;

const ENCODERS: [(&str, LoadEncoder); 2] = [
    ("bert", |builder, config| Ok(Box::new(Bert::load(builder, config)?))),
    ("mpnet", |builder, config| Ok(Box::new(MpNet::load(builder, config)?))),
];

/// Loads the encoder that `config` describes.
///
/// # Errors
/// A tensor is missing or has another shape.
///
/// # Panics
/// If a family of `families/encoders.rs` is not listed here.
pub fn encoder(
    builder: &mut builder::Builder<'_>,
    config: &EncoderConfig,
) -> Result<Box<dyn EncoderBackbone>, LoadError> {
    let family = config.model_type.model_type;
    let (_, load) = ENCODERS.iter().find(|(name, _)| *name == family).expect("each family is listed");
    load(builder, config)
}

/// Loads the backbone that `config` describes.
///
/// # Errors
/// The family is unknown, a field of the configuration is wrong, or a tensor is missing or has another shape.
pub fn load(builder: &mut Builder<'_>, config: &Value) -> Result<Loaded, LoadError> {
    let names = || FAMILIES.iter().flat_map(|(names, _)| *names);
    let known = || names().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    let Some(model_type) = config["model_type"].as_str() else {
        return Err(builder.config_error("model_type", format!("missing; decoders are {}", known())));
    };
    match FAMILIES.iter().find(|(names, _)| names.contains(&model_type)) {
        Some((_, load)) => load(builder, config),
        None => {
            let message = format!("{model_type:?} is not a supported decoder; {} are", known());
            Err(builder.config_error("model_type", message))
        }
    }
}

/// Whether `model_type` names a decoder that `families/llama.rs` loads.
pub fn is_llama(model_type: &str) -> bool {
    LLAMA.contains(&model_type)
}

/// Whether `model_type` names a decoder.
pub fn is_decoder(model_type: &str) -> bool {
    FAMILIES.iter().any(|(names, _)| names.contains(&model_type))
}

fn typed<T: DeserializeOwned>(builder: &Builder<'_>, config: &Value) -> Result<T, LoadError> {
    serde_json::from_value(config.clone()).map_err(|error| builder.config_error("(root)", error.to_string()))
}

fn gpt2(builder: &mut Builder<'_>, config: &Value) -> Result<Loaded, LoadError> {
    let config: Gpt2Config = typed(builder, config)?;
    config.check().map_err(|(field, message)| builder.config_error(field, message))?;
    Ok(Loaded {
        backbone: Box::new(Gpt2::load(builder, &config)?),
        vocab_size: config.vocab_size,
        hidden_size: config.n_embd,
        max_length: config.n_positions as usize,
        tied_head: config.tie_word_embeddings,
    })
}

fn llama(builder: &mut Builder<'_>, config: &Value) -> Result<Loaded, LoadError> {
    let config: LlamaConfig = typed(builder, config)?;
    config.check().map_err(|(field, message)| builder.config_error(field, message))?;
    Ok(Loaded {
        backbone: Box::new(Llama::load(builder, &config)?),
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        max_length: config.max_position_embeddings as usize,
        tied_head: config.tie_word_embeddings,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::encoders::FAMILIES as NAMES;

    #[test]
    fn each_family_of_encoders_can_be_loaded() {
        assert_eq!(ENCODERS.map(|(name, _)| name), NAMES.map(|family| family.model_type));
    }
}
