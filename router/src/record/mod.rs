//! What is recorded of answers: signed request ids, predictions, generations and feedback as events.

pub mod events;
pub mod feedback;
pub mod generation;
pub mod hand_over;
pub mod labels;
pub mod recent;
pub mod request_id;
pub mod sse;
