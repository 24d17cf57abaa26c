//! The update of one process, or the part of it that a rank does by itself.

use athanor_contract::train::Hyperparameters;
use athanor_torch::{Optimizer, ParameterGroup, Shard, add_penalty, backward, norm, scale, zero_grad};
use tch::Tensor;

use super::step::{Update, rule, weight_decay};
use crate::{
    TrainError,
    data::Encoded,
    network::Network,
    train::named::{self, Named},
};

/// An optimizer over all of its parameters, or over one shard of its state.
pub struct Alone {
    pub(super) parameters: Vec<Tensor>,
    /// Those of them that penalties and weight decay apply to.
    decayed: Vec<Tensor>,
    l1: f64,
    l2: f64,
    pub(super) optimizer: Optimizer,
}

impl Alone {
    pub fn new(named: Named, h: &Hyperparameters, shard: Shard) -> Result<Self, TrainError> {
        let tensors = |named: &Named| named.iter().map(|(_, tensor)| tensor.shallow_clone()).collect::<Vec<_>>();
        let parameters = tensors(&named);
        let [decayed, exempt] = weight_decay_groups(named);
        let (of_decayed, l1, l2) = (tensors(&decayed), h.l1, h.l2);
        let groups = vec![
            ParameterGroup { weight_decay: weight_decay(h), parameters: decayed },
            ParameterGroup { weight_decay: 0.0, parameters: exempt },
        ];
        let optimizer = Optimizer::new(rule(h), groups, shard)?;
        Ok(Self { parameters, decayed: of_decayed, l1, l2, optimizer })
    }
}

impl Update for Alone {
    fn begin(&mut self, _: &mut Network, _: &Encoded, _: &[usize]) -> Result<(), TrainError> {
        Ok(zero_grad(&self.parameters)?)
    }

    fn backward(&mut self, loss: &Tensor, _is_last: bool) -> Result<(), TrainError> {
        Ok(backward(loss)?)
    }

    /// Returns the squares of this shard's parts of the gradients.
    fn gradient_squares(&mut self, _: &mut Network) -> Result<f64, TrainError> {
        add_penalty(&self.decayed, self.l1, self.l2)?;
        Ok(norm(&self.optimizer.gradients()?)?.powi(2))
    }

    fn scale_gradients(&mut self, factor: f64) -> Result<(), TrainError> {
        Ok(scale(&self.optimizer.gradients()?, factor)?)
    }

    fn apply(&mut self, learning_rate: f64) -> Result<(), TrainError> {
        Ok(self.optimizer.step(learning_rate)?)
    }

    fn catch_up(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    fn state(&self) -> Named {
        self.optimizer.state()
    }

    fn is_sharded(&self) -> bool {
        false
    }

    fn gather(&self) -> Result<Named, TrainError> {
        named::copy_to_host(&self.state())
    }

    fn load(&mut self, find: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<(), TrainError> {
        Ok(self.optimizer.load_state(find)?)
    }

    fn sum(&self, _: &Tensor) -> Result<(), TrainError> {
        Ok(())
    }

    fn rank_0_says(&self, answer: bool) -> Result<bool, TrainError> {
        Ok(answer)
    }
}

/// Parameters with weight decay, and those without: biases and normalisation weights, which are no matrices.
fn weight_decay_groups(named: Named) -> [Named; 2] {
    let (exempt, decayed) = named.into_iter().partition(|(_, tensor)| tensor.dim() < 2);
    [decayed, exempt]
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn biases_and_norms_do_not_decay() {
        let shapes: [(&str, &[i64]); 4] = [
            ("a.weight", &[2, 2]),
            ("a.bias", &[2]),
            ("x.LayerNorm.weight", &[2]),
            ("word_embeddings.weight", &[3, 2]),
        ];
        let named = shapes
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), Tensor::zeros(*shape, (Kind::Float, Device::Cpu))))
            .collect();
        let names = |named: &Named| named.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        let [decayed, exempt] = weight_decay_groups(named);
        assert_eq!(names(&decayed), ["a.weight", "word_embeddings.weight"]);
        assert_eq!(names(&exempt), ["a.bias", "x.LayerNorm.weight"]);
    }
}
