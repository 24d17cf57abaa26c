//! Backward pass with typed errors, norms, penalties, and the update rules.

use std::ffi::c_int;

use tch::{Device, Kind, Tensor};

use crate::{
    Error, ProcessGroup, Shard, ffi,
    sharding::{Cuts, exchange},
};

/// Most elements of the buffer in which ranks exchange updated parameters: 256 MiB in FP32.
const EXCHANGED: i64 = 64 << 20;

/// Runs the backward pass of a scalar loss; inside it a [`crate::Reducer`] talks to the other ranks.
pub fn backward(loss: &Tensor) -> Result<(), Error> {
    // SAFETY: the tensor is alive for the call.
    ffi::call(|message| unsafe { ffi::athanor_backward(ffi::pointer(loss), message) })
}

/// Drops gradients: the next backward pass moves its results in, and a [`crate::Reducer`] copies them into its buckets.
pub fn zero_grad(parameters: &[Tensor]) -> Result<(), Error> {
    let pointers = ffi::pointers(parameters);
    // SAFETY: the pointers are valid for the call.
    ffi::call(|message| unsafe { ffi::athanor_zero_grad(pointers.as_ptr(), pointers.len(), message) })
}

/// The 2-norm of all numbers of the tensors.
pub fn norm(tensors: &[Tensor]) -> Result<f64, Error> {
    let mut norm = 0.0;
    if !tensors.is_empty() {
        let pointers = ffi::pointers(tensors);
        // SAFETY: pointers and `norm` are valid for the call.
        ffi::call(|message| unsafe { ffi::athanor_norm(pointers.as_ptr(), pointers.len(), &mut norm, message) })?;
    }
    Ok(norm)
}

/// Multiplies the tensors, in place.
pub fn scale(tensors: &[Tensor], factor: f64) -> Result<(), Error> {
    if tensors.is_empty() {
        return Ok(());
    }
    let pointers = ffi::pointers(tensors);
    // SAFETY: the pointers are valid for the call.
    ffi::call(|message| unsafe { ffi::athanor_scale(pointers.as_ptr(), pointers.len(), factor, message) })
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
    /// Hinton's lecture 6e: `s = alpha s + (1 - alpha) g²; w -= lr g / (sqrt(s) + epsilon)`, with momentum on the
    /// quotient.
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

/// Parameters, by name, with one weight decay.
pub struct ParameterGroup {
    pub weight_decay: f64,
    pub parameters: Vec<(String, Tensor)>,
}

/// A rule with its state, or with one [`Shard`] of it; one kernel over all parameters of a weight-decay group where
/// libtorch has one.
pub struct Optimizer {
    rule: Rule,
    shard: Shard,
    groups: Vec<Group>,
}

struct Group {
    weight_decay: f64,
    names: Vec<String>,
    parameters: Vec<Tensor>,
    /// Where each parameter is cut among the ranks.
    cuts: Vec<Cuts>,
    /// The rule's two state tensors, shaped like this shard's parts of the parameters (empty where it has but one), and
    /// the step counters `[]`, which every shard has.
    state: [Vec<Tensor>; 3],
}

impl Group {
    fn new(rule: Rule, group: ParameterGroup, shard: Shard) -> Result<Self, Error> {
        let (names, parameters): (Vec<_>, Vec<_>) = group.parameters.into_iter().unzip();
        let sizes: Vec<i64> = parameters.iter().map(|p| p.numel() as i64).collect();
        let mut group = Self {
            weight_decay: group.weight_decay,
            names,
            parameters,
            cuts: Cuts::of(&sizes, shard.world),
            state: Default::default(),
        };
        let parts = group.parts(shard.rank)?;
        for (tensors, name) in std::iter::zip(&mut group.state, rule.state()) {
            let zeros = |part: &Tensor| if name.is_empty() { Tensor::new() } else { part.zeros_like() };
            *tensors = parts.iter().map(zeros).collect();
        }
        group.state[2] = parts.iter().map(|part| Tensor::zeros([], (Kind::Float, part.device()))).collect();
        Ok(group)
    }

    /// A rank's parts of the parameters, sharing their memory.
    fn parts(&self, rank: usize) -> Result<Vec<Tensor>, Error> {
        std::iter::zip(&self.parameters, &self.cuts).map(|(p, cuts)| cuts.part(&p.detach(), rank)).collect()
    }

    /// A rank's parts of the gradients, which must be there.
    fn gradients(&self, rank: usize) -> Result<Vec<Tensor>, Error> {
        let part = |(parameter, cuts): (&Tensor, &Cuts)| {
            let gradient = parameter.grad();
            if !gradient.defined() {
                return Err(Error::Torch("a parameter has no gradient".into()));
            }
            cuts.part(&gradient, rank)
        };
        std::iter::zip(&self.parameters, &self.cuts).map(part).collect()
    }
}

/// A state tensor, or this shard's part of it.
struct Entry<'a> {
    /// `{parameter}.{name}`.
    name: String,
    tensor: &'a Tensor,
    /// The parameter whose shape the whole has, and where it is cut; the counters are of no shape and whole everywhere.
    like: Option<(&'a Tensor, &'a Cuts)>,
}

impl Optimizer {
    /// The state starts at zero. With shards, parameters must be contiguous.
    pub fn new(rule: Rule, groups: Vec<ParameterGroup>, shard: Shard) -> Result<Self, Error> {
        let groups = groups
            .into_iter()
            .filter(|group| !group.parameters.is_empty())
            .map(|group| Group::new(rule, group, shard))
            .collect::<Result<_, _>>()?;
        Ok(Self { rule, shard, groups })
    }

    /// The part of the state that this process keeps.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// One step with the gradients that the parameters hold; every parameter must have one. It changes this shard's
    /// parts of the parameters alone: [`Optimizer::share_parameters`] brings the others.
    pub fn step(&mut self, learning_rate: f64) -> Result<(), Error> {
        let (rule, a, b, momentum, epsilon) = self.rule.numbers();
        for group in &self.groups {
            let (parameters, gradients) = (group.parts(self.shard.rank)?, group.gradients(self.shard.rank)?);
            let [parameter_list, gradient_list] = [&parameters, &gradients].map(|tensors| ffi::pointers(tensors));
            let [first, second, steps] = group.state.each_ref().map(|tensors| ffi::pointers(tensors));
            ffi::call(|message| {
                // SAFETY: five lists of the same length, whose tensors are alive for the call.
                unsafe {
                    ffi::athanor_optimizer_step(
                        rule,
                        parameter_list.as_ptr(),
                        gradient_list.as_ptr(),
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

    /// This shard's parts of the gradients, without those that are empty.
    pub fn gradients(&self) -> Result<Vec<Tensor>, Error> {
        let mut gradients = Vec::new();
        for group in &self.groups {
            gradients.extend(group.gradients(self.shard.rank)?.into_iter().filter(|part| part.numel() > 0));
        }
        Ok(gradients)
    }

    /// After a step of all shards: gives every rank the parts that the others have updated, by one all-gather for each
    /// kind of number and device.
    pub fn share_parameters(&self, ranks: &ProcessGroup) -> Result<(), Error> {
        let mut places: Vec<(Kind, Device)> = Vec::new();
        for parameter in self.groups.iter().flat_map(|group| &group.parameters) {
            let place = (parameter.kind(), parameter.device());
            if !places.contains(&place) {
                places.push(place);
            }
        }
        for place in places {
            let parts = (0..self.shard.world).map(|owner| self.parts_at(owner, place));
            exchange(&parts.collect::<Result<Vec<_>, _>>()?, ranks, EXCHANGED)?;
        }
        Ok(())
    }

    /// A rank's parts of the parameters of one kind and device, flat, without those that are empty.
    fn parts_at(&self, rank: usize, place: (Kind, Device)) -> Result<Vec<Tensor>, Error> {
        let mut parts = Vec::new();
        for group in &self.groups {
            for part in group.parts(rank)? {
                if part.numel() > 0 && (part.kind(), part.device()) == place {
                    parts.push(part.f_view([-1_i64])?);
                }
            }
        }
        Ok(parts)
    }

    /// The state as named tensors `{parameter}.{name}`, sharing memory with the optimizer: this shard's parts of them.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.entries().into_iter().map(|entry| (entry.name, entry.tensor.shallow_clone())).collect()
    }

    /// The whole state on rank 0, copied into the CPU's memory, with the names and shapes it has without shards;
    /// nothing on the other ranks, all of which have to call it.
    pub fn gather_state(&self, ranks: &ProcessGroup) -> Result<Vec<(String, Tensor)>, Error> {
        let mut named = Vec::new();
        for Entry { name, tensor, like } in self.entries() {
            let whole = match like {
                Some((parameter, cuts)) => cuts.gather(&parameter.detach(), tensor, ranks)?,
                None => (ranks.rank() == 0).then(|| tensor.to_device(Device::Cpu).copy()),
            };
            named.extend(whole.map(|whole| (name, whole)));
        }
        Ok(named)
    }

    /// Overwrites the state with what [`Optimizer::state`] gave, or with this shard's parts of a whole one, which
    /// [`Optimizer::gather_state`] gave, or [`Optimizer::state`] without shards.
    pub fn load_state(&mut self, mut find: impl FnMut(&str) -> Option<Tensor>) -> Result<(), Error> {
        for Entry { name, tensor, like } in self.entries() {
            let mut saved = find(&name).ok_or_else(|| Error::Torch(format!("optimizer state {name} is missing")))?;
            if saved.size() != tensor.size() {
                match like {
                    Some((parameter, cuts)) if saved.size() == parameter.size() => {
                        saved = cuts.part(&saved, self.shard.rank)?;
                    }
                    _ => return Err(Error::Torch(format!("optimizer state {name} has another shape"))),
                }
            }
            tensor.shallow_clone().f_copy_(&saved)?;
        }
        Ok(())
    }

    fn entries(&self) -> Vec<Entry<'_>> {
        let [first, second] = self.rule.state();
        let mut entries = Vec::new();
        for group in &self.groups {
            for (tensors, what) in group.state.iter().zip([first, second, "step"]).filter(|(_, what)| !what.is_empty())
            {
                let likes = std::iter::zip(&group.parameters, &group.cuts);
                entries.extend(tensors.iter().zip(likes).zip(&group.names).map(|((tensor, like), name)| Entry {
                    name: format!("{name}.{what}"),
                    tensor,
                    like: (what != "step").then_some(like),
                }));
            }
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps on `w` from 1, -2 with the gradients 0.5, -1 and then 0.1 times the weights.
    fn run(rule: Rule, weight_decay: f64) -> (Vec<f64>, Optimizer) {
        let mut w = Tensor::from_slice(&[1.0_f32, -2.0]).to_device(Device::Cpu).set_requires_grad(true);
        let groups = vec![ParameterGroup { weight_decay, parameters: vec![("w".to_owned(), w.shallow_clone())] }];
        let mut optimizer = Optimizer::new(rule, groups, Shard::WHOLE).unwrap();
        for step in 0..3 {
            zero_grad(&[w.shallow_clone()]).unwrap();
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

    /// The same by hand, from the rules' definitions; `update` gets the gradient, weight decay added where the rule
    /// adds it.
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
        // FP32 weights near 1 over three steps, against FP64.
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
        assert!(missing.contains("w.square_avg is missing"), "{missing}");
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
