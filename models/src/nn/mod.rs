//! Layers that families share: projections, normalisation, embeddings, rotary positions, attention over packed sequences, and the
//! encoders' layer.

pub mod attention;
pub mod dense;
pub mod dropout;
pub mod embeddings;
pub mod encoder_layer;
pub mod linear;
pub mod norm;
pub mod packed;
pub mod rotary;
