//! What the ranks of one machine's CPU have in common while they train: the parameters' memory, and the place where the gradients of
//! layers' matrices are summed.

use std::{
    ffi::{c_int, c_void},
    ptr::NonNull,
};

use tch::Tensor;

use crate::{Error, ProcessGroup, ffi};

/// What ranks share of layers' matrices besides the matrices: the gradients that a [layer](crate::LayerCall) writes there instead of
/// handing them to autograd, in the numbers that products come in, and copies in BF16, which layers read under autocast.
pub(crate) struct SharedMatrices {
    handle: NonNull<c_void>,
}

// SAFETY: the handle owns an athanor::SharedMatrices, which is not bound to the thread that made it.
unsafe impl Send for SharedMatrices {}

impl SharedMatrices {
    /// For matrices of FP32, the same on all ranks; with `half` for passes under autocast to BF16, else for those in FP32. All ranks
    /// have to call it.
    pub fn new(ranks: &ProcessGroup, matrices: &[Tensor], half: bool) -> Result<Self, Error> {
        let pointers = ffi::pointers(matrices);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the group and the tensors are alive for the call; `handle` is written on success only.
        ffi::call(|message| unsafe {
            let half = c_int::from(half);
            ffi::athanor_matrices_new(ranks.handle(), pointers.as_ptr(), pointers.len(), half, &mut handle, message)
        })?;
        let handle = NonNull::new(handle).ok_or_else(|| Error::Torch("no matrices were shared".into()))?;
        Ok(Self { handle })
    }

    /// Before a backward pass: whether gradients may come here. A layer that is called more than once in it must not find them open.
    pub fn open(&mut self, open: bool) {
        // SAFETY: the handle is alive and borrowed alone.
        unsafe { ffi::athanor_matrices_open(self.handle.as_ptr(), c_int::from(open)) }
    }

    pub fn handle(&self) -> *mut c_void {
        self.handle.as_ptr()
    }
}

impl Drop for SharedMatrices {
    fn drop(&mut self) {
        // SAFETY: made by athanor_matrices_new, dropped once.
        unsafe { ffi::athanor_matrices_drop(self.handle.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use crate::{
        Activation, Autocast, Error, LayerCall, Optimizer, Rule, Shard, backward, sharding::tests::on_ranks, zero_grad,
    };

    use super::*;

    const C: i64 = 32;
    const I: i64 = 48;
    const T: i64 = 5;
    const ROWS: i64 = 6;
    const FLOATS: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// A layer's parameters and their optimizer; the numbers are always the same.
    struct Run {
        parameters: Vec<Tensor>,
        optimizer: Optimizer,
    }

    impl Run {
        fn new(shard: Shard) -> Self {
            let mut shapes: Vec<&[i64]> = [[&[C, C][..], &[C]]; 4].concat();
            shapes.extend::<[&[i64]; 8]>([&[C], &[C], &[I, C], &[I], &[C, I], &[C], &[C], &[C]]);
            let parameter = |(place, shape): (usize, &&[i64])| {
                let numbers = Tensor::arange(shape.iter().product::<i64>(), FLOATS) * 1.7 + place as f64;
                (numbers.sin() * 0.3).view(*shape).set_requires_grad(true)
            };
            let parameters: Vec<Tensor> = shapes.iter().enumerate().map(parameter).collect();
            let shared = parameters.iter().map(Tensor::shallow_clone).collect();
            let rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
            let optimizer = Optimizer::new(rule, vec![(0.1, shared)], shard).unwrap();
            Self { parameters, optimizer }
        }

        fn layer(&self, x: &Tensor) -> Tensor {
            let call = LayerCall {
                parameters: std::array::from_fn(|place| &self.parameters[place]),
                relative: None,
                mask: None,
                heads: 2,
                first_token: false,
                activation: Activation::Gelu,
                attention_dropout: 0.0,
                hidden_dropout: 0.0,
                eps: 1e-5,
            };
            call.forward(x).unwrap()
        }

        /// One backward pass about some of the rows, through the layer `times`.
        fn pass(&self, rows: std::ops::Range<i64>, times: usize) -> Result<(), Error> {
            zero_grad(&self.parameters)?;
            let x = (Tensor::arange(ROWS * T * C, FLOATS) * 0.37).cos().view([ROWS, T, C]);
            let weights = (Tensor::arange(ROWS * T * C, FLOATS) * 0.11).sin().view([ROWS, T, C]);
            let some = |tensor: &Tensor| tensor.narrow(0, rows.start, rows.end - rows.start);
            let y = (0..times).fold(some(&x), |x, _| self.layer(&x));
            backward(&(y.to_kind(Kind::Float) * some(&weights)).sum(Kind::Float))
        }
    }

    /// The difference's norm as a share of what is expected.
    fn difference(found: &Tensor, expected: &Tensor) -> f64 {
        assert_eq!(found.size(), expected.size());
        f64::try_from((found - expected).norm() / expected.norm().clamp_min(1e-3)).unwrap()
    }

    #[test]
    fn layers_gradients_are_summed_and_their_copies_follow_the_parameters() {
        for (world, half) in [(2, false), (2, true), (3, false), (3, true)] {
            let file = tempfile::tempfile().unwrap();
            on_ranks(world, Some(&file), |group| {
                let _autocast = half.then(|| Autocast::bf16(Device::Cpu));
                let shard = Shard { rank: group.rank(), world };
                let (whole, mut run) = (Run::new(shard), Run::new(shard));
                run.optimizer.share(group, half).unwrap();
                let per_rank = ROWS / world as i64;
                let rows = per_rank * shard.rank as i64..per_rank * (shard.rank as i64 + 1);
                // Through the shared matrices, and, with a second call of the layer, through autograd.
                for times in [1, 2] {
                    whole.pass(0..ROWS, times).unwrap();
                    run.optimizer.expect(times == 1);
                    run.pass(rows.clone(), times).unwrap();
                    assert_eq!(run.parameters[0].grad().defined(), times == 2);
                    assert!(run.parameters[1].grad().defined(), "a bias is not shared");
                    run.optimizer.sum_gradients(group).unwrap();
                    let (found, expected) = (run.optimizer.gradients().unwrap(), whole.optimizer.gradients().unwrap());
                    assert!(!expected.is_empty() && found.len() == expected.len());
                    for (found, expected) in std::iter::zip(found, expected) {
                        let difference = difference(&found, &expected);
                        assert!(difference < if half { 5e-2 } else { 1e-5 }, "{world} ranks, {half}: {difference}");
                    }
                }
                // Ranks have changed their parts: all read what a model of its own would.
                run.optimizer.step(0.1).unwrap();
                run.optimizer.share_parameters(group).unwrap();
                let mut alone = Run::new(Shard::WHOLE);
                for (own, shared) in std::iter::zip(&mut alone.parameters, &run.parameters) {
                    assert!(difference(&shared.detach(), &own.detach()) > 1e-2, "a step changes all of it");
                    own.detach().copy_(&shared.detach());
                }
                let x = (Tensor::arange(2 * T * C, FLOATS) * 0.7).sin().view([2, T, C]);
                assert_eq!(run.layer(&x), alone.layer(&x));
            });
        }
    }

    #[test]
    fn a_layer_that_is_called_twice_is_an_error_where_one_pass_was_expected() {
        let file = tempfile::tempfile().unwrap();
        on_ranks(2, Some(&file), |group| {
            let mut run = Run::new(Shard { rank: group.rank(), world: 2 });
            run.optimizer.share(group, false).unwrap();
            run.optimizer.expect(true);
            let found = run.pass(0..2, 2);
            assert!(matches!(&found, Err(Error::Torch(text)) if text.contains("twice")), "{found:?}");
        });
    }

    #[test]
    fn ranks_part_and_their_memory_is_used_again() {
        let file = tempfile::tempfile().unwrap();
        on_ranks(2, Some(&file), |group| {
            let shard = Shard { rank: group.rank(), world: 2 };
            let mut lengths = Vec::new();
            for _ in 0..3 {
                let mut run = Run::new(shard);
                let before: Vec<Tensor> = run.parameters.iter().map(|parameter| parameter.detach().copy()).collect();
                run.optimizer.share(group, true).unwrap();
                lengths.push(file.metadata().unwrap().len());
                // What rank 0 writes, as the others read it.
                let written = |run: &Run, value: f64| {
                    if shard.rank == 0 {
                        let _ = run.parameters[0].detach().fill_(value);
                    }
                    group.barrier().unwrap();
                    run.parameters[0].mean(Kind::Float).double_value(&[])
                };
                assert_eq!(written(&run, 5.0), 5.0, "one memory");
                run.optimizer.unshare(group).unwrap();
                let expected = if shard.rank == 0 { 7.0 } else { 5.0 };
                assert_eq!(written(&run, 7.0), expected, "memory of its own");
                assert_eq!(run.parameters[1].detach(), before[1]);
            }
            assert!(lengths.iter().all(|length| *length == lengths[0]), "{lengths:?}");
        });
    }
}
