//! What an engine requires of a model on a device.

/// A model that reads each input once.
pub trait EncodeBackend: Send + 'static {
    /// Logits `[batch, labels]` of token ids `[batch, differing lengths]`; the backend pads.
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError>;

    /// Fixed cost of a call, expressed as the number of tokens that take as long.
    fn call_cost(&self) -> usize {
        16
    }
}

/// The model could not answer a batch.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the model failed: {0}")]
pub struct BackendError(pub String);
