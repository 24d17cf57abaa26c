//! Input of a decoder: token sequences that follow each other without padding.

use std::collections::BTreeMap;

use tch::{Device, Tensor};

/// Sequences of token ids for one forward pass. With a cache, each holds the tokens that come after those already stored.
pub struct Batch {
    /// [N].
    pub ids: Tensor,
    /// Position of each token in its sequence, [N].
    pub positions: Tensor,
    lengths: Vec<i64>,
    /// Cache slots of all tokens of each sequence so far, the new ones last, [t]; none without a cache.
    slots: Vec<Tensor>,
    /// Adapters, and the tokens that have each, [n].
    adapted: Vec<(u64, Tensor)>,
}

impl Batch {
    /// Whole sequences without a cache. Positions begin at 0 in each: a document never continues another.
    pub fn new(sequences: &[&[i64]], device: Device) -> Self {
        let ids: Vec<i64> = sequences.iter().flat_map(|sequence| sequence.iter().copied()).collect();
        let positions: Vec<i64> = sequences.iter().flat_map(|sequence| 0..sequence.len() as i64).collect();
        Self {
            ids: Tensor::from_slice(&ids).to_device(device),
            positions: Tensor::from_slice(&positions).to_device(device),
            lengths: sequences.iter().map(|sequence| sequence.len() as i64).collect(),
            slots: Vec::new(),
            adapted: Vec::new(),
        }
    }

    /// New tokens of sequences whose earlier tokens are in a cache. `slots` are those of all tokens of a sequence, the new ones
    /// last; every sequence has at least one new token.
    ///
    /// # Panics
    /// A sequence has fewer slots than new tokens: the caller's block table is wrong.
    pub fn cached(rows: &[CachedRow<'_>], device: Device) -> Self {
        let ids: Vec<i64> = rows.iter().flat_map(|row| row.new.iter().copied()).collect();
        let positions: Vec<i64> = rows
            .iter()
            .flat_map(|row| {
                let all = row.slots.len();
                assert!(all >= row.new.len(), "{} new tokens have {all} slots", row.new.len());
                (all - row.new.len()) as i64..all as i64
            })
            .collect();
        Self {
            ids: Tensor::from_slice(&ids).to_device(device),
            positions: Tensor::from_slice(&positions).to_device(device),
            lengths: rows.iter().map(|row| row.new.len() as i64).collect(),
            slots: rows.iter().map(|row| Tensor::from_slice(row.slots).to_device(device)).collect(),
            adapted: Vec::new(),
        }
    }

    /// Gives sequences the adapters of these numbers; see `CausalLanguageModel::add_adapter`. `adapters` has an entry for
    /// each sequence, absent for one without an adapter.
    pub fn with_adapters(mut self, adapters: &[Option<u64>]) -> Self {
        let mut tokens = BTreeMap::<u64, Vec<i64>>::new();
        let mut first = 0;
        for (adapter, &length) in std::iter::zip(adapters, &self.lengths) {
            if let Some(id) = adapter {
                tokens.entry(*id).or_default().extend(first..first + length);
            }
            first += length;
        }
        let device = self.ids.device();
        let adapted = |(id, tokens): (u64, Vec<i64>)| (id, Tensor::from_slice(&tokens).to_device(device));
        self.adapted = tokens.into_iter().map(adapted).collect();
        self
    }

    /// Adapters, and the tokens that have each, [n].
    pub(crate) fn adapted(&self) -> &[(u64, Tensor)] {
        &self.adapted
    }

    /// New tokens of each sequence.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// The cache's slots of one sequence, [t].
    pub fn slots(&self, sequence: usize) -> &Tensor {
        &self.slots[sequence]
    }

    /// The cache's slots of the new tokens, [N].
    pub fn new_slots(&self) -> Tensor {
        let new = std::iter::zip(&self.slots, &self.lengths).map(|(slots, &n)| slots.narrow(0, slots.size()[0] - n, n));
        Tensor::cat(&new.collect::<Vec<_>>(), 0)
    }

    /// Rows of the sequences' last tokens in the hidden states, [sequences].
    pub fn last_rows(&self) -> Tensor {
        let ends = self.lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end - 1)
        });
        Tensor::from_slice(&ends.collect::<Vec<i64>>()).to_device(self.ids.device())
    }
}

/// One sequence of [`Batch::cached`].
pub struct CachedRow<'a> {
    /// Ids of the new tokens.
    pub new: &'a [i64],
    /// The cache's slots of all tokens of the sequence, the new ones last.
    pub slots: &'a [i64],
}
