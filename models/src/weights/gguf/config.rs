//! The metadata of a GGUF file as Hugging Face's `config.json` and `generation_config.json`.

use serde_json::{Map, Value, json};

use super::Gguf;
use crate::LoadError;

const EPSILON: &str = "attention.layer_norm_rms_epsilon";
/// What transformers assumes if a file has no `rope.freq_base`.
const ROPE_THETA: f64 = 10_000.0;

impl Gguf {
    /// A `config.json` with Hugging Face's field names.
    ///
    /// # Errors
    /// [`LoadError::Config`] with the key that is missing or wrong.
    pub fn config(&self) -> Result<Value, LoadError> {
        let architecture = self.architecture()?;
        let hidden_size = self.size("embedding_length")?;
        let heads = self.attention_heads("head_count")?;
        let epsilon = self.float(EPSILON)?.ok_or_else(|| self.missing(EPSILON))?;
        let tied = !self.has_tensor("output.weight");
        let mut config = json!({
            "architectures": [class(architecture)],
            "model_type": architecture,
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "intermediate_size": self.size("feed_forward_length")?,
            "max_position_embeddings": self.size("context_length")?,
            "num_attention_heads": heads,
            "num_hidden_layers": self.size("block_count")?,
            "num_key_value_heads": self.attention_heads("head_count_kv")?,
            "rms_norm_eps": epsilon,
            "rope_theta": self.float("rope.freq_base")?.unwrap_or(ROPE_THETA),
            "tie_word_embeddings": tied,
            "vocab_size": self.vocabulary()?,
        });
        let fields = config.as_object_mut().expect("a literal object");
        match architecture {
            "qwen2" => {
                fields.insert("use_sliding_window".into(), false.into());
            }
            // Qwen2 has a bias always, and no field for it.
            _ => {
                fields.insert("attention_bias".into(), self.has_tensor("blk.0.attn_q.bias").into());
                fields.insert("mlp_bias".into(), self.has_tensor("blk.0.ffn_up.bias").into());
            }
        }
        if let Some(head_dim) = self.head_dim(architecture, hidden_size, heads)? {
            fields.insert("head_dim".into(), head_dim.into());
        }
        if let Some(scaling) = self.rope_scaling()? {
            fields.insert("rope_scaling".into(), scaling);
        }
        if let Some(window) = self.integer("attention.sliding_window")?.filter(|_| architecture == "mistral") {
            fields.insert("sliding_window".into(), window.into());
        }
        fields.extend(self.special_ids()?);
        Ok(config)
    }

    /// A `generation_config.json`: which tokens begin and end a text.
    pub fn generation_config(&self) -> Result<Value, LoadError> {
        Ok(Value::Object(self.special_ids()?))
    }

    fn special_ids(&self) -> Result<Map<String, Value>, LoadError> {
        let mut ids = Map::new();
        for (field, key) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
            ("pad_token_id", "tokenizer.ggml.padding_token_id"),
        ] {
            if let Some(id) = self.metadata().integer(key)? {
                ids.insert(field.to_owned(), id.into());
            }
        }
        Ok(ids)
    }

    /// The embedding's rows. `vocab_size` of the metadata is that of the tokenizer, which may be padded.
    fn vocabulary(&self) -> Result<i64, LoadError> {
        let embedding = self.tensors().iter().find(|tensor| tensor.name == "token_embd.weight");
        let missing = || self.tensor_error("token_embd.weight", "missing");
        Ok(embedding.ok_or_else(missing)?.shape[0])
    }

    /// Width of a head, if the family's default (hidden size by heads) may not be it.
    fn head_dim(&self, architecture: &str, hidden_size: u64, heads: u64) -> Result<Option<u64>, LoadError> {
        let default = hidden_size / heads;
        let found = match self.integer("attention.key_length")? {
            None if architecture == "qwen2" => None,
            // Older files have it for the rotated dimensions alone, which are all of a head's in this family.
            None => self.integer("rope.dimension_count")?,
            found => found,
        };
        let key = self.key("attention.key_length");
        match found {
            None if hidden_size.is_multiple_of(heads) => Ok((architecture != "qwen2").then_some(default)),
            None => Err(self.metadata().error(&key, format!("missing, and {hidden_size} is not {heads} equal heads"))),
            Some(0) => Err(self.metadata().error(&key, "0 is not possible")),
            Some(found) if architecture == "qwen2" && found == default => Ok(None),
            Some(found) => Ok(Some(found)),
        }
    }

    fn rope_scaling(&self) -> Result<Option<Value>, LoadError> {
        let key = self.key("rope.scaling.type");
        let kind = match self.metadata().string(&key)? {
            None | Some("none") => return Ok(None),
            Some(kind @ ("linear" | "yarn")) => kind.to_owned(),
            Some(other) => {
                let message = format!("{other:?} is not supported; supported are none, linear and yarn");
                return Err(self.metadata().error(&key, message));
            }
        };
        let factor = self.float("rope.scaling.factor")?.ok_or_else(|| self.missing("rope.scaling.factor"))?;
        let mut scaling = json!({"rope_type": kind, "factor": factor});
        if let Some(length) = self.integer("rope.scaling.original_context_length")? {
            scaling["original_max_position_embeddings"] = length.into();
        }
        Ok(Some(scaling))
    }

    fn key(&self, name: &str) -> String {
        let architecture = self.metadata().string("general.architecture").ok().flatten().unwrap_or_default();
        format!("{architecture}.{name}")
    }

    fn integer(&self, name: &str) -> Result<Option<u64>, LoadError> {
        self.metadata().integer(&self.key(name))
    }

    fn float(&self, name: &str) -> Result<Option<f64>, LoadError> {
        let found = self.metadata().float(&self.key(name))?;
        match found {
            Some(value) if !value.is_finite() => {
                Err(self.metadata().error(&self.key(name), format!("{value} is not possible")))
            }
            found => Ok(found),
        }
    }

    /// A size that a model must have, at least 1.
    fn size(&self, name: &str) -> Result<u64, LoadError> {
        match self.integer(name)? {
            Some(size @ 1..=0x7fff_ffff) => Ok(size),
            Some(size) => Err(self.metadata().error(&self.key(name), format!("{size} is not possible"))),
            None => Err(self.missing(name)),
        }
    }

    fn missing(&self, name: &str) -> LoadError {
        self.metadata().error(&self.key(name), "missing")
    }
}

/// The class that transformers has for an architecture.
fn class(architecture: &str) -> &'static str {
    match architecture {
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    }
}
