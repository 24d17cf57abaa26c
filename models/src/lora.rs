//! Low-rank adapters (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>), initialised, scaled and stored as PEFT does.

use std::path::Path;

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    load::{self, LoadError, Weights},
    nn::linear::{Adapter, Projection},
};

/// Files of an adapter, as PEFT names them.
pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// Endings of the tensors' names.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

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
    #[serde(default)]
    task_type: Option<String>,
    r: i64,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    target_modules: Targets,
    #[serde(default)]
    bias: String,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    /// The scale is `lora_alpha / sqrt(r)`.
    #[serde(default, skip_serializing)]
    use_rslora: bool,
}

/// PEFT writes a list of names, or a regular expression.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Targets {
    Names(Vec<String>),
    Pattern(String),
}

impl Default for Targets {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

/// Fields that change what an adapter computes, and that are not supported unless they ask for nothing.
const UNSUPPORTED: [&str; 7] = [
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
];

/// Whether a field of the configuration asks for something.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Number(_) | Value::String(_) => true,
    }
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
        task_type: Some("CAUSAL_LM".into()),
        r: options.rank,
        lora_alpha: options.alpha,
        lora_dropout: options.dropout,
        target_modules: Targets::Names(targets),
        bias: "none".into(),
        fan_in_fan_out: transposed,
        inference_mode: true,
        base_model_name_or_path: None,
        use_rslora: false,
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
    let config = settings(&path)?;
    let target_modules = match &config.target_modules {
        Targets::Names(names) => names.clone(),
        Targets::Pattern(pattern) => {
            let message = format!("{pattern:?} is not supported, a list of names is");
            return Err(LoadError::Config { file: path, field: "target_modules".into(), message });
        }
    };
    let (rank, dropout) = (config.r, config.lora_dropout);
    let alpha = config.lora_alpha * if config.use_rslora { (rank as f64).sqrt() } else { 1.0 };
    Ok(LoraOptions { rank, alpha, dropout, target_modules, seed: 0 })
}

impl PeftConfig {
    /// What the product with A and B is multiplied by.
    fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

fn settings(path: &Path) -> Result<PeftConfig, LoadError> {
    let bytes = std::fs::read(path).map_err(|error| LoadError::io(path, error))?;
    let field =
        |field: &str, message: String| LoadError::Config { file: path.to_owned(), field: field.into(), message };
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| field("(root)", error.to_string()))?;
    if let Some(name) = UNSUPPORTED.into_iter().find(|name| asks(&value[*name])) {
        return Err(field(name, "not supported".into()));
    }
    let config: PeftConfig = serde_json::from_value(value).map_err(|error| field("(root)", error.to_string()))?;
    if config.peft_type != "LORA" {
        return Err(field("peft_type", format!("{:?} is not supported, \"LORA\" is", config.peft_type)));
    }
    if config.r < 1 {
        return Err(field("r", format!("{} is too small", config.r)));
    }
    if !matches!(config.bias.as_str(), "" | "none") {
        return Err(field("bias", format!("{:?} is not supported, \"none\" is", config.bias)));
    }
    Ok(config)
}

/// The update of one projection, in FP32 on the CPU.
#[derive(Debug)]
pub struct LowRank {
    /// Name of the module in the model, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// A, [rank, inputs].
    pub a: Tensor,
    /// B, [outputs, rank].
    pub b: Tensor,
    pub scale: f64,
}

/// Reads an adapter of a folder in PEFT's format without its model. Which modules there are follows from the tensors.
///
/// # Errors
/// A file that is missing or not an adapter of this kind, and a tensor that is neither A nor B of the rank in the
/// configuration.
pub fn read(folder: &Path) -> Result<Vec<LowRank>, LoadError> {
    let config = settings(&folder.join(CONFIG))?;
    let path = folder.join(WEIGHTS);
    let mut weights = Weights::load(&path, Device::Cpu)?;
    let wrong = |name: &str, message: String| LoadError::Tensor { file: path.clone(), tensor: name.into(), message };
    let names: Vec<String> = weights.names().map(str::to_owned).collect();
    let module = |name: &str, ending: &str| {
        let module = name.strip_suffix(ending)?;
        Some(module.strip_prefix("base_model.model.").unwrap_or(module).to_owned())
    };
    if let Some(name) = names.iter().find(|name| module(name, A).or_else(|| module(name, B)).is_none()) {
        return Err(wrong(name, "only lora_A.weight and lora_B.weight of a module are supported".into()));
    }
    let mut take = |name: &str, shape: [Option<i64>; 2]| {
        let Some(found) = weights.shape(name) else { return Err(wrong(name, "missing".into())) };
        let fits =
            found.len() == 2 && std::iter::zip(&found, shape).all(|(&size, wanted)| wanted.unwrap_or(size) == size);
        if !fits {
            return Err(wrong(name, format!("its shape is {found:?}, the rank in {CONFIG} is {}", config.r)));
        }
        weights.take(name, &found)
    };
    let mut found = Vec::with_capacity(names.len() / 2);
    for name in names.iter().filter(|name| name.ends_with(A)) {
        let stem = name.strip_suffix(A).unwrap_or(name);
        let a = take(name, [Some(config.r), None])?;
        let b = take(&format!("{stem}{B}"), [None, Some(config.r)])?;
        let module = module(name, A).unwrap_or_default();
        found.push(LowRank { module, a, b, scale: config.scale() });
    }
    if found.len() * 2 != names.len() {
        return Err(wrong(B, "a module has B without A".into()));
    }
    if found.is_empty() {
        return Err(LoadError::File { file: path, message: "the adapter has no tensors".into() });
    }
    Ok(found)
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
