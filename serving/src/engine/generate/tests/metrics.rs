//! Metrics by vLLM's names.

use super::*;

#[tokio::test]
async fn vllms_metrics_have_the_models_name() {
    let metrics = athanor_telemetry::metrics();
    let engine = Engine::start(Fake::new(20, Arc::default()), limits(9, 6), "measured").unwrap();
    assert_eq!(&**engine.model(), "measured");
    run(&engine, request(&[1, 2, 3], 5)).await.unwrap();
    until(&engine, "the end", |load| load == IDLE).await;
    let text = metrics.render();
    for line in [
        r#"vllm:prompt_tokens_total{model_name="measured"} 3"#,
        r#"vllm:generation_tokens_total{model_name="measured"} 5"#,
        r#"vllm:num_preemptions_total{model_name="measured"} 0"#,
        r#"vllm:time_to_first_token_seconds_count{model_name="measured"} 1"#,
        r#"vllm:inter_token_latency_seconds_count{model_name="measured"} 4"#,
        r#"vllm:e2e_request_latency_seconds_count{model_name="measured"} 1"#,
        r#"vllm:spec_decode_num_draft_tokens_total{model_name="measured"} 0"#,
        r#"vllm:num_requests_waiting{model_name="measured"} 0"#,
        r#"vllm:request_success_total{model_name="measured",finished_reason="length"} 1"#,
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}
