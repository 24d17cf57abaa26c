//! Data distillation: which training rows are trained on, and how well they represent all.
//!
//! - `probe`: a linear classifier on fixed vectors, asked about rows it was not fitted to;
//! - `kmeans`: clusters;
//! - `matching`: orthogonal matching pursuit.
//!
//! Every method chooses within each label, as many rows as its share, so that the balance of labels stays.

mod kmeans;
mod matching;
mod probe;

use athanor_contract::train::{SelectMethod, SelectSpec, UncertaintyMeasure};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{TrainError, data::batches::mix};

/// Clusters of all rows by which coverage is measured: about one for this many rows, within bounds.
const ROWS_A_CLUSTER: usize = 50;
const MOST_CLUSTERS: usize = 200;
/// Pairs of selected rows whose distance is the diversity.
const PAIRS: usize = 2000;

/// The chosen rows, and how well they represent all.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Rows in ascending order.
    pub rows: Vec<usize>,
    pub report: SelectionReport,
}

/// How a selection compares with all rows and with as many random ones. Distances are between unit vectors: 0 to 2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SelectionReport {
    pub method: String,
    pub rows: usize,
    pub of: usize,
    /// Each label's share of all rows and of the selection.
    pub balance: Vec<Balance>,
    /// Rows that could not be chosen, because the teacher finds their label improbable.
    #[serde(default)]
    pub disputed: usize,
    pub selected: Representativeness,
    pub random: Representativeness,
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    pub label: String,
    pub before: f64,
    pub after: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Representativeness {
    /// Share of the clusters of all rows in which some row was chosen.
    pub cluster_coverage: f64,
    /// Mean distance from any row to the nearest chosen one.
    pub distance_to_all: f64,
    /// Distance between the mean of all rows and the mean of the chosen ones.
    pub distance_of_means: f64,
    /// Mean distance between two chosen rows.
    pub diversity: f64,
}

/// Vectors that the first process of a machine holds besides those of all its processes: those of a label, and their
/// gradients.
const COPIES: u64 = 2;

/// Whether the machine has memory for a selection: each of `processes` holds a vector of `width` FP32 numbers of each row,
/// and the first one as much [`COPIES`] times more. `available` bytes are free; unknown: any selection may be tried.
///
/// # Errors
/// A user error: the job has to select from fewer rows, on fewer processes, or with more memory.
pub fn check_memory(rows: usize, width: i64, processes: usize, available: Option<u64>) -> Result<(), TrainError> {
    let of_one = rows as u64 * width.unsigned_abs() * 4;
    let required = of_one.saturating_mul(processes as u64 + COPIES);
    match available {
        Some(available) if available < required => Err(TrainError::User(format!(
            "data.select: the vectors of {rows} rows, {width} numbers each, take {:.1} GiB on each node ({processes} processes \
             and {COPIES} copies of {:.1} GiB), but {:.1} GiB are available: give the pods more memory, set \
             distributed.processesPerNode lower, or select from fewer rows",
            gib(required),
            gib(of_one),
            gib(available),
        ))),
        _ => Ok(()),
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Chooses rows. `vectors` [rows, C] are unit vectors in FP32 on the CPU, `labels` the rows' classes (`None` is never
/// chosen), `agreement` the probability that the teacher gives each row's label, where that is asked for.
pub fn select(
    spec: &SelectSpec,
    vectors: &Tensor,
    labels: &[Option<usize>],
    names: &[String],
    agreement: Option<&[f32]>,
) -> Result<Selection, TrainError> {
    let mut classes = classes(labels, names.len());
    let quotas: Vec<usize> = classes.iter().map(|rows| quota(rows.len(), spec.keep_percent)).collect();
    let random = by_chance(&classes, &quotas, spec.seed as u64);
    let all: usize = classes.iter().map(Vec::len).sum();
    if let (Some(agreement), Some(minimum)) = (agreement, spec.minimum_agreement) {
        let minimum = minimum.get() as f32;
        classes.iter_mut().for_each(|rows| rows.retain(|&row| agreement[row] >= minimum));
        if let Some(class) = classes.iter().position(Vec::is_empty) {
            return Err(TrainError::User(format!(
                "data.select: the teacher gives no row of label {} the minimumAgreement of {minimum}",
                names[class]
            )));
        }
    }
    let quotas: Vec<usize> = quotas.iter().zip(&classes).map(|(&quota, rows)| quota.min(rows.len())).collect();
    let disputed = all - classes.iter().map(Vec::len).sum::<usize>();
    let mut rows = match spec.method {
        SelectMethod::Random => by_chance(&classes, &quotas, spec.seed as u64),
        SelectMethod::ClusterCenter => {
            let mut chosen = Vec::new();
            for (rows, &quota) in classes.iter().zip(&quotas) {
                chosen.extend(
                    kmeans::nearest_to_centres(&of(vectors, rows), quota, spec.seed as u64)
                        .into_iter()
                        .map(|place| rows[place]),
                );
            }
            chosen
        }
        SelectMethod::Uncertainty | SelectMethod::GradientMatching => {
            if names.len() < 2 {
                return Err(TrainError::User(format!("data.select: {:?} needs a task with labels", spec.method)));
            }
            let probabilities = probe::held_out_probabilities(vectors, labels, names.len(), spec.seed as u64);
            let mut chosen = Vec::new();
            for (class, (rows, &quota)) in classes.iter().zip(&quotas).enumerate() {
                let places = match spec.method {
                    SelectMethod::Uncertainty => most_uncertain(&of(&probabilities, rows), spec.measure, quota),
                    _ => {
                        let gradients = matching::gradients(&of(vectors, rows), &of(&probabilities, rows), class);
                        matching::pursue(&gradients, quota, spec.seed as u64)
                    }
                };
                chosen.extend(places.into_iter().map(|place| rows[place]));
            }
            chosen
        }
    };
    rows.sort_unstable();
    let report = report(spec, vectors, labels, names, &rows, &random, disputed);
    if let Some(minimum) = spec.minimum_coverage
        && report.selected.cluster_coverage < minimum.get()
    {
        return Err(TrainError::User(format!(
            "data.select: the selection covers {:.3} of the clusters of all rows, minimumCoverage is {minimum}",
            report.selected.cluster_coverage
        )));
    }
    Ok(Selection { rows, report })
}

/// How many rows a selection keeps, where the teacher does not exclude any: `quota` of each of the `count` labels.
/// `labels` are the rows' classes.
pub fn kept(labels: &[Option<usize>], count: usize, keep_percent: u8) -> usize {
    classes(labels, count).iter().map(|rows| quota(rows.len(), keep_percent)).sum()
}

/// The rows of each label; all rows together where there are no labels.
fn classes(labels: &[Option<usize>], count: usize) -> Vec<Vec<usize>> {
    let of = |class: usize| (0..labels.len()).filter(|&row| labels[row] == Some(class)).collect();
    if count == 0 { vec![(0..labels.len()).collect()] } else { (0..count).map(of).collect() }
}

/// Rows of a label that are kept: at least one.
fn quota(rows: usize, keep_percent: u8) -> usize {
    (rows * usize::from(keep_percent)).div_ceil(100).min(rows)
}

fn of(vectors: &Tensor, rows: &[usize]) -> Tensor {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    vectors.index_select(0, &Tensor::from_slice(&rows))
}

fn by_chance(classes: &[Vec<usize>], quotas: &[usize], seed: u64) -> Vec<usize> {
    let mut random = StdRng::seed_from_u64(mix(seed, 0x5e1ec7));
    let mut chosen = Vec::new();
    for (rows, &quota) in classes.iter().zip(quotas) {
        let mut rows = rows.clone();
        rows.shuffle(&mut random);
        chosen.extend(&rows[..quota]);
    }
    chosen.sort_unstable();
    chosen
}

/// Places of the `count` rows of `probabilities` [rows, L] that are least certain.
fn most_uncertain(probabilities: &Tensor, measure: UncertaintyMeasure, count: usize) -> Vec<usize> {
    let certainty = match measure {
        UncertaintyMeasure::Entropy => {
            let p = probabilities.clamp_min(1e-12);
            (&p * p.log()).sum_dim_intlist([-1_i64].as_slice(), false, Kind::Float)
        }
        UncertaintyMeasure::Margin => {
            let (highest, _) = probabilities.topk(2, -1, true, true);
            highest.select(1, 0) - highest.select(1, 1)
        }
    };
    let certainty = Vec::<f32>::try_from(certainty).unwrap_or_default();
    let mut order: Vec<usize> = (0..certainty.len()).collect();
    order.sort_by(|&a, &b| certainty[a].total_cmp(&certainty[b]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

fn report(
    spec: &SelectSpec,
    vectors: &Tensor,
    labels: &[Option<usize>],
    names: &[String],
    rows: &[usize],
    random: &[usize],
    disputed: usize,
) -> SelectionReport {
    let share = |rows: &mut dyn Iterator<Item = usize>, class: usize| {
        let (mut of_class, mut all) = (0, 0);
        for row in rows {
            all += 1;
            of_class += usize::from(labels[row] == Some(class));
        }
        of_class as f64 / f64::from(all.max(1))
    };
    let balance: Vec<Balance> = names
        .iter()
        .enumerate()
        .map(|(class, label)| Balance {
            label: label.clone(),
            before: share(&mut (0..labels.len()), class),
            after: share(&mut rows.iter().copied(), class),
        })
        .collect();
    let count = (labels.len() / ROWS_A_CLUSTER).clamp(1, MOST_CLUSTERS);
    let clusters = kmeans::assign(vectors, count, spec.seed as u64);
    let (selected, random) =
        (representativeness(vectors, &clusters, rows), representativeness(vectors, &clusters, random));
    let mut warnings = Vec::new();
    if selected.cluster_coverage + 0.05 < random.cluster_coverage {
        warnings.push(format!(
            "the selection covers {:.0} % of the clusters, as many random rows {:.0} %",
            selected.cluster_coverage * 100.0,
            random.cluster_coverage * 100.0
        ));
    }
    if selected.distance_of_means > 2.0 * random.distance_of_means.max(0.02) {
        warnings.push(format!(
            "the selection's mean is {:.3} away from that of all rows, that of as many random rows {:.3}",
            selected.distance_of_means, random.distance_of_means
        ));
    }
    for one in &balance {
        if (one.before - one.after).abs() > 0.05 {
            warnings.push(format!(
                "label {} has {:.2} of all rows and {:.2} of the selection",
                one.label, one.before, one.after
            ));
        }
    }
    let method = format!("{:?}", spec.method);
    SelectionReport { method, rows: rows.len(), of: labels.len(), balance, disputed, selected, random, warnings }
}

fn representativeness(vectors: &Tensor, clusters: &[usize], rows: &[usize]) -> Representativeness {
    let all = clusters.iter().collect::<std::collections::BTreeSet<_>>().len();
    let covered = rows.iter().map(|&row| clusters[row]).collect::<std::collections::BTreeSet<_>>().len();
    let chosen = of(vectors, rows);
    let count = vectors.size()[0];
    let mut nearest = 0.0;
    let chunk = 1024;
    for begin in (0..count).step_by(chunk as usize) {
        let part = vectors.narrow(0, begin, chunk.min(count - begin));
        let (closest, _) = part.matmul(&chosen.tr()).max_dim(1, false);
        // For unit vectors |a - b|^2 = 2 - 2 a b.
        nearest += (closest * -2.0 + 2.0).clamp_min(0).sqrt().sum(Kind::Double).double_value(&[]);
    }
    let mean = |x: &Tensor| x.mean_dim([0_i64].as_slice(), false, Kind::Float);
    let pairs = chosen.size()[0].min(PAIRS as i64);
    let some = chosen.narrow(0, 0, pairs);
    let shifted = chosen.roll([chosen.size()[0] / 2], [0]).narrow(0, 0, pairs);
    Representativeness {
        cluster_coverage: covered as f64 / all.max(1) as f64,
        distance_to_all: nearest / count.max(1) as f64,
        distance_of_means: (mean(vectors) - mean(&chosen)).norm().double_value(&[]),
        diversity: (some - shifted)
            .square()
            .sum_dim_intlist([1_i64].as_slice(), false, Kind::Float)
            .sqrt()
            .mean(Kind::Double)
            .double_value(&[]),
    }
}

#[cfg(test)]
mod tests {
    use athanor_contract::train::SelectViewer;

    use super::*;

    /// Rows of two labels in four clumps, as unit vectors: clumps 0 and 1 have label 0, the others label 1.
    fn clumps(rows: usize) -> (Tensor, Vec<Option<usize>>, Vec<usize>) {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tch::manual_seed(3);
        let which: Vec<usize> = (0..rows).map(|row| row % 4).collect();
        let centres = Tensor::eye(4, (Kind::Float, tch::Device::Cpu)).repeat([1, 2]);
        let index: Vec<i64> = which.iter().map(|&clump| clump as i64).collect();
        let noise = Tensor::randn([rows as i64, 8], (Kind::Float, tch::Device::Cpu)) * 0.1;
        let x = centres.index_select(0, &Tensor::from_slice(&index)) + noise;
        let norm = x.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt();
        (x / norm, which.iter().map(|clump| Some(clump / 2)).collect(), which)
    }

    #[test]
    fn a_selection_that_needs_more_memory_than_there_is_is_refused() {
        let gib = |count: u64| Some(count << 30);
        // 10 million vectors of 384 numbers are 14.3 GiB.
        assert!(check_memory(10_000_000, 384, 1, gib(43)).is_ok() && check_memory(10_000_000, 384, 1, None).is_ok());
        let error = check_memory(10_000_000, 384, 8, gib(64)).unwrap_err();
        assert!(matches!(error, TrainError::User(_)));
        let expected = "take 143.1 GiB on each node (8 processes and 2 copies of 14.3 GiB), but 64.0 GiB are available";
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn every_method_keeps_shares_and_is_repeatable() {
        let (vectors, labels, _) = clumps(400);
        let names = ["a".to_owned(), "b".to_owned()];
        for method in [
            SelectMethod::Random,
            SelectMethod::Uncertainty,
            SelectMethod::ClusterCenter,
            SelectMethod::GradientMatching,
        ] {
            let spec = SelectSpec {
                method,
                keep_percent: 10,
                measure: UncertaintyMeasure::Margin,
                seed: 1,
                viewer: SelectViewer::default(),
                minimum_agreement: None,
                minimum_coverage: None,
            };
            let selection = select(&spec, &vectors, &labels, &names, None).unwrap();
            assert_eq!(selection.rows.len(), 40, "{method:?}");
            assert!(selection.rows.windows(2).all(|pair| pair[0] < pair[1]), "{method:?}: each row once");
            let of_a = selection.rows.iter().filter(|&&row| labels[row] == Some(0)).count();
            assert_eq!(of_a, 20, "{method:?}");
            assert_eq!(select(&spec, &vectors, &labels, &names, None).unwrap().rows, selection.rows, "{method:?}");
            let report = &selection.report;
            assert_eq!((report.rows, report.of), (40, 400));
            assert!(report.balance.iter().all(|one| (one.before - 0.5).abs() < 0.01 && (one.after - 0.5).abs() < 0.01));
            assert!(report.selected.cluster_coverage > 0.4, "{method:?}: {report:?}");
        }
    }

    #[test]
    fn as_many_rows_are_kept_as_a_check_announces() {
        let (vectors, _, _) = clumps(400);
        // 7 rows of one label, 393 of another, none of a third: quotas are rounded up label by label.
        let labels: Vec<Option<usize>> = (0..400).map(|row| Some(usize::from(row >= 7))).collect();
        let names = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let spec: SelectSpec =
            serde_json::from_value(serde_json::json!({"method": "Random", "keepPercent": 10})).unwrap();
        assert_eq!(kept(&labels, 3, 10), 1 + 40);
        assert_eq!(select(&spec, &vectors, &labels, &names, None).unwrap().rows.len(), 41);
        assert_eq!(kept(&[None; 9], 0, 50), 5);
    }

    #[test]
    fn cluster_centres_stand_for_all_rows_better_than_chance() {
        let (vectors, labels, _) = clumps(800);
        let names = ["a".to_owned(), "b".to_owned()];
        let spec = SelectSpec {
            method: SelectMethod::ClusterCenter,
            keep_percent: 5,
            measure: UncertaintyMeasure::Entropy,
            seed: 0,
            viewer: SelectViewer::default(),
            minimum_agreement: None,
            minimum_coverage: None,
        };
        let report = select(&spec, &vectors, &labels, &names, None).unwrap().report;
        assert!(report.selected.distance_to_all < report.random.distance_to_all, "{report:?}");
        let strict = SelectSpec { minimum_coverage: athanor_contract::Decimal::new(1.01), ..spec };
        let error = select(&strict, &vectors, &labels, &names, None).unwrap_err();
        assert!(matches!(&error, TrainError::User(message) if message.contains("minimumCoverage")), "{error}");
    }

    #[test]
    fn disputed_rows_are_not_chosen() {
        let (vectors, labels, _) = clumps(400);
        let names = ["a".to_owned(), "b".to_owned()];
        let agreement: Vec<f32> = (0..400).map(|row| if row % 5 == 0 { 0.3 } else { 0.9 }).collect();
        for method in [SelectMethod::Random, SelectMethod::ClusterCenter, SelectMethod::Uncertainty] {
            let spec: SelectSpec = serde_json::from_value(serde_json::json!({
                "method": method, "keepPercent": 70, "minimumAgreement": "0.5"
            }))
            .unwrap();
            let found = select(&spec, &vectors, &labels, &names, Some(&agreement)).unwrap();
            assert_eq!((found.rows.len(), found.report.disputed), (280, 80), "{method:?}: as many rows as without");
            assert!(found.rows.iter().all(|row| row % 5 != 0), "{method:?}");
            let most = SelectSpec { keep_percent: 95, ..spec.clone() };
            let found = select(&most, &vectors, &labels, &names, Some(&agreement)).unwrap();
            assert_eq!(found.rows.len(), 320, "no more than there are");
            let error = select(&spec, &vectors, &labels, &names, Some(&[0.1; 400])).unwrap_err();
            assert!(error.to_string().contains("no row of label a the minimumAgreement of 0.5"), "{error}");
        }
    }

    #[test]
    fn the_least_certain_rows_come_first() {
        let p = Tensor::from_slice(&[0.9_f32, 0.1, 0.5, 0.5, 0.6, 0.4, 0.99, 0.01]).view([4, 2]);
        for measure in [UncertaintyMeasure::Entropy, UncertaintyMeasure::Margin] {
            assert_eq!(most_uncertain(&p, measure, 2), [1, 2]);
        }
    }
}
