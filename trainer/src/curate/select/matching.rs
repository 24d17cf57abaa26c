//! Rows whose gradients add up to those of all rows: GRAD-MATCH (Killamsetty et al. 2021,
//! <https://arxiv.org/abs/2103.00123>) on the last layer's gradients of one label's rows.

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use tch::{Kind, Tensor};

use crate::data::batches::mix;

/// Rows that are chosen of a group: with more of them than the gradients have numbers, everything would be matched
/// exactly.
const MOST_OF_A_GROUP: usize = 128;
/// Keeps the small systems of equations solvable.
const RIDGE: f64 = 1e-3;

/// The gradient of each row's cross entropy with respect to the logits' weights of its own label, [rows, C]: (p - 1) x.
pub fn gradients(vectors: &Tensor, probabilities: &Tensor, class: usize) -> Tensor {
    (probabilities.select(1, class as i64) - 1.0).unsqueeze(1) * vectors
}

/// Places of `count` rows by orthogonal matching pursuit. The rows are dealt into groups by chance, and of each group
/// its share is chosen so that their sum comes nearest to the group's mean gradient: what is chosen of one group does
/// not have to make up for the others, so that rows of every kind are. Rows are matched by the direction of their
/// gradient alone, as a pursuit's atoms are: nothing weights them in training, and by its length the rows would win
/// that are wrong or mislabelled.
pub fn pursue(gradients: &Tensor, count: usize, seed: u64) -> Vec<usize> {
    let rows = gradients.size()[0] as usize;
    let count = count.min(rows);
    let mut order: Vec<usize> = (0..rows).collect();
    order.shuffle(&mut StdRng::seed_from_u64(mix(seed, rows as u64)));
    let groups = count.div_ceil(MOST_OF_A_GROUP);
    let mut chosen = Vec::with_capacity(count);
    for group in 0..groups {
        let share = |of: usize| of * group / groups..of * (group + 1) / groups;
        let (places, size) = (&order[share(rows)], share(count).len());
        let index: Vec<i64> = places.iter().map(|&row| row as i64).collect();
        let picked = of_group(&gradients.index_select(0, &Tensor::from_slice(&index)), size);
        chosen.extend(picked.into_iter().map(|place| places[place]));
    }
    chosen
}

/// Places of `size` rows of a group of gradients [rows, C].
fn of_group(gradients: &Tensor, size: usize) -> Vec<usize> {
    let norms = gradients.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt();
    let units = gradients / norms.clamp_min(1e-12);
    let target = gradients.mean_dim([0_i64].as_slice(), false, Kind::Float);
    let mut chosen: Vec<usize> = Vec::with_capacity(size);
    let taken = Tensor::zeros([gradients.size()[0]], (Kind::Float, gradients.device()));
    let mut residual = target.shallow_clone();
    while chosen.len() < size {
        let best = (units.mv(&residual) + &taken).argmax(0, false).int64_value(&[]);
        let _ = taken.get(best).fill_(f64::NEG_INFINITY);
        chosen.push(best as usize);
        let index: Vec<i64> = chosen.iter().map(|&row| row as i64).collect();
        let atoms = units.index_select(0, &Tensor::from_slice(&index));
        // The weights that bring the chosen rows' sum nearest to the target.
        let gram = atoms.matmul(&atoms.tr());
        let ridge = Tensor::eye(chosen.len() as i64, (Kind::Float, gram.device()))
            * (gram.diag(0).mean(Kind::Float) * RIDGE).clamp_min(1e-12);
        let right = atoms.mv(&target).unsqueeze(1);
        let weights = Tensor::linalg_solve(&(gram + ridge), &right, true).squeeze_dim(1).clamp_min(0.0);
        residual = &target - atoms.tr().mv(&weights);
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
        let chosen = pursue(&x, 12, 1);
        assert_eq!(chosen.len(), 12);
        let direction = |rows: &[usize]| Tensor::cosine_similarity(&mean(rows), &mean(&all), 0, 1e-8).double_value(&[]);
        assert!(direction(&chosen) > direction(&all[..12]), "{} {}", direction(&chosen), direction(&all[..12]));
        assert_eq!(pursue(&x, 500, 1).len(), 500, "all rows, in groups");
        let mut all = pursue(&x, 300, 1);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 300, "each once");
        assert_eq!(pursue(&x.zeros_like(), 7, 1).len(), 7, "gradients of nothing match anything alike");
        assert_eq!(pursue(&x, 0, 1).len(), 0);
    }

    #[test]
    fn long_gradients_do_not_crowd_out_the_others() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tch::manual_seed(6);
        let x = Tensor::randn([400, 16], (Kind::Float, Device::Cpu)) + 0.3;
        // Every other row is as a mislabelled one, far from its label.
        let lengths = (Tensor::arange(400, (Kind::Float, Device::Cpu)).remainder(2.0) * 0.95 + 0.05).unsqueeze(1);
        let long = pursue(&(x * lengths), 120, 1).into_iter().filter(|row| row % 2 == 1).count();
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
