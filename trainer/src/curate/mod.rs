//! Which rows a training learns from: annotated by an endpoint or by the teacher, selected, and augmented with new
//! texts.

pub mod annotate;
pub mod augment;

pub mod select;
pub mod training_data;
