//! What leaves a run while it goes on: log lines, Prometheus gauges, progress to the operator, the terminal's progress
//! bar, and at the end the termination message and a report to look at.

mod chart;
mod classes;
mod events;
mod fields;
mod history;
pub mod ops;
pub mod page;
mod progress;
mod reading;
pub mod tensorboard;
pub mod termination;

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use athanor_contract::Decimal;
use indicatif::{ProgressBar, ProgressStyle};
use metrics::{counter, gauge};

pub use events::{Events, Upload};
pub use history::History;
pub use progress::{ProgressUpdate, Sender};
pub use reading::Reading;

/// Steps whose mean is the current speed.
const WINDOW: usize = 20;
/// Between two log lines of a run without a terminal.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Seconds from process start to each milestone.
#[derive(Clone)]
pub struct Timeline {
    start: Instant,
    marks: Arc<Mutex<BTreeMap<&'static str, f64>>>,
}

impl Timeline {
    /// `start` is when the process began.
    pub fn new(start: Instant) -> Self {
        Self { start, marks: Arc::default() }
    }

    /// Notes that something has been reached now, and logs it. Only its first time counts.
    pub fn mark(&self, name: &'static str) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Vacant(place) = marks.entry(name) {
            let elapsed_seconds = self.start.elapsed().as_secs_f64();
            place.insert(elapsed_seconds);
            tracing::info!(milestone = name, elapsed_seconds, "reached");
        }
    }

    pub fn elapsed(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    pub fn seconds(&self) -> BTreeMap<String, f64> {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.iter().map(|(name, seconds)| ((*name).to_owned(), *seconds)).collect()
    }

    pub fn decimals(&self) -> BTreeMap<String, Decimal> {
        self.seconds().into_iter().filter_map(|(name, seconds)| Some((name, Decimal::new(seconds)?))).collect()
    }
}

/// What one optimizer step did, over all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Steps taken, this one included.
    pub step: u64,
    /// Mean over the batch.
    pub loss: f64,
    pub learning_rate: f64,
    pub gradient_norm: f64,
    pub samples: usize,
    /// Tokens without padding.
    pub tokens: usize,
}

/// Rank 0's reporter. It never blocks training.
pub struct Reporter {
    sender: Option<Sender>,
    update: ProgressUpdate,
    timeline: Timeline,
    bar: Option<ProgressBar>,
    recent: VecDeque<(Instant, usize, usize)>,
    last_log: Instant,
}

impl Reporter {
    /// `identity` is namespace, job and run id, as progress reports carry them.
    pub fn new(identity: (String, String, String), sender: Option<Sender>, timeline: Timeline, terminal: bool) -> Self {
        let (namespace, job, run_id) = identity;
        let update = ProgressUpdate { namespace, job, run_id, ..ProgressUpdate::default() };
        let bar = terminal.then(|| {
            let template = "{spinner} {pos}/{len} [{bar:30}] {eta} {msg}";
            ProgressBar::new(0)
                .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { sender, update, timeline, bar, recent: VecDeque::with_capacity(WINDOW + 1), last_log: Instant::now() }
    }

    /// Preparing, Fold 1 of 5, Training, Evaluating or Writing.
    pub fn stage(&mut self, stage: &str) {
        stage.clone_into(&mut self.update.stage);
        if let Some(bar) = &self.bar {
            bar.set_message(stage.to_owned());
        }
        self.send();
    }

    /// Rows that the teacher has been asked about.
    pub fn asked(&mut self, done: usize, of: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        }
    }

    /// A training begins, or one of several.
    pub fn begin(&mut self, stage: &str, step: u64, total_steps: u64) {
        self.update.step = step;
        self.update.total_steps = total_steps;
        self.update.metrics.clear();
        if let Some(bar) = &self.bar {
            bar.set_length(total_steps);
            bar.set_position(step);
            bar.reset_eta();
        }
        self.recent.clear();
        self.recent.push_back((Instant::now(), 0, 0));
        gauge!("athanor_train_steps").set(total_steps as f64);
        // A counter that has never counted is zero, not absent.
        for name in [
            "athanor_train_skipped_steps_total",
            "athanor_train_roll_backs_total",
            "athanor_train_checkpoint_failures_total",
        ] {
            counter!(name).increment(0);
        }
        self.stage(stage);
    }

    pub fn step(&mut self, step: Step) {
        self.recent.push_back((Instant::now(), step.samples, step.tokens));
        if self.recent.len() > WINDOW + 1 {
            self.recent.pop_front();
        }
        let (samples_per_second, tokens_per_second) = self.speed();
        let update = &mut self.update;
        update.step = step.step;
        update.loss = step.loss;
        update.learning_rate = step.learning_rate;
        update.samples_per_second = samples_per_second;
        update.tokens_per_second = tokens_per_second;
        let seconds_per_step = step.samples as f64 / samples_per_second.max(1e-9);
        update.eta_seconds = update.total_steps.saturating_sub(step.step) as f64 * seconds_per_step;
        gauge!("athanor_train_step").set(step.step as f64);
        gauge!("athanor_train_loss").set(step.loss);
        gauge!("athanor_train_samples_per_second").set(samples_per_second);
        gauge!("athanor_train_tokens_per_second").set(tokens_per_second);
        gauge!("athanor_train_learning_rate").set(step.learning_rate);
        gauge!("athanor_train_gradient_norm").set(step.gradient_norm);
        if let Some(bar) = &self.bar {
            bar.set_position(step.step);
            bar.set_message(format!("{}: loss {:.4}, {samples_per_second:.0} samples/s", self.update.stage, step.loss));
        } else if self.last_log.elapsed() > LOG_EVERY {
            self.last_log = Instant::now();
            tracing::info!(
                stage = self.update.stage,
                step = step.step,
                total_steps = self.update.total_steps,
                loss = step.loss,
                samples_per_second,
                tokens_per_second,
                learning_rate = step.learning_rate,
                "training"
            );
        }
        self.send();
    }

    /// `score` with its name.
    pub fn validated(&mut self, step: u64, epoch: f64, (name, score): (&str, f64), is_best: bool) {
        let elapsed_seconds = self.timeline.elapsed();
        tracing::info!(
            step,
            epoch,
            metric = name,
            score,
            is_best,
            loss = self.update.loss,
            elapsed_seconds,
            "validated"
        );
        gauge!("athanor_train_validation_score").set(score);
        if name == "accuracy" {
            gauge!("athanor_train_validation_accuracy").set(score);
        }
        self.update.metrics.insert(name.into(), score);
        if let Some(bar) = &self.bar {
            bar.println(format!("step {step}, epoch {epoch:.2}: validation {name} {score:.4}"));
        }
        // The pause must not count as slow training.
        self.recent.clear();
        self.recent.push_back((Instant::now(), 0, 0));
        self.send();
    }

    pub fn checkpointed(&mut self, step: u64) {
        if self.update.checkpoint_step != step {
            self.update.checkpoint_step = step;
            gauge!("athanor_train_checkpoint_step").set(step as f64);
            self.send();
        }
    }

    /// Samples and tokens per second over the last steps.
    fn speed(&self) -> (f64, f64) {
        let (Some((first, ..)), Some((last, ..))) = (self.recent.front(), self.recent.back()) else {
            return (0.0, 0.0);
        };
        let seconds = last.duration_since(*first).as_secs_f64().max(1e-9);
        let (samples, tokens) =
            self.recent.iter().skip(1).fold((0, 0), |(samples, tokens), (_, s, t)| (samples + s, tokens + t));
        (samples as f64 / seconds, tokens as f64 / seconds)
    }

    fn send(&mut self) {
        if let Some(sender) = &self.sender {
            self.update.timeline = self.timeline.seconds().into_iter().collect();
            sender.send(self.update.clone());
        }
    }

    /// Sends what is left, for a moment at most.
    pub async fn finish(mut self) {
        self.send();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if let Some(sender) = self.sender.take() {
            sender.finish(Duration::from_secs(1)).await;
        }
    }
}
