//! From a deployment's events to the monitor's verdict: a pure state machine for one revision.
//!
//! It takes every record of the topic from the beginning of the revision's offset ranges on. The same records in any interleaving
//! of the partitions give the same counts and windows. Windows are ordered by the time of arrival ([`arrival`]). Memory is bounded: an
//! answer whose feedback comes more than [`TRACKED`] answers later does not count as labelled.
//!
//! [`arrival`]: crate::cloudevents::arrival

mod bounded;
mod callers;
mod proportion;
mod shift;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use athanor_contract::{
    Decimal,
    artifact::{ClassReference, Reference, sha256_hex},
    event::{Event, EventData, Feedback, Generation, Judgement, Prediction, Rating},
    monitor::{MonitorSpec, MonitorStatus, Statistic, Verdict},
    train::OffsetRange,
};

use crate::drift::{kolmogorov_smirnov, population_stability_index};
use jiff::Timestamp;

use bounded::BoundedMap;
use callers::Callers;
use proportion::{Place, Proportion, Ratings, ReferenceShare};
use shift::{Shift, label_counts};

/// Number of event ids, and of answers without feedback so far, that are kept.
pub const TRACKED: usize = 200_000;
/// Number of feedback events that are kept until their answer is read; those to other revisions are among them.
const TRACKED_FEEDBACK: usize = 20_000;
/// Number of feedback events to one answer that are kept until the answer is read.
const EARLY_FEEDBACK_OF_ONE: usize = 8;

pub const PREDICTION_PSI: &str = "PredictionPSI";
pub const CONFIDENCE_KS: &str = "ConfidenceKS";
pub const LABELLED_ACCURACY: &str = "LabelledAccuracy";
pub const POSITIVE_RATINGS: &str = "PositiveRatings";

/// Kind of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    Prediction,
    Generation,
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
            Self::Generation => "generation",
            Self::Feedback => "feedback",
            Self::Duplicate => "duplicate",
            Self::Malformed => "malformed",
        }
    }
}

/// Request id and index.
type Input = (String, u32);

/// What feedback is compared with: a label, or the SHA-256 of a generated text without differences in white space.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Label(String),
    Text(String),
}

impl Answer {
    fn text(text: &str) -> Self {
        let words: Vec<&str> = text.split_whitespace().collect();
        Self::Text(sha256_hex(words.join(" ").as_bytes()))
    }
}

/// Whether an answer's feedback was counted: the first label or correction, and the first rating.
#[derive(Debug)]
struct Answered {
    /// `None` once it was compared.
    answer: Option<Answer>,
    rated: bool,
}

/// The statistics of one revision.
#[derive(Debug)]
pub struct Window {
    revision: String,
    reference: Option<Reference>,
    spec: MonitorSpec,
    /// Partition to begin and end, from the revision's first event there.
    ranges: BTreeMap<i32, (i64, i64)>,
    seen: BoundedMap<(String, String), ()>,
    answered: BoundedMap<Input, Answered>,
    early_feedback: BoundedMap<Input, Vec<(Place, Feedback)>>,
    predictions: u64,
    labelled: u64,
    /// Labelled answers that their label confirms.
    confirmed: u64,
    /// Label and confidence of the newest predictions; empty for a language model.
    newest: BTreeMap<Place, (String, f32)>,
    shift: Shift,
    /// Labelled answers of a classifier, corrected answers of a language model.
    accuracy: Option<Proportion>,
    ratings: Ratings,
    /// Callers of the labels and of the ratings that were counted.
    label_callers: Callers,
    rating_callers: Callers,
}

impl Window {
    /// Begins with the revision's first event. Without a reference only counts, ranges and ratings are kept. Of one caller's
    /// feedback at most `maximum_caller_percent` counts.
    pub fn new(
        revision: impl Into<String>,
        reference: Option<Reference>,
        spec: MonitorSpec,
        maximum_caller_percent: u32,
    ) -> Self {
        let accuracy = reference.as_ref().and_then(Reference::accuracy);
        let accuracy = accuracy.map(|(good, all)| Proportion::new(ReferenceShare { good, all }, &spec));
        let shift = Shift::new(&spec);
        let callers = Callers::new(maximum_caller_percent, spec.minimum_labels);
        Self {
            revision: revision.into(),
            reference,
            spec,
            ranges: BTreeMap::new(),
            seen: BoundedMap::new(TRACKED),
            answered: BoundedMap::new(TRACKED),
            early_feedback: BoundedMap::new(TRACKED_FEEDBACK),
            predictions: 0,
            labelled: 0,
            confirmed: 0,
            newest: BTreeMap::new(),
            shift,
            accuracy,
            ratings: Ratings::default(),
            label_callers: callers.clone(),
            rating_callers: callers,
        }
    }

    /// Takes over what cannot be rebuilt from the events, once those of the published ranges were read again: the detector saw
    /// labels in another order, so its alarm, once published under the same threshold, must outlive a restart. (The reference of
    /// ratings is rebuilt from the events and may differ by their order, so that their alarm is raised again.)
    pub fn resume(&mut self, published: &MonitorStatus) {
        let Some(accuracy) = self.accuracy.as_mut().filter(|_| published.revision == self.revision) else { return };
        let threshold = accuracy.threshold().map(|threshold| threshold.to_string());
        let was_drifted = published.statistics.iter().any(|statistic| {
            statistic.name == LABELLED_ACCURACY
                && statistic.drifted
                && Some(statistic.threshold.to_string()) == threshold
        });
        if was_drifted {
            accuracy.set_drifted();
        }
    }

    /// Takes the record at `offset` of `partition`, which arrived at this time; `None` stands for a record that is not an event.
    pub fn observe(&mut self, partition: i32, offset: i64, arrived: Timestamp, event: Option<&Event>) -> Observed {
        let observed = self.take((arrived, partition, offset), event);
        if let Some((_, end)) = self.ranges.get_mut(&partition) {
            *end = (*end).max(offset + 1);
        }
        observed
    }

    fn take(&mut self, place: Place, event: Option<&Event>) -> Observed {
        let Some(event) = event else { return Observed::Malformed };
        if self.seen.insert((event.source.clone(), event.id.clone()), ()).is_some() {
            return Observed::Duplicate;
        }
        let (_, partition, offset) = place;
        match &event.data {
            EventData::Prediction(prediction) => {
                if prediction.revision == self.revision {
                    self.ranges.entry(partition).or_insert((offset, offset + 1));
                    self.predict(place, prediction);
                }
                Observed::Prediction
            }
            EventData::Generation(generation) => {
                // What another adapter answered says nothing about the revision.
                if generation.revision == self.revision && generation.adapter.is_none() {
                    self.ranges.entry(partition).or_insert((offset, offset + 1));
                    self.generate(generation);
                }
                Observed::Generation
            }
            EventData::Feedback(feedback) => {
                self.feedback(place, feedback);
                Observed::Feedback
            }
        }
    }

    fn predict(&mut self, place: Place, prediction: &Prediction) {
        self.newest.insert(place, (prediction.label.clone(), prediction.confidence));
        if let Some(Reference::Classes(reference)) = &self.reference {
            self.shift.observe(&prediction.label, prediction.confidence, reference, &self.spec);
        }
        while self.newest.len() > self.spec.window_predictions as usize {
            self.newest.pop_first();
        }
        self.answer((prediction.request_id.clone(), prediction.index), Answer::Label(prediction.label.clone()));
    }

    fn generate(&mut self, generation: &Generation) {
        self.answer((generation.request_id.clone(), generation.index), Answer::text(&generation.answer));
    }

    fn answer(&mut self, input: Input, answer: Answer) {
        self.predictions += 1;
        self.answered.insert(input.clone(), Answered { answer: Some(answer), rated: false });
        for (place, feedback) in self.early_feedback.remove(&input).unwrap_or_default() {
            self.judge(place, &input, &feedback);
        }
    }

    fn feedback(&mut self, place: Place, feedback: &Feedback) {
        let input = (feedback.request_id.clone(), feedback.index);
        if self.answered.get_mut(&input).is_some() {
            self.judge(place, &input, feedback);
        } else if let Some(early) = self.early_feedback.get_mut(&input) {
            if early.len() < EARLY_FEEDBACK_OF_ONE {
                early.push((place, feedback.clone()));
            }
        } else {
            self.early_feedback.insert(input, vec![(place, feedback.clone())]);
        }
    }

    /// Counts the first feedback of each kind to an answer: the tests see it, a later one is for the dataset alone.
    fn judge(&mut self, place: Place, input: &Input, feedback: &Feedback) {
        let Some(answered) = self.answered.get_mut(input) else { return };
        let caller = feedback.caller.as_deref();
        let expected = match &feedback.judgement {
            Judgement::ExpectedLabel(label) => Answer::Label(label.clone()),
            Judgement::ExpectedText(text) => Answer::text(text),
            Judgement::Rating(rating) => {
                if !answered.rated && self.rating_callers.may_count(caller) {
                    answered.rated = true;
                    self.ratings.observe(place, *rating == Rating::Positive, &self.spec);
                }
                return;
            }
            Judgement::Preferred(_) => return,
        };
        if answered.answer.is_none() || !self.label_callers.may_count(caller) {
            return;
        }
        let Some(answer) = answered.answer.take() else { return };
        let is_right = answer == expected;
        self.labelled += 1;
        self.confirmed += u64::from(is_right);
        if let Some(accuracy) = &mut self.accuracy {
            accuracy.observe(place, is_right);
        }
    }

    /// Whether there are enough labels for a verdict, and none of them confirms an answer. They are hardly a sample of the
    /// answers then, as the test on accuracy requires, but reports of mistakes.
    pub fn has_only_mistakes(&self) -> bool {
        self.confirmed == 0 && self.accuracy.as_ref().is_some_and(Proportion::has_enough)
    }

    /// Predictions in the window now.
    pub fn window_predictions(&self) -> usize {
        self.newest.len()
    }

    /// What the events so far say; `time` and `topic` are left to the caller.
    pub fn status(&self) -> MonitorStatus {
        let statistics = self.statistics();
        MonitorStatus {
            revision: self.revision.clone(),
            topic: String::new(),
            verdict: self.verdict(),
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

    /// The rules of [`Verdict`]: with enough labels or ratings their shares decide, else both distributions must have moved.
    fn verdict(&self) -> Verdict {
        let shares: Vec<&Proportion> = self.accuracy.iter().chain(self.ratings.watched()).collect();
        if shares.is_empty() {
            return Verdict::Unknown;
        }
        let is_decisive = |share: &&Proportion| share.has_enough() || share.drifted();
        let drifted = if shares.iter().any(is_decisive) {
            shares.iter().any(|share| share.drifted())
        } else {
            self.shift.drifted
        };
        let is_confirmed = shares.iter().any(|share| share.has_enough());
        match (drifted, self.window_is_full() || is_confirmed) {
            (true, _) => Verdict::Drifted,
            (false, true) => Verdict::Stable,
            (false, false) => Verdict::Unknown,
        }
    }

    /// The statistics for which there are enough events; the distributions only of a full window.
    fn statistics(&self) -> Vec<Statistic> {
        let mut statistics = Vec::new();
        let mut add = |name: &str, value: f64, threshold: Decimal, drifted: bool| {
            let value = Decimal::new(value);
            statistics.extend(value.map(|value| Statistic { name: name.into(), value, threshold, drifted }));
        };
        if let Some(Reference::Classes(reference)) = self.reference.as_ref().filter(|_| self.window_is_full()) {
            if let Some(index) = self.prediction_psi(reference) {
                let threshold = self.spec.prediction_psi;
                add(PREDICTION_PSI, index, threshold, index > threshold.get());
            }
            let confidences: Vec<f32> = self.newest.values().map(|(_, confidence)| *confidence).collect();
            if let Some(test) = kolmogorov_smirnov(&reference.confidences, &confidences) {
                let threshold = self.spec.confidence_p_value;
                add(CONFIDENCE_KS, test.p_value, threshold, test.p_value < threshold.get());
            }
        }
        statistics.extend(self.accuracy.as_ref().and_then(|accuracy| accuracy.statistic(LABELLED_ACCURACY)));
        statistics.extend(self.ratings.watched().and_then(|ratings| ratings.statistic(POSITIVE_RATINGS)));
        statistics
    }

    fn prediction_psi(&self, reference: &ClassReference) -> Option<f64> {
        let (expected, current) = label_counts(reference, self.newest.values().map(|(label, _)| label.as_str()));
        population_stability_index(&expected, &current)
    }
}
