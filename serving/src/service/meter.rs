//! Metrics of an answer by OpenTelemetry's semantic conventions for generative AI, in Prometheus' spelling.

use std::{sync::Arc, time::Instant};

/// Measures one answer.
pub(super) struct Meter {
    /// `chat` or `text_completion`.
    operation: &'static str,
    model: Arc<str>,
    /// Tokens of the prompt that are counted with this answer.
    prompt_tokens: usize,
    started: Instant,
    has_begun: bool,
}

impl Meter {
    pub(super) fn new(operation: &'static str, model: Arc<str>, prompt_tokens: usize) -> Self {
        Self { operation, model, prompt_tokens, started: Instant::now(), has_begun: false }
    }

    /// A token has come.
    pub(super) fn token(&mut self) {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.seconds("gen_ai_server_time_to_first_token_seconds");
        }
    }

    /// The answer is complete.
    pub(super) fn finished(&self, completion_tokens: usize) {
        self.seconds("gen_ai_server_request_duration_seconds");
        for (kind, tokens) in [("input", self.prompt_tokens), ("output", completion_tokens)] {
            metrics::histogram!(
                "gen_ai_client_token_usage",
                "gen_ai_operation_name" => self.operation,
                "gen_ai_request_model" => self.model.clone(),
                "gen_ai_token_type" => kind,
            )
            .record(tokens as f64);
        }
    }

    fn seconds(&self, name: &'static str) {
        metrics::histogram!(
            name,
            "gen_ai_operation_name" => self.operation,
            "gen_ai_request_model" => self.model.clone(),
        )
        .record(self.started.elapsed().as_secs_f64());
    }
}
