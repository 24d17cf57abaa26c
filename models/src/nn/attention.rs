//! Causal attention over sequences that follow each other without padding: no query sees another sequence.
//!
//! Shapes: N tokens of all sequences, H query heads, K key and value heads (K divides H), D values a head.

use tch::{Kind, Tensor};

use crate::{batch::Batch, kv_cache::KvCache};

/// Settings of one layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Index of the layer in the cache.
    pub layer: usize,
    /// A query sees this many tokens, itself included. Absent: all before it.
    pub window: Option<i64>,
    /// Probability with which an attention weight is dropped in training.
    pub dropout: f64,
}

impl Attention {
    /// Queries [N, H, D], keys and values [N, K, D] to [N, H * D]. With a cache the new keys and values are stored in it and the
    /// sequences' earlier ones are read from it.
    pub fn forward(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        batch: &Batch,
        cache: Option<&mut KvCache>,
    ) -> Tensor {
        let width = query.size()[1] * query.size()[2];
        let Some(cache) = cache else {
            let parts = split(batch, query, |at, length| {
                self.sequence(&query.narrow(0, at, length), &key.narrow(0, at, length), &value.narrow(0, at, length))
            });
            return Tensor::cat(&parts, 0).view([-1, width]);
        };
        cache.write(self.layer, &batch.new_slots(), key, value);
        let mut sequence = 0;
        let parts = split(batch, query, |at, length| {
            let slots = batch.slots(sequence);
            sequence += 1;
            let (key, value) = cache.read(self.layer, slots);
            self.sequence(&query.narrow(0, at, length), &key, &value)
        });
        Tensor::cat(&parts, 0).view([-1, width])
    }

    /// The last n tokens of a sequence of t: queries [n, H, D], keys and values [t, K, D] to [n, H, D].
    fn sequence(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Tensor {
        let (n, heads, d) = query.size3().expect("queries have three dimensions");
        let (t, groups) = (key.size()[0], heads / key.size()[1]);
        let keys = key.transpose(0, 1).unsqueeze(0);
        let values = value.transpose(0, 1).unsqueeze(0);
        if n == 1 && self.window.is_none_or(|window| t <= window) {
            // One query sees everything, so the heads that share a key take the place of queries.
            let query = query.view([1, heads / groups, groups, d]);
            return self.product(&query, &keys, &values, None, false).view([1, heads, d]);
        }
        let spread = |x: Tensor| match groups {
            1 => x,
            groups => x.repeat_interleave_self_int(groups, 1, None),
        };
        let query = query.transpose(0, 1).unsqueeze(0);
        let is_plain = n == t && self.window.is_none_or(|window| t <= window);
        let mask = (!is_plain).then(|| self.mask(n, t, query.device()));
        let out = self.product(&query, &spread(keys), &spread(values), mask.as_ref(), is_plain);
        out.squeeze_dim(0).transpose(0, 1).contiguous()
    }

    fn product(&self, query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
        Tensor::scaled_dot_product_attention(query, key, value, mask, self.dropout, causal, None, false)
    }

    /// Where the last n of t tokens may look: [n, t], true where they may.
    fn mask(&self, n: i64, t: i64, device: tch::Device) -> Tensor {
        let query = Tensor::arange_start(t - n, t, (Kind::Int64, device)).unsqueeze(1);
        let key = Tensor::arange(t, (Kind::Int64, device)).unsqueeze(0);
        let distance = query - key;
        let before = distance.ge(0);
        match self.window {
            Some(window) => before.logical_and(&distance.lt(window)),
            None => before,
        }
    }
}

/// Calls `part` with the beginning and length of each sequence.
fn split(batch: &Batch, query: &Tensor, mut part: impl FnMut(i64, i64) -> Tensor) -> Vec<Tensor> {
    debug_assert_eq!(query.size()[0], batch.lengths().iter().sum::<i64>());
    let mut at = 0;
    let mut parts = Vec::with_capacity(batch.lengths().len());
    for &length in batch.lengths() {
        parts.push(part(at, length));
        at += length;
    }
    parts
}
