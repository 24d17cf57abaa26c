//! What this replica answered lately, so that feedback can be compared with it. Bounded: the oldest answers are forgotten.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use uuid::Uuid;

/// Answers that are remembered.
pub const CAPACITY: usize = 100_000;

/// A request's UUID and which of its inputs.
pub type Key = (Uuid, u32);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub revision: Arc<str>,
    pub label: Arc<str>,
}

struct Entry {
    answer: Answer,
    judged: bool,
}

#[derive(Default)]
struct State {
    entries: HashMap<Key, Entry>,
    order: VecDeque<Key>,
}

/// The newest answers by request and input.
pub struct Recent {
    state: Mutex<State>,
    capacity: usize,
}

impl Recent {
    pub fn new(capacity: usize) -> Self {
        Self { state: Mutex::default(), capacity: capacity.max(1) }
    }

    pub fn insert(&self, key: Key, answer: Answer) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.entries.insert(key, Entry { answer, judged: false }).is_none() {
            state.order.push_back(key);
        }
        while state.order.len() > self.capacity {
            if let Some(oldest) = state.order.pop_front() {
                state.entries.remove(&oldest);
            }
        }
    }

    pub fn get(&self, key: Key) -> Option<Answer> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.entries.get(&key).map(|entry| entry.answer.clone())
    }

    /// The answer, the first time it is judged; a repeated feedback counts once.
    pub fn judge(&self, key: Key) -> Option<Answer> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = state.entries.get_mut(&key).filter(|entry| !entry.judged)?;
        entry.judged = true;
        Some(entry.answer.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_newest_and_judges_once() {
        let recent = Recent::new(2);
        let answer = |label: &str| Answer { revision: "r".into(), label: label.into() };
        let key = |id| (Uuid::from_u128(id), 0);
        for (id, label) in [(1, "a"), (2, "b"), (2, "b2"), (3, "c")] {
            recent.insert(key(id), answer(label));
        }
        assert_eq!(recent.get(key(1)), None);
        assert_eq!(recent.get(key(2)), Some(answer("b2")));
        assert_eq!(recent.judge(key(3)), Some(answer("c")));
        assert_eq!(recent.judge(key(3)), None);
        assert_eq!(recent.judge(key(1)), None);
    }
}
