//! Tensor names and row orders of llama.cpp to those of Hugging Face, for the llama family.

/// The architectures (`general.architecture`) of the llama family.
pub const ARCHITECTURES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// Names of the parts of a layer: llama.cpp's, Hugging Face's.
const PARTS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The name that transformers gives to a tensor; `None` for a tensor that this family does not have.
pub fn hugging_face(name: &str) -> Option<String> {
    let whole = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => {
            let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            let (part, parameter) = rest.split_once('.')?;
            let layer: u32 = layer.parse().ok()?;
            let (_, part) = PARTS.iter().find(|(own, _)| *own == part)?;
            return matches!(parameter, "weight" | "bias").then(|| format!("model.layers.{layer}.{part}.{parameter}"));
        }
    };
    Some(whole.to_owned())
}

/// How the rows of a tensor are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    AsHuggingFace,
    /// The halves of each head's rotary pairs alternate: llama.cpp rotates neighbours, transformers rotates row `i`
    /// with row `i + rows / 2` of a head.
    Interleaved {
        /// Rows of a head.
        head: usize,
    },
}

/// The number of heads of a tensor whose rows llama.cpp reorders, by the name of its metadata key: queries and keys of
/// `llama` (and of Mistral, which it converts as one), not those of Qwen.
pub(super) fn reordered_heads(architecture: &str, name: &str) -> Option<&'static str> {
    match name.split('.').nth(2) {
        Some("attn_q") if matches!(architecture, "llama" | "mistral") => Some("head_count"),
        Some("attn_k") if matches!(architecture, "llama" | "mistral") => Some("head_count_kv"),
        _ => None,
    }
}

impl Rows {
    /// Where a row of the file is in transformers' tensor.
    pub fn target(self, row: usize) -> usize {
        match self {
            Self::AsHuggingFace => row,
            Self::Interleaved { head } => {
                let (begin, within) = (row / head * head, row % head);
                begin + within % 2 * (head / 2) + within / 2
            }
        }
    }
}
