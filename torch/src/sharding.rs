//! Which rank keeps which part of the optimizer's state: the first stage of ZeRO (Rajbhandari et al. 2020,
//! <https://arxiv.org/abs/1910.02054>). Parameters and gradients stay whole on every rank.

use tch::{Device, Tensor};

use crate::{Error, ProcessGroup};

/// Fused kernels go by cache lines of 16 floats: a part that begins with one gets the bits it would get within the
/// whole.
const ALIGNMENT: i64 = 16;

/// The part of the state that a process keeps: that of `rank`, if `world` ranks share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    pub world: usize,
}

impl Shard {
    /// All of the state.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };
}

/// Where a tensor is cut among the ranks: rank `r` has the elements from the `r`-th number to the next, of the flat
/// tensor.
pub(crate) struct Cuts(pub Vec<i64>);

impl Cuts {
    /// Cuts tensors with these numbers of elements, laid end to end, into parts that are even but for [`ALIGNMENT`]. A
    /// large one, such as an embedding table, is shared by several ranks. The same on all ranks.
    pub fn of(sizes: &[i64], world: usize) -> Vec<Self> {
        let (total, world) = (sizes.iter().sum::<i64>(), world as i64);
        let begins = sizes.iter().scan(0, |end, &size| {
            *end += size;
            Some(*end - size)
        });
        std::iter::zip(begins, sizes)
            .map(|(begin, &size)| {
                let cut = |rank: i64| {
                    let inside = (total * rank / world - begin).clamp(0, size);
                    if inside == size { size } else { inside - inside % ALIGNMENT }
                };
                Self((0..=world).map(cut).collect())
            })
            .collect()
    }

    /// A view of a rank's part: the tensor itself where that is all of it, else flat, `[elements]`, of none at all
    /// perhaps.
    pub fn part(&self, tensor: &Tensor, rank: usize) -> Result<Tensor, Error> {
        let (begin, end) = (self.0[rank], self.0[rank + 1]);
        if (end - begin) as usize == tensor.numel() {
            return Ok(tensor.shallow_clone());
        }
        Ok(tensor.f_view([-1_i64])?.f_narrow(0, begin, end - begin)?)
    }

    /// Puts a tensor shaped like `like` together on rank 0, in the CPU's memory, of which each rank has the part `own`.
    /// Ranks take turns, so that no more than one part is under way. All ranks have to call it; the others get nothing.
    pub fn gather(&self, like: &Tensor, own: &Tensor, group: &ProcessGroup) -> Result<Option<Tensor>, Error> {
        let whole = (group.rank() == 0).then(|| Tensor::empty(like.size(), (own.kind(), Device::Cpu)));
        for owner in 0..group.world() {
            let part =
                if owner == group.rank() { own.shallow_clone() } else { self.part(like, owner)?.f_empty_like()? };
            if part.numel() == 0 {
                continue;
            }
            if owner != 0 {
                group.broadcast(&part, owner)?;
            }
            if let Some(whole) = &whole {
                self.part(whole, owner)?.f_copy_(&part)?;
            }
        }
        Ok(whole)
    }
}

/// Overwrites the parts of the other ranks with what these ranks have. `parts` are flat tensors of one kind and on one
/// device, listed by the rank that owns them, in the same order on all ranks. It takes one all-gather over a flat buffer,
/// or several if the buffer would have more than `most` elements.
pub(crate) fn exchange(parts: &[Vec<Tensor>], ranks: &ProcessGroup, most: i64) -> Result<(), Error> {
    let elements = |part: &Tensor| part.numel() as i64;
    let longest = parts.iter().map(|parts| parts.iter().map(elements).sum::<i64>()).max().unwrap_or(0);
    let Some(first) = parts.iter().flatten().next() else { return Ok(()) };
    // Ranks have to send equally many elements; the shares' sizes differ a little.
    let own = Tensor::f_zeros([longest], (first.kind(), first.device()))?;
    let mut begin = 0;
    for part in &parts[ranks.rank()] {
        own.f_narrow(0, begin, elements(part))?.f_copy_(part)?;
        begin += elements(part);
    }
    let piece = (most / ranks.world() as i64).clamp(1, longest.max(1));
    for from in (0..longest).step_by(piece as usize) {
        let to = longest.min(from + piece);
        let all = ranks.all_gather(&own.f_narrow(0, from, to - from)?)?;
        for (owner, parts) in parts.iter().enumerate().filter(|(owner, _)| *owner != ranks.rank()) {
            let sent = all.f_get(owner as i64)?;
            let mut begin = 0;
            for part in parts {
                let end = begin + elements(part);
                let (first, last) = (begin.max(from), end.min(to));
                if first < last {
                    let values = sent.f_narrow(0, first - from, last - first)?;
                    part.f_narrow(0, first - begin, last - first)?.f_copy_(&values)?;
                }
                begin = end;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use tch::Kind;

    use super::*;
    use crate::{Backend, Optimizer, ParameterGroup, Rendezvous, Rule, backward, zero_grad};

    #[test]
    fn parts_are_even_and_cover_everything_once() {
        // As an encoder has them: a table that outweighs the rest, matrices, vectors, a small head.
        let sizes = [30_522 * 384, 512 * 384, 384 * 384, 384 * 1536, 384, 1536, 2 * 384, 2, 1];
        let total: i64 = sizes.iter().sum();
        for world in [1, 2, 3, 8, 64] {
            let cuts = Cuts::of(&sizes, world);
            for (Cuts(cuts), &size) in cuts.iter().zip(&sizes) {
                assert_eq!((cuts.len(), cuts[0], cuts[world]), (world + 1, 0, size));
                assert!(cuts.is_sorted(), "{cuts:?}");
            }
            for rank in 0..world {
                let kept: i64 = cuts.iter().map(|Cuts(cuts)| cuts[rank + 1] - cuts[rank]).sum();
                let even = total / world as i64;
                assert!((kept - even).abs() <= ALIGNMENT, "rank {rank} of {world} keeps {kept} of {total}");
            }
        }
    }

    #[test]
    fn parts_arrive_whole_whatever_the_buffer_holds() {
        // Rank 0 has two parts, rank 1 none, rank 2 one that is longer than both.
        let sizes: [&[i64]; 3] = [&[5, 2], &[], &[9]];
        for most in [1, 6, 12, 1000] {
            on_ranks(3, |group| {
                let value = |owner: usize, rank: usize| if owner == rank { owner as f64 + 1.0 } else { 0.0 };
                let whole = Tensor::zeros([16], (Kind::Float, Device::Cpu));
                let mut begin = 0;
                let parts: Vec<Vec<Tensor>> = (0..3)
                    .map(|owner| {
                        let part = |&size: &i64| {
                            begin += size;
                            let part = whole.narrow(0, begin - size, size);
                            let count = Tensor::arange(size, (Kind::Float, Device::Cpu)) + 1.0;
                            part.shallow_clone().copy_(&(count * value(owner, group.rank())));
                            part
                        };
                        sizes[owner].iter().map(part).collect()
                    })
                    .collect();
                exchange(&parts, group, most).unwrap();
                let found = Vec::<f32>::try_from(whole).unwrap();
                let expected: Vec<f32> =
                    (1..=5).chain(1..=2).map(|n| n as f32).chain((1..=9).map(|n| 3.0 * n as f32)).collect();
                assert_eq!(found, expected, "rank {}, a buffer of {most}", group.rank());
            });
        }
    }

    type Named = Vec<(String, Tensor)>;

    /// Runs `of_rank` on a thread for each of `world` ranks. A rank that panics drops its process group, which closes
    /// its connections: the others fail at their next collective instead of waiting for their timeout.
    pub(crate) fn on_ranks(world: usize, of_rank: impl Fn(&ProcessGroup) + Sync) {
        std::thread::scope(|scope| {
            for at in Rendezvous::on_loopback(world).unwrap() {
                let of_rank = &of_rank;
                scope.spawn(move || {
                    let group = ProcessGroup::new(Backend::Gloo, at).unwrap();
                    of_rank(&group);
                    // Rank 0 has the store that the others are still using.
                    group.barrier().unwrap();
                });
            }
        });
    }

    /// Parameters and their optimizer; the sizes are no multiples of anything.
    struct Run {
        parameters: Vec<Tensor>,
        optimizer: Optimizer,
    }

    impl Run {
        fn new(rule: Rule, shard: Shard) -> Self {
            let shapes: [&[i64]; 5] = [&[301, 37], &[7, 5], &[64], &[3], &[1]];
            let parameter = |shape: &&[i64]| {
                let size: i64 = shape.iter().product();
                // Numbers that are computed exactly: a sine's last bit depends on how threads share the work.
                let values = Tensor::arange(size, (Kind::Float, Device::Cpu)).remainder(23) / 8 - 1.5;
                values.view(*shape).set_requires_grad(true)
            };
            let parameters: Vec<Tensor> = shapes.iter().map(parameter).collect();
            let group = |weight_decay: f64, range: std::ops::Range<usize>| {
                let named = range.map(|index| (format!("parameter {index}"), parameters[index].shallow_clone()));
                ParameterGroup { weight_decay, parameters: named.collect() }
            };
            let groups = vec![group(0.01, 0..2), group(0.0, 2..5)];
            let optimizer = Optimizer::new(rule, groups, shard).unwrap();
            Self { parameters, optimizer }
        }

        /// Steps down `sum(0.05 w² + 0.3 w)`.
        fn steps(&mut self, count: usize, group: Option<&ProcessGroup>) {
            for _ in 0..count {
                zero_grad(&self.parameters).unwrap();
                let loss: Tensor = self.parameters.iter().map(|w| (w * w * 0.05 + w * 0.3).sum(Kind::Float)).sum();
                backward(&loss).unwrap();
                self.optimizer.step(0.01).unwrap();
                if let Some(group) = group {
                    self.optimizer.share_parameters(group).unwrap();
                }
            }
        }

        fn weights(&self) -> Vec<Tensor> {
            self.parameters.iter().map(|w| w.detach().copy()).collect()
        }

        fn load(&mut self, weights: &[Tensor], state: &Named) {
            for (parameter, saved) in std::iter::zip(&self.parameters, weights) {
                parameter.detach().copy_(saved);
            }
            let find = |name: &str| state.iter().find(|(n, _)| n == name).map(|(_, saved)| saved.shallow_clone());
            self.optimizer.load_state(find).unwrap();
        }
    }

    fn elements(named: &Named) -> usize {
        named.iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    #[test]
    fn shards_together_are_one_optimizer_bit_for_bit_and_go_on_from_its_state() {
        let (beta1, beta2, epsilon) = (0.9, 0.999, 1e-8);
        for (rule, world) in [
            (Rule::AdamW { beta1, beta2, epsilon }, 2),
            (Rule::AdamW { beta1, beta2, epsilon }, 3),
            (Rule::Sgd { momentum: 0.9 }, 2),
            (Rule::RmsProp { alpha: 0.99, momentum: 0.9, epsilon }, 2),
        ] {
            on_ranks(world, |group| {
                let shard = Shard { rank: group.rank(), world };
                let mut whole = Run::new(rule, Shard::WHOLE);
                let mut shards = Run::new(rule, shard);
                whole.steps(3, None);
                shards.steps(3, Some(group));
                assert_eq!(shards.weights(), whole.weights(), "{rule:?} on {world} ranks");

                let saved: Named = whole.optimizer.state().into_iter().map(|(name, t)| (name, t.copy())).collect();
                let gathered = shards.optimizer.gather_state(group).unwrap();
                if shard.rank == 0 {
                    assert_eq!(gathered, saved, "{rule:?} on {world} ranks");
                } else {
                    assert!(gathered.is_empty());
                }
                let (kept, all) = (elements(&shards.optimizer.state()), elements(&saved));
                // The counters are whole, and cuts are aligned.
                assert!(kept.abs_diff(all / world) < 100, "rank {} of {world} keeps {kept} of {all}", shard.rank);

                let mut resumed = Run::new(rule, shard);
                resumed.load(&whole.weights(), &saved);
                whole.steps(3, None);
                resumed.steps(3, Some(group));
                assert_eq!(resumed.weights(), whole.weights(), "{rule:?} on {world} ranks, resumed");
            });
        }
    }
}
