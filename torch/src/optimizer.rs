//! Backward pass with typed errors, gradient clipping, penalties, and the update rules.

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
pub fn zero_grad(parameters: &[Tensor], keep_memory: bool) -> Result<(), Error> {
    let pointers = ffi::pointers(parameters);
    ffi::call(|message| {
        // SAFETY: the pointers are valid for the call.
        unsafe { ffi::athanor_zero_grad(pointers.as_ptr(), pointers.len(), c_int::from(keep_memory), message) }
    })
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

/// Adds the gradient of `l1 |w| + l2 / 2 w²` to the parameters' gradients.
pub fn add_penalty(parameters: &[Tensor], l1: f64, l2: f64) -> Result<(), Error> {
    if l1 == 0.0 && l2 == 0.0 {
        return Ok(());
    }
    let pointers = ffi::pointers(parameters);
    // SAFETY: the pointers are valid for the call.
    ffi::call(|message| unsafe { ffi::athanor_add_penalty(pointers.as_ptr(), pointers.len(), l1, l2, message) })
}

/// An update rule, with PyTorch's meaning of its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `v = momentum v + g; w -= lr v`.
    Sgd { momentum: f64 },
    /// Kingma and Ba 2015, <https://arxiv.org/abs/1412.6980>; weight decay is added to the gradient.
    Adam { beta1: f64, beta2: f64, epsilon: f64 },
    /// Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>; weight decay shrinks the weights themselves.
    AdamW { beta1: f64, beta2: f64, epsilon: f64 },
    /// Hinton's lecture 6e: `s = alpha s + (1 - alpha) g²; w -= lr g / (sqrt(s) + epsilon)`, with momentum on the quotient.
    RmsProp { alpha: f64, momentum: f64, epsilon: f64 },
}

impl Rule {
    /// Names of the two state tensors of a parameter.
    fn state(self) -> [&'static str; 2] {
        match self {
            Self::Sgd { .. } => ["momentum_buffer", ""],
            Self::Adam { .. } | Self::AdamW { .. } => ["exp_avg", "exp_avg_sq"],
            Self::RmsProp { momentum, .. } => ["square_avg", if momentum > 0.0 { "momentum_buffer" } else { "" }],
        }
    }

    /// Number, first and second coefficient, momentum and epsilon, as the shim takes them.
    fn numbers(self) -> (c_int, f64, f64, f64, f64) {
        match self {
            Self::Sgd { momentum } => (0, 0.0, 0.0, momentum, 0.0),
            Self::Adam { beta1, beta2, epsilon } => (1, beta1, beta2, 0.0, epsilon),
            Self::AdamW { beta1, beta2, epsilon } => (2, beta1, beta2, 0.0, epsilon),
            Self::RmsProp { alpha, momentum, epsilon } => (3, 0.0, alpha, momentum, epsilon),
        }
    }
}

/// A rule with its state; one kernel over all parameters of a weight-decay group where libtorch has one.
pub struct Optimizer {
    rule: Rule,
    groups: Vec<Group>,
}

struct Group {
    weight_decay: f64,
    parameters: Vec<Tensor>,
    /// The rule's two state tensors, shaped like the parameters (empty where it has but one), and the step counters `[]`.
    state: [Vec<Tensor>; 3],
}

impl Optimizer {
    /// Groups of (weight decay, parameters); the state starts at zero.
    pub fn new(rule: Rule, groups: Vec<(f64, Vec<Tensor>)>) -> Self {
        let groups = groups
            .into_iter()
            .filter(|(_, parameters)| !parameters.is_empty())
            .map(|(weight_decay, parameters)| {
                let [first, second] = rule.state().map(|name| {
                    let zeros = |p: &Tensor| if name.is_empty() { Tensor::new() } else { p.detach().zeros_like() };
                    parameters.iter().map(zeros).collect::<Vec<_>>()
                });
                let steps = parameters.iter().map(|p| Tensor::zeros([], (Kind::Float, p.device()))).collect();
                Group { weight_decay, state: [first, second, steps], parameters }
            })
            .collect();
        Self { rule, groups }
    }

    /// One step with the gradients that the parameters hold; every parameter must have one.
    pub fn step(&mut self, learning_rate: f64) -> Result<(), Error> {
        let (rule, a, b, momentum, epsilon) = self.rule.numbers();
        for group in &self.groups {
            let parameters = ffi::pointers(&group.parameters);
            let [first, second, steps] = group.state.each_ref().map(|tensors| ffi::pointers(tensors));
            ffi::call(|message| {
                // SAFETY: four lists of the same length, whose tensors are alive for the call.
                unsafe {
                    ffi::athanor_optimizer_step(
                        rule,
                        parameters.as_ptr(),
                        first.as_ptr(),
                        second.as_ptr(),
                        steps.as_ptr(),
                        parameters.len(),
                        learning_rate,
                        a,
                        b,
                        momentum,
                        group.weight_decay,
                        epsilon,
                        message,
                    )
                }
            })?;
        }
        Ok(())
    }

    /// The state as named tensors `{group}.{index}.{name}`, sharing memory with the optimizer.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let [first, second] = self.rule.state();
        let mut named = Vec::new();
        for (g, group) in self.groups.iter().enumerate() {
            for (tensors, what) in group.state.iter().zip([first, second, "step"]).filter(|(_, what)| !what.is_empty())
            {
                named.extend(tensors.iter().enumerate().map(|(i, t)| (format!("{g}.{i}.{what}"), t.shallow_clone())));
            }
        }
        named
    }

    /// Overwrites the state with what [`Optimizer::state`] once gave.
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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Three steps on `w` from 1, -2 with the gradients 0.5, -1 and then 0.1 times the weights.
    fn run(rule: Rule, weight_decay: f64) -> (Vec<f64>, Optimizer) {
        let mut w = Tensor::from_slice(&[1.0_f32, -2.0]).to_device(Device::Cpu).set_requires_grad(true);
        let mut optimizer = Optimizer::new(rule, vec![(weight_decay, vec![w.shallow_clone()])]);
        for step in 0..3 {
            zero_grad(&[w.shallow_clone()], false).unwrap();
            let loss = if step == 0 {
                (&w * Tensor::from_slice(&[0.5_f32, -1.0])).sum(Kind::Float)
            } else {
                (&w * &w).sum(Kind::Float) * 0.05
            };
            backward(&loss).unwrap();
            optimizer.step(0.1).unwrap();
        }
        (Vec::<f64>::try_from(w.detach_().to_kind(Kind::Double)).unwrap(), optimizer)
    }

    /// The same by hand, from the rules' definitions; `update` gets the gradient, weight decay added where the rule adds it.
    fn naive(decay: f64, coupled: bool, mut update: impl FnMut(usize, i32, f64) -> f64) -> Vec<f64> {
        let mut w = [1.0, -2.0];
        for step in 1..=3 {
            for (i, first) in [0.5, -1.0].into_iter().enumerate() {
                let gradient = if step == 1 { first } else { 0.1 * w[i] };
                if coupled {
                    w[i] -= 0.1 * update(i, step, gradient + decay * w[i]);
                } else {
                    w[i] = w[i] * (1.0 - 0.1 * decay) - 0.1 * update(i, step, gradient);
                }
            }
        }
        w.to_vec()
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert!(std::iter::zip(found, expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} {expected:?}");
    }

    #[test]
    fn rules_are_their_definitions() {
        for momentum in [0.0, 0.9] {
            let mut v = [0.0; 2];
            let expected = naive(0.01, true, |i, _, g| {
                v[i] = momentum * v[i] + g;
                v[i]
            });
            close(&run(Rule::Sgd { momentum }, 0.01).0, &expected);

            let (mut s, mut v) = ([0.0; 2], [0.0; 2]);
            let expected = naive(0.01, true, |i, _, g| {
                s[i] = 0.99 * s[i] + 0.01 * g * g;
                let quotient = g / (f64::sqrt(s[i]) + 1e-8);
                v[i] = momentum * v[i] + quotient;
                v[i]
            });
            close(&run(Rule::RmsProp { alpha: 0.99, momentum, epsilon: 1e-8 }, 0.01).0, &expected);
        }
        let adam = |coupled: bool| {
            let (mut m, mut s) = ([0.0; 2], [0.0; 2]);
            naive(0.01, coupled, move |i, step, g| {
                m[i] = 0.9 * m[i] + 0.1 * g;
                s[i] = 0.999 * s[i] + 0.001 * g * g;
                let (m, s) = (m[i] / (1.0 - 0.9_f64.powi(step)), s[i] / (1.0 - 0.999_f64.powi(step)));
                m / (s.sqrt() + 1e-8)
            })
        };
        let (beta1, beta2, epsilon) = (0.9, 0.999, 1e-8);
        close(&run(Rule::Adam { beta1, beta2, epsilon }, 0.01).0, &adam(true));
        close(&run(Rule::AdamW { beta1, beta2, epsilon }, 0.01).0, &adam(false));
    }

    #[test]
    fn state_comes_back_by_name() {
        let rule = Rule::RmsProp { alpha: 0.99, momentum: 0.9, epsilon: 1e-8 };
        let (_, optimizer) = run(rule, 0.0);
        let saved: Vec<(String, Tensor)> = optimizer.state().into_iter().map(|(n, t)| (n, t.copy())).collect();
        let (_, mut other) = run(Rule::RmsProp { alpha: 0.5, momentum: 0.1, epsilon: 1e-8 }, 0.0);
        other.load_state(|name| saved.iter().find(|(n, _)| n == name).map(|(_, t)| t.shallow_clone())).unwrap();
        for ((name, a), (_, b)) in std::iter::zip(other.state(), saved) {
            assert_eq!(a, b, "{name}");
        }
        let missing = other.load_state(|_| None).unwrap_err().to_string();
        assert!(missing.contains("square_avg is missing"), "{missing}");
        assert_eq!(run(Rule::Sgd { momentum: 0.0 }, 0.0).1.state().len(), 2);
    }

    #[test]
    fn penalties_have_their_gradients() {
        let w = Tensor::from_slice(&[3.0_f32, -2.0, 0.0]).set_requires_grad(true);
        backward(&(&w * 0.0).sum(Kind::Float)).unwrap();
        add_penalty(&[w.shallow_clone()], 0.5, 0.1).unwrap();
        close(&Vec::<f64>::try_from(w.grad().to_kind(Kind::Double)).unwrap(), &[0.8, -0.7, 0.0]);
    }
}
