//! The values that are searched through: one dimension for each hyperparameter.
//!
//! A dimension of numbers has coordinates, in which it is drawn evenly: the number itself, or its logarithm. A number that has steps
//! stands for the cell of coordinates halfway to its neighbours.

use athanor_contract::train::{
    ParameterName, ParameterRange, ParameterScale, SearchParameter,
    rules::{
        CHOICES_ARE_NAMES, LOG_ABOVE_ZERO, MIN_BELOW_MAX, RANGE_VALUES_OR_CHOICES, STEP_ABOVE_ZERO, STEP_IS_LINEAR,
    },
};

use crate::{Assignment, Setting, Trial, limits::Limits, random::Random};

/// Digits of a drawn number: more would only be hard to read.
const DIGITS: usize = 6;

/// All dimensions, in the order of their names.
pub struct Space {
    pub dimensions: Vec<(ParameterName, Dimension)>,
}

pub enum Dimension {
    Continuous {
        low: f64,
        high: f64,
        log: bool,
    },
    /// `low`, `low + step`, ..., so many; none is above `high`.
    Stepped {
        low: f64,
        high: f64,
        step: f64,
        count: u64,
        log: bool,
    },
    Options(Vec<Setting>),
}

impl Space {
    /// # Errors
    /// Everything that is wrong with the parameters.
    pub fn new(parameters: &[SearchParameter]) -> Result<Self, Vec<String>> {
        let mut dimensions = Vec::new();
        let mut mistakes = Vec::new();
        for parameter in parameters {
            if dimensions.iter().any(|(name, _)| *name == parameter.name) {
                mistakes.push(format!("{} is there twice", parameter.name));
            }
            match Dimension::new(parameter) {
                Ok(dimension) => dimensions.push((parameter.name, dimension)),
                Err(mistake) => mistakes.push(mistake),
            }
        }
        if parameters.is_empty() {
            mistakes.push("there are no parameters".into());
        }
        dimensions.sort_by_key(|(name, _)| *name);
        if mistakes.is_empty() { Ok(Self { dimensions }) } else { Err(mistakes) }
    }

    pub fn draw(&self, random: &mut Random) -> Assignment {
        Assignment(self.dimensions.iter().map(|(name, dimension)| (*name, dimension.draw(random))).collect())
    }

    /// Different assignments there are; `None` if there are more than can be counted.
    fn size(&self) -> Option<u64> {
        self.dimensions.iter().try_fold(1_u64, |size, (_, dimension)| size.checked_mul(dimension.size()?))
    }

    /// An assignment that no trial has, found by counting; `None` if there is none, or if they cannot be counted.
    pub fn unused(&self, trials: &[Trial], random: &mut Random) -> Option<Assignment> {
        let size = self.size()?;
        let start = (random.unit() * size as f64) as u64;
        // At most as many are taken as there are trials.
        let places = (0..size.min(trials.len() as u64 + 1)).map(|offset| (start % size + offset) % size);
        places.map(|place| self.nth(place)).find(|assignment| !is_known(trials, assignment))
    }

    fn nth(&self, mut place: u64) -> Assignment {
        let settings = self.dimensions.iter().map(|(name, dimension)| {
            let size = dimension.size().unwrap_or(1);
            let index = place % size;
            place /= size;
            (*name, dimension.nth(index))
        });
        Assignment(settings.collect())
    }
}

/// Whether a trial has this assignment.
pub fn is_known(trials: &[Trial], assignment: &Assignment) -> bool {
    trials.iter().any(|trial| trial.assignment == *assignment)
}

impl Dimension {
    fn new(parameter: &SearchParameter) -> Result<Self, String> {
        let name = parameter.name;
        let limits = Limits::of(name)?;
        let options = |settings: Vec<Setting>| {
            let mut options: Vec<Setting> = Vec::new();
            for setting in settings {
                limits.check(name, &setting)?;
                if !options.contains(&setting) {
                    options.push(setting);
                }
            }
            if options.is_empty() { Err(format!("{name}: there are no values")) } else { Ok(Self::Options(options)) }
        };
        let has_names = parameter.choices.is_some() == matches!(limits, Limits::Name);
        match (&parameter.range, &parameter.values, &parameter.choices) {
            (Some(_), None, None) | (None, Some(_), None) | (None, None, Some(_)) if !has_names => {
                Err(format!("{name}: {}", CHOICES_ARE_NAMES.message))
            }
            (Some(range), None, None) => Self::of_range(name, limits, range),
            (None, Some(values), None) => options(values.iter().map(|value| Setting::Number(*value)).collect()),
            (None, None, Some(choices)) => options(choices.iter().cloned().map(Setting::Name).collect()),
            _ => Err(format!("{name}: {}", RANGE_VALUES_OR_CHOICES.message)),
        }
    }

    fn of_range(name: ParameterName, limits: Limits, range: &ParameterRange) -> Result<Self, String> {
        let ParameterRange { min, max, scale, step } = *range;
        limits.check(name, &Setting::Number(min))?;
        limits.check(name, &Setting::Number(max))?;
        let log = scale == ParameterScale::Log;
        let whole = matches!(limits, Limits::Number { whole: true, .. });
        for (is_wrong, mistake) in [
            (min >= max, &*MIN_BELOW_MAX.message),
            (log && min <= 0.0, &*LOG_ABOVE_ZERO.message),
            (log && step.is_some(), &*STEP_IS_LINEAR.message),
            (step.is_some_and(|step| step <= 0.0 || !step.is_finite()), &*STEP_ABOVE_ZERO.message),
            (whole && step.is_some_and(|step| step.fract() != 0.0), "step must be a whole number"),
        ] {
            if is_wrong {
                return Err(format!("{name}: {mistake}"));
            }
        }
        Ok(match step.or(whole.then_some(1.0)) {
            Some(step) => {
                Self::Stepped { low: min, high: max, step, count: ((max - min) / step + 1e-9) as u64 + 1, log }
            }
            None => Self::Continuous { low: min, high: max, log },
        })
    }

    /// Smallest and largest coordinate; none for options.
    pub fn bounds(&self) -> Option<(f64, f64)> {
        match *self {
            Self::Continuous { low, high, log } => Some((scaled(low, log), scaled(high, log))),
            Self::Stepped { low, step, count, log, .. } => {
                let last = low + step * (count - 1) as f64;
                Some((scaled(low - step / 2.0, log), scaled(last + step / 2.0, log)))
            }
            Self::Options(_) => None,
        }
    }

    /// A number's coordinate.
    pub fn coordinate(&self, setting: &Setting) -> Option<f64> {
        match (self, setting) {
            (Self::Continuous { log, .. } | Self::Stepped { log, .. }, Setting::Number(number)) => {
                Some(scaled(*number, *log))
            }
            _ => None,
        }
    }

    /// The coordinates that a number with steps stands for.
    pub fn cell(&self, setting: &Setting) -> Option<(f64, f64)> {
        match (self, setting) {
            (Self::Stepped { step, log, .. }, Setting::Number(number)) => {
                Some((scaled(number - step / 2.0, *log), scaled(number + step / 2.0, *log)))
            }
            _ => None,
        }
    }

    /// The number at a coordinate, inside the range and on a step.
    pub fn number_at(&self, coordinate: f64) -> f64 {
        match *self {
            Self::Continuous { low, high, log } => {
                let number = if log { coordinate.exp() } else { coordinate };
                let short = significant(number, DIGITS);
                let number = if (short - number).abs() > (high - low) * 1e-4 { number } else { short };
                number.clamp(low, high)
            }
            Self::Stepped { low, high, step, count, log } => {
                let number = if log { coordinate.exp() } else { coordinate };
                let index = ((number - low) / step).round().clamp(0.0, (count - 1) as f64);
                on_step(low, high, step, index)
            }
            Self::Options(_) => coordinate,
        }
    }

    fn size(&self) -> Option<u64> {
        match self {
            Self::Continuous { .. } => None,
            Self::Stepped { count, .. } => Some(*count),
            Self::Options(options) => Some(options.len() as u64),
        }
    }

    fn nth(&self, index: u64) -> Setting {
        match self {
            Self::Options(options) => options[index as usize % options.len()].clone(),
            Self::Stepped { low, high, step, .. } => Setting::Number(on_step(*low, *high, *step, index as f64)),
            Self::Continuous { low, .. } => Setting::Number(*low),
        }
    }

    pub fn draw(&self, random: &mut Random) -> Setting {
        match (self, self.bounds()) {
            (Self::Options(options), _) => options[random.index(options.len())].clone(),
            (_, Some((low, high))) => Setting::Number(self.number_at(random.between(low, high))),
            (_, None) => self.nth(0),
        }
    }
}

fn scaled(number: f64, log: bool) -> f64 {
    if log { number.ln() } else { number }
}

/// The number after so many steps: 0.3, not 0.30000000000000004.
fn on_step(low: f64, high: f64, step: f64, index: f64) -> f64 {
    significant(low + step * index, 12).clamp(low, high)
}

/// A number with so many digits.
fn significant(number: f64, digits: usize) -> f64 {
    format!("{number:.*e}", digits - 1).parse().unwrap_or(number)
}
