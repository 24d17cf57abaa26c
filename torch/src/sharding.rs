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
