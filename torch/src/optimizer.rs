//! Backward pass with typed errors, gradient clipping, and AdamW in one fused kernel.

use std::ffi::c_int;

use tch::{Kind, Tensor};

use crate::{Error, ffi};

/// Runs the backward pass of a scalar loss; inside it a [`crate::Reducer`] talks to the other ranks.
pub fn backward(loss: &Tensor) -> Result<(), Error> {
    // SAFETY: the tensor is alive for the call.
    ffi::call(|message| unsafe { ffi::athanor_backward(ffi::pointer(loss), message) })
}

/// Clears gradients. With `keep_memory` they are zeroed in place, which a [`crate::Reducer`]'s bucket views need; without it
/// they are dropped, and the next backward pass moves its results in.
pub fn zero_grad(parameters: &[Tensor], keep_memory: bool) {
    let pointers = ffi::pointers(parameters);
    // SAFETY: the pointers are valid for the call.
    unsafe { ffi::athanor_zero_grad(pointers.as_ptr(), pointers.len(), c_int::from(keep_memory)) }
}

/// Global 2-norm of the gradients before clipping; they are scaled to `max_norm` if that is above zero and below the norm.
/// A norm that is not finite is returned and the gradients stay as they are.
pub fn clip_grad_norm(parameters: &[Tensor], max_norm: f64) -> Result<f64, Error> {
    let pointers = ffi::pointers(parameters);
    let mut norm = 0.0;
    ffi::call(|message| {
        // SAFETY: pointers and `norm` are valid for the call.
        unsafe { ffi::athanor_clip_grad_norm(pointers.as_ptr(), pointers.len(), max_norm, &mut norm, message) }
    })?;
    Ok(norm)
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

/// AdamW (Loshchilov and Hutter 2019), one kernel over all parameters of a weight-decay group.
pub struct AdamW {
    options: AdamWOptions,
    groups: Vec<Group>,
}

struct Group {
    weight_decay: f64,
    parameters: Vec<Tensor>,
    /// First and second moments, shaped like the parameters, and the step counters `[]`.
    state: [Vec<Tensor>; 3],
}

/// Names of the state tensors of a parameter, in the order of [`AdamW::state`].
const STATE: [&str; 3] = ["exp_avg", "exp_avg_sq", "step"];

impl AdamW {
    /// Groups of (weight decay, parameters); all moments start at zero.
    pub fn new(options: AdamWOptions, groups: Vec<(f64, Vec<Tensor>)>) -> Self {
        let groups = groups
            .into_iter()
            .filter(|(_, parameters)| !parameters.is_empty())
            .map(|(weight_decay, parameters)| {
                let zeros = || parameters.iter().map(|p| p.detach().zeros_like()).collect::<Vec<_>>();
                let steps = parameters.iter().map(|p| Tensor::zeros([], (Kind::Float, p.device()))).collect();
                Group { weight_decay, state: [zeros(), zeros(), steps], parameters }
            })
            .collect();
        Self { options, groups }
    }

    /// One step with the gradients that the parameters hold; every parameter must have one.
    pub fn step(&mut self, learning_rate: f64) -> Result<(), Error> {
        let AdamWOptions { beta1, beta2, epsilon } = self.options;
        for group in &self.groups {
            let parameters = ffi::pointers(&group.parameters);
            let [averages, squares, steps] = group.state.each_ref().map(|tensors| ffi::pointers(tensors));
            ffi::call(|message| {
                // SAFETY: four lists of the same length, whose tensors are alive for the call.
                unsafe {
                    ffi::athanor_fused_adamw(
                        parameters.as_ptr(),
                        averages.as_ptr(),
                        squares.as_ptr(),
                        steps.as_ptr(),
                        parameters.len(),
                        learning_rate,
                        beta1,
                        beta2,
                        group.weight_decay,
                        epsilon,
                        message,
                    )
                }
            })?;
        }
        Ok(())
    }

    /// The state as named tensors `{group}.{index}.{exp_avg|exp_avg_sq|step}`, sharing memory with the optimizer.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut named = Vec::new();
        for (g, group) in self.groups.iter().enumerate() {
            for (tensors, what) in group.state.iter().zip(STATE) {
                named.extend(tensors.iter().enumerate().map(|(i, t)| (format!("{g}.{i}.{what}"), t.shallow_clone())));
            }
        }
        named
    }

    /// Overwrites the state with what [`AdamW::state`] once gave.
    pub fn load_state(&mut self, mut find: impl FnMut(&str) -> Option<Tensor>) -> Result<(), Error> {
        for (name, mut tensor) in self.state() {
            let saved = find(&name).ok_or_else(|| Error::Torch(format!("optimizer state {name} is missing")))?;
            if saved.size() != tensor.size() {
                return Err(Error::Torch(format!("optimizer state {name} has another shape")));
            }
            tensor.f_copy_(&saved).map_err(|error| Error::Torch(error.to_string()))?;
        }
        Ok(())
    }
}
