//! Rotary position embeddings (Su et al. 2021, <https://arxiv.org/abs/2104.09864>) in the layout of Hugging Face's Llama: the first
//! half of a head is paired with the second.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// How `rope_scaling` of config.json stretches the positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    Default,
    /// Positions are divided by the factor.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies are divided by the factor, high ones stay, those between are interpolated.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
}

/// Frequencies of one model.
pub struct Rotary {
    /// [D / 2], in FP32.
    frequencies: Tensor,
}

impl Rotary {
    /// `head_dim`: D, even.
    pub fn new(theta: f64, head_dim: i64, scaling: &RopeScaling, device: Device) -> Self {
        Self { frequencies: Tensor::from_slice(&frequencies(theta, head_dim, scaling)).to_device(device) }
    }

    /// Cosines and sines of positions [N], each [N, 1, D], in `kind`.
    pub fn angles(&self, positions: &Tensor, kind: Kind) -> (Tensor, Tensor) {
        let angles = positions.to_kind(Kind::Float).outer(&self.frequencies);
        let angles = Tensor::cat(&[&angles, &angles], -1).unsqueeze(1);
        (angles.cos().to_kind(kind), angles.sin().to_kind(kind))
    }
}

/// The frequency of each pair of numbers of a head, [D / 2].
pub fn frequencies(theta: f64, head_dim: i64, scaling: &RopeScaling) -> Vec<f32> {
    // f32, as in transformers.
    let exponent = |pair: i64| (2 * pair) as f32 / head_dim as f32;
    (0..head_dim / 2).map(|pair| scaled(1.0 / (theta as f32).powf(exponent(pair)), scaling)).collect()
}

fn scaled(frequency: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
            let original = original_max_position_embeddings as f32;
            let wavelength = 2.0 * std::f32::consts::PI / frequency;
            if wavelength > original / low {
                frequency / factor as f32
            } else if wavelength < original / high {
                frequency
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
            }
        }
    }
}

/// Rotates heads [N, H, D] by the angles of their positions.
pub fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Tensor {
    let half = x.size()[2] / 2;
    let turned = Tensor::cat(&[&-x.narrow(2, half, half), &x.narrow(2, 0, half)], 2);
    x * cos + turned * sin
}
