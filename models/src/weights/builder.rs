//! A decoder's parameters, taken from a source and collected under their names.

use tch::{Device, Kind, Tensor};

use super::Source;
use crate::{
    load::LoadError,
    nn::{
        linear::Projection,
        norm::{LayerNorm, RmsNorm},
    },
};

/// Takes a model's parameters from a source, in the order in which the family asks for them.
pub struct Builder<'a> {
    source: &'a dyn Source,
    /// Kind of the parameters. Absent: as the file has them.
    kind: Option<Kind>,
    device: Device,
    parameters: Vec<(String, Tensor)>,
}

impl<'a> Builder<'a> {
    pub fn new(source: &'a dyn Source, kind: Option<Kind>, device: Device) -> Self {
        Self { source, kind, device, parameters: Vec::new() }
    }

    /// Every parameter under its name, in the order in which it was taken.
    pub fn finish(self) -> Vec<(String, Tensor)> {
        self.parameters
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    /// An error about a field of the configuration.
    pub fn config_error(&self, field: &str, message: String) -> LoadError {
        LoadError::Config { file: self.source.config_file(), field: field.into(), message }
    }

    /// A tensor by its name, or by its name without the first part: checkpoints of a bare backbone lack `model.` and
    /// `transformer.`.
    pub fn tensor(&mut self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let bare = name.split_once('.').map_or(name, |(_, rest)| rest);
        let stored = if !self.source.contains(name) && self.source.contains(bare) { bare } else { name };
        let tensor = self.source.take(stored, shape, self.kind)?.f_to_device(self.device)?;
        self.parameters.push((name.to_owned(), tensor.shallow_clone()));
        Ok(tensor)
    }

    pub fn projection(&mut self, name: &str, inputs: i64, outputs: i64, bias: bool) -> Result<Projection, LoadError> {
        let weight = self.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[outputs])).transpose()?;
        Ok(Projection::new(name, weight, bias, false))
    }

    /// A projection with a bias whose matrix is stored as [inputs, outputs].
    pub fn transposed_projection(&mut self, name: &str, inputs: i64, outputs: i64) -> Result<Projection, LoadError> {
        let weight = self.tensor(&format!("{name}.weight"), &[inputs, outputs])?;
        let bias = Some(self.tensor(&format!("{name}.bias"), &[outputs])?);
        Ok(Projection::new(name, weight, bias, true))
    }

    pub fn rms_norm(&mut self, name: &str, size: i64, eps: f64) -> Result<RmsNorm, LoadError> {
        Ok(RmsNorm { weight: self.tensor(&format!("{name}.weight"), &[size])?, eps })
    }

    pub fn layer_norm(&mut self, name: &str, size: i64, eps: f64) -> Result<LayerNorm, LoadError> {
        let weight = self.tensor(&format!("{name}.weight"), &[size])?;
        Ok(LayerNorm { weight, bias: self.tensor(&format!("{name}.bias"), &[size])?, eps })
    }
}
