//! Why there is no dataset, sorted by who can mend it.

use athanor_feedback::SnapshotError;
use athanor_store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The user has to change the job or its data; trying again does not help. The message names file, row and field.
    #[error("{0}")]
    User(String),
    /// Anything else, such as a store that does not answer: a later try may do.
    #[error("{0}")]
    Other(String),
}

impl From<StoreError> for DataError {
    fn from(error: StoreError) -> Self {
        if error.is_user_error() { Self::User(error.to_string()) } else { Self::Other(error.to_string()) }
    }
}

impl From<SnapshotError> for DataError {
    fn from(error: SnapshotError) -> Self {
        if error.is_user_error() { Self::User(error.to_string()) } else { Self::Other(error.to_string()) }
    }
}
