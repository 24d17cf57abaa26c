//! Output heads of decoders.

pub mod causal;
