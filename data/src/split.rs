//! Which part a row belongs to, decided by its text and the seed alone: a row that was held out once stays held out in every
//! retraining, whatever other rows come and go. Where rows belong together (a group, near duplicates), what they share decides.

mod held_out;
mod part;
mod units;

use athanor_contract::train::{RowCounts, SplitSpec};
use sha2::{Digest, Sha256};

use crate::{DataError, Dataset};
use held_out::{Place, Places};
use units::Units;

pub use held_out::Overlap;
pub use part::Part;

/// Row indices of each part, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    pub train: Vec<usize>,
    pub validation: Vec<usize>,
    pub test: Vec<usize>,
    /// Rows in no part because a held-out source has them; `None` if no source has a part.
    pub overlap: Option<Overlap>,
}

impl Parts {
    pub fn counts(&self) -> RowCounts {
        RowCounts {
            train: self.train.len() as u64,
            validation: self.validation.len() as u64,
            test: self.test.len() as u64,
        }
    }

    fn part(&mut self, part: Part) -> &mut Vec<usize> {
        match part {
            Part::Train => &mut self.train,
            Part::Validation => &mut self.validation,
            Part::Test => &mut self.test,
        }
    }
}

/// One round of a cross-validation: row indices, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fold {
    pub train: Vec<usize>,
    pub held_out: Vec<usize>,
}

/// Hashes seed and text to a number in [0, 100) and compares it with the percentages: test first, then validation.
pub fn part_of(text: &str, split: &SplitSpec) -> Part {
    let percent = hash(split.seed, &[], text) as f64 / 2_f64.powi(64) * 100.0;
    let test = f64::from(split.test_percent);
    if percent < test {
        Part::Test
    } else if percent < test + f64::from(split.validation_percent) {
        Part::Validation
    } else {
        Part::Train
    }
}

/// The first eight bytes of sha256 over seed, purpose and key.
fn hash(seed: i64, purpose: &[u8], key: &str) -> u64 {
    let digest =
        Sha256::new().chain_update(seed.to_le_bytes()).chain_update(purpose).chain_update(key.as_bytes()).finalize();
    let mut head = [0; 8];
    head.copy_from_slice(&digest[..8]);
    u64::from_be_bytes(head)
}

impl Dataset {
    /// The rows of each part. Rows of one group, and those of one cluster of near duplicates, are in one part. Held-out rows that a
    /// model labelled are left out where others have labels of their own: they would measure that model. The rows of a source with a
    /// part are the whole of that part, and rows of other sources with the same texts are left out.
    ///
    /// # Errors
    /// A part without rows is the user's error.
    pub fn split(&self, spec: &SplitSpec) -> Result<Parts, DataError> {
        let units = Units::new(&self.rows, self.clusters.as_deref());
        let mut places = Places::new(self, &units);
        let mut parts = Parts { overlap: places.overlap.take(), ..Parts::default() };
        let stratified = spec.stratify.then(|| self.stratified(spec, &units, &places));
        for row in 0..self.rows.len() {
            let by_share =
                || stratified.as_ref().map_or_else(|| part_of(units.key(row), spec), |stratified| stratified[row]);
            match places.of(row) {
                Place::Open => parts.part(places.assigned(by_share())).push(row),
                Place::In(part) => parts.part(part).push(row),
                Place::LeftOut => {}
            }
        }
        let is_annotated = |row: usize| self.annotated.get(row).copied().unwrap_or(false);
        for part in [&mut parts.validation, &mut parts.test] {
            if part.iter().any(|&row| !is_annotated(row)) {
                part.retain(|&row| !is_annotated(row));
            }
        }
        for (name, part) in [("training", &parts.train), ("validation", &parts.validation), ("test", &parts.test)] {
            if part.is_empty() {
                let left_out = match parts.overlap.as_ref().map_or(0, |overlap| overlap.rows) {
                    0 => String::new(),
                    rows => format!(" ({rows} were left out: a source with a part has the same texts)"),
                };
                return Err(DataError::User(format!(
                    "none of the {} rows falls into the {name} part{left_out}: give more rows, or another data.split",
                    self.rows.len()
                )));
            }
        }
        Ok(parts)
    }

    /// Each row's part, with the shares that `spec` asks for within each label: units in the order of their hashes, cut where
    /// the share of their label's rows is reached. A unit counts to the label of its first row. Only rows that are open count.
    fn stratified(&self, spec: &SplitSpec, units: &Units, places: &Places) -> Vec<Part> {
        let (test, held_out) =
            (u64::from(spec.test_percent), u64::from(spec.test_percent) + u64::from(spec.validation_percent));
        // Half a row or more is a row.
        let reached = |rows: u64, percent: u64| (rows * percent + 50) / 100;
        let mut parts = vec![Part::Train; self.rows.len()];
        let rows: Vec<u32> =
            (0..self.rows.len() as u32).filter(|&row| places.of(row as usize) == Place::Open).collect();
        self.in_order(&rows, units, spec.seed, &[], |unit, position, of_label| {
            let part = if position < reached(of_label, test) {
                Part::Test
            } else if position < reached(of_label, held_out) {
                Part::Validation
            } else {
                Part::Train
            };
            unit.iter().for_each(|&(_, row)| parts[row as usize] = part);
        });
        parts
    }

    /// Cross-validation: `count` times the given rows (those of parts that the split made whole), each of them held out once. Rows
    /// that the split keeps in one part are in one fold, and with `stratify` each fold has its share of each label.
    ///
    /// # Errors
    /// Fewer than two folds, or fewer rows (or groups) than folds, are the user's error.
    pub fn folds(&self, spec: &SplitSpec, rows: &[usize], count: usize) -> Result<Vec<Fold>, DataError> {
        if count < 2 {
            return Err(DataError::User(format!("a cross-validation needs two folds or more, not {count}")));
        }
        let units = Units::new(&self.rows, self.clusters.as_deref());
        let mut pool: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        pool.sort_unstable();
        // Folds have their own hashes: those of the split have decided already which rows these are.
        let mut folds: Vec<(u32, usize)> = Vec::with_capacity(pool.len());
        if spec.stratify {
            self.in_order(&pool, &units, spec.seed, b"fold", |unit, position, of_label| {
                let fold = (position * count as u64 / of_label) as usize;
                folds.extend(unit.iter().map(|&(_, row)| (row, fold)));
            });
            folds.sort_unstable();
        } else {
            folds.extend(pool.iter().map(|&row| {
                let share = u128::from(hash(spec.seed, b"fold", units.key(row as usize))) * count as u128;
                (row, (share >> 64) as usize)
            }));
        }
        let mut result = vec![Fold::default(); count];
        for &(row, fold) in &folds {
            for (index, result) in result.iter_mut().enumerate() {
                if index == fold { &mut result.held_out } else { &mut result.train }.push(row as usize);
            }
        }
        if let Some(empty) = result.iter().position(|fold| fold.held_out.is_empty() || fold.train.is_empty()) {
            return Err(DataError::User(format!(
                "none of the {} rows falls into fold {} of {count}: give more rows, or fewer folds",
                pool.len(),
                empty + 1
            )));
        }
        Ok(result)
    }

    /// Calls `visit` for each unit of `rows` in the order of hashes: with its rows (each behind its hash), the number of rows of
    /// its label that came before it, and the number of all rows of its label.
    fn in_order(
        &self,
        rows: &[u32],
        units: &Units,
        seed: i64,
        purpose: &[u8],
        mut visit: impl FnMut(&[(u64, u32)], u64, u64),
    ) {
        let mut hashes: Vec<(u64, u32)> =
            rows.iter().map(|&row| (hash(seed, purpose, units.key(row as usize)), row)).collect();
        hashes.sort_unstable();
        let label = |unit: &[(u64, u32)]| self.rows.label_number(unit[0].1 as usize);
        let mut of_label = vec![0; self.rows.label_count()];
        for unit in hashes.chunk_by(|a, b| a.0 == b.0) {
            of_label[label(unit)] += unit.len() as u64;
        }
        let mut before = vec![0; self.rows.label_count()];
        for unit in hashes.chunk_by(|a, b| a.0 == b.0) {
            visit(unit, before[label(unit)], of_label[label(unit)]);
            before[label(unit)] += unit.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests;
