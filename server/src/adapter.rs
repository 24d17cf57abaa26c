//! One adapter: from a folder to the engine, and from the engine to the two backends.

use std::path::Path;

use anyhow::Context;
use athanor_cpu::AdapterLayer;
use athanor_models::lora;
use athanor_serving::engine::backend::{AdapterWeights, LowRank};
use tch::Tensor;

/// Reads an adapter of a folder in PEFT's format.
///
/// # Errors
/// A file that is missing, or an adapter of a kind that is not supported; each names the file and the field or tensor.
pub fn read(folder: &Path) -> anyhow::Result<AdapterWeights> {
    let module = |read: lora::LowRank| -> anyhow::Result<LowRank> {
        let rank = usize::try_from(read.a.size2()?.0).context("the rank")?;
        Ok(LowRank { module: read.module, rank, a: numbers(&read.a)?, b: numbers(&read.b)?, scale: read.scale as f32 })
    };
    Ok(AdapterWeights { modules: lora::read(folder)?.into_iter().map(module).collect::<anyhow::Result<_>>()? })
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>, tch::TchError> {
    Vec::try_from(tensor.f_reshape([-1])?)
}

/// The adapter as libtorch's models take it.
///
/// # Errors
/// A module whose numbers make no matrices of its rank.
pub fn tensors(weights: &AdapterWeights) -> Result<Vec<lora::LowRank>, String> {
    let module = |module: &LowRank| -> Result<lora::LowRank, String> {
        let rank = i64::try_from(module.rank).unwrap_or_default();
        let matrix = |numbers: &[f32], shape: [i64; 2]| {
            let matrix = Tensor::f_from_slice(numbers).and_then(|numbers| numbers.f_view(shape));
            matrix.map_err(|error| format!("{}: {error}", module.module))
        };
        let (a, b) = (matrix(&module.a, [rank, -1])?, matrix(&module.b, [-1, rank])?);
        Ok(lora::LowRank { module: module.module.clone(), a, b, scale: f64::from(module.scale) })
    };
    weights.modules.iter().map(module).collect()
}

/// The adapter as packed decoders take it, by layer.
///
/// # Errors
/// A module that decoders of the llama family do not have, or of a layer behind the last one.
pub fn layers(weights: AdapterWeights, count: usize) -> Result<Vec<AdapterLayer>, String> {
    let mut layers = vec![AdapterLayer::default(); count];
    for LowRank { module, rank, a, b, scale } in weights.modules {
        let found = module.strip_prefix("model.layers.").and_then(|rest| {
            let (index, part) = rest.split_once('.')?;
            let layer = layers.get_mut(index.parse::<usize>().ok()?)?;
            match part {
                "self_attn.q_proj" => Some(&mut layer.query),
                "self_attn.k_proj" => Some(&mut layer.key),
                "self_attn.v_proj" => Some(&mut layer.value),
                "self_attn.o_proj" => Some(&mut layer.output),
                "mlp.gate_proj" => Some(&mut layer.gate),
                "mlp.up_proj" => Some(&mut layer.up),
                "mlp.down_proj" => Some(&mut layer.down),
                _ => None,
            }
        });
        match found {
            Some(place) => *place = Some(athanor_cpu::LowRank { rank, a, b, scale }),
            None => return Err(format!("{module}: the model has no such linear layer")),
        }
    }
    Ok(layers)
}

#[cfg(test)]
#[path = "adapter_tests.rs"]
mod tests;
