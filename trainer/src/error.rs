//! Why a run ended early, and the exit code by which the operator decides.

use std::path::Path;

use athanor_contract::train::exit_code;
use athanor_data::DataError;
use athanor_models::LoadError;
use athanor_store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The job or its data must be changed. The message names the field or the row.
    #[error("{0}")]
    User(String),
    #[error("lost a peer: {0}")]
    LostPeer(String),
    /// This process, or another rank's, was asked to stop.
    #[error("asked to stop at step {step}, checkpointed at step {checkpoint}")]
    Stopped { step: u64, checkpoint: u64 },
    #[error(
        "step {step}: {what} is not finite; lower learningRate, or set failurePolicy.onNonFinite to Skip or RollBack"
    )]
    NonFinite { step: u64, what: &'static str },
    /// Under the policy RollBack, time and again.
    #[error(
        "step {step}: {what} is not finite, after {times} roll-backs to step {checkpoint} without a new checkpoint; lower learningRate"
    )]
    RolledBackInVain { step: u64, what: &'static str, times: u32, checkpoint: u64 },
    /// Anything else: it counts against maxRestarts.
    #[error("{0}")]
    Other(String),
}

impl TrainError {
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::User(_) => exit_code::USER_ERROR,
            Self::LostPeer(_) => exit_code::LOST_PEER,
            Self::Stopped { .. } => exit_code::STOPPED,
            Self::NonFinite { .. } | Self::RolledBackInVain { .. } => exit_code::NON_FINITE,
            Self::Other(_) => 1,
        }
    }

    /// A file or folder that cannot be read or written; for `map_err`.
    pub fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Other(format!("{}: {error}", path.display()))
    }

    pub fn other(error: impl std::fmt::Display) -> Self {
        Self::Other(error.to_string())
    }
}

impl From<StoreError> for TrainError {
    fn from(error: StoreError) -> Self {
        if error.is_user_error() { Self::User(error.to_string()) } else { Self::Other(error.to_string()) }
    }
}

impl From<DataError> for TrainError {
    fn from(error: DataError) -> Self {
        match error {
            DataError::User(message) => Self::User(message),
            DataError::Other(message) => Self::Other(message),
        }
    }
}

impl From<LoadError> for TrainError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Torch(_) | LoadError::Shim(_) => Self::Other(error.to_string()),
            error => Self::User(error.to_string()),
        }
    }
}

impl From<athanor_torch::Error> for TrainError {
    fn from(error: athanor_torch::Error) -> Self {
        match error {
            athanor_torch::Error::LostPeer(message) => Self::LostPeer(message),
            athanor_torch::Error::Torch(message) => Self::Other(format!("libtorch: {message}")),
        }
    }
}

impl From<tch::TchError> for TrainError {
    fn from(error: tch::TchError) -> Self {
        // libtorch appends a C++ stack trace to its first line.
        Self::Other(format!("libtorch: {}", error.to_string().lines().next().unwrap_or_default()))
    }
}
