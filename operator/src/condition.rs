//! Conditions of a status, as the Kubernetes API conventions define them.

use athanor_crds::condition::GPU_IMAGE;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Most characters of a message.
const MESSAGE: usize = 1024;

/// Status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    True,
    False,
    Unknown,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for State {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

/// What a condition says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub state: State,
    pub reason: &'static str,
    pub message: String,
}

impl Value {
    pub fn new(state: State, reason: &'static str, message: impl Into<String>) -> Self {
        Self { state, reason, message: message.into() }
    }
}

/// Sets one condition; its transition time changes only with its state.
pub fn set(conditions: &mut Vec<Condition>, type_: &str, value: &Value, generation: Option<i64>, now: Timestamp) {
    let before = conditions.iter().position(|condition| condition.type_ == type_);
    let same_state = before.map(|at| &conditions[at]).filter(|condition| condition.status == value.state.as_str());
    let condition = Condition {
        type_: type_.into(),
        status: value.state.as_str().into(),
        reason: value.reason.into(),
        message: cut(&value.message, MESSAGE),
        observed_generation: generation,
        last_transition_time: same_state.map_or(Time(now), |condition| condition.last_transition_time.clone()),
    };
    match before {
        Some(at) => conditions[at] = condition,
        None => conditions.push(condition),
    }
}

/// Sets the condition GpuImage to False with a warning; without one, removes it.
pub fn warn_of_image(conditions: &mut Vec<Condition>, warning: Option<&str>, generation: Option<i64>, now: Timestamp) {
    match warning {
        Some(warning) => set(conditions, GPU_IMAGE, &Value::new(State::False, "NoCudaImage", warning), generation, now),
        None => conditions.retain(|condition| condition.type_ != GPU_IMAGE),
    }
}

/// Returns the condition of a type.
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Returns at most `most` characters of a text; the last one is an ellipsis if there were more.
pub fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.into(),
        Some(_) => text.chars().take(most - 1).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transition_time_moves_with_the_value_only() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut conditions = Vec::new();
        set(&mut conditions, "Ready", &Value::new(State::False, "Waiting", "0 of 1"), Some(1), at(10));
        set(&mut conditions, "Ready", &Value::new(State::False, "Waiting", "still"), Some(2), at(20));
        assert_eq!((conditions[0].last_transition_time.0, conditions[0].message.as_str()), (at(10), "still"));
        set(&mut conditions, "Ready", &Value::new(State::True, "Available", ""), Some(2), at(30));
        assert_eq!((conditions.len(), conditions[0].last_transition_time.0), (1, at(30)));
        assert_eq!(cut("äöü", 3), "äöü");
        assert_eq!(cut("äöüß", 3), "äö…");
    }
}
