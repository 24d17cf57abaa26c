//! Rows whose gradients add up to those of all rows: GRAD-MATCH (Killamsetty et al. 2021, <https://arxiv.org/abs/2103.00123>) on
//! the last layer's gradients of one label's rows.

use tch::{Kind, Tensor};

/// Rows of one pursuit: with more of them than the gradients have numbers, everything would be matched exactly.
const MOST_A_ROUND: usize = 128;
/// Keeps the small systems of equations solvable.
const RIDGE: f64 = 1e-3;

/// The gradient of each row's cross entropy with respect to the logits' weights of its own label, [rows, C]: (p - 1) x.
pub fn gradients(vectors: &Tensor, probabilities: &Tensor, class: usize) -> Tensor {
    (probabilities.select(1, class as i64) - 1.0).unsqueeze(1) * vectors
}

/// Places of `count` rows by orthogonal matching pursuit of the mean gradient, in rounds: each round begins with the whole mean
/// again and takes from the rows that are left. Rows are matched by the direction of their gradient alone, as a pursuit's atoms are:
/// nothing weights them in training, and by its length the rows would win that are wrong or mislabelled.
pub fn pursue(gradients: &Tensor, count: usize) -> Vec<usize> {
    let units =
        gradients / gradients.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt().clamp_min(1e-12);
    let rows = gradients.size()[0] as usize;
    let mut taken = vec![false; rows];
    let mut chosen = Vec::with_capacity(count);
    let target = gradients.mean_dim([0_i64].as_slice(), false, Kind::Float);
    while chosen.len() < count.min(rows) {
        let size = MOST_A_ROUND.min(count - chosen.len());
        let round = round(&units, &target, size, &mut taken);
        if round.is_empty() {
            break;
        }
        chosen.extend(round);
    }
    // Gradients of nothing match anything alike: the rows left fill up in order.
    let missing = count.min(rows) - chosen.len();
    chosen.extend((0..rows).filter(|&row| !taken[row]).take(missing));
    chosen
}

fn round(units: &Tensor, target: &Tensor, size: usize, taken: &mut [bool]) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::with_capacity(size);
    let blocked: Vec<f32> = taken.iter().map(|&taken| if taken { f32::NEG_INFINITY } else { 0.0 }).collect();
    let blocked = Tensor::from_slice(&blocked);
    let mut residual = target.shallow_clone();
    for _ in 0..size {
        let fit = units.mv(&residual) + &blocked;
        let best = fit.argmax(0, false).int64_value(&[]);
        if !fit.double_value(&[best]).is_finite() {
            break;
        }
        taken[best as usize] = true;
        let _ = blocked.get(best).fill_(f64::NEG_INFINITY);
        chosen.push(best as usize);
        let index: Vec<i64> = chosen.iter().map(|&row| row as i64).collect();
        let atoms = units.index_select(0, &Tensor::from_slice(&index));
        // The weights that bring the chosen rows' sum nearest to the target.
        let gram = atoms.matmul(&atoms.tr());
        let ridge = Tensor::eye(chosen.len() as i64, (Kind::Float, gram.device()))
            * (gram.diag(0).mean(Kind::Float) * RIDGE).clamp_min(1e-12);
        let right = atoms.mv(target).unsqueeze(1);
        let weights = Tensor::linalg_solve(&(gram + ridge), &right, true).squeeze_dim(1).clamp_min(0.0);
        residual = target - atoms.tr().mv(&weights);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn a_pursuit_comes_nearer_than_chance() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tch::manual_seed(5);
        let x = Tensor::randn([500, 16], (Kind::Float, Device::Cpu)) + 0.3;
        let mean = |rows: &[usize]| {
            let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            x.index_select(0, &Tensor::from_slice(&index)).mean_dim([0_i64].as_slice(), false, Kind::Float)
        };
        let all: Vec<usize> = (0..500).collect();
        let chosen = pursue(&x, 12);
        assert_eq!(chosen.len(), 12);
        let direction = |rows: &[usize]| Tensor::cosine_similarity(&mean(rows), &mean(&all), 0, 1e-8).double_value(&[]);
        assert!(direction(&chosen) > direction(&all[..12]), "{} {}", direction(&chosen), direction(&all[..12]));
        assert_eq!(pursue(&x, 500).len(), 500, "all rows, in rounds");
        assert_eq!(pursue(&x.zeros_like(), 7).len(), 7);
    }

    #[test]
    fn long_gradients_do_not_crowd_out_the_others() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tch::manual_seed(6);
        let x = Tensor::randn([400, 16], (Kind::Float, Device::Cpu)) + 0.3;
        // Every other row is as a mislabelled one, far from its label.
        let lengths = (Tensor::arange(400, (Kind::Float, Device::Cpu)).remainder(2.0) * 0.95 + 0.05).unsqueeze(1);
        let long = pursue(&(x * lengths), 120).into_iter().filter(|row| row % 2 == 1).count();
        assert!((30..=90).contains(&long), "{long} of 120");
    }

    #[test]
    fn a_gradient_is_that_of_autograd() {
        let x = Tensor::from_slice(&[0.5_f32, -1.0, 2.0, 1.0, 0.25, -0.5]).view([2, 3]);
        let weight = Tensor::from_slice(&[0.1_f32, 0.2, -0.3, 0.4, 0.0, 0.5]).view([3, 2]).set_requires_grad(true);
        let logits = x.matmul(&weight);
        let p = logits.softmax(-1, Kind::Float).detach();
        let found = gradients(&x, &p, 1);
        for row in 0..2 {
            let loss = x.get(row).unsqueeze(0).matmul(&weight).cross_entropy_for_logits(&Tensor::from_slice(&[1_i64]));
            let own = Tensor::run_backward(&[loss], &[&weight], false, false);
            assert!(own[0].select(1, 1).allclose(&found.get(row), 1e-5, 1e-6, false));
        }
    }
}
