//! Tensors by name, as checkpoints and the optimizer's state have them.

use athanor_models::load::Weights;
use tch::Tensor;

use crate::TrainError;

/// Tensors by name.
pub type Named = Vec<(String, Tensor)>;

/// The same tensors once more, sharing memory.
pub fn share(named: &[(String, Tensor)]) -> Named {
    named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// Copies in the host's memory, made one tensor after the other: the device holds none of them.
pub fn copy_to_host(named: &[(String, Tensor)]) -> Result<Named, TrainError> {
    named.iter().map(|(name, tensor)| Ok((name.clone(), athanor_torch::copy_to_host(tensor)?))).collect()
}

/// Overwrites tensors, as far as there are others, with those in the same places.
pub fn overwrite(named: &[(String, Tensor)], saved: &[(String, Tensor)]) -> Result<(), TrainError> {
    tch::no_grad(|| {
        for ((_, tensor), (_, saved)) in named.iter().zip(saved) {
            tensor.shallow_clone().f_copy_(saved)?;
        }
        Ok(())
    })
}

/// Overwrites tensors with those of the same names.
pub fn load(weights: &mut Weights, named: &[(String, Tensor)]) -> Result<(), TrainError> {
    tch::no_grad(|| {
        for (name, tensor) in named {
            let saved = weights.take(name, &tensor.size())?;
            tensor.shallow_clone().f_copy_(&saved)?;
        }
        Ok(())
    })
}

/// The tensors of a file in the order of `like`.
pub fn take_all(weights: &mut Weights, like: &[(String, Tensor)]) -> Result<Named, TrainError> {
    like.iter().map(|(name, tensor)| Ok((name.clone(), weights.take(name, &tensor.size())?))).collect()
}
