//! A share of good answers, watched by a sequential test against a reference.

use std::collections::BTreeMap;

use athanor_contract::{Decimal, serve::Statistic};

use crate::drift::{Decision, SequentialTest};

/// Time, partition and offset: a total order that does not depend on the order of arrival.
pub type Place = (jiff::Timestamp, i32, i64);

/// The share of good answers of one revision against a reference share.
#[derive(Debug)]
pub(super) struct Proportion {
    test: SequentialTest,
    reference: f64,
    loss: f64,
    /// Answers before the test may decide.
    minimum: u64,
    /// Answers that the statistic shows.
    window: usize,
    observed: u64,
    newest: BTreeMap<Place, bool>,
    /// The reference was confirmed at least once.
    pub accepted: bool,
    /// Final for the revision.
    pub drifted: bool,
}

impl Proportion {
    /// `loss`: by how much the share must fall to count as drift.
    pub fn new(reference: f64, loss: f64, minimum: u64, window: usize) -> Self {
        Self {
            test: SequentialTest::new(reference, loss),
            reference,
            loss,
            minimum,
            window,
            observed: 0,
            newest: BTreeMap::new(),
            accepted: false,
            drifted: false,
        }
    }

    pub fn observe(&mut self, place: Place, good: bool) {
        self.observed += 1;
        self.newest.insert(place, good);
        while self.newest.len() > self.window {
            self.newest.pop_first();
        }
        if self.drifted {
            return;
        }
        self.test.observe(good);
        if !self.has_enough() {
            return;
        }
        match self.test.decision() {
            Decision::Drifted => self.drifted = true,
            // Traffic goes on and stays watched: a new test begins, with its own 1 % of false alarms.
            Decision::Stable => {
                self.accepted = true;
                self.test.restart();
            }
            Decision::Continue => {}
        }
    }

    pub fn has_enough(&self) -> bool {
        self.observed >= self.minimum
    }

    /// The reference less the loss.
    pub fn threshold(&self) -> Option<Decimal> {
        Decimal::new(self.reference - self.loss)
    }

    /// The share in the window, once there are enough answers or the test has decided.
    pub fn statistic(&self, name: &str) -> Option<Statistic> {
        if !self.has_enough() && !self.drifted {
            return None;
        }
        let good = self.newest.values().filter(|good| **good).count();
        let value = Decimal::new(good as f64 / self.newest.len().max(1) as f64)?;
        Some(Statistic { name: name.into(), value, threshold: self.threshold()?, drifted: self.drifted })
    }
}

/// The share of positive ratings. No rating exists when a model is trained, so the first ratings of the revision are the
/// reference of the later ones.
#[derive(Debug)]
pub(super) enum Ratings {
    Collecting { positive: u64, all: u64 },
    Watching(Proportion),
}

impl Default for Ratings {
    fn default() -> Self {
        Self::Collecting { positive: 0, all: 0 }
    }
}

impl Ratings {
    /// `minimum` ratings make the reference; `loss` and `window` as for [`Proportion::new`].
    pub fn observe(&mut self, place: Place, positive: bool, loss: f64, minimum: u64, window: usize) {
        match self {
            Self::Watching(proportion) => proportion.observe(place, positive),
            Self::Collecting { positive: good, all } => {
                *good += u64::from(positive);
                *all += 1;
                if *all >= minimum {
                    *self = Self::Watching(Proportion::new(*good as f64 / *all as f64, loss, minimum, window));
                }
            }
        }
    }

    pub fn watched(&self) -> Option<&Proportion> {
        match self {
            Self::Watching(proportion) => Some(proportion),
            Self::Collecting { .. } => None,
        }
    }
}
