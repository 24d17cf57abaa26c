//! Keys and values of tokens that were computed before. The tensors are here; which slot belongs to which sequence is decided by
//! the caller, so that sequences can share a prefix and memory is bounded.

use tch::{Device, Kind, Tensor};

/// Keys and values of every layer, one slot a token.
pub struct KvCache {
    /// Keys and values of each layer, [slots, K, D].
    layers: Vec<(Tensor, Tensor)>,
}

/// Size of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    pub layers: usize,
    /// K.
    pub key_value_heads: i64,
    /// D.
    pub head_dim: i64,
}

impl CacheShape {
    /// Bytes of one slot of all layers.
    pub fn slot_bytes(&self, kind: Kind) -> usize {
        2 * self.layers * (self.key_value_heads * self.head_dim) as usize * kind.elt_size_in_bytes()
    }
}

impl KvCache {
    pub fn new(shape: CacheShape, slots: i64, kind: Kind, device: Device) -> Self {
        let tensor = || Tensor::zeros([slots, shape.key_value_heads, shape.head_dim], (kind, device));
        Self { layers: (0..shape.layers).map(|_| (tensor(), tensor())).collect() }
    }

    /// Stores keys and values [N, K, D] in slots [N].
    pub fn write(&mut self, layer: usize, slots: &Tensor, key: &Tensor, value: &Tensor) {
        let (keys, values) = &mut self.layers[layer];
        let _ = keys.index_copy_(0, slots, &key.to_kind(keys.kind()));
        let _ = values.index_copy_(0, slots, &value.to_kind(values.kind()));
    }

    /// Keys and values of slots [t], each [t, K, D].
    pub fn read(&self, layer: usize, slots: &Tensor) -> (Tensor, Tensor) {
        let (keys, values) = &self.layers[layer];
        (keys.index_select(0, slots), values.index_select(0, slots))
    }
}
