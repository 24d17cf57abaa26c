//! Rules of `compress`.

use super::{
    cel::{PRUNE_OR_QUANTIZE, SPARSITY_OR_TWO_OF_FOUR},
    rule::Found,
};
use crate::train::TrainSpec;

pub(super) fn check(spec: &TrainSpec, found: &mut Found) {
    for (index, step) in spec.compress.iter().enumerate() {
        let field = format!("compress[{index}]");
        found.require(step.prune.is_some() != step.quantize.is_some(), &field, &PRUNE_OR_QUANTIZE);
        let Some(prune) = &step.prune else { continue };
        let holds = prune.sparsity_percent.is_some() != prune.two_of_four;
        found.require(holds, format!("{field}.prune"), &SPARSITY_OR_TWO_OF_FOUR);
        if spec.compress[..index].iter().any(|earlier| earlier.quantize.is_some()) {
            found.add(field, "prune must come before quantize, which fixes the weights");
        }
    }
}
