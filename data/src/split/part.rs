//! The parts of a dataset.

use athanor_contract::train::HeldOutPart;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Train,
    Validation,
    Test,
}

impl From<HeldOutPart> for Part {
    fn from(part: HeldOutPart) -> Self {
        match part {
            HeldOutPart::Validation => Self::Validation,
            HeldOutPart::Test => Self::Test,
        }
    }
}
