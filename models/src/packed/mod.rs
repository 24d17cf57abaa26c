//! Models with packed weights, for serving on a CPU ([`athanor_cpu`]).

pub mod decoder;
pub mod encoder;

pub use decoder::{Bits, PackOptions, is_packable, load};
