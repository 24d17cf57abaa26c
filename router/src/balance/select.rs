//! Which revision and which endpoint take a request: pure functions of a snapshot, the request's hash and random numbers.

use std::{sync::Arc, time::Instant};

use rand::Rng;

use super::endpoints::{Endpoint, Revision, Snapshot};

/// Who may answer a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A revision by weight, chosen by this uniform hash; if it has no endpoint, another one.
    Weighted(u64),
    /// This revision alone, whatever its weight.
    Pinned(String),
}

impl Target {
    /// Whether chance decides. The analysis of a canary counts these requests alone: others may be chosen to make one
    /// revision look bad or good.
    pub fn is_by_weight(&self) -> bool {
        matches!(self, Self::Weighted(_))
    }
}

/// Indices of the revisions that may answer: the chosen one, then the others, heaviest first. One without weight, such as
/// the champion beside a candidate that has all of the traffic, comes last: its answer is better than none. Empty when no
/// revision has weight.
pub fn order(weights: &[u32], hash: u64) -> Vec<usize> {
    let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
    if total == 0 {
        return Vec::new();
    }
    let mut point = hash % total;
    let mut chosen = 0;
    for (index, &weight) in weights.iter().enumerate() {
        if point < u64::from(weight) {
            chosen = index;
            break;
        }
        point -= u64::from(weight);
    }
    let mut others: Vec<usize> = (0..weights.len()).filter(|&index| index != chosen).collect();
    others.sort_by_key(|&index| std::cmp::Reverse(weights[index]));
    others.insert(0, chosen);
    others
}

/// The revisions a target allows, in the order to try them.
pub fn revisions<'a>(snapshot: &'a Snapshot, target: &Target) -> Vec<&'a Revision> {
    match target {
        Target::Pinned(name) => snapshot.revision(name).into_iter().collect(),
        Target::Weighted(hash) => {
            let weights: Vec<u32> = snapshot.revisions.iter().map(|revision| revision.weight).collect();
            order(&weights, *hash).into_iter().map(|index| &snapshot.revisions[index]).collect()
        }
    }
}

/// The less loaded of two random endpoints that are neither avoided nor in `tried`; one that drains only when no other is left.
pub fn endpoint(
    endpoints: &[Arc<Endpoint>],
    usable: impl Fn(&Endpoint) -> bool,
    tried: &[Arc<Endpoint>],
    now: Instant,
    random: &mut impl Rng,
) -> Option<Arc<Endpoint>> {
    let free: Vec<&Arc<Endpoint>> = endpoints
        .iter()
        .filter(|endpoint| usable(endpoint) && endpoint.avoided_until(now).is_none())
        .filter(|endpoint| !tried.iter().any(|tried| Arc::ptr_eq(tried, endpoint)))
        .collect();
    let serving: Vec<&Arc<Endpoint>> = free.iter().copied().filter(|endpoint| !endpoint.draining()).collect();
    let candidates = if serving.is_empty() { free } else { serving };
    let first = random.random_range(0..candidates.len().max(1));
    let mut second = random.random_range(0..candidates.len().saturating_sub(1).max(1));
    if second >= first {
        second += 1;
    }
    let first = *candidates.get(first)?;
    match candidates.get(second) {
        Some(second) if second.outstanding() < first.outstanding() => Some((*second).clone()),
        _ => Some(first.clone()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::{SeedableRng, rngs::StdRng};

    use super::*;
    use crate::{balance::endpoints::Address, record::request_id::RequestIds};

    #[test]
    fn the_order_follows_weights() {
        for (weights, hash, expected) in [
            (&[100][..], 7, &[0][..]),
            (&[90, 10], 0, &[0, 1]),
            (&[90, 10], 89, &[0, 1]),
            (&[90, 10], 90, &[1, 0]),
            (&[0, 100], 0, &[1, 0]),
            (&[20, 0, 50, 30], 19, &[0, 2, 3, 1]),
            (&[0, 0], 5, &[]),
            (&[], 5, &[]),
        ] {
            assert_eq!(order(weights, hash), expected, "{weights:?} {hash}");
        }
    }

    #[test]
    fn ids_spread_over_revisions_by_weight() {
        let ids = RequestIds::random();
        let canary = (0..20_000).filter(|_| order(&[90, 10], ids.generate().hash)[0] == 1).count();
        // Six standard deviations around 2,000.
        assert!((1_745..2_255).contains(&canary), "{canary}");
    }

    fn endpoint_at(port: u16, draining: bool) -> Arc<Endpoint> {
        Arc::new(Endpoint::new(Address { http: ([127, 0, 0, 1], port).into(), grpc: None, draining }))
    }

    #[test]
    fn the_less_loaded_of_two_wins_and_bad_ones_are_left_out() {
        let mut random = StdRng::seed_from_u64(1);
        let now = Instant::now();
        let endpoints = [endpoint_at(1, false), endpoint_at(2, false), endpoint_at(3, true)];
        let mut pick = |tried: &[Arc<Endpoint>], now| {
            endpoint(&endpoints, |_| true, tried, now, &mut random).map(|endpoint| endpoint.http.port())
        };
        let load = endpoints[0].begin();
        for _ in 0..20 {
            assert_eq!(pick(&[], now), Some(2));
        }
        drop(load);
        assert_eq!(pick(&[endpoints[1].clone()], now), Some(1));
        endpoints[0].avoid(now, Duration::from_secs(1));
        assert_eq!(pick(&[endpoints[1].clone()], now), Some(3), "one that drains is better than none");
        endpoints[1].avoid(now, Duration::from_secs(1));
        endpoints[2].avoid(now, Duration::from_secs(1));
        assert_eq!(pick(&[], now), None);
        let later = now + Duration::from_millis(1_100);
        assert_eq!(pick(&[endpoints[0].clone()], later), Some(2));
    }
}
