//! From a deployment's events to the monitor's verdict: a pure state machine for one revision.
//!
//! Feed it every record of the topic from the beginning of the revision's offset ranges on; feeding the same records again, in any
//! interleaving of the partitions, gives the same counts and windows. Windows are ordered by the events' times. Memory is bounded:
//! an input whose feedback comes more than [`TRACKED`] predictions later no longer counts as labelled.

mod bounded;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use athanor_contract::{
    Decimal,
    artifact::Reference,
    event::{Event, EventData, Feedback, Prediction},
    serve::{MonitorSpec, MonitorStatus, Statistic, Verdict},
    train::OffsetRange,
};

use crate::{
    cloudevents::event_time,
    drift::{Decision, SequentialTest, kolmogorov_smirnov, population_stability_index},
};
use bounded::BoundedMap;

/// Event ids, and predictions that wait for feedback, that are remembered.
pub const TRACKED: usize = 200_000;
/// Feedback that came before its prediction, or to another revision's.
const TRACKED_FEEDBACK: usize = 20_000;

pub const PREDICTION_PSI: &str = "PredictionPSI";
pub const CONFIDENCE_KS: &str = "ConfidenceKS";
pub const LABELLED_ACCURACY: &str = "LabelledAccuracy";

/// What a record was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    Prediction,
    Feedback,
    /// An event whose id was seen before.
    Duplicate,
    Malformed,
}

impl Observed {
    /// Value of the label `type` of the metric that counts it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prediction => "prediction",
            Self::Feedback => "feedback",
            Self::Duplicate => "duplicate",
            Self::Malformed => "malformed",
        }
    }
}

/// Time, partition and offset: a total order that does not depend on the order of arrival.
type Place = (jiff::Timestamp, i32, i64);
/// Request id and index.
type Input = (String, u32);

/// The statistics of one revision.
#[derive(Debug)]
pub struct Window {
    revision: String,
    reference: Option<Reference>,
    spec: MonitorSpec,
    /// Partition to begin and end, from the revision's first event there.
    ranges: BTreeMap<i32, (i64, i64)>,
    seen: BoundedMap<(String, String), ()>,
    /// Predicted label of each input of this revision, `None` once its feedback was counted.
    predicted: BoundedMap<Input, Option<String>>,
    early_feedback: BoundedMap<Input, (Place, String)>,
    predictions: u64,
    labelled: u64,
    /// Label and confidence of the newest predictions.
    newest: BTreeMap<Place, (String, f32)>,
    /// Whether the newest labelled answers were right.
    newest_labelled: BTreeMap<Place, bool>,
    accuracy: Option<AccuracyTest>,
}

#[derive(Debug)]
struct AccuracyTest {
    test: SequentialTest,
    reference: f64,
    /// H0 was accepted at least once.
    accepted: bool,
    /// Final: only another revision ends it.
    drifted: bool,
}

impl Window {
    /// Begins with the revision's first event. Without a reference only counts and ranges are kept.
    pub fn new(revision: impl Into<String>, reference: Option<Reference>, spec: MonitorSpec) -> Self {
        let rows = reference.as_ref().filter(|reference| reference.rows > 0);
        let accuracy = rows.map(|reference| {
            let accuracy = reference.correct as f64 / reference.rows as f64;
            let test = SequentialTest::new(accuracy, spec.accuracy_loss.get());
            AccuracyTest { test, reference: accuracy, accepted: false, drifted: false }
        });
        Self {
            revision: revision.into(),
            reference,
            spec,
            ranges: BTreeMap::new(),
            seen: BoundedMap::new(TRACKED),
            predicted: BoundedMap::new(TRACKED),
            early_feedback: BoundedMap::new(TRACKED_FEEDBACK),
            predictions: 0,
            labelled: 0,
            newest: BTreeMap::new(),
            newest_labelled: BTreeMap::new(),
            accuracy,
        }
    }

    /// Takes over what cannot be rebuilt from the events: the sequential test saw labels in another order, so that its decision
    /// for drift, once published under the same threshold, must not be lost with a restart.
    pub fn resume(&mut self, published: &MonitorStatus) {
        let threshold = self.accuracy_threshold().map(|threshold| threshold.to_string());
        let decided = published.statistics.iter().any(|statistic| {
            statistic.name == LABELLED_ACCURACY
                && statistic.drifted
                && Some(statistic.threshold.to_string()) == threshold
        });
        if let Some(accuracy) = self.accuracy.as_mut().filter(|_| decided && published.revision == self.revision) {
            accuracy.drifted = true;
        }
    }

    /// Takes the record at `offset` of `partition`; `None` is a record that is no event.
    pub fn observe(&mut self, partition: i32, offset: i64, event: Option<&Event>) -> Observed {
        let observed = self.take(partition, offset, event);
        if let Some((_, end)) = self.ranges.get_mut(&partition) {
            *end = (*end).max(offset + 1);
        }
        observed
    }

    fn take(&mut self, partition: i32, offset: i64, event: Option<&Event>) -> Observed {
        let Some(event) = event else { return Observed::Malformed };
        if self.seen.insert((event.source.clone(), event.id.clone()), ()).is_some() {
            return Observed::Duplicate;
        }
        let place = (event_time(event), partition, offset);
        match &event.data {
            EventData::Prediction(prediction) => {
                if prediction.revision == self.revision {
                    self.ranges.entry(partition).or_insert((offset, offset + 1));
                    self.predict(place, prediction);
                }
                Observed::Prediction
            }
            EventData::Feedback(feedback) => {
                self.label(place, feedback);
                Observed::Feedback
            }
        }
    }

    fn predict(&mut self, place: Place, prediction: &Prediction) {
        let input = (prediction.request_id.clone(), prediction.index);
        self.predictions += 1;
        self.newest.insert(place, (prediction.label.clone(), prediction.confidence));
        self.bound_windows();
        match self.early_feedback.remove(&input) {
            Some((place, expected)) => {
                self.predicted.insert(input, None);
                self.judge(place, prediction.label == expected);
            }
            None => {
                self.predicted.insert(input, Some(prediction.label.clone()));
            }
        }
    }

    fn label(&mut self, place: Place, feedback: &Feedback) {
        let input = (feedback.request_id.clone(), feedback.index);
        match self.predicted.get_mut(&input) {
            // The first feedback is the one the sequential test sees; a correction is for the dataset.
            Some(label) => {
                if let Some(label) = label.take() {
                    self.judge(place, label == feedback.expected_label);
                }
            }
            None => {
                self.early_feedback.insert(input, (place, feedback.expected_label.clone()));
            }
        }
    }

    fn judge(&mut self, place: Place, correct: bool) {
        self.labelled += 1;
        self.newest_labelled.insert(place, correct);
        self.bound_windows();
        let Some(accuracy) = self.accuracy.as_mut().filter(|accuracy| !accuracy.drifted) else { return };
        accuracy.test.observe(correct);
        if self.labelled < u64::from(self.spec.minimum_labels) {
            return;
        }
        match accuracy.test.decision() {
            Decision::Drifted => accuracy.drifted = true,
            // The traffic goes on, and so does the watch over it: a new test begins, with its own 1 % of false alarms.
            Decision::Stable => {
                accuracy.accepted = true;
                accuracy.test.restart();
            }
            Decision::Continue => {}
        }
    }

    fn bound_windows(&mut self) {
        let bound = self.spec.window_predictions as usize;
        while self.newest.len() > bound {
            self.newest.pop_first();
        }
        while self.newest_labelled.len() > bound {
            self.newest_labelled.pop_first();
        }
    }

    /// Predictions in the window now.
    pub fn window_predictions(&self) -> usize {
        self.newest.len()
    }

    /// What the events so far say; `time` is left to the caller.
    pub fn status(&self) -> MonitorStatus {
        let statistics = self.statistics();
        MonitorStatus {
            revision: self.revision.clone(),
            verdict: self.verdict(&statistics),
            statistics,
            predictions: self.predictions,
            labelled: self.labelled,
            ranges: self
                .ranges
                .iter()
                .map(|(partition, (begin, end))| OffsetRange { partition: *partition, begin: *begin, end: *end })
                .collect(),
            time: None,
        }
    }

    fn window_is_full(&self) -> bool {
        self.newest.len() >= self.spec.window_predictions as usize
    }

    fn has_enough_labels(&self) -> bool {
        self.labelled >= u64::from(self.spec.minimum_labels)
    }

    /// The rules of [`Verdict`]: with enough labels the accuracy alone decides, else both distributions must have moved.
    fn verdict(&self, statistics: &[Statistic]) -> Verdict {
        let Some(accuracy) = &self.accuracy else { return Verdict::Unknown };
        let moved = |name| statistics.iter().any(|statistic| statistic.name == name && statistic.drifted);
        let drifted = if self.has_enough_labels() || accuracy.drifted {
            accuracy.drifted
        } else {
            moved(PREDICTION_PSI) && moved(CONFIDENCE_KS)
        };
        match (drifted, self.window_is_full() || (self.has_enough_labels() && accuracy.accepted)) {
            (true, _) => Verdict::Drifted,
            (false, true) => Verdict::Stable,
            (false, false) => Verdict::Unknown,
        }
    }

    /// Those for which there are enough events; the distributions only on a full window.
    fn statistics(&self) -> Vec<Statistic> {
        let mut statistics = Vec::new();
        let mut add = |name: &str, value: f64, threshold: Option<Decimal>, drifted: bool| {
            if let (Some(value), Some(threshold)) = (Decimal::new(value), threshold) {
                statistics.push(Statistic { name: name.into(), value, threshold, drifted });
            }
        };
        if let Some(reference) = self.reference.as_ref().filter(|_| self.window_is_full()) {
            if let Some(index) = self.prediction_psi(reference) {
                let threshold = self.spec.prediction_psi;
                add(PREDICTION_PSI, index, Some(threshold), index > threshold.get());
            }
            let confidences: Vec<f32> = self.newest.values().map(|(_, confidence)| *confidence).collect();
            if let Some(test) = kolmogorov_smirnov(&reference.confidences, &confidences) {
                let threshold = self.spec.confidence_p_value;
                add(CONFIDENCE_KS, test.p_value, Some(threshold), test.p_value < threshold.get());
            }
        }
        if let Some(accuracy) = self.accuracy.as_ref().filter(|it| self.has_enough_labels() || it.drifted) {
            let right = self.newest_labelled.values().filter(|correct| **correct).count();
            let value = right as f64 / self.newest_labelled.len().max(1) as f64;
            add(LABELLED_ACCURACY, value, self.accuracy_threshold(), accuracy.drifted);
        }
        statistics
    }

    fn accuracy_threshold(&self) -> Option<Decimal> {
        Decimal::new(self.accuracy.as_ref()?.reference - self.spec.accuracy_loss.get())
    }

    fn prediction_psi(&self, reference: &Reference) -> Option<f64> {
        let places: HashMap<&str, usize> =
            reference.labels.iter().enumerate().map(|(at, it)| (it.as_str(), at)).collect();
        let mut expected = reference.predicted.clone();
        let mut current = vec![0; reference.labels.len()];
        let mut others = 0;
        for (label, _) in self.newest.values() {
            match places.get(label.as_str()) {
                Some(place) => current[*place] += 1,
                None => others += 1,
            }
        }
        if others > 0 {
            expected.push(0);
            current.push(others);
        }
        population_stability_index(&expected, &current)
    }
}
