//! Progress over gRPC: a background task holds one stream and opens it again when it is lost. Updates replace each
//! other, so a slow or absent operator costs nothing.

use std::time::Duration;

use tokio::{sync::watch, task::JoinHandle};
use tokio_stream::{StreamExt, wrappers::WatchStream};
use tonic::transport::Endpoint;

mod wire {
    #![allow(clippy::all, missing_docs)]
    tonic::include_proto!("athanor.train.v1");
}

pub use wire::ProgressUpdate;
use wire::progress_client::ProgressClient;

const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// At most this many updates a second go out.
const BETWEEN_UPDATES: Duration = Duration::from_millis(200);

/// The sending end; dropping it ends the stream.
pub struct Sender {
    newest: watch::Sender<ProgressUpdate>,
    task: JoinHandle<()>,
}

impl Sender {
    /// Starts to report to `address`. Call inside a tokio runtime.
    ///
    /// # Errors
    /// An address that is no URI.
    pub fn start(address: &str) -> Result<Self, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(address.to_owned())?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_while_idle(true);
        let (newest, updates) = watch::channel(ProgressUpdate::default());
        Ok(Self { newest, task: tokio::spawn(keep_reporting(endpoint, updates)) })
    }

    pub fn send(&self, update: ProgressUpdate) {
        self.newest.send_replace(update);
    }

    /// Ends the stream and waits for the operator to have read it, `patience` at most.
    pub async fn finish(self, patience: Duration) {
        drop(self.newest);
        if tokio::time::timeout(patience, self.task).await.is_err() {
            tracing::debug!("the last progress did not arrive");
        }
    }
}

async fn keep_reporting(endpoint: Endpoint, updates: watch::Receiver<ProgressUpdate>) {
    let mut pause = FIRST_PAUSE;
    // The receiver fails once the sender is gone: then nothing is left to send.
    while updates.has_changed().is_ok() {
        match report(&endpoint, updates.clone()).await {
            Ok(()) => pause = FIRST_PAUSE,
            Err(error) => tracing::debug!(code = ?error.code(), message = error.message(), "progress was not taken"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn report(endpoint: &Endpoint, updates: watch::Receiver<ProgressUpdate>) -> Result<(), tonic::Status> {
    let channel = endpoint.connect().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let stream = WatchStream::new(updates).filter(|update| !update.run_id.is_empty()).throttle(BETWEEN_UPDATES);
    ProgressClient::new(channel).report(stream).await?;
    Ok(())
}
