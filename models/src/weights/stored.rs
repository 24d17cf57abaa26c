//! Rows of matrices as a source stores them.

use athanor_cpu::Group;

use crate::load::LoadError;

/// A row of a matrix as the source stores it.
#[derive(Clone, Copy, Debug)]
pub enum StoredRow<'a> {
    Numbers(&'a [f32]),
    /// Four bits a number, in groups of 32.
    Groups(&'a [Group]),
}

/// Called with the index of a row and the row.
pub type EachRow<'a> = &'a mut dyn FnMut(usize, StoredRow<'_>) -> Result<(), LoadError>;
