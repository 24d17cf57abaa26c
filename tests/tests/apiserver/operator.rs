//! The operator as a process beside an API server.

use std::{
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use anyhow::{Context, Result, ensure};
use athanor_tests::{apiserver::ApiServer, paths};

/// Ends the process when it is dropped.
pub struct Operator(Child);

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Operator {
    /// Starts it with a log named after its identity in the folder of the server.
    pub fn start(server: &ApiServer, identity: &str, kubeconfig: &Path, arguments: &[&str]) -> Result<Self> {
        let log = std::fs::File::create(server.folder().join(format!("{identity}.log")))?;
        let child = Command::new(paths::binary("athanor-operator"))
            .args(["--progress-port=0", "--ops-port=0", "--lease-namespace=default"])
            .arg(format!("--identity={identity}"))
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("athanor-operator (cargo build --release --workspace --bins)")?;
        Ok(Self(child))
    }

    /// Sends a signal by its name.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let done = Command::new("kill").arg(format!("-{signal}")).arg(self.0.id().to_string()).status()?;
        ensure!(done.success(), "kill -{signal}");
        Ok(())
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.0.try_wait()?)
    }
}
