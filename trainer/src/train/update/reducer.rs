//! The update of a rank: c10d's Reducer averages the gradients over the ranks while the backward pass goes on. With
//! `distributed.shardOptimizer` each rank updates its share of the parameters (ZeRO, stage 1) and the ranks exchange
//! the results.

use athanor_torch::{ProcessGroup, Reducer};
use tch::{Device, Tensor};

use super::{alone::Alone, step::Update};
use crate::{TrainError, data::Encoded, network::Network, train::named::Named};

/// One rank's update; the same code for Gloo and NCCL.
pub struct Reduced<'a> {
    // Dropped before the parameters that it hooks into.
    reducer: Reducer<'a>,
    alone: Alone,
    group: &'a ProcessGroup,
    device: Device,
}

impl<'a> Reduced<'a> {
    /// All ranks have to call it, with the same parameters.
    pub fn new(alone: Alone, group: &'a ProcessGroup, device: Device) -> Result<Self, TrainError> {
        Ok(Self { reducer: Reducer::new(&alone.parameters, group)?, alone, group, device })
    }
}

impl Update for Reduced<'_> {
    fn begin(&mut self, model: &mut Network, train: &Encoded, batch: &[usize]) -> Result<(), TrainError> {
        self.alone.begin(model, train, batch)?;
        Ok(self.reducer.prepare_for_forward()?)
    }

    /// Ranks exchange gradients in the last backward pass alone. The reducer averages them, so each rank's share is
    /// multiplied by the number of ranks.
    fn backward(&mut self, loss: &Tensor, is_last: bool) -> Result<(), TrainError> {
        if is_last {
            self.reducer.prepare_for_backward()?;
        }
        self.alone.backward(&(loss * self.group.world() as f64), is_last)
    }

    fn gradient_squares(&mut self, model: &mut Network) -> Result<f64, TrainError> {
        let squares = self.alone.gradient_squares(model)?;
        if !self.is_sharded() {
            return Ok(squares);
        }
        let sum = Tensor::from_slice(&[squares]).to_device(self.device);
        self.sum(&sum)?;
        Ok(sum.double_value(&[0]))
    }

    fn scale_gradients(&mut self, factor: f64) -> Result<(), TrainError> {
        self.alone.scale_gradients(factor)
    }

    fn apply(&mut self, learning_rate: f64) -> Result<(), TrainError> {
        self.alone.apply(learning_rate)?;
        if self.is_sharded() {
            self.alone.optimizer.share_parameters(self.group)?;
        }
        Ok(())
    }

    fn catch_up(&mut self) -> Result<(), TrainError> {
        self.alone.catch_up()
    }

    fn state(&self) -> Named {
        self.alone.state()
    }

    fn is_sharded(&self) -> bool {
        self.alone.optimizer.shard().world > 1
    }

    fn gather(&self) -> Result<Named, TrainError> {
        Ok(self.alone.optimizer.gather_state(self.group)?)
    }

    fn load(&mut self, find: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<(), TrainError> {
        self.alone.load(find)
    }

    fn sum(&self, numbers: &Tensor) -> Result<(), TrainError> {
        Ok(self.group.all_reduce_sum(numbers)?)
    }

    fn rank_0_says(&self, answer: bool) -> Result<bool, TrainError> {
        let shared = Tensor::from_slice(&[i64::from(answer)]).to_device(self.device);
        self.group.broadcast(&shared, 0)?;
        Ok(shared.int64_value(&[0]) == 1)
    }
}
