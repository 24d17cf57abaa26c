//! The tree-structured Parzen estimator of Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", section 4.
//!
//! Where good trials were denser than bad ones the expected improvement is largest: of some candidates drawn from the density l of
//! the good ones, the one with the largest l/g is taken, each hyperparameter by itself. Densities of numbers are mixtures of
//! Gaussians cut off at the range, one around each trial and a wide one for the prior; those of options are smoothed counts.

use std::f64::consts::{PI, SQRT_2};

use crate::{
    Assignment, Setting,
    random::Random,
    space::{Dimension, Space},
};

/// Candidates of each hyperparameter, as in the paper's experiments.
const CANDIDATES: usize = 24;
/// Share of the trials that are good ones.
const GOOD_SHARE: f64 = 0.15;
/// More good ones than this would blur what they have in common.
const MOST_GOOD: usize = 25;

/// How many of so many trials are good ones.
pub fn good_count(trials: usize) -> usize {
    ((GOOD_SHARE * trials as f64).ceil() as usize).min(MOST_GOOD)
}

/// The next assignment, from those that turned out well and the others.
pub fn suggest(space: &Space, good: &[&Assignment], bad: &[&Assignment], random: &mut Random) -> Assignment {
    let settings = space.dimensions.iter().map(|(name, dimension)| {
        let of = |assignments: &[&Assignment]| -> Vec<Setting> {
            assignments.iter().filter_map(|assignment| assignment.0.get(name).cloned()).collect()
        };
        let (good, bad) = (Density::new(dimension, &of(good)), Density::new(dimension, &of(bad)));
        let mut best: Option<(f64, Setting)> = None;
        for _ in 0..CANDIDATES {
            let candidate = good.draw(random);
            let gain = good.of(&candidate).ln() - bad.of(&candidate).ln();
            if best.as_ref().is_none_or(|(most, _)| gain > *most) {
                best = Some((gain, candidate));
            }
        }
        (*name, best.map_or_else(|| dimension.draw(random), |(_, candidate)| candidate))
    });
    Assignment(settings.collect())
}

/// How often a hyperparameter had which value.
enum Density<'a> {
    Kernels { dimension: &'a Dimension, low: f64, high: f64, kernels: Vec<Kernel> },
    Counts { options: &'a [Setting], weights: Vec<f64> },
}

/// A Gaussian.
#[derive(Clone, Copy)]
struct Kernel {
    centre: f64,
    width: f64,
}

impl<'a> Density<'a> {
    fn new(dimension: &'a Dimension, settings: &[Setting]) -> Self {
        match (dimension, dimension.bounds()) {
            (Dimension::Options(options), _) => {
                // The prior counts each option once.
                let count =
                    |option: &Setting| settings.iter().filter(|setting| *setting == option).count() as f64 + 1.0;
                let total = (settings.len() + options.len()) as f64;
                Self::Counts { options, weights: options.iter().map(|option| count(option) / total).collect() }
            }
            (_, bounds) => {
                let (low, high) = bounds.unwrap_or((0.0, 1.0));
                let points = settings.iter().filter_map(|setting| dimension.coordinate(setting)).collect();
                Self::Kernels { dimension, low, high, kernels: kernels(points, low, high) }
            }
        }
    }

    fn draw(&self, random: &mut Random) -> Setting {
        match self {
            Self::Kernels { dimension, low, high, kernels } => {
                let kernel = kernels[random.index(kernels.len())];
                Setting::Number(dimension.number_at(kernel.draw(*low, *high, random)))
            }
            Self::Counts { options, weights } => {
                let mut rest = random.unit();
                let place = weights.iter().position(|weight| {
                    rest -= weight;
                    rest < 0.0
                });
                options[place.unwrap_or(options.len() - 1)].clone()
            }
        }
    }

    /// Density at a number, probability of a number with steps or of an option.
    fn of(&self, setting: &Setting) -> f64 {
        match self {
            Self::Kernels { dimension, low, high, kernels } => {
                let each = |kernel: &Kernel| {
                    let inside = kernel.mass(*low, *high);
                    match (dimension.cell(setting), dimension.coordinate(setting)) {
                        (Some((from, to)), _) => kernel.mass(from, to) / inside,
                        (None, Some(at)) => kernel.density(at) / inside,
                        (None, None) => 0.0,
                    }
                };
                kernels.iter().map(each).sum::<f64>() / kernels.len() as f64
            }
            Self::Counts { options, weights } => {
                let place = options.iter().position(|option| option == setting);
                place.map_or(0.0, |place| weights[place])
            }
        }
    }
}

/// A kernel around each point, as wide as the farther of its two neighbours is away, and the prior's, as wide as the range.
fn kernels(points: Vec<f64>, low: f64, high: f64) -> Vec<Kernel> {
    let span = high - low;
    let narrowest = span / (points.len() as f64 + 2.0).min(100.0);
    let prior = Kernel { centre: (low + high) / 2.0, width: span };
    let mut centres = points;
    centres.push(prior.centre);
    centres.sort_by(f64::total_cmp);
    let width = |index: usize| {
        let left = if index == 0 { low } else { centres[index - 1] };
        let right = centres.get(index + 1).copied().unwrap_or(high);
        (centres[index] - left).max(right - centres[index]).clamp(narrowest, span)
    };
    let mut kernels: Vec<Kernel> =
        (0..centres.len()).map(|index| Kernel { centre: centres[index], width: width(index) }).collect();
    if let Some(kernel) = kernels.iter_mut().find(|kernel| kernel.centre == prior.centre) {
        *kernel = prior;
    }
    kernels
}

impl Kernel {
    fn density(&self, at: f64) -> f64 {
        let distance = (at - self.centre) / self.width;
        (-0.5 * distance * distance).exp() / (self.width * (2.0 * PI).sqrt())
    }

    /// Probability between two coordinates.
    fn mass(&self, from: f64, to: f64) -> f64 {
        let below = |at: f64| 0.5 * libm::erfc((self.centre - at) / (self.width * SQRT_2));
        (below(to) - below(from)).max(f64::MIN_POSITIVE)
    }

    /// From the part inside the range.
    fn draw(&self, low: f64, high: f64, random: &mut Random) -> f64 {
        // The centre is inside, and no kernel is wider than the range: a third of the draws or more are taken.
        for _ in 0..100 {
            let drawn = self.centre + self.width * random.normal();
            if (low..=high).contains(&drawn) {
                return drawn;
            }
        }
        self.centre
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn densities_are_densities() {
        let continuous = Dimension::Continuous { low: 1e-5, high: 1e-1, log: true };
        let stepped = Dimension::Stepped { low: 2.0, high: 16.0, step: 2.0, count: 8, log: false };
        let whole = Dimension::Stepped { low: 1.0, high: 100.0, step: 1.0, count: 100, log: true };
        let of = |numbers: &[f64]| numbers.iter().map(|number| Setting::Number(*number)).collect::<Vec<_>>();

        let density = Density::new(&continuous, &of(&[1e-4, 2e-4, 5e-2]));
        let (low, high) = continuous.bounds().unwrap();
        let cells = 20_000;
        let width = (high - low) / f64::from(cells);
        let total: f64 = (0..cells)
            .map(|cell| density.of(&Setting::Number((low + (f64::from(cell) + 0.5) * width).exp())) * width)
            .sum();
        assert!((total - 1.0).abs() < 1e-4, "{total}");

        for (dimension, seen, all) in [
            (&stepped, of(&[4.0, 4.0, 16.0]), (1..=8).map(|index| f64::from(index) * 2.0).collect::<Vec<_>>()),
            (&whole, of(&[1.0, 7.0]), (1..=100).map(f64::from).collect()),
        ] {
            let density = Density::new(dimension, &seen);
            let total: f64 = all.iter().map(|number| density.of(&Setting::Number(*number))).sum();
            assert!((total - 1.0).abs() < 1e-9, "{total}");
        }

        let options = Dimension::Options(vec![Setting::Name("SGD".into()), Setting::Name("AdamW".into())]);
        let density = Density::new(&options, &[Setting::Name("SGD".into()), Setting::Name("SGD".into())]);
        assert_eq!(density.of(&Setting::Name("SGD".into())), 0.75, "two seen and one of the prior, of four");
        assert_eq!(density.of(&Setting::Name("AdamW".into())), 0.25);
    }

    #[test]
    fn draws_follow_the_density() {
        let dimension = Dimension::Continuous { low: 0.0, high: 1.0, log: false };
        let seen: Vec<Setting> = [0.2, 0.21, 0.22, 0.9].map(Setting::Number).into();
        let density = Density::new(&dimension, &seen);
        let mut random = Random::new(1, &[]);
        let draws = 20_000;
        let below = (0..draws).filter(|_| matches!(density.draw(&mut random), Setting::Number(x) if x < 0.3)).count();
        let cells = 3000;
        let expected: f64 =
            (0..cells).map(|cell| density.of(&Setting::Number((f64::from(cell) + 0.5) * 1e-4)) * 1e-4).sum();
        assert!((below as f64 / f64::from(draws) - expected).abs() < 0.015, "{below} {expected}");
    }
}
