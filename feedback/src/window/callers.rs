//! How much of the counted feedback came from which caller.

use std::collections::BTreeMap;

/// Counts feedback by caller, and refuses what would be more than a caller's share.
#[derive(Clone, Debug)]
pub(super) struct Callers {
    percent: u64,
    /// Number of all feedback by which a verdict is possible: a caller may give its share of it before the others have given any.
    minimum: u64,
    all: u64,
    by_name: BTreeMap<String, u64>,
}

impl Callers {
    /// One caller may give at most `percent` of all counted feedback and one more, once there are `minimum`.
    pub fn new(percent: u32, minimum: u32) -> Self {
        Self { percent: percent.into(), minimum: minimum.into(), all: 0, by_name: BTreeMap::new() }
    }

    /// Whether one more feedback of the caller may count; if so, it is counted. Feedback without a caller always may.
    pub fn may_count(&mut self, caller: Option<&str>) -> bool {
        if let Some(caller) = caller {
            let own = self.by_name.get(caller).copied().unwrap_or(0) + 1;
            // One more than the share, or callers that have exactly theirs would keep each other from going on.
            if (own - 1) * 100 > self.percent * (self.all + 1).max(self.minimum) {
                return false;
            }
            self.by_name.insert(caller.to_owned(), own);
        }
        self.all += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counted feedback of callers that send in turns as often as their numbers say.
    fn counted(percent: u32, callers: &[(&str, u32)]) -> Vec<u32> {
        let mut share = Callers::new(percent, 20);
        let mut counted = vec![0; callers.len()];
        for _ in 0..1_000 {
            for (at, (name, times)) in callers.iter().enumerate() {
                counted[at] += (0..*times).filter(|_| share.may_count(Some(name))).count() as u32;
            }
        }
        counted
    }

    #[test]
    fn no_caller_has_more_than_its_share() {
        assert_eq!(counted(100, &[("a", 1)]), [1_000]);
        // Alone a caller gives its share of the least number, and no verdict.
        assert_eq!(counted(50, &[("a", 1)]), [11]);
        let flooded = counted(25, &[("hostile", 50), ("a", 1), ("b", 1), ("c", 1)]);
        assert!((flooded[0] - 2) * 4 <= flooded.iter().sum::<u32>() && flooded[1] > 900, "{flooded:?}");
        let equal = counted(25, &[("a", 1), ("b", 1), ("c", 1), ("d", 1)]);
        assert_eq!(equal, [1_000; 4]);
        let mut open = Callers::new(25, 20);
        assert!((0..100).all(|_| open.may_count(None)));
    }
}
