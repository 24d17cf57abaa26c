//! Weights of eight bits: whole numbers from -127 to 127 and a scale for each row, in the notation of compressed-tensors, which
//! vLLM and transformers read.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::{config::EncoderConfig, nn::packed::Packing};

/// `quantization_config` of `config.json`. `activations`: inputs are rounded as they come, a scale for each token.
pub fn config(activations: bool) -> Value {
    let weights = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "dynamic": false});
    let inputs = json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true});
    json!({
        "quant_method": "compressed-tensors",
        "format": if activations { "int-quantized" } else { "naive-quantized" },
        "quantization_status": "compressed",
        "config_groups": {
            "matrices": {
                "targets": ["re:.*encoder\\.layer\\..*"],
                "weights": weights,
                "input_activations": if activations { inputs } else { Value::Null },
            },
            "embeddings": {"targets": ["re:.*word_embeddings"], "weights": weights, "input_activations": null},
        },
        "ignore": ["re:.*pooler.*", "re:.*classifier.*", "re:.*lm_head.*", "re:.*cls.*"],
    })
}

/// How a folder's matrices are to be laid out for inference.
pub fn packing(config: &EncoderConfig) -> Packing {
    let groups = config.quantization_config.as_ref().and_then(|config| config.get("config_groups")?.as_object());
    let rounds_inputs =
        groups.into_iter().flat_map(|groups| groups.values()).any(|group| group["input_activations"].is_object());
    if rounds_inputs { Packing::Int8 } else { Packing::Float }
}

/// The parameters with the chosen matrices [outputs, inputs] as `name` (Int8) and `name_scale` [outputs, 1].
pub fn quantized(parameters: &[(String, Tensor)], chosen: &BTreeSet<String>) -> Vec<(String, Tensor)> {
    let mut all = Vec::with_capacity(parameters.len() + chosen.len());
    for (name, tensor) in parameters {
        if !chosen.contains(name) {
            all.push((name.clone(), tensor.shallow_clone()));
            continue;
        }
        let tensor = tensor.detach().to_kind(Kind::Float);
        let scale = tensor.abs().amax([1_i64].as_slice(), true) / 127.0;
        let rounded = (tensor / scale.clamp_min(1e-30)).round().clamp(-127.0, 127.0).to_kind(Kind::Int8);
        all.push((name.clone(), rounded));
        all.push((format!("{name}_scale"), scale));
    }
    all
}
