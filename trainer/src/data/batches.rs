//! Rows to batches: shuffled, grouped by length so that little is padding, and dealt to the ranks. All of it is a
//! function of seed, epoch and lengths, so every rank computes the same batches and a resumed run goes on with them.

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

/// Parts of a rank's even share of a batch by which the share may be smaller or larger.
const RUNS_A_SHARE: usize = 4;

/// The rows of a batch that this rank computes, from the longest. Every rank pads its rows to its longest one, so each
/// gets a run of rows of like length, and the longest runs are the shortest in rows: the ranks' padded tokens are as
/// even as runs can be. A rank has none where the others' take no longer without it.
pub fn share(batch: &[usize], lengths: &[usize], rank: usize, world: usize) -> Vec<usize> {
    let mut sorted = batch.to_vec();
    sorted.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    // Shapes that have not been seen before cost their kernels: numbers of rows are rounded.
    let quantum = (batch.len() / world / RUNS_A_SHARE).max(1);
    let end = |begin: usize, most: usize| {
        let fit = sorted.get(begin).map_or(0, |&row| most / lengths[row].max(1));
        if fit >= sorted.len() - begin { sorted.len() } else { begin + fit / quantum * quantum }
    };
    let fits = |most: usize| (0..world).fold(0, |begin, _| end(begin, most)) == sorted.len();
    let (mut below, mut most) = (0, sorted.first().map_or(0, |&row| lengths[row].max(1) * sorted.len()));
    while most - below > 1 {
        let middle = below.midpoint(most);
        if fits(middle) { most = middle } else { below = middle }
    }
    let begin = (0..rank).fold(0, |begin, _| end(begin, most));
    sorted[begin..end(begin, most)].to_vec()
}

/// Batches for evaluation: sorted by length, for one rank every `world`-th.
pub fn evaluation_batches(lengths: &[usize], batch_size: usize, rank: usize, world: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    order.chunks(batch_size).skip(rank).step_by(world).map(<[usize]>::to_vec).collect()
}

/// Ids [B, T], and the mask [B, T] where some text is shorter than others: without padding attention takes the faster
/// kernel.
pub fn inputs(texts: &[&[u32]], pad_id: i64, device: Device) -> (Tensor, Option<Tensor>) {
    let padded = texts.iter().any(|ids| ids.len() != texts[0].len());
    let (ids, mask) = pad(texts, pad_id);
    (ids.to_device(device), padded.then(|| mask.to_device(device)))
}

/// A well-mixed seed from two numbers (SplitMix64).
pub fn mix(seed: u64, number: u64) -> u64 {
    athanor_data::mix(seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
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
    fn ranks_share_a_batch_and_pad_little() {
        let lengths = lengths();
        let batch: Vec<usize> = (0..32).collect();
        for world in [1, 2, 3, 7, 40] {
            let shares: Vec<Vec<usize>> = (0..world).map(|rank| share(&batch, &lengths, rank, world)).collect();
            let mut all = shares.concat();
            all.sort_unstable();
            assert_eq!(all, batch);
        }
        // Padded tokens of each rank.
        let costs = |lengths: &[usize], world: usize| -> Vec<usize> {
            let batch: Vec<usize> = (0..lengths.len()).collect();
            let cost = |rows: Vec<usize>| rows.len() * rows.iter().map(|&row| lengths[row]).max().unwrap_or(0);
            (0..world).map(|rank| cost(share(&batch, lengths, rank, world))).collect()
        };
        assert_eq!(costs(&[20; 32], 2), [320, 320]);
        assert_eq!(costs(&[20; 32], 4), [160; 4]);
        assert_eq!(costs(&[20; 3], 5), [20, 20, 20, 0, 0]);
        assert_eq!(costs(&[], 2), [0, 0]);
        // A few long rows among short ones: a half of all rows padded to 110 would be 1760 tokens.
        let mixed: Vec<usize> = [vec![110; 5], vec![40; 27]].concat();
        assert_eq!(costs(&mixed, 2), [8 * 110, 24 * 40]);
        // No other two runs of multiples of four rows are more even, whatever the lengths.
        for seed in 0..200 {
            let lengths: Vec<usize> = (0..32).map(|row| 4 + mix(seed, row) as usize % (1 + seed as usize)).collect();
            let mut sorted = lengths.clone();
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            let best = (0..32).step_by(4).map(|cut| (cut * sorted[0]).max((32 - cut) * sorted[cut])).min();
            assert_eq!(costs(&lengths, 2).into_iter().max(), best, "{sorted:?}");
        }
    }
}
