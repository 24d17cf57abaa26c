//! Low-rank adapters (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>), initialised, scaled and stored as PEFT does.

use std::path::Path;

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    load::{self, LoadError, Weights},
    nn::linear::{Adapter, Projection},
};

/// Files of an adapter, as PEFT names them.
pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// What an adapter adds, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOptions {
    /// Columns of A and rows of B.
    pub rank: i64,
    /// The product is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability with which an input of the adapter is dropped in training.
    pub dropout: f64,
    /// Last parts of the names of the adapted projections, such as `q_proj`. Empty: all of them.
    pub target_modules: Vec<String>,
    /// Seed of the first values of A.
    pub seed: u64,
}

/// Adds adapters to the projections that `options` names: A uniform in ±1/sqrt(inputs), B zero, so that the model's outputs are
/// those without them. Returns A and B under PEFT's names.
///
/// # Errors
/// A name of `target_modules` that no projection has.
pub fn attach(projections: Vec<&mut Projection>, options: &LoraOptions) -> Result<Vec<(String, Tensor)>, String> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
    for target in &options.target_modules {
        if !projections.iter().any(|projection| last(&projection.name) == *target) {
            let mut known: Vec<String> = projections.iter().map(|projection| last(&projection.name)).collect();
            known.sort();
            known.dedup();
            return Err(format!("no layer is named {target:?}; the layers are {}", known.join(", ")));
        }
    }
    let mut random = StdRng::seed_from_u64(options.seed);
    let mut named = Vec::new();
    for projection in projections {
        if !options.target_modules.is_empty() && !options.target_modules.contains(&last(&projection.name)) {
            continue;
        }
        let (inputs, outputs, device) = (projection.inputs(), projection.outputs(), projection.weight.device());
        let bound = 1.0 / (inputs as f64).sqrt();
        let values: Vec<f32> =
            (0..options.rank * inputs).map(|_| ((random.random::<f64>() * 2.0 - 1.0) * bound) as f32).collect();
        let a = Tensor::from_slice(&values).view([options.rank, inputs]).to_device(device);
        let b = Tensor::zeros([outputs, options.rank], (Kind::Float, device));
        let name = |part: &str| format!("base_model.model.{}.lora_{part}.weight", projection.name);
        named.extend([(name("A"), a.shallow_clone()), (name("B"), b.shallow_clone())]);
        let scaling = options.alpha / options.rank as f64;
        projection.adapter = Some(Adapter { a, b, scaling, dropout: options.dropout });
    }
    Ok(named)
}

/// `adapter_config.json`, as far as it is read and written here.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    task_type: String,
    r: i64,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Vec<String>,
    #[serde(default)]
    bias: String,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
}

/// Writes an adapter as PEFT reads it. `transposed`: the base model stores its matrices as [inputs, outputs].
///
/// # Errors
/// A folder that cannot be written to.
pub fn save(
    folder: &Path,
    options: &LoraOptions,
    named: &[(String, Tensor)],
    transposed: bool,
) -> Result<(), LoadError> {
    let mut targets: Vec<String> =
        named.iter().filter_map(|(name, _)| name.rsplit('.').nth(2).map(str::to_owned)).collect();
    targets.sort();
    targets.dedup();
    let config = PeftConfig {
        peft_type: "LORA".into(),
        task_type: "CAUSAL_LM".into(),
        r: options.rank,
        lora_alpha: options.alpha,
        lora_dropout: options.dropout,
        target_modules: targets,
        bias: "none".into(),
        fan_in_fan_out: transposed,
        inference_mode: true,
        base_model_name_or_path: None,
    };
    let path = folder.join(CONFIG);
    let text = serde_json::to_vec_pretty(&config)
        .map_err(|error| LoadError::File { file: path.clone(), message: error.to_string() })?;
    std::fs::write(&path, text).map_err(|error| LoadError::io(&path, error))?;
    load::save(&folder.join(WEIGHTS), named)
}

/// Reads an adapter's settings from a folder; its tensors are read by [`load_into`].
///
/// # Errors
/// A file that is missing or not an adapter of this kind, by its field.
pub fn options(folder: &Path) -> Result<LoraOptions, LoadError> {
    let path = folder.join(CONFIG);
    let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
    let field = |field: &str, message: String| LoadError::Config { file: path.clone(), field: field.into(), message };
    let config: PeftConfig = serde_json::from_slice(&bytes).map_err(|error| field("(root)", error.to_string()))?;
    if config.peft_type != "LORA" {
        return Err(field("peft_type", format!("{:?} is not supported, \"LORA\" is", config.peft_type)));
    }
    if config.r < 1 {
        return Err(field("r", format!("{} is too small", config.r)));
    }
    if !matches!(config.bias.as_str(), "" | "none") {
        return Err(field("bias", format!("{:?} is not supported, \"none\" is", config.bias)));
    }
    Ok(LoraOptions {
        rank: config.r,
        alpha: config.lora_alpha,
        dropout: config.lora_dropout,
        target_modules: config.target_modules,
        seed: 0,
    })
}

/// Overwrites attached adapters with the tensors of a folder.
///
/// # Errors
/// A tensor that is missing or has another shape.
pub fn load_into(folder: &Path, named: &[(String, Tensor)]) -> Result<(), LoadError> {
    let mut weights = Weights::load(&folder.join(WEIGHTS), Device::Cpu)?;
    tch::no_grad(|| {
        for (name, tensor) in named {
            let saved = weights.take(name, &tensor.size())?;
            tensor.shallow_clone().f_copy_(&saved)?;
        }
        Ok(())
    })
}
