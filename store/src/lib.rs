//! Object stores and files behind one URI (`s3://`, `gs://`, `az://`, `http(s)://`, `file://`), and artifacts in them.
//!
//! Credentials and endpoints come from the environment by the names each provider's tools use (`AWS_ENDPOINT_URL`,
//! `AWS_ACCESS_KEY_ID`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_NAME`, ...). No caching, no retries beyond the client's.

mod adapter;
pub mod artifact;
mod download;
mod error;
mod location;
mod model_folder;
mod stream;

pub use adapter::download_adapter;
pub use error::StoreError;
pub use location::{Location, open, settle_tls};
