//! Whether the distributions of predicted labels and confidences have moved, from windows that do not overlap.

use std::collections::HashMap;

use athanor_contract::{artifact::ClassReference, monitor::MonitorSpec};

use crate::drift::{WindowDetector, confidences_p_value, labels_p_value, population_stability_index};

/// The windows of one revision, compared with its reference.
#[derive(Debug)]
pub(super) struct Shift {
    detector: WindowDetector,
    /// Predictions of the window that is being filled.
    labels: Vec<String>,
    confidences: Vec<f32>,
    pub drifted: bool,
}

impl Shift {
    /// The mean number of predictions until a false alarm is that of labels, `averageRunLength`.
    pub fn new(spec: &MonitorSpec) -> Self {
        let windows = spec.average_run_length as f64 / f64::from(spec.window_predictions.max(1));
        Self { detector: WindowDetector::new(windows.max(1.0)), labels: vec![], confidences: vec![], drifted: false }
    }

    /// Takes a prediction; a full window is compared.
    pub fn observe(&mut self, label: &str, confidence: f32, reference: &ClassReference, spec: &MonitorSpec) {
        self.labels.push(label.to_owned());
        self.confidences.push(confidence);
        if self.labels.len() < spec.window_predictions as usize {
            return;
        }
        let (expected, current) = label_counts(reference, self.labels.iter().map(String::as_str));
        let compared =
            labels_p_value(&expected, &current).zip(confidences_p_value(&reference.confidences, &self.confidences));
        let index = population_stability_index(&expected, &current).unwrap_or(0.0);
        self.labels.clear();
        self.confidences.clear();
        let Some((labels, confidences)) = compared else { return };
        // Both have to move, and the labels by more than is of interest.
        let p_value = if index > spec.prediction_psi.get() { labels.max(confidences) } else { 1.0 };
        if p_value < spec.confidence_p_value.get() {
            self.detector.observe(p_value);
            self.drifted |= self.detector.has_moved();
        } else {
            // A window like the reference withdraws the verdict.
            self.detector.observe(1.0);
            if std::mem::take(&mut self.drifted) {
                self.detector.restart();
            }
        }
    }
}

/// Counts of the reference's labels in the reference and among `labels`; labels that it does not have are one more.
pub(super) fn label_counts<'a>(
    reference: &ClassReference,
    labels: impl Iterator<Item = &'a str>,
) -> (Vec<u64>, Vec<u64>) {
    let places: HashMap<&str, usize> = reference.labels.iter().enumerate().map(|(at, it)| (it.as_str(), at)).collect();
    let mut expected = reference.predicted.clone();
    let mut current = vec![0; reference.labels.len()];
    let mut others = 0;
    for label in labels {
        match places.get(label) {
            Some(place) => current[*place] += 1,
            None => others += 1,
        }
    }
    if others > 0 {
        expected.push(0);
        current.push(others);
    }
    (expected, current)
}
