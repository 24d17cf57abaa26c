//! A transformer layer for training on the CPU, forward and backward in few passes over memory.

use std::ffi::c_int;

use tch::{Device, Kind, Tensor};

use crate::{Activation, Error, ffi};

/// A layer that normalises behind each half (Vaswani et al. 2017), with its gradient: `y = norm(x + drop(attention(x) W
/// + b))`, then `norm(y + drop(act(y W + b) W + b))`.
///
/// Under autocast it hands on BF16 and keeps BF16 for the backward pass; sums and normalisation are FP32. Dropout's
/// masks follow from the default generator's state alone. Nothing depends on the number of threads but what libtorch's
/// matrix products do.
///
/// Shapes: B texts, T tokens, Q = T or 1 tokens that ask, C = hidden size, H = heads, I = intermediate size.
pub struct LayerCall<'a> {
    /// Weight and bias each of query, key, value, attention's output [C, C], its norm [C], the inner layer [I, C], the
    /// outer [C, I] and the last norm [C]; FP32.
    pub parameters: [&'a Tensor; 16],
    /// Added to the scores, [1, H, T, T].
    pub relative: Option<&'a Tensor>,
    /// True where attention may look, [B, T] with any ones between.
    pub mask: Option<&'a Tensor>,
    pub heads: i64,
    /// Only each text's first token asks and goes on.
    pub first_token: bool,
    /// Activation of the inner layer; [`Activation::Identity`] is refused.
    pub activation: Activation,
    pub attention_dropout: f64,
    pub hidden_dropout: f64,
    pub eps: f64,
}

impl LayerCall<'_> {
    /// Whether `x` can be computed here and gradients are wanted: without them nothing has to be kept.
    pub fn applies(x: &Tensor) -> bool {
        // SAFETY: takes nothing and reads a flag of this thread.
        let wanted = unsafe { ffi::athanor_grad_enabled() } != 0;
        wanted && x.device() == Device::Cpu && matches!(x.kind(), Kind::Float | Kind::BFloat16)
    }

    /// `x` [B, T, C] to [B, Q, C].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let activation = match self.activation {
            Activation::Relu => 0,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
            Activation::Identity => return Err(Error::Torch("a layer without an activation".into())),
        };
        let parameters = self.parameters.map(ffi::pointer);
        let optional = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null_mut(), ffi::pointer);
        let into = Tensor::new();
        // SAFETY: all tensors are alive for the call, and there are as many parameters as the shim reads; it checks
        // shapes and assigns to the last tensor, which this function alone holds.
        ffi::call(|message| unsafe {
            ffi::athanor_layer(
                ffi::pointer(x),
                parameters.as_ptr(),
                optional(self.relative),
                optional(self.mask),
                self.heads,
                c_int::from(self.first_token),
                activation,
                self.attention_dropout,
                self.hidden_dropout,
                self.eps,
                ffi::pointer(&into),
                message,
            )
        })?;
        Ok(into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Autocast, backward};

    const B: i64 = 3;
    const T: i64 = 21;
    const C: i64 = 48;
    const H: i64 = 4;
    const I: i64 = 80;
    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    struct Case {
        x: Tensor,
        parameters: Vec<Tensor>,
        relative: Tensor,
        mask: Tensor,
    }

    impl Case {
        fn new(seed: i64) -> Self {
            tch::manual_seed(seed);
            let leaf = |tensor: Tensor| tensor.detach().set_requires_grad(true);
            let matrix = |outputs: i64, inputs: i64| leaf(Tensor::randn([outputs, inputs], OPTIONS) * 0.2);
            let vector = |size: i64, around: f64| leaf(Tensor::randn([size], OPTIONS) * 0.3 + around);
            let mut parameters = Vec::new();
            for (outputs, inputs) in [(C, C), (C, C), (C, C), (C, C), (0, 0), (I, C), (C, I), (0, 0)] {
                if outputs > 0 {
                    parameters.extend([matrix(outputs, inputs), vector(outputs, 0.0)]);
                } else {
                    parameters.extend([vector(C, 1.0), vector(C, 0.0)]);
                }
            }
            // The second text has 13 tokens, the third 2.
            let lengths = Tensor::from_slice(&[T, 13, 2]).unsqueeze(1);
            Self {
                x: leaf(Tensor::randn([B, T, C], OPTIONS)),
                parameters,
                relative: leaf(Tensor::randn([1, H, T, T], OPTIONS)),
                mask: Tensor::arange(T, (Kind::Int64, Device::Cpu)).unsqueeze(0).lt_tensor(&lengths),
            }
        }

        fn call(&self, first_token: bool, activation: Activation, dropout: f64) -> LayerCall<'_> {
            LayerCall {
                parameters: std::array::from_fn(|place| &self.parameters[place]),
                relative: Some(&self.relative),
                mask: Some(&self.mask),
                heads: H,
                first_token,
                activation,
                attention_dropout: dropout,
                hidden_dropout: dropout,
                eps: 1e-5,
            }
        }

        /// The same by libtorch's operators, without dropout.
        fn naive(&self, first_token: bool, activation: Activation) -> Tensor {
            let p = &self.parameters;
            let linear = |x: &Tensor, place: usize| x.linear(&p[place], Some(&p[place + 1]));
            let norm = |x: Tensor, place: usize| x.layer_norm([C], Some(&p[place]), Some(&p[place + 1]), 1e-5, false);
            let heads = |x: Tensor| x.view([B, T, H, C / H]).transpose(1, 2);
            let [query, key, value] = [0, 2, 4].map(|place| heads(linear(&self.x, place)));
            let scores = query.matmul(&key.transpose(-2, -1)) / ((C / H) as f64).sqrt() + &self.relative;
            let never = self.mask.logical_not().view([B, 1, 1, T]);
            let attention = scores.masked_fill(&never, f64::NEG_INFINITY).softmax(-1, Kind::Float);
            let context = attention.matmul(&value).transpose(1, 2).reshape([B, T, C]);
            let middle = norm(linear(&context, 6) + &self.x, 8);
            let inner = linear(&middle, 10);
            let active = match activation {
                Activation::Relu => inner.relu(),
                Activation::Gelu => inner.gelu("none"),
                _ => inner.gelu("tanh"),
            };
            let y = norm(linear(&active, 12) + middle, 14);
            if first_token { y.narrow(1, 0, 1) } else { y }
        }

        fn leaves(&self) -> Vec<Tensor> {
            self.parameters.iter().chain([&self.x, &self.relative]).map(Tensor::shallow_clone).collect()
        }

        /// Gradients by all leaves of the sum of the outputs, weighted unevenly.
        fn gradients(&self, y: &Tensor) -> Vec<Tensor> {
            let leaves = self.leaves();
            crate::zero_grad(&leaves).unwrap();
            backward(&loss(y)).unwrap();
            leaves.iter().map(|leaf| leaf.grad().copy()).collect()
        }
    }

    fn loss(y: &Tensor) -> Tensor {
        let weights = Tensor::arange(y.numel() as i64, OPTIONS).sin().view_as(y);
        (y.to_kind(Kind::Float) * weights).sum(Kind::Float)
    }

    /// The difference's norm as a share of what is expected.
    fn difference(found: &Tensor, expected: &Tensor) -> f64 {
        assert_eq!(found.size(), expected.size());
        let (found, expected) = (found.to_kind(Kind::Float), expected.to_kind(Kind::Float));
        f64::try_from((found - &expected).norm() / expected.norm()).unwrap()
    }

    #[test]
    fn equals_libtorchs_operators_and_their_gradients() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (first_token, activation) in [
            (false, Activation::Gelu),
            (true, Activation::Gelu),
            (false, Activation::Relu),
            (true, Activation::GeluTanh),
        ] {
            let case = Case::new(1);
            let expected = case.naive(first_token, activation);
            let wanted = case.gradients(&expected);
            for half in [false, true] {
                let _autocast = half.then(|| Autocast::bf16(Device::Cpu));
                let y = case.call(first_token, activation, 0.0).forward(&case.x).unwrap();
                assert_eq!(y.kind(), if half { Kind::BFloat16 } else { Kind::Float });
                // bfloat16 has eight bits.
                let (near, near_gradient) = match (half, activation) {
                    // FP32 products and sums in another order; the backward pass has twice as many.
                    (false, _) => (1e-5, 2e-5),
                    // Near zero a rounded number is on the other side.
                    (true, Activation::Relu) => (1e-2, 1e-1),
                    (true, _) => (1e-2, 5e-2),
                };
                assert!(difference(&y, &expected) < near, "{}", difference(&y, &expected));
                for (place, (found, expected)) in case.gradients(&y).iter().zip(&wanted).enumerate() {
                    // A key's bias moves all scores of a row alike: its gradient is rounding.
                    if place != 3 {
                        let difference = difference(found, expected);
                        assert!(
                            difference < near_gradient,
                            "{activation:?} {first_token} {half} {place}: {difference}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn without_a_bias_and_a_mask_all_is_allowed() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut case = Case::new(2);
        case.relative = Tensor::zeros([1, H, T, T], OPTIONS);
        case.mask = Tensor::ones([B, T], (Kind::Bool, Device::Cpu));
        let call = LayerCall { relative: None, mask: None, ..case.call(false, Activation::Gelu, 0.0) };
        // FP32 products summed in another order.
        assert!(difference(&call.forward(&case.x).unwrap(), &case.naive(false, Activation::Gelu)) < 1e-5);
    }

    #[test]
    fn gradients_follow_the_dropped_function() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for first_token in [false, true] {
            let case = Case::new(3);
            let value = || {
                tch::manual_seed(4);
                case.call(first_token, Activation::Gelu, 0.3).forward(&case.x).unwrap()
            };
            let y = value();
            assert_eq!(y, value());
            assert!(difference(&y, &case.naive(first_token, Activation::Gelu)) > 0.1);
            let gradients = case.gradients(&y);
            for (place, (leaf, gradient)) in case.leaves().iter().zip(gradients).enumerate() {
                if place == 3 {
                    continue;
                }
                // Along the gradient, where the change is largest.
                let direction = &gradient / gradient.norm();
                // A central difference: its error is of second order in the step, and rounding of the loss is divided
                // by it.
                let step = 3e-3;
                let shift = |by: f64| {
                    tch::no_grad(|| {
                        let mut leaf = leaf.shallow_clone();
                        leaf += &direction * by;
                    })
                };
                let moved = |by: f64| {
                    shift(by);
                    let found = f64::try_from(loss(&value()).to_kind(Kind::Double)).unwrap();
                    shift(-by);
                    found
                };
                let slope = (moved(step) - moved(-step)) / (2.0 * step);
                let expected = f64::try_from(gradient.norm()).unwrap();
                assert!((slope / expected - 1.0).abs() < 0.02, "{place}: {slope} {expected}");
            }
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let case = Case::new(5);
        let narrow = Tensor::zeros([B, T, C - 1], OPTIONS);
        assert!(case.call(false, Activation::Gelu, 0.0).forward(&narrow).is_err());
        assert!(case.call(false, Activation::Identity, 0.0).forward(&case.x).is_err());
        assert!(case.call(false, Activation::Gelu, 1.0).forward(&case.x).is_err());
        let other = Tensor::zeros([1, H, T, T - 1], OPTIONS);
        assert!(
            LayerCall { relative: Some(&other), ..case.call(false, Activation::Gelu, 0.0) }.forward(&case.x).is_err()
        );
        let narrow = Tensor::zeros([C - 1], OPTIONS);
        let mut call = case.call(false, Activation::Gelu, 0.0);
        call.parameters[9] = &narrow;
        assert!(call.forward(&case.x).is_err());
        assert!(tch::no_grad(|| !LayerCall::applies(&case.x)));
    }
}
