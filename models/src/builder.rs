//! Parameters by name: from a folder's weights, or drawn at random where the folder has none.

use std::collections::BTreeSet;

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};

use crate::{
    load::{LoadError, Weights},
    nn::{dense::Linear, norm::LayerNorm},
};

/// How a tensor that is in no file begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initializer {
    /// Normal with the deviation `initializer_range`, as transformers draws.
    #[default]
    Normal,
    /// Glorot and Bengio 2010: uniform in ±sqrt(6 / (inputs + outputs)).
    XavierUniform,
    /// He et al. 2015: uniform in ±sqrt(6 / inputs).
    KaimingUniform,
    Zeros,
}

/// Collects a model's parameters in the order they are made, under their names.
pub struct Builder<'a> {
    /// Absent: everything is drawn.
    weights: Option<&'a mut Weights>,
    /// Prefix of the encoder's names in the model, such as `bert.`.
    prefix: &'static str,
    /// The same in the file: it may be nothing.
    file_prefix: &'static str,
    /// Which layer of the file each layer of the model is.
    layers: &'a [usize],
    initializer_range: f64,
    random: StdRng,
    device: Device,
    parameters: Vec<(String, Tensor)>,
    fresh: BTreeSet<String>,
}

impl<'a> Builder<'a> {
    pub fn new(
        weights: Option<&'a mut Weights>,
        prefix: &'static str,
        layers: &'a [usize],
        initializer_range: f64,
        seed: u64,
        device: Device,
    ) -> Self {
        let is_prefixed = weights
            .as_ref()
            .is_some_and(|weights| weights.contains(&format!("{prefix}embeddings.word_embeddings.weight")));
        Self {
            weights,
            prefix,
            file_prefix: if is_prefixed { prefix } else { "" },
            layers,
            initializer_range,
            random: StdRng::seed_from_u64(seed),
            device,
            parameters: Vec::new(),
            fresh: BTreeSet::new(),
        }
    }

    /// The parameters, and the names of the layers that are in no file.
    pub fn finish(self) -> (Vec<(String, Tensor)>, Vec<String>) {
        (self.parameters, self.fresh.into_iter().collect())
    }

    /// Whether the file has an encoder's layer.
    pub fn has(&self, name: &str) -> bool {
        self.weights.as_ref().is_some_and(|weights| weights.contains(&self.file_name(&format!("{name}.weight"))))
    }

    fn file_name(&self, name: &str) -> String {
        let renumbered = name.strip_prefix("encoder.layer.").and_then(|rest| {
            let (index, part) = rest.split_once('.')?;
            let layer = self.layers.get(index.parse::<usize>().ok()?)?;
            Some(format!("{}encoder.layer.{layer}.{part}", self.file_prefix))
        });
        renumbered.unwrap_or_else(|| format!("{}{name}", self.file_prefix))
    }

    /// An encoder's tensor, known as `{prefix}{name}`.
    pub fn encoder(&mut self, name: &str, shape: &[i64], initializer: Initializer) -> Result<Tensor, LoadError> {
        let file_name = self.file_name(name);
        let known = format!("{}{name}", self.prefix);
        let tensor = match &mut self.weights {
            Some(weights) => weights.take(&file_name, shape)?,
            None => self.draw(&known, shape, initializer),
        };
        Ok(self.add(known, tensor))
    }

    /// A tensor whose name has no prefix, from the file.
    pub fn plain(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let tensor = match &mut self.weights {
            Some(weights) => weights.take(name, shape)?,
            None => self.draw(name, shape, Initializer::Normal),
        };
        Ok(self.add(name.to_owned(), tensor))
    }

    fn add(&mut self, name: String, tensor: Tensor) -> Tensor {
        self.parameters.push((name, tensor.shallow_clone()));
        tensor
    }

    fn draw(&mut self, name: &str, shape: &[i64], initializer: Initializer) -> Tensor {
        let layer = name.rsplit_once('.').map_or(name, |(layer, _)| layer);
        self.fresh.insert(layer.to_owned());
        let count: i64 = shape.iter().product();
        let (outputs, inputs) = (shape[0] as f64, shape.get(1).copied().unwrap_or(1) as f64);
        let uniform = |random: &mut StdRng, bound: f64| ((random.random::<f64>() * 2.0 - 1.0) * bound) as f32;
        let values: Vec<f32> = (0..count)
            .map(|_| match initializer {
                Initializer::Zeros => 0.0,
                Initializer::XavierUniform => uniform(&mut self.random, (6.0 / (inputs + outputs)).sqrt()),
                Initializer::KaimingUniform => uniform(&mut self.random, (6.0 / inputs).sqrt()),
                Initializer::Normal => {
                    // Box-Muller: two uniform numbers make one that is normal.
                    let (radius, angle): (f64, f64) = (1.0 - self.random.random::<f64>(), self.random.random());
                    ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos() * self.initializer_range)
                        as f32
                }
            })
            .collect();
        Tensor::from_slice(&values).view(shape).to_device(self.device)
    }

    /// An encoder's layer `x W^T + b`.
    pub fn linear(&mut self, name: &str, inputs: i64, outputs: i64) -> Result<Linear, LoadError> {
        let weight = self.encoder(&format!("{name}.weight"), &[outputs, inputs], Initializer::Normal)?;
        let bias = self.encoder(&format!("{name}.bias"), &[outputs], Initializer::Zeros)?;
        Ok(Linear::new(format!("{}{name}", self.prefix), weight, bias))
    }

    /// A head's layer from the file.
    pub fn plain_linear(&mut self, name: &str, inputs: i64, outputs: i64) -> Result<Linear, LoadError> {
        let weight = self.plain(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = self.plain(&format!("{name}.bias"), &[outputs])?;
        Ok(Linear::new(name.to_owned(), weight, bias))
    }

    /// A layer that is in no file; its biases are zero. `name` is whole.
    pub fn fresh_linear(&mut self, name: &str, inputs: i64, outputs: i64, initializer: Initializer) -> Linear {
        let weight = format!("{name}.weight");
        let drawn = self.draw(&weight, &[outputs, inputs], initializer);
        let bias = Tensor::zeros([outputs], (Kind::Float, self.device));
        Linear::new(name.to_owned(), self.add(weight, drawn), self.add(format!("{name}.bias"), bias))
    }

    pub fn layer_norm(&mut self, name: &str, size: i64, eps: f64) -> Result<LayerNorm, LoadError> {
        let name = |part: &str| format!("{name}.{part}");
        if self.weights.is_none() {
            let known = format!("{}{}", self.prefix, name("weight"));
            let weight = self.add(known, Tensor::ones([size], (Kind::Float, self.device)));
            let bias = self.encoder(&name("bias"), &[size], Initializer::Zeros)?;
            return Ok(LayerNorm { weight, bias, eps });
        }
        let weight = self.encoder(&name("weight"), &[size], Initializer::Zeros)?;
        let bias = self.encoder(&name("bias"), &[size], Initializer::Zeros)?;
        Ok(LayerNorm { weight, bias, eps })
    }

    /// A head's normalisation, from the file or fresh: ones and zeros.
    pub fn plain_layer_norm(&mut self, name: &str, size: i64, eps: f64, fresh: bool) -> Result<LayerNorm, LoadError> {
        let (weight, bias) = if fresh {
            self.fresh.insert(name.to_owned());
            let options = (Kind::Float, self.device);
            let weight = self.add(format!("{name}.weight"), Tensor::ones([size], options));
            (weight, self.add(format!("{name}.bias"), Tensor::zeros([size], options)))
        } else {
            (self.plain(&format!("{name}.weight"), &[size])?, self.plain(&format!("{name}.bias"), &[size])?)
        };
        Ok(LayerNorm { weight, bias, eps })
    }

    /// A head's vector of zeros, or what the file has.
    pub fn plain_bias(&mut self, name: &str, size: i64, fresh: bool) -> Result<Tensor, LoadError> {
        if !fresh {
            return self.plain(name, &[size]);
        }
        let zeros = Tensor::zeros([size], (Kind::Float, self.device));
        Ok(self.add(name.to_owned(), zeros))
    }
}
