//! Waits for rank 0's store and joins the process group.

use std::{
    net::{TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use athanor_torch::{ProcessGroup, Rendezvous};
use tch::Tensor;

use super::Topology;
use crate::{TrainError, train::watchdog::Watchdog};

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
    watchdog.beat();
    let ranks = Tensor::from(1.0_f32).to_device(topology.device());
    group.all_reduce_sum(&ranks).map_err(|error| {
        let message = format!(
            "the ranks found each other, but their first collective over {:?} failed: {error}. Check the firewall between \
             the nodes, the interfaces (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO), the driver and the size of /dev/shm",
            topology.backend
        );
        // A peer that was evicted in this moment is no fault of the run.
        match error {
            athanor_torch::Error::LostPeer(_) => TrainError::LostPeer(message),
            athanor_torch::Error::Torch(_) => TrainError::Other(message),
        }
    })?;
    watchdog.rest();
    Ok(Some(group))
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
