//! Sources to the rows of a dataset: read in any format, cleaned, annotated, and split. The same digest gives the same rows.
//!
//! Leaves out tokens and tensors: those are the trainer's.
