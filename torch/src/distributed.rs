//! Process groups and the DDP reducer of c10d.

use std::{
    ffi::{CString, c_int, c_void},
    marker::PhantomData,
    net::TcpListener,
    os::fd::IntoRawFd,
    ptr::NonNull,
    time::Duration,
};

use tch::Tensor;

use crate::{Error, ffi};

/// Which library moves the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// CPU tensors over TCP.
    Gloo,
    /// CUDA tensors; only in builds with the feature `nccl`.
    Nccl,
}

/// The address at which the ranks of a process group find each other.
#[derive(Debug)]
pub struct Rendezvous<'a> {
    /// Address of rank 0, which runs the store; rank 0 itself may pass 127.0.0.1.
    pub store_host: &'a str,
    pub store_port: u16,
    /// Rank 0's listener on `store_port`; `None`: its store opens one.
    pub listener: Option<TcpListener>,
    /// Address (or a name of it) of this machine that the other ranks can reach: Gloo listens there.
    pub bind_host: &'a str,
    pub rank: usize,
    pub world: usize,
    /// Time limit of the rendezvous and of each collective.
    pub timeout: Duration,
}

impl Rendezvous<'static> {
    /// For each of `world` ranks that are threads of this process: a free port of 127.0.0.1, on which rank 0 listens
    /// already, so that nobody else can take it.
    ///
    /// # Errors
    /// If no port is free.
    pub fn on_loopback(world: usize) -> std::io::Result<Vec<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let store_port = listener.local_addr()?.port();
        let mut listener = Some(listener);
        let (store_host, bind_host, timeout) = ("127.0.0.1", "127.0.0.1", Duration::from_secs(60));
        let of_rank =
            |rank| Self { store_host, store_port, listener: listener.take(), bind_host, rank, world, timeout };
        Ok((0..world).map(of_rank).collect())
    }
}

/// The ranks that train together. Collectives have to be called by all ranks in the same order, from one thread at a
/// time.
pub struct ProcessGroup {
    handle: NonNull<c_void>,
    rank: usize,
    world: usize,
}

// SAFETY: the handle owns a reference-counted c10d::ProcessGroup, which is not bound to the thread that made it.
unsafe impl Send for ProcessGroup {}

impl ProcessGroup {
    /// What [`ProcessGroup::broadcast_all`] sends at a time.
    const BUFFER_BYTES: i64 = 25 << 20;

    /// Blocks until all ranks have arrived.
    pub fn new(backend: Backend, at: Rendezvous) -> Result<Self, Error> {
        let text = |value: &str| CString::new(value).map_err(|_| Error::Torch(format!("{value:?} is not a host name")));
        let (store_host, bind_host) = (text(at.store_host)?, text(at.bind_host)?);
        let number =
            |value: usize| c_int::try_from(value).map_err(|_| Error::Torch(format!("{value} ranks are too many")));
        let (rank, world) = (number(at.rank)?, number(at.world)?);
        let timeout = i64::try_from(at.timeout.as_millis()).unwrap_or(i64::MAX);
        let mut handle = std::ptr::null_mut();
        ffi::call(|message| {
            // SAFETY: the strings outlive the call; `handle` is written on success only.
            unsafe {
                ffi::athanor_group_new(
                    c_int::from(backend == Backend::Nccl),
                    store_host.as_ptr(),
                    at.store_port,
                    at.listener.map_or(-1, IntoRawFd::into_raw_fd),
                    bind_host.as_ptr(),
                    rank,
                    world,
                    timeout,
                    &mut handle,
                    message,
                )
            }
        })?;
        let handle = NonNull::new(handle).ok_or_else(|| Error::Torch("no process group was made".into()))?;
        Ok(Self { handle, rank: at.rank, world: at.world })
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world(&self) -> usize {
        self.world
    }

    /// Sums the tensor over all ranks, in place.
    pub fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), Error> {
        // SAFETY: handle and tensor are alive for the call, which waits for the collective to end.
        ffi::call(|message| unsafe { ffi::athanor_all_reduce_sum(self.handle.as_ptr(), ffi::pointer(tensor), message) })
    }

    /// Overwrites the tensor with the one of rank `root`; shape and kind have to be the same on all ranks.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<(), Error> {
        let root = c_int::try_from(root).map_err(|_| Error::Torch("root is not a rank".into()))?;
        // SAFETY: as in all_reduce_sum.
        ffi::call(|message| unsafe {
            ffi::athanor_broadcast(self.handle.as_ptr(), ffi::pointer(tensor), root, message)
        })
    }

    /// Overwrites tensors with those of rank `root`, many small ones in one message; shapes and kinds have to be the
    /// same on all ranks.
    pub fn broadcast_all(&self, tensors: &[Tensor], root: usize) -> Result<(), Error> {
        if tensors.is_empty() {
            return Ok(());
        }
        let root = c_int::try_from(root).map_err(|_| Error::Torch("root is not a rank".into()))?;
        let pointers = ffi::pointers(tensors);
        ffi::call(|message| {
            // SAFETY: handle and tensors are alive for the call, which waits for the collectives to end.
            unsafe {
                ffi::athanor_broadcast_coalesced(
                    self.handle.as_ptr(),
                    pointers.as_ptr(),
                    pointers.len(),
                    Self::BUFFER_BYTES,
                    root,
                    message,
                )
            }
        })
    }

    /// The flat tensors `own` [n] of all ranks, one after the other: [ranks, n]. Size and kind have to be the same on all
    /// ranks.
    pub fn all_gather(&self, own: &Tensor) -> Result<Tensor, Error> {
        let world = i64::try_from(self.world).map_err(|_| Error::Torch("too many ranks".into()))?;
        let own = own.f_contiguous()?;
        let all = Tensor::f_empty([world * own.numel() as i64], (own.kind(), own.device()))?;
        ffi::call(|message| {
            // SAFETY: handle and tensors are alive for the call, which waits for the collective to end.
            unsafe { ffi::athanor_all_gather(self.handle.as_ptr(), ffi::pointer(&own), ffi::pointer(&all), message) }
        })?;
        Ok(all.f_view([world, -1])?)
    }

    /// Returns once all ranks have called it.
    pub fn barrier(&self) -> Result<(), Error> {
        // SAFETY: the handle is alive for the call.
        ffi::call(|message| unsafe { ffi::athanor_barrier(self.handle.as_ptr(), message) })
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: made by athanor_group_new, dropped once.
        unsafe { ffi::athanor_group_drop(self.handle.as_ptr()) }
    }
}

/// DistributedDataParallel's reducer (Li et al. 2020): it hooks into the backward pass and averages gradients over the
/// ranks, bucket by bucket, while the backward pass goes on. Gradients are views into the buckets.
///
/// Each step: [`Reducer::prepare_for_forward`], the forward pass, [`Reducer::prepare_for_backward`], then
/// [`crate::backward`].
pub struct Reducer<'group> {
    handle: NonNull<c_void>,
    group: PhantomData<&'group ProcessGroup>,
}

impl<'group> Reducer<'group> {
    /// Small, so that the first all-reduce starts early in the backward pass.
    const FIRST_BUCKET_BYTES: i64 = 1 << 20;
    const BUCKET_BYTES: i64 = 25 << 20;

    /// Hooks into the parameters, which must be leaves that require gradients, in the same order on all ranks.
    pub fn new(parameters: &[Tensor], group: &'group ProcessGroup) -> Result<Self, Error> {
        let pointers = ffi::pointers(parameters);
        let mut handle = std::ptr::null_mut();
        ffi::call(|message| {
            // SAFETY: the pointers are valid for the call; the shim copies the tensors' references.
            unsafe {
                ffi::athanor_reducer_new(
                    group.handle.as_ptr(),
                    pointers.as_ptr(),
                    pointers.len(),
                    Self::FIRST_BUCKET_BYTES,
                    Self::BUCKET_BYTES,
                    &mut handle,
                    message,
                )
            }
        })?;
        let handle = NonNull::new(handle).ok_or_else(|| Error::Torch("no reducer was made".into()))?;
        Ok(Self { handle, group: PhantomData })
    }

    pub fn prepare_for_forward(&mut self) -> Result<(), Error> {
        // SAFETY: the handle is alive and borrowed alone.
        ffi::call(|message| unsafe { ffi::athanor_reducer_prepare_for_forward(self.handle.as_ptr(), message) })
    }

    pub fn prepare_for_backward(&mut self) -> Result<(), Error> {
        // SAFETY: the handle is alive and borrowed alone.
        ffi::call(|message| unsafe { ffi::athanor_reducer_prepare_for_backward(self.handle.as_ptr(), message) })
    }
}

impl Drop for Reducer<'_> {
    fn drop(&mut self) {
        // SAFETY: made by athanor_reducer_new, dropped once, before the group it borrows.
        unsafe { ffi::athanor_reducer_drop(self.handle.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Barrier, Mutex},
        time::Instant,
    };

    use tch::{Device, Kind};

    use super::*;
    use crate::{backward, sharding::tests::on_ranks, zero_grad};

    #[test]
    fn sums_are_those_over_all_ranks_and_the_same_bits_on_each() {
        for world in [2, 3, 4] {
            let found = Mutex::new(Vec::new());
            on_ranks(world, |group| {
                // A number for each rank and less, and sizes that no number of ranks divides.
                for (size, kind) in [(1_i64, Kind::Double), (700_001, Kind::Float), (70_003, Kind::Double)] {
                    let of_rank = |rank: usize| Tensor::arange(size, (kind, Device::Cpu)) * 0.1 + (rank as f64 + 0.3);
                    let sum = of_rank(group.rank());
                    group.all_reduce_sum(&sum).unwrap();
                    let expected: Tensor = (0..world).map(|rank| of_rank(rank).to_kind(Kind::Double)).sum();
                    // FP32 rounds each of up to three additions, 6e-8 relative each.
                    assert!(sum.to_kind(Kind::Double).allclose(&expected, 1e-6, 0.0, false), "{size} of {world} ranks");
                    found.lock().unwrap().push((size, sum));
                }
                let whole = Tensor::from(group.rank() as i64 + 1);
                group.all_reduce_sum(&whole).unwrap();
                assert_eq!(whole.int64_value(&[]) as usize, world * (world + 1) / 2);
            });
            let found = found.into_inner().unwrap();
            for (size, sum) in &found {
                assert!(found.iter().filter(|(other, _)| other == size).all(|(_, other)| other == sum));
            }
        }
    }

    #[test]
    fn gathered_rows_are_those_of_the_ranks_in_their_order() {
        on_ranks(3, |group| {
            let of_rank = |rank: usize| Tensor::arange(5, (Kind::Float, Device::Cpu)) + rank as f64 * 10.0;
            let all = group.all_gather(&of_rank(group.rank())).unwrap();
            assert_eq!(all, Tensor::stack(&[of_rank(0), of_rank(1), of_rank(2)], 0));
        });
    }

    /// What a rank of [`on_ranks`] relies on when another one fails.
    #[test]
    fn a_rank_whose_peer_goes_away_has_lost_a_peer_at_once() {
        let [first, second] = Rendezvous::on_loopback(2).unwrap().try_into().unwrap();
        // The second one leaves when both have joined: before that the first one's joining fails.
        let joined = Barrier::new(2);
        let join = |at: Rendezvous| {
            let group = ProcessGroup::new(Backend::Gloo, at).unwrap();
            joined.wait();
            group
        };
        std::thread::scope(|scope| {
            scope.spawn(|| drop(join(second)));
            let group = join(first);
            let begun = Instant::now();
            let found = group.all_reduce_sum(&Tensor::from(1.0_f32));
            assert!(matches!(found, Err(Error::LostPeer(_))), "{found:?}");
            assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        });
    }

    /// The loss of each rank is of its own rows; the averages of the gradients are those of the whole batch, bit for
    /// bit on all ranks.
    #[test]
    fn the_reducer_averages_gradients_over_the_ranks() {
        let world = 2;
        let found = Mutex::new(Vec::new());
        on_ranks(world, |group| {
            let size = 400_000_i64;
            let values = |rank: usize| Tensor::arange(size, (Kind::Float, Device::Cpu)).cos() * (rank as f64 + 1.0);
            let parameters: Vec<Tensor> = [3_i64, size, 17]
                .map(|size| Tensor::ones([size], (Kind::Float, Device::Cpu)).set_requires_grad(true))
                .into();
            let mut reducer = Reducer::new(&parameters, group).unwrap();
            // The buckets are arranged again after the first step.
            for _ in 0..3 {
                zero_grad(&parameters).unwrap();
                reducer.prepare_for_forward().unwrap();
                let loss: Tensor = parameters
                    .iter()
                    .map(|w| (w * values(group.rank()).narrow(0, 0, w.size()[0])).sum(Kind::Float))
                    .sum();
                reducer.prepare_for_backward().unwrap();
                backward(&loss).unwrap();
                for parameter in &parameters {
                    let expected = (values(0) + values(1)).narrow(0, 0, parameter.size()[0]) / 2.0;
                    // Halves are exact: one addition rounds.
                    assert!(parameter.grad().allclose(&expected, 1e-6, 1e-6, false));
                }
            }
            found.lock().unwrap().push(parameters[1].grad().copy());
        });
        let found = found.into_inner().unwrap();
        assert_eq!(found[0], found[1]);
    }
}

#[cfg(all(test, feature = "nccl"))]
mod nccl_tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{backward, zero_grad};

    /// On one GPU: collectives of one rank change nothing, and gradients that go through the reducer are the same.
    #[test]
    fn one_rank_trains_over_nccl() {
        let [at] = Rendezvous::on_loopback(1).unwrap().try_into().unwrap();
        let group = ProcessGroup::new(Backend::Nccl, at).unwrap();
        let on_gpu = (Kind::Float, Device::Cuda(0));
        let values = Tensor::arange(1 << 20, on_gpu).sin();
        let reduced = values.copy();
        group.all_reduce_sum(&reduced).unwrap();
        group.broadcast(&reduced, 0).unwrap();
        group.broadcast_all(&[reduced.shallow_clone(), values.copy()], 0).unwrap();
        group.barrier().unwrap();
        assert_eq!(reduced, values);
        assert_eq!(group.all_gather(&values).unwrap(), values.unsqueeze(0));

        let parameters = || -> Vec<Tensor> {
            let sizes = [300_i64, 2_000_000, 7_000_000, 5];
            sizes.map(|size| Tensor::arange(size, on_gpu).cos().set_requires_grad(true)).into()
        };
        let loss = |parameters: &[Tensor]| parameters.iter().map(|w| (w * w).sum(Kind::Float)).sum::<Tensor>();
        let (plain, reduced) = (parameters(), parameters());
        let mut reducer = Reducer::new(&reduced, &group).unwrap();
        for _ in 0..3 {
            zero_grad(&plain).unwrap();
            zero_grad(&reduced).unwrap();
            backward(&loss(&plain)).unwrap();
            reducer.prepare_for_forward().unwrap();
            let loss = loss(&reduced);
            reducer.prepare_for_backward().unwrap();
            backward(&loss).unwrap();
            for (one, other) in plain.iter().zip(&reduced) {
                assert_eq!(one.grad(), other.grad());
            }
        }
    }
}
