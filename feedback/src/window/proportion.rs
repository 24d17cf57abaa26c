//! A share of good answers, watched by sequential detectors against a reference.

use std::collections::BTreeMap;

use athanor_contract::{
    Decimal,
    monitor::{MonitorSpec, Statistic},
};

use crate::drift::{FallDetector, RecoveryDetector, lower_bound};

/// Time of arrival, partition and offset: a total order that does not depend on the order of arrival.
pub type Place = (jiff::Timestamp, i32, i64);

/// What a share is compared with.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReferenceShare {
    /// Good ones among `all`.
    pub good: u64,
    pub all: u64,
}

impl ReferenceShare {
    fn share(self) -> f64 {
        self.good as f64 / self.all.max(1) as f64
    }

    fn floor(self) -> f64 {
        lower_bound(self.good, self.all)
    }
}

/// The share of good answers of one revision against a reference share.
#[derive(Debug)]
pub(super) struct Proportion {
    fall: FallDetector,
    /// Present while the share has fallen.
    recovery: Option<RecoveryDetector>,
    reference: ReferenceShare,
    loss: f64,
    /// Answers before there is an alarm.
    minimum: u64,
    /// Answers that the statistic shows.
    window: usize,
    observed: u64,
    newest: BTreeMap<Place, bool>,
}

impl Proportion {
    /// The detectors compare with a lower bound of the reference share, so that few test rows are no false alarm.
    pub fn new(reference: ReferenceShare, spec: &MonitorSpec) -> Self {
        let loss = spec.accuracy_loss.get();
        Self {
            fall: FallDetector::new(reference.floor(), loss, spec.average_run_length as f64),
            recovery: None,
            reference,
            loss,
            minimum: spec.minimum_labels.into(),
            window: spec.window_predictions as usize,
            observed: 0,
            newest: BTreeMap::new(),
        }
    }

    pub fn observe(&mut self, place: Place, good: bool) {
        self.observed += 1;
        self.newest.insert(place, good);
        while self.newest.len() > self.window {
            self.newest.pop_first();
        }
        match &mut self.recovery {
            Some(recovery) => {
                recovery.observe(good);
                if recovery.has_recovered() {
                    self.recovery = None;
                    self.fall.restart();
                }
            }
            None => {
                self.fall.observe(good);
                if self.has_enough() && self.fall.has_fallen() {
                    self.set_drifted();
                }
            }
        }
    }

    /// Whether the share has fallen and has not recovered since.
    pub fn drifted(&self) -> bool {
        self.recovery.is_some()
    }

    /// Takes a fall over that was found before.
    pub fn set_drifted(&mut self) {
        self.recovery.get_or_insert_with(|| RecoveryDetector::new(self.reference.floor(), self.loss));
    }

    pub fn has_enough(&self) -> bool {
        self.observed >= self.minimum
    }

    /// The reference less the loss.
    pub fn threshold(&self) -> Option<Decimal> {
        Decimal::new(self.reference.share() - self.loss)
    }

    /// The share in the window, once there are enough answers or it has fallen.
    pub fn statistic(&self, name: &str) -> Option<Statistic> {
        if !self.has_enough() && !self.drifted() {
            return None;
        }
        let good = self.newest.values().filter(|good| **good).count();
        let value = Decimal::new(good as f64 / self.newest.len().max(1) as f64)?;
        Some(Statistic { name: name.into(), value, threshold: self.threshold()?, drifted: self.drifted() })
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
    /// The first `minimumLabels` ratings make the reference.
    pub fn observe(&mut self, place: Place, positive: bool, spec: &MonitorSpec) {
        match self {
            Self::Watching(proportion) => proportion.observe(place, positive),
            Self::Collecting { positive: good, all } => {
                *good += u64::from(positive);
                *all += 1;
                if *all >= u64::from(spec.minimum_labels) {
                    *self = Self::Watching(Proportion::new(ReferenceShare { good: *good, all: *all }, spec));
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
