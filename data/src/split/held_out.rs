//! Sources that are a whole part (`data.sources[].part`), and the rows of other sources that these leave out.

use std::collections::HashMap;

use athanor_contract::train::HeldOutPart;
use serde::Serialize;

use super::{part::Part, units::Units};
use crate::Dataset;

/// Rows that are in no part, because a held-out source has the same text, a near duplicate of it, or the same group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Overlap {
    pub rows: u64,
    /// The first of them: where the row is, and where the held-out row is.
    pub examples: Vec<String>,
}

impl Overlap {
    const EXAMPLES: usize = 10;

    fn add(&mut self, dataset: &Dataset, row: usize, other: usize) {
        self.rows += 1;
        if self.examples.len() < Self::EXAMPLES {
            let (place, other) = (dataset.rows.place(row), dataset.rows.place(other));
            self.examples.push(format!("{place}, also held out as {other}"));
        }
    }
}

/// What the sources alone say of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The split decides.
    Open,
    In(Part),
    LeftOut,
}

/// The place of each row.
pub(super) struct Places {
    /// Empty if no source has a part.
    places: Vec<Place>,
    gives_validation: bool,
    gives_test: bool,
    /// `None` if no source has a part.
    pub overlap: Option<Overlap>,
}

impl Places {
    /// A text of a test source is in no other part, and one of a validation source is not in training. The memory is
    /// that of a hash table over the rows of sources with a part.
    pub fn new(dataset: &Dataset, units: &Units) -> Self {
        let gives = |part| dataset.held_out.contains(&Some(part));
        let (gives_validation, gives_test) = (gives(HeldOutPart::Validation), gives(HeldOutPart::Test));
        if !gives_validation && !gives_test {
            return Self { places: Vec::new(), gives_validation, gives_test, overlap: None };
        }
        let (mut places, mut overlap) = (vec![Place::Open; dataset.rows.len()], Overlap::default());
        let mut held: HashMap<(bool, &str), usize> = HashMap::new();
        for part in [Some(HeldOutPart::Test), Some(HeldOutPart::Validation), None] {
            let mut own = Vec::new();
            for row in (0..dataset.rows.len()).filter(|&row| dataset.part_of_source(row) == part) {
                let keys = [units.identity(row), units.text(row)];
                match (keys.iter().find_map(|key| held.get(key)), part) {
                    (Some(&other), _) => {
                        overlap.add(dataset, row, other);
                        places[row] = Place::LeftOut;
                    }
                    (None, None) => {}
                    (None, Some(part)) => {
                        places[row] = Place::In(part.into());
                        own.push(row);
                    }
                }
            }
            for row in own {
                for key in [units.identity(row), units.text(row)] {
                    held.entry(key).or_insert(row);
                }
            }
        }
        Self { places, gives_validation, gives_test, overlap: Some(overlap) }
    }

    pub fn of(&self, row: usize) -> Place {
        self.places.get(row).copied().unwrap_or(Place::Open)
    }

    /// The part of a row that the split assigns to `part`: training if the rows of `part` are those of sources. So the
    /// rows of the other parts are the same with and without such sources.
    pub fn assigned(&self, part: Part) -> Part {
        match part {
            Part::Validation if self.gives_validation => Part::Train,
            Part::Test if self.gives_test => Part::Train,
            part => part,
        }
    }
}
