//! The weights of a model folder: one safetensors file, or several with an index.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path},
};

use serde::Deserialize;
use tch::Device;

use crate::load::{LoadError, WEIGHTS, Weights};

/// Name of the index in a model folder.
pub const INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    /// Tensor to file.
    weight_map: BTreeMap<String, String>,
}

/// Reads `model.safetensors`, or every shard that the index names.
///
/// # Errors
/// The folder has only pickled weights, the index or a file cannot be read, or a shard lacks a tensor that the index
/// places in it.
pub fn load_folder(folder: &Path, device: Device) -> Result<Weights, LoadError> {
    let path = folder.join(WEIGHTS);
    if !path.exists() {
        if folder.join("pytorch_model.bin").exists() {
            let message =
                "missing; pytorch_model.bin holds pickled weights, which are refused because loading them runs code";
            return Err(LoadError::File { file: path, message: message.into() });
        }
        if folder.join(INDEX).exists() {
            return load_shards(folder, device);
        }
    }
    Weights::load(&path, device)
}

fn load_shards(folder: &Path, device: Device) -> Result<Weights, LoadError> {
    let path = folder.join(INDEX);
    let refused = |message: String| LoadError::File { file: path.clone(), message };
    let bytes = std::fs::read(&path).map_err(|error| LoadError::io(&path, error))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))?;
    let mut weights = Weights::empty(&path);
    for shard in index.weight_map.values().collect::<BTreeSet<_>>() {
        let mut parts = Path::new(shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(refused(format!("{shard:?} is not the name of a file in the folder")));
        }
        let found = Weights::load(&folder.join(shard), device)?;
        let placed = index.weight_map.iter().filter(|(_, file)| *file == shard);
        if let Some((tensor, _)) = placed.into_iter().find(|(tensor, _)| !found.contains(tensor)) {
            let message = format!("missing, though {INDEX} places it in this file");
            return Err(LoadError::Tensor { file: folder.join(shard), tensor: tensor.clone(), message });
        }
        weights.add(found);
    }
    Ok(weights)
}
