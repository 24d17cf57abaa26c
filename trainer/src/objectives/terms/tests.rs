//! Each term against a naive reference in double precision.

use athanor_contract::train::{Divergence, HiddenStateLoss};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::{
    contrastive::contrastive, cross_entropy::cross_entropy, hidden_state::hidden_state,
    mean_squared_error::mean_squared_error, soft_label::soft_label,
};
use crate::data::IGNORED;

/// Rows of numbers as the naive references take them.
type Rows = Vec<Vec<f64>>;

fn tensor(rows: &Rows) -> Tensor {
    let flat: Vec<f32> = rows.iter().flatten().map(|&value| value as f32).collect();
    Tensor::from_slice(&flat).view([rows.len() as i64, -1])
}

fn softmax(row: &[f64], temperature: f64) -> Vec<f64> {
    let exps: Vec<f64> = row.iter().map(|value| (value / temperature).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|value| value / sum).collect()
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum()
}

fn naive_soft_label(student: &Rows, teacher: &Rows, temperature: f64, divergence: Divergence) -> f64 {
    let of_row = |student: &Vec<f64>, teacher: &Vec<f64>| {
        let (s, t) = (softmax(student, temperature), softmax(teacher, temperature));
        match divergence {
            Divergence::ForwardKL => kl(&t, &s),
            Divergence::ReverseKL => kl(&s, &t),
            Divergence::JensenShannon => {
                let m: Vec<f64> = s.iter().zip(&t).map(|(s, t)| (s + t) / 2.0).collect();
                (kl(&s, &m) + kl(&t, &m)) / 2.0
            }
        }
    };
    student.iter().zip(teacher).map(|(s, t)| of_row(s, t)).sum::<f64>() * temperature * temperature
}

fn close(found: &Tensor, expected: f64) {
    let found = f64::try_from(found).unwrap();
    assert!((found - expected).abs() <= 1e-4 + 1e-4 * expected.abs(), "{found} is not {expected}");
}

fn rows(rows: usize, columns: usize) -> impl Strategy<Value = Rows> {
    proptest::collection::vec(proptest::collection::vec(-4.0..4.0_f64, columns), rows)
}

const DIVERGENCES: [Divergence; 3] = [Divergence::ForwardKL, Divergence::ReverseKL, Divergence::JensenShannon];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn soft_labels_equal_the_naive_sums(student in rows(3, 4), teacher in rows(3, 4), temperature in 0.5..8.0_f64) {
        for divergence in DIVERGENCES {
            let found = soft_label(&tensor(&student), &tensor(&teacher), temperature, divergence);
            close(&found, naive_soft_label(&student, &teacher, temperature, divergence));
        }
    }

    #[test]
    fn jensen_shannon_is_symmetric_and_zero_for_equals(a in rows(2, 5), b in rows(2, 5)) {
        let js = |x: &Rows, y: &Rows| {
            f64::try_from(soft_label(&tensor(x), &tensor(y), 1.5, Divergence::JensenShannon)).unwrap()
        };
        prop_assert!((js(&a, &b) - js(&b, &a)).abs() < 1e-5);
        for divergence in DIVERGENCES {
            let found = f64::try_from(soft_label(&tensor(&a), &tensor(&a), 2.0, divergence)).unwrap();
            prop_assert!(found.abs() < 1e-5, "{divergence:?}: {found}");
        }
        prop_assert!(js(&a, &b) <= 2.0 * 1.5 * 1.5 * std::f64::consts::LN_2 + 1e-5, "bounded by ln 2 a row");
    }

    #[test]
    fn cross_entropy_and_squares_equal_the_naive_sums(logits in rows(4, 3), wanted in rows(4, 3), smoothing in 0.0..0.5_f64) {
        let labels = [2_i64, 0, IGNORED, 1];
        let expected: f64 = logits.iter().zip(labels).filter(|(_, label)| *label >= 0).map(|(row, label)| {
            let p = softmax(row, 1.0);
            let spread: f64 = p.iter().map(|p| -p.ln()).sum::<f64>() / 3.0;
            -(1.0 - smoothing) * p[label as usize].ln() + smoothing * spread
        }).sum();
        close(&cross_entropy(&tensor(&logits), &Tensor::from_slice(&labels), smoothing), expected);
        let expected: f64 =
            logits.iter().flatten().zip(wanted.iter().flatten()).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / 3.0;
        close(&mean_squared_error(&tensor(&logits), &tensor(&wanted)), expected);
    }

    #[test]
    fn contrastive_equals_the_naive_sum(anchors in rows(4, 3), pairs in rows(4, 3), temperature in 0.05..2.0_f64) {
        let norm = |row: &[f64]| row.iter().map(|value| value * value).sum::<f64>().sqrt().max(1e-12);
        let cosine = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / norm(a) / norm(b);
        let expected: f64 = (0..4).map(|i| {
            let scores: Vec<f64> = pairs.iter().map(|pair| cosine(&anchors[i], pair)).collect();
            -softmax(&scores, temperature)[i].ln()
        }).sum();
        close(&contrastive(&tensor(&anchors), &tensor(&pairs), temperature), expected);
    }

    #[test]
    fn hidden_states_equal_the_naive_sums(a in rows(6, 4), b in rows(6, 4)) {
        // Two rows of three tokens; the last token of the second is padding.
        let (student, teacher) = (tensor(&a).view([2, 3, 4]), tensor(&b).view([2, 3, 4]));
        let mask = Tensor::from_slice(&[1_i64, 1, 1, 1, 1, 0]).view([2, 3]);
        let squares = |i: usize| a[i].iter().zip(&b[i]).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / 4.0;
        let norm = |row: &[f64]| row.iter().map(|value| value * value).sum::<f64>().sqrt();
        let cosines = |i: usize| {
            1.0 - a[i].iter().zip(&b[i]).map(|(a, b)| a * b).sum::<f64>() / (norm(&a[i]) * norm(&b[i])).max(1e-8)
        };
        let over = |of: &dyn Fn(usize) -> f64| (of(0) + of(1) + of(2)) / 3.0 + (of(3) + of(4)) / 2.0;
        close(&hidden_state(&student, &teacher, Some(&mask), HiddenStateLoss::MSE), over(&squares));
        close(&hidden_state(&student, &teacher, Some(&mask), HiddenStateLoss::Cosine), over(&cosines));
        let whole = hidden_state(&student, &teacher, None, HiddenStateLoss::MSE);
        close(&whole, (0..6).map(squares).sum::<f64>() / 3.0);
    }

    #[test]
    fn divergences_have_the_gradients_of_finite_differences(student in rows(2, 3), teacher in rows(2, 3)) {
        for divergence in DIVERGENCES {
            let x = tensor(&student).set_requires_grad(true);
            soft_label(&x, &tensor(&teacher), 2.0, divergence).backward();
            let gradient = Vec::<Vec<f32>>::try_from(x.grad()).unwrap();
            for (i, j) in [(0, 0), (0, 2), (1, 1)] {
                let at = |change: f64| {
                    let mut moved = student.clone();
                    moved[i][j] += change;
                    naive_soft_label(&moved, &teacher, 2.0, divergence)
                };
                let expected = (at(1e-5) - at(-1e-5)) / 2e-5;
                let found = f64::from(gradient[i][j]);
                prop_assert!((found - expected).abs() < 1e-3, "{divergence:?}: {found} is not {expected}");
            }
        }
    }
}

#[test]
fn all_terms_compute_in_fp32() {
    let half = Tensor::rand([2, 3, 4], (Kind::BFloat16, Device::Cpu));
    assert_eq!(hidden_state(&half, &half, None, HiddenStateLoss::MSE).kind(), Kind::Float);
    let logits = half.select(1, 0);
    assert_eq!(soft_label(&logits, &logits, 1.0, Divergence::ForwardKL).kind(), Kind::Float);
    assert_eq!(contrastive(&logits, &logits, 0.1).kind(), Kind::Float);
}
