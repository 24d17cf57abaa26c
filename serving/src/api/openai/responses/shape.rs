//! The JSON of a response and of its parts.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{super::usage::Usage, output::Output};
use crate::{engine::generate::sequence::FinishReason, service::generate::Completed};

/// What all JSON of one response has in common.
pub struct Shape {
    id: String,
    created: i64,
    model: String,
    /// Parameters of the request, which a response repeats.
    parameters: Map<String, Value>,
}

/// Why a response ended, in its own terms.
pub fn status(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "completed",
        FinishReason::Length => "incomplete",
    }
}

impl Shape {
    pub fn new(model: &str, parameters: Map<String, Value>) -> Self {
        Self {
            id: format!("resp_{}", Uuid::now_v7().simple()),
            created: jiff::Timestamp::now().as_second(),
            model: model.to_owned(),
            parameters,
        }
    }

    /// A whole response.
    pub fn complete(&self, completed: &Completed, mut output: Output, usage: &Usage) -> Value {
        let status = status(completed.reason);
        output.piece(&completed.text, &completed.logprobs);
        output.end(status);
        self.response(status, output.items(), Some(usage))
    }

    /// A response with this output so far.
    pub fn response(&self, status: &str, output: Vec<Value>, usage: Option<&Usage>) -> Value {
        let is_incomplete = status == "incomplete";
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": is_incomplete.then(|| json!({"reason": "max_output_tokens"})),
            "model": self.model,
            "output": output,
            "previous_response_id": null,
            "reasoning": {"effort": null, "summary": null},
            "store": false,
            "truncation": "disabled",
        });
        if let Some(fields) = response.as_object_mut() {
            fields.extend(self.parameters.clone());
        }
        // Last, where a router looks for it.
        response["usage"] = json!(usage.map(usage_json));
        response
    }

    /// A response that ended with an error.
    pub fn failed(&self, message: &str) -> Value {
        let mut response = self.response("failed", Vec::new(), None);
        response["error"] = json!({"code": "server_error", "message": message});
        response
    }
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    })
}
