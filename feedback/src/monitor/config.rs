//! The mounted configuration file, which the operator changes when revisions change.

use std::{path::PathBuf, time::Duration};

use athanor_contract::monitor::MonitorConfig;

/// Between attempts after an error, and between looks at the configuration.
pub const PAUSE: Duration = Duration::from_secs(1);

pub struct ConfigFile {
    path: PathBuf,
    /// Content that was last read, valid or not.
    content: Option<Vec<u8>>,
}

impl ConfigFile {
    pub fn new(path: PathBuf) -> Self {
        Self { path, content: None }
    }

    /// Waits for a readable and valid file.
    pub async fn next(&mut self) -> MonitorConfig {
        let mut last_complaint = String::new();
        loop {
            match self.read().await {
                Ok(config) => return config,
                Err(complaint) if complaint != last_complaint => {
                    tracing::error!(path = %self.path.display(), complaint, "the configuration cannot be used");
                    last_complaint = complaint;
                }
                Err(_) => {}
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Ends when the file holds something else than what was last read. A ConfigMap's volume is swapped as a whole, so the content
    /// is compared, not the time.
    pub async fn changed(&self) {
        loop {
            tokio::time::sleep(PAUSE).await;
            if let Ok(content) = tokio::fs::read(&self.path).await
                && Some(&content) != self.content.as_ref()
            {
                return;
            }
        }
    }

    async fn read(&mut self) -> Result<MonitorConfig, String> {
        let content = tokio::fs::read(&self.path).await.map_err(|error| error.to_string())?;
        let parsed = serde_json::from_slice::<MonitorConfig>(&content).map_err(|error| error.to_string());
        self.content = Some(content);
        let config = parsed?;
        if config.revisions.is_empty() {
            return Err("revisions is empty: there is nothing to watch yet".into());
        }
        Ok(config)
    }
}
