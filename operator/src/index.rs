//! Names of the objects that have a value of a label, so that a reconcile does not look through all objects of a kind.

use std::collections::{BTreeSet, HashMap};

use kube::{Resource, ResourceExt};

/// Names of objects by the values of some labels.
#[derive(Debug)]
pub struct Index {
    labels: &'static [&'static str],
    names: HashMap<Entry, BTreeSet<String>>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Entry {
    label: &'static str,
    namespace: String,
    value: String,
}

impl Index {
    /// Makes an empty index of these labels.
    pub fn new(labels: &'static [&'static str]) -> Self {
        Self { labels, names: HashMap::new() }
    }

    /// Returns the names of the objects of a namespace whose label has the value.
    ///
    /// # Panics
    /// The label is not indexed.
    pub fn names(&self, namespace: &str, label: &str, value: &str) -> Vec<String> {
        let label = self.labels.iter().find(|one| **one == label).expect("a label that is indexed");
        let entry = Entry { label, namespace: namespace.to_owned(), value: value.to_owned() };
        self.names.get(&entry).map(|names| names.iter().cloned().collect()).unwrap_or_default()
    }

    /// Adds an object that is not there.
    pub fn add(&mut self, object: &impl Resource) {
        for entry in entries(self.labels, object) {
            self.names.entry(entry).or_default().insert(object.name_any());
        }
    }

    /// Removes an object as it was added.
    pub fn remove(&mut self, object: &impl Resource) {
        let name = object.name_any();
        for entry in entries(self.labels, object) {
            if let Some(names) = self.names.get_mut(&entry) {
                names.remove(&name);
                if names.is_empty() {
                    self.names.remove(&entry);
                }
            }
        }
    }

    pub fn clear(&mut self) {
        self.names.clear();
    }
}

fn entries(labels: &'static [&'static str], object: &impl Resource) -> impl Iterator<Item = Entry> {
    let namespace = object.namespace().unwrap_or_default();
    labels.iter().filter_map(move |label| {
        let value = object.labels().get(*label)?.clone();
        Some(Entry { label, namespace: namespace.clone(), value })
    })
}
