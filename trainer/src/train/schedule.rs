//! The learning rate of each step.

use athanor_contract::train::Schedule;

/// Linear warm-up to `peak`, then the schedule's way down, which would reach zero one step after the last.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    pub peak: f64,
    pub warmup_steps: u64,
    pub total_steps: u64,
    pub schedule: Schedule,
}

impl LearningRate {
    pub fn new(peak: f64, warmup_ratio: f64, total_steps: u64, schedule: Schedule) -> Self {
        let warmup_steps = (warmup_ratio * total_steps as f64).ceil() as u64;
        Self { peak, warmup_steps, total_steps, schedule }
    }

    /// The learning rate of step number `step`, counted from 0. No step has rate zero: it would be lost.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let after = (self.total_steps.saturating_sub(self.warmup_steps)).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / after).min(1.0);
        self.peak
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - progress,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_and_fall() {
        let rates = |schedule| {
            let rate = LearningRate::new(1.0, 0.2, 10, schedule);
            [0, 1, 2, 6, 9].map(|step| (rate.at(step) * 1000.0).round() / 1000.0)
        };
        assert_eq!(rates(Schedule::Constant), [0.5, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Linear), [0.5, 1.0, 1.0, 0.5, 0.125]);
        assert_eq!(rates(Schedule::Cosine), [0.5, 1.0, 1.0, 0.5, 0.038]);
        assert_eq!(LearningRate::new(2.0, 0.0, 1, Schedule::Linear).at(0), 2.0);
    }
}
