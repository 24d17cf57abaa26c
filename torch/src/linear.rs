//! Linear layers for inference on the CPU, with weights in oneDNN's own layout.

use std::ffi::CStr;

use tch::Tensor;

use crate::{Error, ffi};

/// Rows the packed layout is chosen for; any number works.
const TYPICAL_ROWS: i64 = 256;

/// What follows the product in the same kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Identity,
    Relu,
    /// The exact form, by the error function.
    Gelu,
    /// The tanh approximation.
    GeluTanh,
}

impl Activation {
    fn names(self) -> (&'static CStr, &'static CStr) {
        match self {
            Self::Identity => (c"none", c""),
            Self::Relu => (c"relu", c""),
            Self::Gelu => (c"gelu", c"none"),
            Self::GeluTanh => (c"gelu", c"tanh"),
        }
    }
}

/// `x W^T + b` in FP32 on the CPU, without gradients: several times as fast as `linear` for the few rows a request has.
#[derive(Debug)]
pub struct PackedLinear {
    weight: Tensor,
    bias: Tensor,
}

impl PackedLinear {
    /// `weight` [outputs, inputs] and `bias` [outputs], both FP32 on the CPU.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self, Error> {
        let packed = Tensor::new();
        // SAFETY: both tensors are alive for the call; the shim assigns to the second, which this function alone holds.
        ffi::call(|message| unsafe {
            ffi::athanor_linear_pack(ffi::pointer(weight), TYPICAL_ROWS, ffi::pointer(&packed), message)
        })?;
        Ok(Self { weight: packed, bias: bias.detach() })
    }

    /// `x` [..., inputs] to [..., outputs].
    pub fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor, Error> {
        let into = Tensor::new();
        let (name, algorithm) = activation.names();
        // SAFETY: all tensors and strings are alive for the call; the shim assigns to the last, which this function
        // alone holds.
        ffi::call(|message| unsafe {
            ffi::athanor_linear_packed(
                ffi::pointer(x),
                ffi::pointer(&self.weight),
                ffi::pointer(&self.bias),
                name.as_ptr(),
                algorithm.as_ptr(),
                ffi::pointer(&into),
                message,
            )
        })?;
        Ok(into)
    }
}

/// `x W^T + b` on the CPU with eight-bit weights, one scale an output, and rows of `x` rounded to eight bits as they
/// come, one scale a row: a row's result does not depend on its neighbours. On CPUs without VNNI rows are rounded to
/// seven bits, because oneDNN's sums would saturate. Without gradients.
#[derive(Debug)]
pub struct QuantizedLinear {
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor,
}

impl QuantizedLinear {
    /// `weight` [outputs, inputs] and `bias` [outputs], both FP32 on the CPU; the weight is rounded here.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self, Error> {
        let (packed, scales, zeros) = (Tensor::new(), Tensor::new(), Tensor::new());
        // SAFETY: all tensors are alive for the call; the shim assigns to those that this function alone holds.
        ffi::call(|message| unsafe {
            ffi::athanor_linear_quantize(
                ffi::pointer(weight),
                ffi::pointer(&packed),
                ffi::pointer(&scales),
                ffi::pointer(&zeros),
                message,
            )
        })?;
        Ok(Self { weight: packed, scales, zeros, bias: bias.detach().contiguous() })
    }

    /// `x` [..., inputs] to [..., outputs], FP32.
    pub fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor, Error> {
        let into = Tensor::new();
        let (name, algorithm) = activation.names();
        // SAFETY: all tensors and strings are alive for the call; the shim assigns to the last, which this function
        // alone holds.
        ffi::call(|message| unsafe {
            ffi::athanor_linear_int8(
                ffi::pointer(x),
                ffi::pointer(&self.weight),
                ffi::pointer(&self.scales),
                ffi::pointer(&self.zeros),
                ffi::pointer(&self.bias),
                name.as_ptr(),
                algorithm.as_ptr(),
                ffi::pointer(&into),
                message,
            )
        })?;
        Ok(into)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_packed_layer_equals_a_plain_one() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let options = (Kind::Float, Device::Cpu);
        let (weight, bias) = (Tensor::randn([96, 64], options), Tensor::randn([96], options));
        let packed = PackedLinear::new(&weight, &bias).unwrap();
        for shape in [vec![1, 64], vec![7, 64], vec![3, 300, 64]] {
            let x = Tensor::randn(shape, options);
            let plain = x.linear(&weight, Some(&bias));
            for (activation, expected) in [
                (Activation::Identity, plain.shallow_clone()),
                (Activation::Relu, plain.relu()),
                (Activation::Gelu, plain.gelu("none")),
                (Activation::GeluTanh, plain.gelu("tanh")),
            ] {
                let found = packed.forward(&x, activation).unwrap();
                // oneDNN sums 64 products in another order than MKL; gelu is approximated by another polynomial.
                assert!(found.allclose(&expected, 1e-4, 1e-5, false), "{activation:?} {:?}", x.size());
            }
        }
        assert!(packed.forward(&Tensor::randn([2, 65], options), Activation::Identity).is_err());
    }

    #[test]
    fn a_quantized_layer_is_close_and_treats_rows_alone() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let options = (Kind::Float, Device::Cpu);
        let (weight, bias) = (Tensor::randn([96, 64], options), Tensor::randn([96], options));
        let quantized = QuantizedLinear::new(&weight, &bias).unwrap();
        // Independent of the shim: round both sides by hand and multiply in FP32.
        let round = |x: &Tensor| {
            let scale = x.abs().amax([-1_i64].as_slice(), true) / 127.0;
            (x / scale.clamp_min(1e-30)).round() * scale
        };
        // Rows have eight bits where the CPU has VNNI, else seven.
        let round_row = |x: &Tensor, levels: f64| {
            let largest = x.abs().amax([-1_i64].as_slice(), true);
            (x * (largest.full_like(levels) / &largest)).round() * (&largest / levels)
        };
        for shape in [vec![1, 64], vec![3, 50, 64]] {
            let x = Tensor::randn(shape, options) * 3.0;
            let exact = x.linear(&weight, Some(&bias));
            let naive = [127.0, 63.0].map(|levels| round_row(&x, levels).linear(&round(&weight), Some(&bias)));
            for (activation, expected) in [
                (Activation::Identity, naive.each_ref().map(Tensor::shallow_clone)),
                (Activation::Relu, naive.each_ref().map(Tensor::relu)),
                (Activation::Gelu, naive.each_ref().map(|naive| naive.gelu("none"))),
            ] {
                let found = quantized.forward(&x, activation).unwrap();
                // Whole numbers are summed exactly; scaling them rounds. `naive` rounds each of 64 products and sums.
                let is_close = expected.iter().any(|expected| found.allclose(expected, 1e-3, 1e-2, false));
                assert!(is_close, "{activation:?} {:?}", x.size());
            }
            // Half a level is 1/254 of a row's largest value with eight bits, 1/126 with seven: some 1 % and 2 % of its
            // norm.
            let error =
                f64::try_from((quantized.forward(&x, Activation::Identity).unwrap() - &exact).norm() / exact.norm());
            assert!(error.unwrap() < 0.03);
        }
        let x = Tensor::cat(&[Tensor::randn([1, 64], options), Tensor::randn([1, 64], options) * 1000.0], 0);
        let alone = quantized.forward(&x.narrow(0, 0, 1), Activation::Identity).unwrap();
        let together = quantized.forward(&x, Activation::Identity).unwrap();
        assert_eq!(alone, together.narrow(0, 0, 1));
        let zeros = quantized.forward(&Tensor::zeros([2, 64], options), Activation::Identity).unwrap();
        // Adding zero: exact but for a conversion.
        assert!(zeros.allclose(&bias.unsqueeze(0), 1e-6, 1e-6, false));
    }
}
