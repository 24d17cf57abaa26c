//! Who takes part in a run and how its processes find each other.

pub mod launch;
mod node;
mod rendezvous;

use athanor_contract::{
    process::port,
    train::{Backend, DistributedSpec},
};

pub use node::Node;
pub use rendezvous::rendezvous;

use crate::TrainError;

/// Environment of a trainer process. The operator sets these variables in each pod; a laptop's launcher sets them for its children.
pub use athanor_contract::process::variable as environment;

/// The place of this process among all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    pub node_rank: usize,
    pub num_nodes: usize,
    pub local_rank: usize,
    pub processes_per_node: usize,
    pub master_host: String,
    pub master_port: u16,
    pub bind_host: String,
    pub backend: athanor_torch::Backend,
}

impl Topology {
    /// Reads the environment through `variable`.
    pub fn new(spec: &DistributedSpec, variable: impl Fn(&str) -> Option<String>) -> Result<Self, TrainError> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let number = |name: &str, default: usize| match get(name) {
            Some(text) => text
                .parse::<usize>()
                .map_err(|_| TrainError::User(format!("environment variable {name}: {text:?} is not a number"))),
            None => Ok(default),
        };
        let node_rank = match get(environment::NODE_RANK) {
            Some(_) => number(environment::NODE_RANK, 0)?,
            None => number(environment::JOB_COMPLETION_INDEX, 0)?,
        };
        let num_nodes = number(environment::NUM_NODES, spec.num_nodes as usize)?.max(1);
        let processes_per_node = spec.processes_per_node.max(1) as usize;
        let local_rank = number(environment::LOCAL_RANK, 0)?;
        if node_rank >= num_nodes || local_rank >= processes_per_node {
            return Err(TrainError::User(format!(
                "node {node_rank} of {num_nodes}, process {local_rank} of {processes_per_node}: ranks are counted from 0"
            )));
        }
        let master_host = get(environment::MASTER_ADDR);
        if num_nodes > 1 && master_host.is_none() {
            return Err(TrainError::User(format!(
                "{num_nodes} nodes need the environment variable {}",
                environment::MASTER_ADDR
            )));
        }
        let master_port = number(environment::MASTER_PORT, port::RENDEZVOUS.into())?;
        let loopback = "127.0.0.1".to_owned();
        Ok(Self {
            node_rank,
            num_nodes,
            local_rank,
            processes_per_node,
            master_host: master_host.unwrap_or_else(|| loopback.clone()),
            master_port: u16::try_from(master_port).map_err(|_| {
                TrainError::User(format!("environment variable {}: {master_port} is no port", environment::MASTER_PORT))
            })?,
            bind_host: get(environment::POD_IP).unwrap_or(loopback),
            backend: choose_backend(spec.backend, Gpus::found(number(environment::GPUS, 0)?), processes_per_node)?,
        })
    }

    pub fn rank(&self) -> usize {
        self.node_rank * self.processes_per_node + self.local_rank
    }

    pub fn world(&self) -> usize {
        self.num_nodes * self.processes_per_node
    }

    /// Whether this process has to start the node's ranks instead of being one.
    pub fn is_launcher(&self, variable: impl Fn(&str) -> Option<String>) -> bool {
        self.processes_per_node > 1 && variable(environment::LOCAL_RANK).is_none()
    }

    /// The accelerator of this process, or the CPU.
    pub fn device(&self) -> tch::Device {
        match self.backend {
            athanor_torch::Backend::Nccl => tch::Device::Cuda(self.local_rank),
            athanor_torch::Backend::Gloo => tch::Device::Cpu,
        }
    }
}

/// GPUs of this machine.
#[derive(Clone, Copy)]
struct Gpus {
    /// What the pod has reserved.
    reserved: usize,
    /// What this process can use.
    usable: usize,
    /// Whether this is the build for GPUs.
    has_nccl: bool,
}

impl Gpus {
    fn found(reserved: usize) -> Self {
        let has_nccl = athanor_torch::has_nccl();
        let usable = if has_nccl { tch::Cuda::device_count().max(0) as usize } else { 0 };
        Self { reserved, usable, has_nccl }
    }

    fn describe(self) -> String {
        match self.has_nccl {
            false => "this build of athanor-trainer has no CUDA: use the CUDA build (docs/gpu.md)".into(),
            true => format!("CUDA finds {} GPUs: check the driver and the runtime class of the pods", self.usable),
        }
    }
}

/// GPUs are used where there are any; a pod that has reserved some never trains on the CPU instead, unless it is asked to.
fn choose_backend(wanted: Backend, gpus: Gpus, processes: usize) -> Result<athanor_torch::Backend, TrainError> {
    let needed = match wanted {
        Backend::Gloo => return Ok(athanor_torch::Backend::Gloo),
        Backend::Auto if gpus.usable == 0 && gpus.reserved == 0 => return Ok(athanor_torch::Backend::Gloo),
        Backend::Auto | Backend::NCCL => gpus.reserved.max(processes),
    };
    if gpus.usable < needed {
        return Err(TrainError::User(format!(
            "distributed.backend: {wanted:?} with {processes} processes on each node and {} reserved GPUs: {}",
            gpus.reserved,
            gpus.describe()
        )));
    }
    Ok(athanor_torch::Backend::Nccl)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_gpus_are_used_or_the_job_fails() {
        use athanor_torch::Backend::{Gloo, Nccl};
        let gpus = |reserved, usable| Gpus { reserved, usable, has_nccl: usable > 0 };
        for (wanted, reserved, usable, processes, expected) in [
            (Backend::Auto, 0, 0, 2, Some(Gloo)),
            (Backend::Auto, 0, 1, 1, Some(Nccl)),
            (Backend::Auto, 8, 8, 8, Some(Nccl)),
            (Backend::Auto, 8, 0, 8, None),
            (Backend::Auto, 8, 4, 4, None),
            (Backend::Auto, 0, 4, 8, None),
            (Backend::NCCL, 0, 0, 1, None),
            (Backend::Gloo, 8, 0, 8, Some(Gloo)),
        ] {
            let found = choose_backend(wanted, gpus(reserved, usable), processes);
            assert_eq!(found.as_ref().ok(), expected.as_ref(), "{wanted:?} {reserved} {usable} {processes}: {found:?}");
        }
        let without = choose_backend(Backend::Auto, gpus(8, 0), 8).unwrap_err().to_string();
        assert!(without.contains("8 reserved GPUs: this build of athanor-trainer has no CUDA"), "{without}");
    }

    fn topology(nodes: u32, processes: u32, variables: &[(&str, &str)]) -> Result<Topology, TrainError> {
        let spec = DistributedSpec {
            num_nodes: nodes,
            processes_per_node: processes,
            backend: Backend::Gloo,
            ..DistributedSpec::default()
        };
        Topology::new(&spec, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn ranks_are_counted_node_by_node() {
        let master = ("ATHANOR_MASTER_ADDR", "job-0.job");
        let place = topology(2, 4, &[("ATHANOR_NODE_RANK", "1"), ("ATHANOR_LOCAL_RANK", "2"), master]).unwrap();
        assert_eq!((place.rank(), place.world(), place.master_port), (6, 8, 29500));
        let alone = topology(1, 1, &[]).unwrap();
        assert_eq!((alone.rank(), alone.world(), alone.master_host.as_str()), (0, 1, "127.0.0.1"));
        assert_eq!(topology(3, 1, &[("JOB_COMPLETION_INDEX", "2"), master]).unwrap().rank(), 2);
        for (nodes, variables) in [
            (2, vec![("ATHANOR_NODE_RANK", "1")]),
            (1, vec![("ATHANOR_NODE_RANK", "1")]),
            (1, vec![("ATHANOR_NODE_RANK", "x")]),
        ] {
            assert!(topology(nodes, 1, &variables).is_err(), "{variables:?}");
        }
    }
}
