//! A linear classifier on fixed vectors: multinomial logistic regression with a small L2 penalty, by full-batch Adam.

use tch::{Device, Kind, Tensor};

use crate::data::batches::mix;

const STEPS: usize = 200;
const LEARNING_RATE: f64 = 0.1;
const L2: f64 = 1e-4;
/// Unit vectors are small numbers in hundreds of places: this brings a logit's inputs to about one.
const SCALE: f64 = 10.0;

/// Probabilities [rows, L] of each row, by a classifier that was fitted to the other half of the rows. Rows without a
/// label are asked about, and not learned from.
pub fn held_out_probabilities(vectors: &Tensor, labels: &[Option<usize>], classes: usize, seed: u64) -> Tensor {
    let rows = labels.len();
    let half = |row: usize| mix(mix(seed, 0x70_726f_6265), row as u64) & 1 == 0;
    let probabilities = Tensor::zeros([rows as i64, classes as i64], (Kind::Float, Device::Cpu));
    for asked in [true, false] {
        let pick = |which: &dyn Fn(usize) -> bool| -> Vec<i64> {
            (0..rows).filter(|&row| which(row)).map(|row| row as i64).collect()
        };
        let learned = pick(&|row| half(row) != asked && labels[row].is_some());
        let held_out = pick(&|row| half(row) == asked);
        if held_out.is_empty() {
            continue;
        }
        let targets: Vec<i64> = learned.iter().map(|&row| labels[row as usize].unwrap_or(0) as i64).collect();
        let x = vectors.index_select(0, &Tensor::from_slice(&learned)) * SCALE;
        let weight = fit(&x, &Tensor::from_slice(&targets), classes);
        let held_out = Tensor::from_slice(&held_out);
        let logits = with_ones(&(vectors.index_select(0, &held_out) * SCALE)).matmul(&weight);
        let _ = probabilities.shallow_clone().index_copy_(0, &held_out, &logits.softmax(-1, Kind::Float));
    }
    probabilities
}

fn with_ones(x: &Tensor) -> Tensor {
    Tensor::cat(&[x.shallow_clone(), Tensor::ones([x.size()[0], 1], (Kind::Float, x.device()))], 1)
}

/// Weights [C + 1, L], the last row the bias.
fn fit(x: &Tensor, targets: &Tensor, classes: usize) -> Tensor {
    let x = with_ones(x);
    let (rows, width) = (x.size()[0], x.size()[1]);
    let wanted = targets.one_hot(classes as i64).to_kind(Kind::Float);
    let mut weight = Tensor::zeros([width, classes as i64], (Kind::Float, x.device()));
    let (mut first, mut second) = (weight.zeros_like(), weight.zeros_like());
    for step in 1..=STEPS {
        let error = x.matmul(&weight).softmax(-1, Kind::Float) - &wanted;
        let gradient = x.tr().matmul(&error) / rows.max(1) as f64 + &weight * L2;
        first = first * 0.9 + &gradient * 0.1;
        second = second * 0.999 + gradient.square() * 0.001;
        let (mean, square) = (1.0 - 0.9_f64.powi(step as i32), 1.0 - 0.999_f64.powi(step as i32));
        weight -= (&first / mean) / ((&second / square).sqrt() + 1e-8) * LEARNING_RATE;
    }
    weight
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_learns_what_is_linear_and_asks_about_the_other_half() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tch::manual_seed(1);
        let x = Tensor::randn([600, 6], (Kind::Float, Device::Cpu));
        let x = &x / x.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt();
        let truth: Vec<Option<usize>> = Vec::<f32>::try_from(x.select(1, 0))
            .unwrap()
            .into_iter()
            .map(|value| Some(usize::from(value > 0.0)))
            .collect();
        let p = held_out_probabilities(&x, &truth, 2, 0);
        let found = Vec::<i64>::try_from(p.argmax(1, false)).unwrap();
        let right = found.iter().zip(&truth).filter(|(found, truth)| Some(**found as usize) == **truth).count();
        assert!(right > 570, "{right} of 600");
        // A row's own label does not change what is said about it.
        let mut other = truth.clone();
        other[0] = other[0].map(|label| 1 - label);
        let q = held_out_probabilities(&x, &other, 2, 0);
        assert_eq!(p.get(0), q.get(0));
        assert_ne!(p, q);
    }
}
