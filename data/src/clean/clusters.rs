//! Rows that are near duplicates of each other: MinHash signatures sorted band by band (Leskovec, Rajaraman, Ullman, "Mining of
//! Massive Datasets", chapter 3) find candidates, the shingles of the texts themselves decide, and what is joined forms a cluster.
//!
//! Clusters depend on the texts alone, not on the order of the rows. A pair at the threshold is found with probability 0.99 or
//! more; a pair below it is never joined directly, though both may be near duplicates of a third. Memory: 264 bytes a row for
//! the signatures, and while [`NearDuplicateIndex::clusters`] runs 20 to 36 more.

use std::borrow::Cow;

use athanor_contract::train::NearDuplicates;

use super::minhash::{MinHasher, PERMUTATIONS, estimate, jaccard, mix};

/// Chance with which a pair at the threshold has to become a candidate.
const RECALL: f64 = 0.99;

/// Rows that share a band are compared with so many that follow in the order of their signatures: with all others, unless the
/// band is as common as boilerplate. The order is that of the content, so the rows' own does not matter.
const NEIGHBOURS: usize = 64;

/// Estimates this far below the threshold (four standard deviations) are not worth a look at the texts.
const MARGIN: f64 = 0.18;

/// Takes the texts one by one; at most `u32::MAX` of them.
#[derive(Clone, Debug)]
pub struct NearDuplicateIndex {
    hasher: MinHasher,
    threshold: f64,
    /// [rows, PERMUTATIONS]
    signatures: Vec<u16>,
    /// A hash of each row's shingles; 0 for a row without any.
    sets: Vec<u64>,
}

impl NearDuplicateIndex {
    pub fn new(spec: &NearDuplicates) -> Self {
        Self {
            hasher: MinHasher::new(spec.shingles),
            threshold: spec.threshold.get(),
            signatures: Vec::new(),
            sets: Vec::new(),
        }
    }

    /// Adds the text of the next row.
    pub fn push(&mut self, text: &str) {
        let set = self.hasher.shingle_set(text);
        self.signatures.extend(self.hasher.signature(&set));
        let hash = set.iter().fold(1, |state: u64, &shingle| mix(state.rotate_left(7) ^ u64::from(shingle)));
        self.sets.push(if set.is_empty() { 0 } else { hash.max(1) });
    }

    pub fn len(&self) -> usize {
        self.sets.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// The clusters of the rows, whose texts `text` gives once more, the same as were pushed.
    pub fn clusters<'a>(&self, text: impl Fn(usize) -> Cow<'a, str>) -> Clusters {
        let mut clusters = Clusters { parents: (0..self.len() as u32).collect() };
        let distinct = self.join_equal_sets(&mut clusters);
        let rows = band_rows(self.threshold);
        let mut keyed: Vec<(u64, u32)> = Vec::with_capacity(distinct.len());
        for band in 0..PERMUTATIONS / rows {
            keyed.clear();
            keyed.extend(distinct.iter().map(|&row| (self.band_key(row, band * rows, rows), row)));
            keyed.sort_unstable();
            for same in keyed.chunk_by(|a, b| a.0 == b.0).filter(|same| same.len() > 1) {
                self.join_candidates(same, &text, &mut clusters);
            }
        }
        clusters.flatten();
        clusters
    }

    /// Joins rows with the same shingles and gives one of each, so that a text that occurs a thousand times is compared once.
    fn join_equal_sets(&self, clusters: &mut Clusters) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.len() as u32).filter(|&row| self.sets[row as usize] != 0).collect();
        order.sort_unstable_by_key(|&row| self.content(row));
        let mut distinct = Vec::new();
        for same in order.chunk_by(|&a, &b| self.content(a) == self.content(b)) {
            distinct.push(same[0]);
            for &row in &same[1..] {
                clusters.join(same[0], row);
            }
        }
        distinct
    }

    /// Compares the rows of one band's key, each with its next neighbours.
    fn join_candidates<'a>(&self, same: &[(u64, u32)], text: &impl Fn(usize) -> Cow<'a, str>, clusters: &mut Clusters) {
        let mut rows: Vec<u32> = same.iter().map(|&(_, row)| row).collect();
        rows.sort_unstable_by_key(|&row| self.content(row));
        let mut sets: Vec<Option<Vec<u32>>> = vec![None; rows.len()];
        let shingles = |row: u32| self.hasher.shingle_set(&text(row as usize));
        for (i, &row) in rows.iter().enumerate() {
            for (j, &other) in rows.iter().enumerate().skip(i + 1).take(NEIGHBOURS) {
                if clusters.root(row) == clusters.root(other)
                    || estimate(self.signature(row), self.signature(other)) < self.threshold - MARGIN
                {
                    continue;
                }
                let one = sets[i].take().unwrap_or_else(|| shingles(row));
                let two = sets[j].take().unwrap_or_else(|| shingles(other));
                if jaccard(&one, &two) >= self.threshold {
                    clusters.join(row, other);
                }
                (sets[i], sets[j]) = (Some(one), Some(two));
            }
            // No later row is compared with this one.
            sets[i] = None;
        }
    }

    fn signature(&self, row: u32) -> &[u16] {
        &self.signatures[row as usize * PERMUTATIONS..][..PERMUTATIONS]
    }

    /// What rows are ordered by: equal for equal shingles alone, up to collisions of 64 and 2,048 bits at once.
    fn content(&self, row: u32) -> (&[u16], u64) {
        (self.signature(row), self.sets[row as usize])
    }

    fn band_key(&self, row: u32, first: usize, rows: usize) -> u64 {
        self.signature(row)[first..first + rows]
            .iter()
            .fold(0, |key: u64, &place| mix(key.rotate_left(16) ^ u64::from(place)))
    }
}

/// Places of a band: as many as leave a pair at the threshold its chance, for the fewest false candidates.
fn band_rows(threshold: f64) -> usize {
    let found = |rows: usize| 1.0 - (1.0 - threshold.powi(rows as i32)).powi((PERMUTATIONS / rows) as i32);
    (1..=16).rev().find(|&rows| found(rows) >= RECALL).unwrap_or(1)
}

/// Which rows belong together: a union-find whose roots are the first rows of their clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clusters {
    parents: Vec<u32>,
}

impl Clusters {
    /// The cluster's first row, which names it; the row itself if it has no near duplicates.
    pub fn id(&self, row: usize) -> usize {
        self.parents[row] as usize
    }

    /// Whether the row is the first, or the only one, of its cluster.
    pub fn is_first(&self, row: usize) -> bool {
        self.id(row) == row
    }

    pub fn len(&self) -> usize {
        self.parents.len()
    }

    pub fn is_empty(&self) -> bool {
        self.parents.is_empty()
    }

    fn root(&mut self, mut row: u32) -> u32 {
        while self.parents[row as usize] != row {
            let parent = self.parents[row as usize];
            self.parents[row as usize] = self.parents[parent as usize];
            row = parent;
        }
        row
    }

    fn join(&mut self, one: u32, other: u32) {
        let (one, other) = (self.root(one), self.root(other));
        self.parents[one.max(other) as usize] = one.min(other);
    }

    /// Points every row at its root; a parent comes before its children.
    fn flatten(&mut self) {
        for row in 0..self.parents.len() {
            self.parents[row] = self.parents[self.parents[row] as usize];
        }
    }
}

#[cfg(test)]
#[path = "clusters_tests.rs"]
mod tests;
