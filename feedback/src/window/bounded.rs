//! A map that forgets its oldest entries.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

#[derive(Debug)]
pub(super) struct BoundedMap<K, V> {
    entries: HashMap<K, V>,
    /// Keys by age; a key that was removed stays until its turn.
    ages: VecDeque<K>,
    bound: usize,
}

impl<K: Clone + Eq + Hash, V> BoundedMap<K, V> {
    pub fn new(bound: usize) -> Self {
        Self { entries: HashMap::new(), ages: VecDeque::new(), bound }
    }

    /// Returns the value that was there; replacing does not make an entry younger.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let replaced = self.entries.insert(key.clone(), value);
        if replaced.is_none() {
            self.ages.push_back(key);
            if self.ages.len() > self.bound
                && let Some(oldest) = self.ages.pop_front()
            {
                self.entries.remove(&oldest);
            }
        }
        replaced
    }

    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key)
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.entries.remove(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_forgotten() {
        let mut map = BoundedMap::new(2);
        assert_eq!((map.insert("a", 1), map.insert("b", 2), map.insert("a", 3)), (None, None, Some(1)));
        map.insert("c", 4);
        assert_eq!((map.remove(&"a"), map.get_mut(&"b")), (None, Some(&mut 2)));
        assert_eq!(map.remove(&"c"), Some(4));
    }
}
