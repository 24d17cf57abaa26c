//! Layers that the decoder families share: projections, normalisation, rotary positions, attention over packed sequences.

pub mod attention;
pub mod linear;
pub mod norm;
pub mod rotary;
