//! Which waiting inputs share a batch: pure arithmetic over lengths.
//!
//! Where inputs of one batch are padded to its longest, a batch costs `inputs * longest` tokens plus a fixed price for the call. After
//! sorting by length an optimal grouping is a cut into runs, which dynamic programming finds. Without padding the fewest batches
//! are best, in the order in which the inputs came.

/// Tokens of a batch without padding: more would not be computed faster, and every answer of a batch waits for the whole of it.
const PACKED_TOKENS: usize = 1024;

/// Bounds of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    pub inputs: usize,
    /// Tokens, padding included. A single input longer than this is still a batch of its own.
    pub tokens: usize,
    /// What a call costs besides its tokens, in tokens: high on a GPU, low on a CPU. `None`: inputs are not padded.
    pub call_cost: Option<usize>,
}

/// Cuts inputs of these `lengths` into batches (indices into `lengths`). Every index appears exactly once.
pub fn plan(lengths: &[usize], limits: BatchLimits) -> Vec<Vec<usize>> {
    match limits.call_cost {
        Some(call_cost) => plan_padded(lengths, limits, call_cost),
        None => plan_packed(lengths, limits),
    }
}

/// Batches in the order of the inputs, each as large as the limits allow.
fn plan_packed(lengths: &[usize], limits: BatchLimits) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let most = limits.tokens.min(PACKED_TOKENS);
    let mut tokens = 0usize;
    for (index, &length) in lengths.iter().enumerate() {
        tokens = tokens.saturating_add(length);
        match batches.last_mut() {
            Some(batch) if batch.len() < limits.inputs && tokens <= most => batch.push(index),
            _ => {
                batches.push(vec![index]);
                tokens = length;
            }
        }
    }
    batches
}

/// Batches with the least padded tokens and calls, shortest first.
fn plan_padded(lengths: &[usize], limits: BatchLimits, call_cost: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    // Stable, so that inputs of one length keep the order they came in.
    order.sort_by_key(|&index| lengths[index]);
    // cost[end]: the least cost of the first `end` inputs; start[end]: where the last batch of that cut begins.
    let mut cost = vec![0usize; order.len() + 1];
    let mut start = vec![0usize; order.len() + 1];
    for end in 1..=order.len() {
        let longest = lengths[order[end - 1]];
        let fits = limits.tokens.checked_div(longest).unwrap_or(limits.inputs).clamp(1, limits.inputs.max(1));
        let best = (end.saturating_sub(fits)..end)
            .map(|begin| {
                (cost[begin].saturating_add((end - begin).saturating_mul(longest)).saturating_add(call_cost), begin)
            })
            .min()
            .unwrap_or_default();
        (cost[end], start[end]) = best;
    }
    let mut batches = Vec::new();
    let mut end = order.len();
    while end > 0 {
        batches.push(order[start[end]..end].to_vec());
        end = start[end];
    }
    batches.reverse();
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL_COST: usize = 10;
    const LIMITS: BatchLimits = BatchLimits { inputs: 4, tokens: 100, call_cost: Some(CALL_COST) };

    #[test]
    fn cuts_by_length_and_limits() {
        let cases: &[(&[usize], &[&[usize]])] = &[
            (&[], &[]),
            (&[7], &[&[0]]),
            // One batch, although padded: a second call would cost more.
            (&[5, 6, 5], &[&[0, 2, 1]]),
            // The long one would pad three short ones: a batch of its own.
            (&[5, 90, 5, 5], &[&[0, 2, 3], &[1]]),
            // At most four inputs.
            (&[5, 5, 5, 5, 5], &[&[0], &[1, 2, 3, 4]]),
            // At most 100 tokens: two of 50 each.
            (&[50, 50, 50, 50], &[&[0, 1], &[2, 3]]),
            // Longer than the limit of tokens: alone.
            (&[500, 5], &[&[1], &[0]]),
        ];
        for (lengths, expected) in cases {
            assert_eq!(&plan(lengths, LIMITS), expected, "{lengths:?}");
        }
    }

    #[test]
    fn without_padding_batches_are_as_large_as_the_limits_allow() {
        let cases: &[(&[usize], &[&[usize]])] = &[
            (&[], &[]),
            // Lengths differ, and a second call would gain nothing.
            (&[5, 90, 2, 3], &[&[0, 1, 2, 3]]),
            // At most four inputs.
            (&[5, 5, 5, 5, 5], &[&[0, 1, 2, 3], &[4]]),
            // At most 100 tokens.
            (&[50, 50, 1, 99], &[&[0, 1], &[2, 3]]),
            // Longer than the limit of tokens: alone.
            (&[5, 500, 5], &[&[0], &[1], &[2]]),
        ];
        for (lengths, expected) in cases {
            assert_eq!(&plan(lengths, BatchLimits { call_cost: None, ..LIMITS }), expected, "{lengths:?}");
        }
    }

    #[test]
    fn no_cut_is_cheaper() {
        // Against every cut of a sorted sequence: bit i of the mask says that a batch ends after input i.
        let lengths = [3, 4, 9, 10, 30, 31, 31, 60];
        let price = |batches: &[Vec<usize>]| -> usize {
            batches.iter().map(|batch| batch.len() * batch.iter().map(|&i| lengths[i]).max().unwrap() + CALL_COST).sum()
        };
        let allowed = |batch: &Vec<usize>| {
            batch.len() <= LIMITS.inputs
                && (batch.len() == 1 || batch.len() * lengths[*batch.last().unwrap()] <= LIMITS.tokens)
        };
        let best = (0..1u32 << (lengths.len() - 1))
            .map(|mask| {
                let mut batches = vec![vec![0]];
                for index in 1..lengths.len() {
                    if mask & (1 << (index - 1)) != 0 {
                        batches.push(Vec::new());
                    }
                    batches.last_mut().unwrap().push(index);
                }
                batches
            })
            .filter(|batches| batches.iter().all(allowed))
            .map(|batches| price(&batches))
            .min()
            .unwrap();
        let planned = plan(&lengths, LIMITS);
        assert!(planned.iter().all(allowed), "{planned:?}");
        assert_eq!(price(&planned), best);
    }
}
