//! Where the router's configuration and the revisions' endpoints come from.

pub mod kubernetes;
pub mod local;
