//! Rows to batches: shuffled, grouped by length so that little is padding, and dealt to the ranks. All of it is a function of
//! seed, epoch and lengths, so every rank computes the same batches and a resumed run goes on with them.

use athanor_models::tokenizer::pad;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use tch::{Device, Tensor};

/// Batches whose rows are sorted by length together: small enough to keep the order of an epoch random.
const GROUPED: usize = 32;

/// The batches of an epoch: four bytes a row.
#[derive(Debug, PartialEq, Eq)]
pub struct Batches {
    rows: Vec<u32>,
    /// Where batches begin, in the order of the epoch.
    starts: Vec<u32>,
    size: usize,
}

impl Batches {
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The rows of a batch; none behind the last.
    pub fn get(&self, index: usize) -> Vec<usize> {
        let rows = self.starts.get(index).map_or(&[][..], |&start| &self.rows[start as usize..]);
        rows.iter().take(self.size).map(|&row| row as usize).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = Vec<usize>> {
        (0..self.len()).map(|index| self.get(index))
    }
}

/// The batches of one epoch, as indices into `lengths`; each row once, one batch may be smaller.
pub fn epoch_batches(lengths: &[usize], batch_size: usize, seed: u64, epoch: u64) -> Batches {
    let mut random = StdRng::seed_from_u64(mix(seed, epoch));
    // A dataset numbers its rows in 32 bits.
    let mut rows: Vec<u32> = (0..lengths.len() as u32).collect();
    rows.shuffle(&mut random);
    rows.chunks_mut(batch_size * GROUPED).for_each(|group| group.sort_by_key(|&row| lengths[row as usize]));
    let mut starts: Vec<u32> = (0..rows.len() as u32).step_by(batch_size).collect();
    starts.shuffle(&mut random);
    Batches { rows, starts, size: batch_size }
}

/// The rows of a batch that this rank computes. Rows are dealt from the longest, to and fro, so that the ranks have about the same
/// number of tokens; a rank has none if there are fewer rows than ranks.
pub fn share(batch: &[usize], lengths: &[usize], rank: usize, world: usize) -> Vec<usize> {
    let mut sorted = batch.to_vec();
    sorted.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    let dealt = |place: usize| {
        let (round, position) = (place / world, place % world);
        if round % 2 == 0 { position } else { world - 1 - position }
    };
    sorted.into_iter().enumerate().filter(|&(place, _)| dealt(place) == rank).map(|(_, row)| row).collect()
}

/// Batches for evaluation: sorted by length, for one rank every `world`-th.
pub fn evaluation_batches(lengths: &[usize], batch_size: usize, rank: usize, world: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    order.chunks(batch_size).skip(rank).step_by(world).map(<[usize]>::to_vec).collect()
}

/// Ids [B, T], and the mask [B, T] where some text is shorter than others: without padding attention takes the faster kernel.
pub fn inputs(texts: &[&[u32]], pad_id: i64, device: Device) -> (Tensor, Option<Tensor>) {
    let padded = texts.iter().any(|ids| ids.len() != texts[0].len());
    let (ids, mask) = pad(texts, pad_id);
    (ids.to_device(device), padded.then(|| mask.to_device(device)))
}

/// A well-mixed seed from two numbers (SplitMix64).
pub fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths() -> Vec<usize> {
        (0..1000).map(|i| 5 + (i * 7919) % 60).collect()
    }

    #[test]
    fn an_epoch_has_each_row_once_and_little_padding() {
        let lengths = lengths();
        let batches = epoch_batches(&lengths, 16, 1, 0);
        let mut rows: Vec<usize> = batches.iter().flatten().collect();
        rows.sort_unstable();
        assert!(rows.into_iter().eq(0..1000));
        let padded: usize = batches.iter().map(|b| b.len() * b.iter().map(|&row| lengths[row]).max().unwrap()).sum();
        let real: usize = lengths.iter().sum();
        assert!(padded < real * 11 / 10, "{padded} places for {real} tokens");
        assert_eq!(batches, epoch_batches(&lengths, 16, 1, 0));
        assert_ne!(batches, epoch_batches(&lengths, 16, 1, 1));
        assert_ne!(batches, epoch_batches(&lengths, 16, 2, 0));
    }

    #[test]
    fn ranks_share_a_batch_evenly() {
        let lengths = lengths();
        let batch: Vec<usize> = (0..30).collect();
        for world in [1, 2, 3, 7, 40] {
            let shares: Vec<Vec<usize>> = (0..world).map(|rank| share(&batch, &lengths, rank, world)).collect();
            let mut all = shares.concat();
            all.sort_unstable();
            assert_eq!(all, batch);
            let tokens: Vec<usize> = shares.iter().map(|share| share.iter().map(|&row| lengths[row]).sum()).collect();
            if world <= 3 {
                assert!(tokens.iter().max().unwrap() - tokens.iter().min().unwrap() < 60, "{tokens:?}");
            }
        }
    }
}
