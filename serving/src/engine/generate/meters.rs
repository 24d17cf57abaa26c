//! Metrics by vLLM's names, so that dashboards and autoscalers made for vLLM read this engine. Each has the label
//! `model_name`.

use metrics::SharedString;

use super::sequence::FinishReason;

/// Records for one model.
pub(super) struct Meters {
    model: SharedString,
}

impl Meters {
    /// A counter that has never counted is zero, not absent.
    pub(super) fn new(model: &str) -> Self {
        let meters = Self { model: SharedString::from(std::sync::Arc::<str>::from(model)) };
        for name in ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total"] {
            meters.count(name, 0);
        }
        meters.proposed(0, 0, 0);
        meters.state(0, 0, 0.0);
        meters
    }

    fn count(&self, name: &'static str, by: usize) {
        metrics::counter!(name, "model_name" => self.model.clone()).increment(by as u64);
    }

    fn record(&self, name: &'static str, seconds: f64) {
        metrics::histogram!(name, "model_name" => self.model.clone()).record(seconds);
    }

    fn set(&self, name: &'static str, value: f64) {
        metrics::gauge!(name, "model_name" => self.model.clone()).set(value);
    }

    /// A sequence runs for the first time. Tokens that the prefix cache has are counted as well.
    pub(super) fn admitted(&self, prompt_tokens: usize, queued_seconds: f64) {
        self.count("vllm:prompt_tokens_total", prompt_tokens);
        self.record("vllm:request_queue_time_seconds", queued_seconds);
    }

    pub(super) fn preempted(&self, sequences: usize) {
        self.count("vllm:num_preemptions_total", sequences);
    }

    /// Tokens that were proposed for a number of sequences and computed, and those of them that were right.
    pub(super) fn proposed(&self, sequences: usize, tokens: usize, right: usize) {
        self.count("vllm:spec_decode_num_drafts_total", sequences);
        self.count("vllm:spec_decode_num_draft_tokens_total", tokens);
        self.count("vllm:spec_decode_num_accepted_tokens_total", right);
    }

    /// A token of an answer, as many seconds after the request if it is the first one, else after the token before it.
    pub(super) fn token(&self, is_first: bool, seconds: f64) {
        self.count("vllm:generation_tokens_total", 1);
        match is_first {
            true => self.record("vllm:time_to_first_token_seconds", seconds),
            false => self.record("vllm:inter_token_latency_seconds", seconds),
        }
    }

    /// An answer is complete, as many seconds after its request.
    pub(super) fn finished(&self, reason: FinishReason, seconds: f64) {
        let reason = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        let labels = [("model_name", self.model.clone()), ("finished_reason", SharedString::const_str(reason))];
        metrics::counter!("vllm:request_success_total", &labels).increment(1);
        self.record("vllm:e2e_request_latency_seconds", seconds);
    }

    /// Sequences at the moment, and the used share of the cache, 0 to 1.
    pub(super) fn state(&self, running: usize, waiting: usize, cache_usage: f64) {
        self.set("vllm:num_requests_running", running as f64);
        self.set("vllm:num_requests_waiting", waiting as f64);
        self.set("vllm:kv_cache_usage_perc", cache_usage);
    }
}
