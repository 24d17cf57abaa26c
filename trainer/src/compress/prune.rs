//! Weights to zero: the smallest, by magnitude or by their part in the layer's output.

use std::collections::BTreeMap;

use athanor_contract::train::{PruneMethod, PruneSpec};
use tch::{Kind, Tensor};

/// Sets weights of the matrices [outputs, inputs] to zero, in place. `norms` are those of the matrices' inputs, for
/// Wanda.
pub fn prune(matrices: &[(String, Tensor)], spec: &PruneSpec, norms: &BTreeMap<String, Tensor>) {
    tch::no_grad(|| {
        for (name, weight) in matrices {
            let importance = match (spec.method, norms.get(name)) {
                (PruneMethod::Wanda, Some(norm)) => weight.abs() * norm.unsqueeze(0),
                _ => weight.abs(),
            };
            let keep = match spec.sparsity_percent {
                Some(percent) if !spec.two_of_four => largest(&importance, percent, spec.method),
                _ => two_of_four(&importance),
            };
            let _ = weight.shallow_clone().masked_fill_(&keep.logical_not(), 0.0);
        }
    });
}

/// True for the weights that stay. Wanda compares those of one output, magnitude those of the whole matrix.
fn largest(importance: &Tensor, percent: u8, method: PruneMethod) -> Tensor {
    let (rows, columns) = (importance.size()[0], importance.size()[1]);
    let compared = match method {
        PruneMethod::Wanda => importance.shallow_clone(),
        PruneMethod::Magnitude => importance.reshape([1, -1]),
    };
    let kept = compared.size()[1] - compared.size()[1] * i64::from(percent) / 100;
    let (_, places) = compared.topk(kept, 1, true, false);
    let keep = Tensor::zeros(compared.size(), (Kind::Bool, compared.device()));
    keep.scatter_value(1, &places, 1).reshape([rows, columns])
}

/// True for the two largest of each four neighbours of a row; what is left over at a row's end stays.
fn two_of_four(importance: &Tensor) -> Tensor {
    let (rows, columns) = (importance.size()[0], importance.size()[1]);
    let whole = columns / 4 * 4;
    let groups = importance.narrow(1, 0, whole).reshape([-1, 4]);
    let (_, places) = groups.topk(2, 1, true, false);
    let keep = Tensor::zeros(groups.size(), (Kind::Bool, groups.device())).scatter_value(1, &places, 1);
    let rest = Tensor::ones([rows, columns - whole], (Kind::Bool, groups.device()));
    Tensor::cat(&[keep.reshape([rows, whole]), rest], 1)
}

/// Share of zeros among the weights of some matrices.
pub fn sparsity(matrices: &[(String, Tensor)]) -> f64 {
    let (mut zeros, mut all) = (0, 0);
    for (_, weight) in matrices {
        zeros += weight.eq(0.0).sum(Kind::Int64).int64_value(&[]);
        all += weight.numel() as i64;
    }
    zeros as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pruned(method: PruneMethod, percent: Option<u8>, norms: &[f32]) -> Vec<Vec<f32>> {
        let weight = Tensor::from_slice(&[1.0_f32, -2.0, 3.0, -4.0, 0.5, 6.0, -0.1, 8.0]).view([2, 4]);
        let named = [("w".to_owned(), weight.shallow_clone())];
        let spec = PruneSpec { method, sparsity_percent: percent, two_of_four: percent.is_none() };
        prune(&named, &spec, &[("w".to_owned(), Tensor::from_slice(norms))].into());
        Vec::<Vec<f32>>::try_from(weight).unwrap()
    }

    #[test]
    fn the_smallest_go() {
        let ones = [1.0; 4];
        let expected = [vec![0.0, 0.0, 3.0, -4.0], vec![0.0, 6.0, 0.0, 8.0]];
        assert_eq!(pruned(PruneMethod::Magnitude, Some(50), &ones), expected);
        assert_eq!(pruned(PruneMethod::Magnitude, None, &ones), expected, "two of four");
        // By the whole matrix: six of eight.
        assert_eq!(
            pruned(PruneMethod::Magnitude, Some(75), &ones),
            [vec![0.0, 0.0, 0.0, 0.0], vec![0.0, 6.0, 0.0, 8.0]]
        );
        // By row, and an input that is often large keeps its small weight.
        assert_eq!(
            pruned(PruneMethod::Wanda, Some(50), &[100.0, 1.0, 1.0, 1.0]),
            [vec![1.0, 0.0, 0.0, -4.0], vec![0.5, 0.0, 0.0, 8.0]]
        );
    }

    #[test]
    fn sparsity_counts_zeros() {
        let named = [("w".to_owned(), Tensor::from_slice(&[0.0_f32, 1.0, 0.0, 2.0]).view([2, 2]))];
        assert_eq!(sparsity(&named), 0.5);
    }
}
