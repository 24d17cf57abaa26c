//! What happened while training, for the report's curves. It is kept in checkpoints, so that a resumed run's curves are
//! whole.

use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Step, events::TRAINING, tensorboard::EventWriter};

/// Most points of a curve: a picture shows no more.
const MOST_POINTS: usize = 1000;

/// Curves of a run: every point is the mean of `stride` steps, which doubles whenever there are too many points.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    pub stride: u64,
    pub points: Vec<Point>,
    pub validations: Vec<Validation>,
    /// What the score of a validation is.
    #[serde(default)]
    pub score_name: String,
    /// Sums over the steps that are not a point yet, and their number.
    #[serde(default)]
    open: (Point, u64),
}

/// Means over some steps, the last of which is `step`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Point {
    pub step: u64,
    /// On the training rows, as the objective has it.
    pub loss: f64,
    pub learning_rate: f64,
    /// Before clipping.
    pub gradient_norm: f64,
    /// When the step ended, seconds since 1970.
    #[serde(default)]
    pub time: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Validation {
    pub step: u64,
    pub epoch: f64,
    /// The more the better.
    pub score: f64,
    /// Seconds since 1970.
    #[serde(default)]
    pub time: f64,
}

impl Default for History {
    fn default() -> Self {
        Self {
            stride: 1,
            points: Vec::new(),
            validations: Vec::new(),
            score_name: String::new(),
            open: Default::default(),
        }
    }
}

impl Point {
    fn plus(self, other: Self) -> Self {
        Self {
            step: other.step,
            loss: self.loss + other.loss,
            learning_rate: self.learning_rate + other.learning_rate,
            gradient_norm: self.gradient_norm + other.gradient_norm,
            time: other.time,
        }
    }

    fn over(self, count: u64) -> Self {
        let count = count as f64;
        Self {
            step: self.step,
            loss: self.loss / count,
            learning_rate: self.learning_rate / count,
            gradient_norm: self.gradient_norm / count,
            time: self.time,
        }
    }
}

impl History {
    /// A step that was left out because it was not finite is left out here too.
    pub fn step(&mut self, step: &Step) {
        if !(step.loss.is_finite() && step.gradient_norm.is_finite()) {
            return;
        }
        let one = Point {
            step: step.step,
            loss: step.loss,
            learning_rate: step.learning_rate,
            gradient_norm: step.gradient_norm,
            time: now(),
        };
        self.open = (self.open.0.plus(one), self.open.1 + 1);
        if self.open.1 < self.stride {
            return;
        }
        let (sums, count) = std::mem::take(&mut self.open);
        self.points.push(sums.over(count));
        if self.points.len() > MOST_POINTS {
            // An odd one at the end waits for its partner.
            if self.points.len() % 2 == 1
                && let Some(last) = self.points.pop()
            {
                let stride = self.stride as f64;
                let sums = Point {
                    step: last.step,
                    loss: last.loss * stride,
                    learning_rate: last.learning_rate * stride,
                    gradient_norm: last.gradient_norm * stride,
                    time: last.time,
                };
                self.open = (sums, self.stride);
            }
            self.points = self.points.chunks(2).map(|pair| pair[0].plus(pair[1]).over(2)).collect();
            self.stride *= 2;
        }
    }

    /// Writes the curves as an event file for TensorBoard.
    pub fn write_events(&self, folder: &Path) -> std::io::Result<()> {
        let at = |time: f64| Timestamp::from_millisecond((time * 1000.0) as i64).unwrap_or(Timestamp::UNIX_EPOCH);
        let started = self.points.first().map_or_else(Timestamp::now, |point| at(point.time));
        let mut writer = EventWriter::create(folder, started)?;
        for point in &self.points {
            let values = [point.loss, point.learning_rate, point.gradient_norm];
            let values: Vec<_> = TRAINING.into_iter().zip(values).collect();
            writer.scalars(point.step, &values, at(point.time))?;
        }
        let tag = format!("validation/{}", self.score_name);
        for one in &self.validations {
            writer.scalar(&tag, one.step, one.score, at(one.time))?;
        }
        Ok(())
    }

    /// A score that is not finite is left out: a checkpoint is JSON, which cannot hold it.
    pub fn validated(&mut self, step: u64, epoch: f64, name: &str, score: f64) {
        name.clone_into(&mut self.score_name);
        if !score.is_finite() {
            return;
        }
        self.validations.push(Validation { step, epoch, score, time: now() });
    }
}

fn now() -> f64 {
    jiff::Timestamp::now().as_millisecond() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_can_be_read_after_a_validation_that_was_not_finite() {
        let mut history = History::default();
        for (step, score) in [(1, f64::NAN), (2, f64::NEG_INFINITY), (3, 0.5)] {
            history.validated(step, 1.0, "accuracy", score);
        }
        let text = serde_json::to_string(&history).unwrap();
        let read: History = serde_json::from_str(&text).unwrap();
        assert_eq!(read.validations.iter().map(|one| one.step).collect::<Vec<_>>(), [3]);
        assert!(read == history);
    }

    #[test]
    fn long_runs_are_thinned_to_means() {
        let mut history = History::default();
        let steps = 12_345;
        for step in 1..=steps {
            let loss = step as f64;
            history.step(&Step { step, loss, learning_rate: 0.1, gradient_norm: 2.0, samples: 1, tokens: 1 });
        }
        assert!(history.points.len() <= MOST_POINTS && history.points.len() > MOST_POINTS / 4);
        assert_eq!(history.stride, 16);
        for (index, point) in history.points.iter().enumerate() {
            let last = (index as u64 + 1) * history.stride;
            assert_eq!(point.step, last);
            // The mean of the numbers from last - 15 to last.
            assert!((point.loss - (last as f64 - 7.5)).abs() < 1e-6);
            assert!((point.learning_rate - 0.1).abs() < 1e-9);
        }
        let text = serde_json::to_string(&history).unwrap();
        assert!(serde_json::from_str::<History>(&text).unwrap() == history, "a checkpoint gives it back");
    }
}
