//! The conditions a result has to meet.

use athanor_contract::train::Gate;

use super::evaluation::{Evaluation, name};

/// The rows that a result was measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldOut {
    /// They choose: a gate that cannot be measured on them does not apply.
    Validation,
    /// They decide whether the job succeeds: a gate that cannot be measured on them fails.
    Test,
}

impl HeldOut {
    fn name(self) -> &'static str {
        match self {
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

/// The results of other models on the same rows.
#[derive(Clone, Copy, Default)]
pub struct Others<'a> {
    pub baseline: Option<&'a Evaluation>,
    pub teacher: Option<&'a Evaluation>,
}

/// The gates that do not hold on `rows`, each with its numbers. `sources` are the names of the dataset's sources.
pub fn failed_gates(
    gates: &[Gate],
    sources: &[String],
    rows: HeldOut,
    result: &Evaluation,
    others: Others,
) -> Vec<String> {
    gates.iter().filter_map(|gate| failure(gate, sources, rows, result, others)).collect()
}

fn failure(gate: &Gate, sources: &[String], rows: HeldOut, result: &Evaluation, others: Others) -> Option<String> {
    let slice: Option<Vec<usize>> = gate.sources.as_ref().map(|names| {
        sources.iter().enumerate().filter(|(_, source)| names.contains(source)).map(|(index, _)| index).collect()
    });
    let name = name(gate.metric);
    let place = gate.sources.as_ref().map_or_else(
        || format!("all {} rows", rows.name()),
        |of| format!("the {} rows of {}", rows.name(), of.join(", ")),
    );
    let value_of = |found: &Evaluation| found.metric(gate.metric, slice.as_deref());
    let Some(value) = value_of(result) else {
        return (rows == HeldOut::Test).then(|| format!("{name} on {place}: it cannot be measured there"));
    };
    if let Some(minimum) = gate.minimum {
        return (value < minimum.get()).then(|| format!("{name} on {place} is {value:.4}, less than {minimum}"));
    }
    if let Some(maximum) = gate.maximum {
        return (value > maximum.get()).then(|| format!("{name} on {place} is {value:.4}, more than {maximum}"));
    }
    if let Some(share) = gate.minimum_of_teacher {
        let Some(of_teacher) = others.teacher.and_then(value_of) else {
            return Some(format!("{name} on {place}: there is no teacher to compare with"));
        };
        return (value < of_teacher * share.get() - 1e-9).then(|| {
            format!("{name} on {place} is {value:.4}; required: {share} of the teacher's score ({of_teacher:.4})")
        });
    }
    let gain = gate.minimum_gain?;
    let Some(before) = others.baseline.and_then(value_of) else {
        return Some(format!("{name} on {place}: there is no baseline to compare with"));
    };
    let (found, sign) = if gate.metric.is_loss() { (before - value, "minus") } else { (value - before, "plus") };
    // Both are ratios of small integers: a gain that is exactly reached must not fail by rounding.
    (found < gain.get() - 1e-9)
        .then(|| format!("{name} on {place} is {value:.4}; required: the baseline's score ({before:.4}) {sign} {gain}"))
}

#[cfg(test)]
mod tests {
    use athanor_contract::{Decimal, train::Metric};

    use super::*;
    use crate::evaluate::{Classes, Predictions};

    #[test]
    fn gates_pool_sources_and_compare_with_the_baseline() {
        let predictions = |labels: [usize; 6]| {
            let truth = vec![Some(0), Some(1), Some(0), Some(1), Some(0), Some(1)];
            let predictions = Predictions { labels: labels.to_vec(), confidences: vec![1.0; 6] };
            Evaluation { sources: vec![0, 0, 1, 1, 1, 2], results: Box::new(Classes { truth, predictions }) }
        };
        let (result, before) = (predictions([0, 1, 0, 1, 1, 0]), predictions([0, 1, 1, 0, 0, 1]));
        let names = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let gate = |sources: &[&str], minimum: Option<f64>, gain: Option<f64>| Gate {
            metric: Metric::Accuracy,
            sources: (!sources.is_empty()).then(|| sources.iter().map(|&name| name.to_owned()).collect()),
            minimum: minimum.and_then(Decimal::new),
            minimum_gain: gain.and_then(Decimal::new),
            maximum: None,
            minimum_of_teacher: None,
        };
        let of_teacher = |sources: &[&str], share: f64| Gate {
            minimum_of_teacher: Decimal::new(share),
            ..gate(sources, None, None)
        };
        // Result: a 2/2, b 2/3, c 0/1. Baseline, and teacher: a 2/2, b 1/3, c 1/1.
        let cases = [
            (gate(&[], Some(0.66), None), None),
            (gate(&[], Some(0.67), None), Some("accuracy on all test rows is 0.6667, less than 0.67")),
            (gate(&["a", "b"], Some(0.8), None), None),
            (gate(&["a"], None, Some(0.0)), None),
            (gate(&["b"], None, Some(1.0 / 3.0)), None),
            (gate(&["a", "b", "c"], None, Some(0.0)), None),
            (
                gate(&["c"], None, Some(-0.5)),
                Some("accuracy on the test rows of c is 0.0000; required: the baseline's score (1.0000) plus -0.5"),
            ),
            (of_teacher(&[], 1.0), None),
            (
                of_teacher(&["c"], 0.9),
                Some("accuracy on the test rows of c is 0.0000; required: 0.9 of the teacher's score (1.0000)"),
            ),
            (gate(&["d"], Some(0.1), None), Some("accuracy on the test rows of d: it cannot be measured there")),
        ];
        for (gate, expected) in cases {
            let others = Others { baseline: Some(&before), teacher: Some(&before) };
            let failed = failed_gates(std::slice::from_ref(&gate), &names, HeldOut::Test, &result, others);
            assert_eq!(failed.first().map(String::as_str), expected);
            // The same numbers on validation rows; a source without such rows does not choose.
            let failed = failed_gates(&[gate], &names, HeldOut::Validation, &result, others);
            let expected = expected.filter(|why| !why.contains("cannot be measured"));
            assert_eq!(failed.first(), expected.map(|why| why.replace("test rows", "validation rows")).as_ref());
        }
        for gate in [gate(&[], None, Some(0.0)), of_teacher(&[], 0.5)] {
            assert_eq!(failed_gates(&[gate], &names, HeldOut::Test, &result, Others::default()).len(), 1);
        }
    }
}
