//! Dropout (Srivastava et al. 2014, <https://jmlr.org/papers/v15/srivastava14a.html>).

use tch::Tensor;

use crate::{Error, ffi};

/// Zeroes each number with probability `p` in [0, 1) and scales the others by 1 / (1 - p). The mask follows from the default
/// generator's state alone, whatever the number of threads. Other devices and kinds than FP32 and BF16 on the CPU are libtorch's.
pub fn dropout(x: &Tensor, p: f64) -> Result<Tensor, Error> {
    if p == 0.0 {
        return Ok(x.shallow_clone());
    }
    let into = Tensor::new();
    // SAFETY: both tensors are alive for the call; the shim assigns to the second, which this function alone holds.
    ffi::call(|message| unsafe { ffi::athanor_dropout(ffi::pointer(x), p, ffi::pointer(&into), message) })?;
    Ok(into)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn keeps_its_share_scales_the_rest_and_passes_gradients_alike() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for kind in [Kind::Float, Kind::BFloat16] {
            let x = Tensor::ones([1000, 300], (kind, Device::Cpu)).set_requires_grad(true);
            let y = dropout(&x, 0.25).unwrap();
            let values = y.detach().to_kind(Kind::Float);
            let kept = f64::try_from(values.gt(0.0).to_kind(Kind::Double).mean(Kind::Double)).unwrap();
            // Five standard deviations of 300,000 draws.
            assert!((kept - 0.75).abs() < 0.004, "{kept}");
            let scale = f64::try_from(values.max()).unwrap();
            // BF16 rounds 4/3 to 1.336.
            assert!((scale - 4.0 / 3.0).abs() < 0.005, "{scale}");
            // Columns and rows are alike: no stripes.
            for dimension in [0, 1] {
                let shares = values.gt(0.0).to_kind(Kind::Double).mean_dim(dimension, false, Kind::Double);
                // Expected: sqrt(0.75 * 0.25 / 300) = 0.025, and 0.014 for a thousand.
                assert!(f64::try_from(shares.std(true)).unwrap() < 0.035);
            }
            y.sum(Kind::Float).backward();
            assert_eq!(x.grad().to_kind(Kind::Float), values);
            // Another draw is another mask.
            assert_ne!(dropout(&x, 0.25).unwrap(), y);
        }
    }

    #[test]
    fn nothing_is_dropped_at_zero_and_one_is_refused() {
        let x = Tensor::ones([4], (Kind::Float, Device::Cpu));
        assert_eq!(dropout(&x, 0.0).unwrap(), x);
        assert!(dropout(&x, 1.0).is_err());
    }
}
