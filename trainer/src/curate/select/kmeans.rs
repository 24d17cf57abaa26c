//! k-means by Lloyd's iterations on rows in RAM (FP32, CPU), begun at random rows of a seed.

use rand::{SeedableRng, rngs::StdRng, seq::index::sample};
use tch::{Kind, Tensor};

use crate::data::batches::mix;

const ITERATIONS: usize = 15;
/// Rows whose distances are in RAM at once.
const CHUNK: i64 = 2048;

/// Centres [k, C] and the cluster of each row.
fn cluster(x: &Tensor, k: usize, seed: u64) -> (Tensor, Tensor) {
    let rows = x.size()[0] as usize;
    let k = k.clamp(1, rows.max(1));
    let mut random = StdRng::seed_from_u64(mix(seed, k as u64));
    let begin: Vec<i64> = sample(&mut random, rows, k).into_iter().map(|row| row as i64).collect();
    let mut centres = x.index_select(0, &Tensor::from_slice(&begin));
    let mut clusters = nearest(x, &centres);
    for _ in 0..ITERATIONS {
        let sums = Tensor::zeros_like(&centres).index_add(0, &clusters, x);
        let counts = Tensor::zeros([k as i64], (Kind::Float, x.device())).index_add(
            0,
            &clusters,
            &Tensor::ones([rows as i64], (Kind::Float, x.device())),
        );
        // A cluster that lost all rows keeps its centre.
        let is_empty = counts.eq(0.0).unsqueeze(1);
        centres = (sums / counts.clamp_min(1.0).unsqueeze(1)).where_self(&is_empty.logical_not(), &centres);
        let next = nearest(x, &centres);
        if next == clusters {
            break;
        }
        clusters = next;
    }
    (centres, clusters)
}

/// Index of the nearest centre of each row, [rows] (i64).
fn nearest(x: &Tensor, centres: &Tensor) -> Tensor {
    let norms = centres.square().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
    let rows = x.size()[0];
    let parts: Vec<Tensor> = (0..rows)
        .step_by(CHUNK as usize)
        .map(|begin| {
            let part = x.narrow(0, begin, CHUNK.min(rows - begin));
            // |x - c|^2 without |x|^2, which is the same for all centres.
            (&norms - part.matmul(&centres.tr()) * 2.0).argmin(1, false)
        })
        .collect();
    Tensor::cat(&parts, 0)
}

/// The cluster of each row.
pub fn assign(x: &Tensor, k: usize, seed: u64) -> Vec<usize> {
    let clusters = Vec::<i64>::try_from(cluster(x, k, seed).1).unwrap_or_default();
    clusters.into_iter().map(|cluster| cluster as usize).collect()
}

/// `k` rows, each the nearest to the centre of its cluster; clusters without rows give theirs to the rows farthest from
/// a centre.
pub fn nearest_to_centres(x: &Tensor, k: usize, seed: u64) -> Vec<usize> {
    if k == 0 {
        return Vec::new();
    }
    let (centres, clusters) = cluster(x, k, seed);
    let own = centres.index_select(0, &clusters);
    let distances = (x - own).square().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
    let distances = Vec::<f32>::try_from(distances).unwrap_or_default();
    let clusters = Vec::<i64>::try_from(clusters).unwrap_or_default();
    let mut order: Vec<usize> = (0..distances.len()).collect();
    order.sort_by(|&a, &b| distances[a].total_cmp(&distances[b]).then(a.cmp(&b)));
    let mut taken = vec![false; k];
    let (mut chosen, mut others) = (Vec::with_capacity(k), Vec::new());
    for row in order {
        let cluster = clusters[row] as usize;
        if std::mem::replace(&mut taken[cluster], true) { others.push(row) } else { chosen.push(row) }
    }
    let missing = k.saturating_sub(chosen.len());
    chosen.extend(others.into_iter().rev().take(missing));
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clumps_are_found() {
        let values: Vec<f32> = (0..60).flat_map(|i| [(i % 3) as f32 * 10.0 + (i as f32) * 0.001, 1.0]).collect();
        let x = Tensor::from_slice(&values).view([60, 2]);
        let found = (0..20).map(|seed| assign(&x, 3, seed)).find(|clusters| clusters[0] != clusters[1]).unwrap();
        let together = |a: usize, b: usize| found[a] == found[b];
        assert!((3..60).all(|row| together(row, row % 3)), "{found:?}");
        let centres = nearest_to_centres(&x, 3, 0);
        assert_eq!(centres.len(), 3);
        assert_eq!(nearest_to_centres(&x, 60, 0).len(), 60, "as many clusters as rows");
        assert!(nearest_to_centres(&x, 0, 0).is_empty());
    }
}
