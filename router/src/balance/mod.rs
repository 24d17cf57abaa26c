//! Which endpoint answers a request: endpoints and their load, the choice, and attempts until one answers.

pub mod client;
pub mod endpoints;
pub mod forward;
pub mod select;
