//! Hidden states to the vocabulary, and the cross entropy of next tokens without the logits of all tokens at once.

use athanor_torch::Error;
use tch::{Kind, Tensor};

/// Rows of logits that training and evaluation compute at a time: of a vocabulary of 150,000 tokens they take 300 MB.
pub const LOGIT_ROWS: i64 = 512;

/// Sum of the cross entropies of some tokens.
pub struct NextTokenLoss {
    /// Sum over the target tokens, FP32, with its gradient.
    pub sum: Tensor,
    /// Tokens with a target.
    pub targets: i64,
    /// Targets that have the highest logit.
    pub correct: i64,
}

/// Hidden states [N, C] and a head [V, C] to logits [N, V] in FP32.
pub fn logits(hidden: &Tensor, head: &Tensor) -> Tensor {
    hidden.linear(head, None::<&Tensor>).to_kind(Kind::Float)
}

/// Cross entropy of the head's predictions over the vocabulary, summed over the targets. `hidden` [N, C] are the states that
/// predict `targets` [N] (ids; a negative one is left out). `chunk` rows of logits exist at a time; the gradients with respect to
/// the hidden states and the head are computed with them, so that no pass over the vocabulary is repeated for the gradient.
///
/// # Errors
/// libtorch has no memory for a chunk.
pub fn next_token_loss(hidden: &Tensor, head: &Tensor, targets: &Tensor, chunk: i64) -> Result<NextTokenLoss, Error> {
    let rows = targets.f_ge(0)?.f_nonzero()?.f_view([-1])?;
    let count = rows.size()[0];
    let targets = targets.f_index_select(0, &rows)?;
    let used = hidden.f_index_select(0, &rows)?;
    // A view has a gradient only where gradients are computed, which they are not when a model is measured.
    let (needs_states, needs_head) = (used.requires_grad(), head.f_narrow(0, 0, 1)?.requires_grad());
    let (states, table) = (used.detach(), head.detach());
    let zero = || Tensor::zeros([], (Kind::Float, hidden.device()));
    let (mut sum, mut correct) = (zero(), 0);
    let mut state_gradients = Vec::new();
    let mut head_gradient = needs_head.then(|| Tensor::zeros(head.size(), (Kind::Float, head.device())));
    let mut at = 0;
    while at < count {
        let length = chunk.min(count - at);
        let (x, y) = (states.f_narrow(0, at, length)?, targets.f_narrow(0, at, length)?.f_unsqueeze(1)?);
        let product = x.f_linear(&table, None::<&Tensor>)?;
        let kind = product.kind();
        let logits = product.f_to_kind(Kind::Float)?;
        correct += logits.f_argmax(-1, true)?.f_eq_tensor(&y)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        let log_probabilities = logits.f_log_softmax(-1, Kind::Float)?;
        sum = sum.f_sub(&log_probabilities.f_gather(1, &y, false)?.f_sum(Kind::Float)?)?;
        if needs_states || needs_head {
            // The gradient of a row's loss: its probabilities, less one for the target.
            let ones = Tensor::f_ones([length, 1], (Kind::Float, hidden.device()))?;
            let gradient = log_probabilities.f_exp()?.f_scatter_add(1, &y, &ones.f_neg()?)?.f_to_kind(kind)?;
            if needs_states {
                state_gradients.push(gradient.f_matmul(&table.f_to_kind(kind)?)?.f_to_kind(states.kind())?);
            }
            if let Some(total) = &mut head_gradient {
                let part = gradient.f_tr()?.f_matmul(&x.f_to_kind(kind)?)?;
                *total = total.f_add(&part.f_to_kind(Kind::Float)?)?;
            }
        }
        at += length;
    }
    // A value whose gradients are those computed above: the products less themselves add nothing to the sum.
    if needs_states && count > 0 {
        let gradients = Tensor::f_cat(&state_gradients, 0)?;
        sum = sum.f_add(&attached(&used, &gradients)?)?;
    }
    if let Some(gradient) = head_gradient.filter(|_| count > 0) {
        sum = sum.f_add(&attached(head, &gradient)?)?;
    }
    Ok(NextTokenLoss { sum, targets: count, correct })
}

/// A zero whose gradient with respect to `x` is `gradient`.
fn attached(x: &Tensor, gradient: &Tensor) -> Result<Tensor, Error> {
    let product = x.f_to_kind(Kind::Float)?.f_mul(&gradient.f_to_kind(Kind::Float)?)?.f_sum(Kind::Float)?;
    Ok(product.f_sub(&product.detach())?)
}
