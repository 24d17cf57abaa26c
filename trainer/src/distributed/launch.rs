//! Starts the ranks of one machine as child processes and ends with the exit code that says most about them.

use std::{path::Path, process::ExitStatus, time::Duration};

use athanor_contract::train::exit_code;
use futures::{StreamExt, stream::FuturesUnordered};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::environment;
use crate::TrainError;

/// What the other ranks get to end by themselves once one has failed or a stop was asked for.
const GRACE: Duration = Duration::from_secs(25);

/// Runs `processes` ranks of this very program with the configuration at `config`; returns the exit code of the whole.
/// Each variable in `extra` is set in the children besides their rank.
pub async fn launch(
    config: &Path,
    processes: usize,
    extra: &[(&str, String)],
    stop: CancellationToken,
) -> Result<i32, TrainError> {
    let program = std::env::current_exe().map_err(TrainError::other)?;
    let mut children = Vec::with_capacity(processes);
    for rank in 0..processes {
        let child = Command::new(&program)
            .arg("run")
            .arg("--config")
            .arg(config)
            .envs(extra.iter().map(|(name, value)| (name, value)))
            .env(environment::LOCAL_RANK, rank.to_string())
            .env(environment::PARENT, std::process::id().to_string())
            // A group of its own: Ctrl-C reaches this process, which passes it on once.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| TrainError::Other(format!("rank {rank} could not be started: {error}")))?;
        children.push(child);
    }
    let pids: Vec<Option<Pid>> = children.iter().map(|child| Pid::from_raw(child.id()? as i32)).collect();
    let mut running: FuturesUnordered<_> = children.into_iter().enumerate().map(wait).collect();
    let mut codes = vec![None; processes];
    let mut ending = None;
    let mut stopped = false;
    while !running.is_empty() {
        let deadline = async {
            match ending {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some((rank, status)) = running.next() => {
                let code = code_of(status);
                codes[rank] = Some(code);
                if code != exit_code::DONE {
                    tracing::warn!(rank, code, "a rank ended");
                    ending.get_or_insert(tokio::time::Instant::now() + GRACE);
                }
            }
            () = stop.cancelled(), if !stopped => {
                stopped = true;
                ending.get_or_insert(tokio::time::Instant::now() + GRACE);
                signal(&pids, &codes, Signal::TERM);
            }
            () = deadline => {
                signal(&pids, &codes, Signal::KILL);
                ending = None;
            }
        }
    }
    Ok(overall(codes.into_iter().flatten()))
}

async fn wait((rank, mut child): (usize, Child)) -> (usize, std::io::Result<ExitStatus>) {
    (rank, child.wait().await)
}

/// Signals the ranks that have not ended yet.
fn signal(pids: &[Option<Pid>], codes: &[Option<i32>], signal: Signal) {
    for (pid, _) in std::iter::zip(pids, codes).filter(|(_, code)| code.is_none()) {
        if let Some(pid) = pid
            && let Err(error) = kill_process(*pid, signal)
        {
            tracing::warn!(%error, "a rank could not be signalled");
        }
    }
}

fn code_of(status: std::io::Result<ExitStatus>) -> i32 {
    // A rank killed by a signal has no code; the shell's 128 + n is not needed, only that it failed.
    status.ok().and_then(|status| status.code()).unwrap_or(1)
}

/// The cause rather than its effects: when one rank fails, the others lose a peer.
fn overall(codes: impl Iterator<Item = i32>) -> i32 {
    let weight = |code: &i32| match *code {
        exit_code::USER_ERROR => 6,
        exit_code::NON_FINITE => 5,
        exit_code::HUNG => 4,
        exit_code::DONE => 0,
        exit_code::LOST_PEER => 1,
        exit_code::STOPPED => 2,
        _ => 3,
    };
    codes.max_by_key(weight).unwrap_or(exit_code::DONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_wins_over_its_effects() {
        for (codes, expected) in [
            (vec![0, 0], 0),
            (vec![42, 3, 42], 3),
            (vec![42, 1], 1),
            (vec![42, 0], 42),
            (vec![42, 44], 44),
            (vec![42, 45], 45),
            (vec![45, 1], 1),
        ] {
            assert_eq!(overall(codes.into_iter()), expected);
        }
    }
}
