//! The loop on a real cluster, after `make demo` and, for what has to do with language models, `make demo-chat`. One
//! program: each would link the Kubernetes client anew. Run with one test thread; each test has a namespace of its own.

mod access;
mod adapters;
mod bad_requests;
mod canary;
mod chaos;
mod chat;
mod container;
mod kills;
