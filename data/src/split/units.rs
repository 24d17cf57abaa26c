//! Rows that are never parted, and the key by which each is placed.

use std::collections::HashMap;

use crate::Rows;

/// The row whose key decides, for each row; without groups and clusters each row decides for itself.
pub(super) struct Units<'a> {
    rows: &'a Rows,
    deciding: Option<Vec<u32>>,
}

impl<'a> Units<'a> {
    /// Rows of one group are a unit, and so are rows of one cluster (near duplicates, the same number); where both overlap, all
    /// of them together.
    pub fn new(rows: &'a Rows, clusters: Option<&[u32]>) -> Self {
        if !rows.has_groups() && clusters.is_none() {
            return Self { rows, deciding: None };
        }
        let mut parents: Vec<u32> = (0..rows.len() as u32).collect();
        let mut first_of_group = vec![None; rows.group_count()];
        for row in 0..rows.len() {
            if let Some(group) = rows.group_number(row) {
                let first = *first_of_group[group as usize].get_or_insert(row as u32);
                join(&mut parents, first, row as u32);
            }
        }
        if let Some(clusters) = clusters {
            let mut first_of_cluster = HashMap::new();
            for (row, &cluster) in clusters.iter().enumerate() {
                let first = *first_of_cluster.entry(cluster).or_insert(row as u32);
                join(&mut parents, first, row as u32);
            }
        }
        // The smallest key decides: it is the same in whatever order the rows come.
        let mut smallest: Vec<u32> = (0..rows.len() as u32).collect();
        for row in 0..rows.len() as u32 {
            let root = find(&mut parents, row) as usize;
            if key_of(rows, row) < key_of(rows, smallest[root]) {
                smallest[root] = row;
            }
        }
        for row in 0..rows.len() as u32 {
            let root = find(&mut parents, row);
            parents[row as usize] = root;
        }
        parents.iter_mut().for_each(|root| *root = smallest[*root as usize]);
        Self { rows, deciding: Some(parents) }
    }

    /// What is hashed for a row: the smallest group of its unit or, where it has none, the smallest text.
    pub fn key(&self, row: usize) -> &'a str {
        self.identity(row).1
    }

    /// The key of a row's unit, and whether it is a text: rows of one unit have the same.
    pub fn identity(&self, row: usize) -> (bool, &'a str) {
        let deciding = self.deciding.as_ref().map_or(row as u32, |deciding| deciding[row]);
        key_of(self.rows, deciding)
    }

    /// A row's own text, as [`Self::identity`] of a row that decides for itself.
    pub fn text(&self, row: usize) -> (bool, &'a str) {
        (true, self.rows.text(row))
    }
}

/// Groups are before texts, so that a group's rows are where the group is, whatever their near duplicates are.
fn key_of(rows: &Rows, row: u32) -> (bool, &str) {
    match rows.group(row as usize) {
        Some(group) => (false, group),
        None => (true, rows.text(row as usize)),
    }
}

fn find(parents: &mut [u32], mut row: u32) -> u32 {
    while parents[row as usize] != row {
        let above = parents[row as usize];
        parents[row as usize] = parents[above as usize];
        row = above;
    }
    row
}

fn join(parents: &mut [u32], a: u32, b: u32) {
    let (a, b) = (find(parents, a), find(parents, b));
    // The smaller row is the root, so that paths stay short where rows of a unit are joined in order.
    parents[a.max(b) as usize] = a.min(b);
}
