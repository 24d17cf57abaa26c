//! Waits for rank 0's store and joins the process group.

use std::{
    net::{TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use athanor_torch::{Backend, ProcessGroup, Rendezvous};
use tch::Tensor;

use super::Topology;
use crate::{
    TrainError,
    train::watchdog::{Watchdog, Watched},
};

/// Between looks for rank 0: its DNS name appears some time after its pod, its port some time after that.
const POLL: Duration = Duration::from_millis(50);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Joins all ranks; `None` for a run of one process. Blocks until all have arrived or `patience` is over; afterwards each
/// collective may take up to `collective_timeout`. The watchdog ends a process whose first collective never does: NCCL
/// connects the ranks in it, without a time limit of its own.
pub fn rendezvous(
    topology: &Topology,
    patience: Duration,
    collective_timeout: Duration,
    watchdog: &Watchdog,
) -> Result<Option<ProcessGroup>, TrainError> {
    if topology.world() == 1 {
        return Ok(None);
    }
    // Rank 0 finds its own store without DNS; the others by address, so that c10d does not look names up with its own long pauses.
    let store_host = if topology.rank() == 0 { "127.0.0.1".to_owned() } else { wait_for_master(topology, patience)? };
    let group = ProcessGroup::new(
        topology.backend,
        Rendezvous {
            store_host: &store_host,
            store_port: topology.master_port,
            listener: None,
            bind_host: &topology.bind_host,
            rank: topology.rank(),
            world: topology.world(),
            timeout: collective_timeout.max(patience),
        },
    )?;
    let advice = advice(topology);
    watchdog.watch(Watched::Connecting { advice: advice.clone() });
    let ranks = Tensor::from(1.0_f32).to_device(topology.device());
    group.all_reduce_sum(&ranks).map_err(|error| {
        let message = format!("the ranks found each other, but their first collective failed: {error}. {advice}");
        // A peer that was evicted in this moment is no fault of the run.
        match error {
            athanor_torch::Error::LostPeer(_) => TrainError::LostPeer(message),
            athanor_torch::Error::Torch(_) => TrainError::Other(message),
        }
    })?;
    watchdog.rest();
    Ok(Some(group))
}

/// What to check if the ranks cannot connect.
fn advice(topology: &Topology) -> String {
    match topology.backend {
        Backend::Gloo => format!(
            "Check the firewall between the nodes and that the other ranks reach {} (Gloo, distributed.backend)",
            topology.bind_host
        ),
        Backend::Nccl => {
            "Check the firewall between the nodes, the interfaces (NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO logs those \
                          that NCCL uses), the driver and the size of /dev/shm"
                .into()
        }
    }
}

/// Address of rank 0 once its store accepts connections.
fn wait_for_master(topology: &Topology, patience: Duration) -> Result<String, TrainError> {
    let (host, port) = (topology.master_host.as_str(), topology.master_port);
    let deadline = Instant::now() + patience;
    let mut problem = String::new();
    while Instant::now() < deadline {
        match (host, port).to_socket_addrs() {
            Ok(addresses) => {
                for address in addresses {
                    match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                        Ok(_) => return Ok(address.ip().to_string()),
                        Err(error) => problem = format!("{address}: {error}"),
                    }
                }
            }
            Err(error) => problem = error.to_string(),
        }
        std::thread::sleep(POLL);
    }
    Err(TrainError::LostPeer(format!("rank 0 at {host}:{port} was not reached in {} s: {problem}", patience.as_secs())))
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, sync::mpsc};

    use athanor_contract::train::{Backend as Wanted, DistributedSpec};

    use super::*;
    use crate::distributed::environment;

    fn topology(rank: usize, port: u16) -> Topology {
        let spec = DistributedSpec { processes_per_node: 2, backend: Wanted::Gloo, ..DistributedSpec::default() };
        let variable = |name: &str| match name {
            environment::LOCAL_RANK => Some(rank.to_string()),
            environment::MASTER_PORT => Some(port.to_string()),
            _ => None,
        };
        Topology::new(&spec, variable).unwrap()
    }

    /// A peer that joins and takes no part in the first collective, as behind a firewall.
    #[test]
    fn ranks_that_hang_while_they_connect_have_a_cause_of_their_own() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (sender, hung) = mpsc::channel();
        let watchdog = Watchdog::start(Duration::from_millis(300), move |silent, work| {
            let _ = sender.send(work.hung(silent));
        });
        let limit = Duration::from_secs(60);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| rendezvous(&topology(0, port), limit, limit, &watchdog).map(drop));
            let second = topology(1, port);
            let store_host = wait_for_master(&second, limit).unwrap();
            let at = Rendezvous {
                store_host: &store_host,
                store_port: port,
                listener: None,
                bind_host: &second.bind_host,
                rank: 1,
                world: 2,
                timeout: limit,
            };
            let silent = ProcessGroup::new(Backend::Gloo, at).unwrap();
            let message = hung.recv_timeout(limit).unwrap();
            assert!(
                message.starts_with("the ranks found each other, but their first collective did not end in"),
                "{message}"
            );
            assert!(message.contains("firewall") && message.contains("127.0.0.1"), "{message}");
            drop(silent);
            // In the tests the watchdog ends no process.
            let error = first.join().unwrap().unwrap_err();
            assert!(
                matches!(&error, TrainError::LostPeer(message) if message.contains("Check the firewall")),
                "{error}"
            );
        });
    }

    #[test]
    fn a_hang_of_nccl_names_what_to_check() {
        let topology = Topology { backend: Backend::Nccl, ..topology(0, 1) };
        let message = Watched::Connecting { advice: advice(&topology) }.hung(Duration::from_secs(600));
        for part in ["600 s (failurePolicy.hangSeconds)", "NCCL_SOCKET_IFNAME", "/dev/shm", "driver"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
