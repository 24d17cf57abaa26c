//! What a real API server takes of the CRDs and of the chart, and what the operator does with one. One program: each
//! would link the Kubernetes client anew.

mod admission;
mod chart;
mod generated;
mod operator;
mod reconcile_faults;
mod requests;
mod rights;
