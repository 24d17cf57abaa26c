//! Rows that are near duplicates of each other: the places of MinHash signatures band by band (Leskovec, Rajaraman,
//! Ullman, "Mining of Massive Datasets", chapter 3) find candidates, the shingles of the texts themselves decide, and
//! what is joined forms a cluster.
//!
//! Clusters depend on the texts alone, not on the order of the rows. A pair at the threshold is found with probability
//! 0.99 or more; a pair below it is never joined directly, though both may be near duplicates of a third.
//!
//! Signatures are not kept. Of each row stay 24 bytes ([`Sketch`]), and a key of four bytes for each of some bands; as
//! many bands as fit into [`KEYS`] are gone through at once, and for the next ones the texts are hashed again. Millions
//! of rows so take time instead of memory: 37 bytes a row beside the keys, 0.8 GB for ten million rows. Keys of 32 bits
//! bring rows together that have nothing in common, some thousand pairs a band of ten million rows, which their
//! sketches then tell apart.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicU64, Ordering},
};

use athanor_contract::train::NearDuplicates;

use super::minhash::{MinHasher, PERMUTATIONS, jaccard};
use crate::{
    progress::{Progress, Report},
    random::mix,
};

/// Chance with which a pair at the threshold has to become a candidate.
const RECALL: f64 = 0.99;

/// Rows that share a band are compared with so many that follow in the order of their sketches: with all others, unless
/// the band is as common as boilerplate. The order is that of the content, so the rows' own does not matter.
const NEIGHBOURS: usize = 64;

/// Sketches this many standard deviations below what the threshold lets expect are not worth a look at the texts.
const MARGIN: f64 = 4.0;

/// Bytes of the keys that are kept at a time: two rounds for ten million rows at a threshold of 0.8, one for five
/// million.
const KEYS: usize = 448 << 20;

/// Texts that are hashed between two reports of progress.
const TEXTS_A_REPORT: u64 = 4096;

/// What stays of a signature and its shingles. The order is that of the first places, so that similar texts are
/// neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Sketch {
    /// Four bits of each of the first eight places.
    first: u32,
    /// A bit of each place: equal in all places that are equal, and in half of the others (Li, König, "b-Bit Minwise
    /// Hashing", 2010).
    bits: [u64; PERMUTATIONS / 64],
    /// A hash of all shingles; 0 for a row without any.
    set: u32,
}

impl Sketch {
    fn new(signature: &[u32; PERMUTATIONS], set: &[u32]) -> Self {
        let hash = set.iter().fold(1, |state: u64, &shingle| mix(state.rotate_left(7) ^ u64::from(shingle)));
        let mut bits = [0; PERMUTATIONS / 64];
        for (at, place) in signature.iter().enumerate() {
            bits[at / 64] |= u64::from(place & 1) << (at % 64);
        }
        let first = signature[..8].iter().fold(0, |first, place| first << 4 | place & 15);
        Self { first, bits, set: ((hash >> 32) as u32).max(1) }
    }

    fn equal_bits(&self, other: &Self) -> u32 {
        std::iter::zip(self.bits, other.bits).map(|(one, other)| (one ^ other).count_zeros()).sum()
    }
}

/// The clusters of `count` texts, at most `u32::MAX`; `text` is asked for each more than once.
pub fn near_duplicates<'a>(
    spec: &NearDuplicates,
    count: usize,
    text: impl Fn(usize) -> Cow<'a, str> + Sync,
    report: Report,
) -> Clusters {
    find(spec, count, text, KEYS, report)
}

fn find<'a>(
    spec: &NearDuplicates,
    count: usize,
    text: impl Fn(usize) -> Cow<'a, str> + Sync,
    memory: usize,
    report: Report,
) -> Clusters {
    let threshold = spec.threshold.get();
    let rows = band_rows(threshold);
    let bands = PERMUTATIONS / rows;
    let at_once = at_once(bands, count, memory);
    // Every text is hashed once a round, and compared in every band: all bands together count as one round more.
    let rounds = bands.div_ceil(at_once);
    let progress = Work { done: AtomicU64::new(0), total: (count * (rounds + 1)) as u64, report };
    let mut search = Search {
        hasher: MinHasher::new(spec.shingles),
        threshold,
        text,
        sketches: vec![Sketch::default(); count],
        clusters: Clusters { parents: (0..count as u32).collect() },
    };
    let mut keys = vec![0; count * at_once];
    let mut distinct = Vec::new();
    let mut keyed: Vec<u64> = Vec::with_capacity(count);
    for first in (0..bands).step_by(at_once) {
        search.hash(first, rows, at_once, &mut keys, &progress);
        if first == 0 {
            distinct = search.join_equal_sets(&mut keyed);
        }
        for band in 0..at_once.min(bands - first) {
            keyed.clear();
            let key = |row: usize| pack(keys[row * at_once + band], row);
            keyed.extend((0..count).filter(|&row| distinct[row]).map(key));
            keyed.sort_unstable();
            for same in same_key(&keyed) {
                search.join_candidates(same);
            }
            progress.add((count * (first + band + 1) / bands - count * (first + band) / bands) as u64);
        }
    }
    search.clusters.flatten();
    search.clusters
}

/// Bands whose keys are kept at a time: as even a share for each round as there is room for.
fn at_once(bands: usize, count: usize, memory: usize) -> usize {
    let room = memory / (size_of::<u32>() * count.max(1));
    let rounds = bands.div_ceil(room.max(1));
    bands.div_ceil(rounds)
}

/// A key and its row in one number, so that rows are sorted by key.
fn pack(key: u32, row: usize) -> u64 {
    u64::from(key) << 32 | row as u64
}

/// The rows of each key that more than one has.
fn same_key(keyed: &[u64]) -> impl Iterator<Item = &[u64]> {
    keyed.chunk_by(|a, b| a >> 32 == b >> 32).filter(|same| same.len() > 1)
}

/// Counts what was done, for those who watch.
struct Work<'a> {
    done: AtomicU64,
    total: u64,
    report: Report<'a>,
}

impl Work<'_> {
    fn add(&self, texts: u64) {
        let done = self.done.fetch_add(texts, Ordering::Relaxed) + texts;
        (self.report)(Progress::Comparing { done, total: self.total });
    }
}

struct Search<T> {
    hasher: MinHasher,
    threshold: f64,
    text: T,
    sketches: Vec<Sketch>,
    clusters: Clusters,
}

impl<'a, T: Fn(usize) -> Cow<'a, str> + Sync> Search<T> {
    /// The keys of `at_once` bands from band `first`, on all threads; with the first, the sketches.
    fn hash(&mut self, first: usize, rows: usize, at_once: usize, keys: &mut [u32], progress: &Work) {
        let Self { hasher, text, sketches, .. } = self;
        let (hasher, text) = (&*hasher, &*text);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let share = sketches.len().div_ceil(threads).max(1);
        let places = first * rows..((first + at_once) * rows).min(PERMUTATIONS);
        std::thread::scope(|scope| {
            let shares = std::iter::zip(sketches.chunks_mut(share), keys.chunks_mut(share * at_once));
            for (number, (sketches, keys)) in shares.enumerate() {
                let places = places.clone();
                scope.spawn(move || {
                    let texts = sketches.len();
                    let mut least = [0; PERMUTATIONS];
                    let mut told = 0;
                    for (at, (sketch, keys)) in std::iter::zip(sketches, keys.chunks_mut(at_once)).enumerate() {
                        let hashed = at as u64;
                        if hashed == told + TEXTS_A_REPORT {
                            progress.add(TEXTS_A_REPORT);
                            told = hashed;
                        }
                        let text = text(number * share + at);
                        if first == 0 {
                            let set = hasher.shingle_set(&text);
                            if set.is_empty() {
                                continue;
                            }
                            least = hasher.signature(&set);
                            *sketch = Sketch::new(&least, &set);
                        } else {
                            hasher.least(&hasher.shingles(&text), places.clone(), &mut least);
                        }
                        for (key, band) in std::iter::zip(keys, least[places.clone()].chunks_exact(rows)) {
                            let fold = |key: u64, &place: &u32| mix(key.rotate_left(16) ^ u64::from(place));
                            *key = (band.iter().fold(0, fold) >> 32) as u32;
                        }
                    }
                    progress.add(texts as u64 - told);
                });
            }
        });
    }

    /// Joins rows with the same shingles, so that a text that occurs a thousand times is compared once: says of each
    /// row whether it is the one that is.
    fn join_equal_sets(&mut self, keyed: &mut Vec<u64>) -> Vec<bool> {
        let Self { sketches, clusters, .. } = self;
        let mut distinct: Vec<bool> = sketches.iter().map(|sketch| sketch.set != 0).collect();
        keyed.clear();
        keyed.extend((0..distinct.len()).filter(|&row| distinct[row]).map(|row| pack(sketches[row].set, row)));
        keyed.sort_unstable();
        for same in same_key(keyed) {
            let rows = in_order(sketches, same);
            for equal in rows.chunk_by(|&a, &b| sketches[a as usize] == sketches[b as usize]) {
                for &row in &equal[1..] {
                    clusters.join(equal[0], row);
                    distinct[row as usize] = false;
                }
            }
        }
        distinct
    }

    /// Compares the rows of one band's key, each with its next neighbours.
    fn join_candidates(&mut self, same: &[u64]) {
        let Self { hasher, threshold, text, sketches, clusters } = self;
        let expected = (1.0 + *threshold) / 2.0;
        let deviation = (expected * (1.0 - expected) / PERMUTATIONS as f64).sqrt();
        let least = ((expected - MARGIN * deviation) * PERMUTATIONS as f64) as u32;
        let rows = in_order(sketches, same);
        let mut sets: Vec<Option<Vec<u32>>> = vec![None; rows.len()];
        let shingles = |row: u32| hasher.shingle_set(&text(row as usize));
        for (i, &row) in rows.iter().enumerate() {
            let sketch = &sketches[row as usize];
            for (j, &other) in rows.iter().enumerate().skip(i + 1).take(NEIGHBOURS) {
                if sketch.equal_bits(&sketches[other as usize]) < least || clusters.root(row) == clusters.root(other) {
                    continue;
                }
                let one = sets[i].take().unwrap_or_else(|| shingles(row));
                let two = sets[j].take().unwrap_or_else(|| shingles(other));
                if jaccard(&one, &two) >= *threshold {
                    clusters.join(row, other);
                }
                (sets[i], sets[j]) = (Some(one), Some(two));
            }
            // No later row is compared with this one.
            sets[i] = None;
        }
    }
}

/// The rows of one key in the order of their content.
fn in_order(sketches: &[Sketch], same: &[u64]) -> Vec<u32> {
    let mut rows: Vec<u32> = same.iter().map(|&keyed| keyed as u32).collect();
    rows.sort_unstable_by_key(|&row| (sketches[row as usize], row));
    rows
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
