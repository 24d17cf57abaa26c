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
    /// When the first token came.
    begun: Option<Instant>,
}

impl Meter {
    pub(super) fn new(operation: &'static str, model: Arc<str>, prompt_tokens: usize) -> Self {
        Self { operation, model, prompt_tokens, started: Instant::now(), begun: None }
    }

    /// A token has come.
    pub(super) fn token(&mut self) {
        if self.begun.is_none() {
            self.begun = Some(Instant::now());
            self.seconds("gen_ai_server_time_to_first_token_seconds", self.started.elapsed().as_secs_f64());
        }
    }

    /// The answer is complete. The time for each token is that of the tokens behind the first one, so that an answer of one
    /// token has none.
    pub(super) fn finished(&self, completion_tokens: usize) {
        self.seconds("gen_ai_server_request_duration_seconds", self.started.elapsed().as_secs_f64());
        if let Some(begun) = self.begun
            && completion_tokens > 1
        {
            let seconds = begun.elapsed().as_secs_f64() / (completion_tokens - 1) as f64;
            self.seconds("gen_ai_server_time_per_output_token_seconds", seconds);
        }
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

    fn seconds(&self, name: &'static str, seconds: f64) {
        metrics::histogram!(
            name,
            "gen_ai_operation_name" => self.operation,
            "gen_ai_request_model" => self.model.clone(),
        )
        .record(seconds);
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    #[test]
    fn the_time_of_a_token_is_the_mean_of_those_behind_the_first() {
        let metrics = athanor_telemetry::metrics();
        let answer = |tokens: usize| {
            let mut meter = Meter::new("chat", "metered".into(), 3);
            // Before the first token, so it does not count.
            thread::sleep(Duration::from_millis(60));
            for _ in 0..tokens {
                meter.token();
            }
            thread::sleep(Duration::from_millis(40));
            meter.finished(tokens);
        };
        answer(1);
        let found = |part: &str| -> Option<f64> {
            let labels = r#"gen_ai_operation_name="chat",gen_ai_request_model="metered""#;
            let line = format!("gen_ai_server_time_per_output_token_seconds_{part}{{{labels}}} ");
            metrics.render().lines().find_map(|found| found.strip_prefix(&line)).map(|value| value.parse().unwrap())
        };
        assert_eq!(found("count"), None, "an answer of one token has no such time");
        let began = Instant::now();
        answer(5);
        assert_eq!(found("count"), Some(1.0));
        let seconds = found("sum").unwrap();
        assert!(seconds >= 0.01, "40 ms and more for four tokens: {seconds}");
        let total = began.elapsed().as_secs_f64();
        assert!(seconds <= (total - 0.06) / 4.0, "the time to the first token counts: {seconds} of {total}");
    }
}
