//! Which part a row belongs to, decided by its text and the seed alone: a row that was held out once stays held out in every
//! retraining, whatever other rows come and go.

use athanor_contract::train::SplitSpec;
use sha2::{Digest, Sha256};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Train,
    Validation,
    Test,
}

/// Hashes seed and text to a number in [0, 100) and compares it with the percentages: test first, then validation.
pub fn part_of(text: &str, split: &SplitSpec) -> Part {
    let digest = Sha256::new().chain_update(split.seed.to_le_bytes()).chain_update(text.as_bytes()).finalize();
    let mut head = [0; 8];
    head.copy_from_slice(&digest[..8]);
    let percent = u64::from_be_bytes(head) as f64 / 2_f64.powi(64) * 100.0;
    let test = f64::from(split.test_percent);
    if percent < test {
        Part::Test
    } else if percent < test + f64::from(split.validation_percent) {
        Part::Validation
    } else {
        Part::Train
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_their_shares_and_a_larger_share_keeps_its_rows() {
        let small = SplitSpec { validation_percent: 10, test_percent: 10, seed: 0 };
        let large = SplitSpec { test_percent: 20, ..small };
        let other = SplitSpec { seed: 1, ..small };
        let texts: Vec<String> = (0..10_000).map(|i| format!("text {i}")).collect();
        let count = |split: &SplitSpec, part| texts.iter().filter(|text| part_of(text, split) == part).count();
        assert!((900..1100).contains(&count(&small, Part::Test)));
        assert!((900..1100).contains(&count(&small, Part::Validation)));
        let mut moved = 0;
        for text in &texts {
            if part_of(text, &small) == Part::Test {
                assert_eq!(part_of(text, &large), Part::Test);
                moved += usize::from(part_of(text, &other) != Part::Test);
            }
        }
        assert!(moved > 800, "another seed gives another split");
    }
}
