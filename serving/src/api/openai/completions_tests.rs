//! What `/v1/completions` has and a chat has not: echoed prompts, their log-probabilities, the best of several answers.

use serde_json::{Value, json};

use super::generate_tests::{application, ask, events, limits, send};
use crate::service::generate::{Completed, best};

const TEXT: &str = "/v1/completions";

fn numbers(value: &Value) -> Vec<Option<f64>> {
    value.as_array().unwrap().iter().map(Value::as_f64).collect()
}

#[tokio::test]
async fn an_echoed_prompt_has_log_probabilities_and_offsets() {
    let (app, _, _) = application(limits());
    let body =
        ask(&app, TEXT, json!({"prompt": "[ab]", "temperature": 0, "echo": true, "logprobs": 1, "stop": "b"})).await;
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], "[ab]a", "the prompt is not searched for stop strings");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["[", "a", "b", "]", "\u{1}", "a"]));
    // The last token of the prompt is not in its text.
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4, 4]));
    // In the middle of a prompt the rule's model has 10 for its end token, 5 for the next and 0 for 256 others.
    let sum = (10_f64.exp() + 5_f64.exp() + 256.0).ln();
    let found = numbers(&logprobs["token_logprobs"]);
    assert_eq!(found[0], None);
    for (index, expected) in [-sum, -sum, -sum, -sum, 10.0 - sum].into_iter().enumerate() {
        let found = found[index + 1].unwrap();
        assert!((found - expected).abs() < 1e-4, "{index}: {found}, {expected}");
    }
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert!(logprobs["top_logprobs"][1]["<end>"].is_f64(), "{logprobs}");
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(5), &json!(2)));
}

#[tokio::test]
async fn an_echo_alone_needs_no_answer_and_each_prompt_has_its_own() {
    let (app, _, _) = application(limits());
    for (logprobs, expected) in [(Value::Null, 0), (json!(0), 5)] {
        let request = json!({"prompt": "[ab]", "echo": true, "max_tokens": 0, "logprobs": logprobs});
        let body = ask(&app, TEXT, request).await;
        let choice = &body["choices"][0];
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("[ab]"), &json!("length")));
        assert_eq!(choice["logprobs"]["tokens"].as_array().map_or(0, Vec::len), expected, "{choice}");
        assert_eq!(body["usage"]["completion_tokens"], 0);
    }
    let body =
        ask(&app, TEXT, json!({"prompt": ["[ab]", "[c]"], "n": 2, "echo": true, "temperature": 0, "max_tokens": 1}));
    let body = body.await;
    let texts: Vec<&Value> = body["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts, ["[ab]a", "[ab]a", "[c]c", "[c]c"]);
    let tokens: Vec<u32> = "[ab]".bytes().map(u32::from).chain([crate::test_support::BEGIN]).collect();
    let body = ask(&app, TEXT, json!({"prompt": tokens, "echo": true, "temperature": 0})).await;
    assert_eq!(body["choices"][0]["text"], "[ab]\u{1}ab", "the text of the tokens");
    let (_, text) = send(&app, TEXT, json!({"prompt": "[ab]", "temperature": 0, "echo": true, "stream": true})).await;
    let events = events(&text);
    let texts: Vec<&Value> = events.iter().filter_map(|event| event["choices"][0].get("text")).collect();
    assert_eq!(texts, ["[ab]", "a", "b", ""]);
}

#[tokio::test]
async fn log_probabilities_of_a_prompt_do_without_the_cache() {
    let (app, _, _) = application(limits());
    let prompt = "x".repeat(12) + "[ab]";
    let cached = async |more: Value| {
        let mut request = json!({"prompt": prompt, "temperature": 0});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let body = ask(&app, TEXT, request).await;
        body["usage"]["prompt_tokens_details"]["cached_tokens"].clone()
    };
    assert_eq!(cached(json!({})).await, 0);
    assert_eq!(cached(json!({"echo": true, "logprobs": 0})).await, 0);
    assert_eq!(cached(json!({"echo": true})).await, 16);
}

#[tokio::test]
async fn the_best_answers_are_kept_and_all_are_counted() {
    let (app, _, _) = application(limits());
    let request = |n: usize, best_of: usize| {
        let mut request = json!({"prompt": "[aaaaaa]", "temperature": 2, "seed": 7, "max_tokens": 12, "n": n});
        request["best_of"] = json!(best_of);
        request
    };
    let all = ask(&app, TEXT, request(4, 4)).await;
    let texts: Vec<&Value> = all["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
    let kept = ask(&app, TEXT, request(2, 4)).await;
    let choices = kept["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert!(choices.iter().all(|choice| texts.contains(&&choice["text"]) && choice["logprobs"].is_null()), "{kept}");
    assert_eq!(kept["usage"]["completion_tokens"], all["usage"]["completion_tokens"]);
    for (more, param, code) in [
        (json!({"best_of": 2, "stream": true}), "best_of", "invalid_field"),
        (json!({"best_of": 5}), "n", "too_many_answers"),
        (json!({"logprobs": 21}), "logprobs", "invalid_field"),
        (json!({"max_tokens": 0}), "max_tokens", "invalid_field"),
    ] {
        let mut request = json!({"prompt": "x"});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (parts, text) = send(&app, TEXT, request).await;
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parts.status, 400, "{more}: {text}");
        assert_eq!((&error["error"]["param"], &error["error"]["code"]), (&json!(param), &json!(code)), "{more}");
    }
}

#[tokio::test]
async fn answers_are_measured_by_the_conventions_for_generative_ai() {
    let metrics = athanor_telemetry::metrics();
    let (app, _, _) = application(limits());
    ask(&app, TEXT, json!({"prompt": "[ab]", "temperature": 0})).await;
    let text = metrics.render();
    let labels = r#"gen_ai_operation_name="text_completion",gen_ai_request_model="writer""#;
    for line in [
        format!("gen_ai_server_time_to_first_token_seconds_count{{{labels}}}"),
        format!("gen_ai_server_request_duration_seconds_count{{{labels}}}"),
        format!("gen_ai_server_request_duration_seconds_bucket{{{labels},le=\"81.92\"}}"),
        format!("gen_ai_server_time_per_output_token_seconds_bucket{{{labels},le=\"0.75\"}}"),
        format!("gen_ai_client_token_usage_count{{{labels},gen_ai_token_type=\"input\"}}"),
        format!("gen_ai_client_token_usage_bucket{{{labels},gen_ai_token_type=\"output\",le=\"4\"}}"),
    ] {
        assert!(text.contains(&line), "{line} is not in {text}");
    }
}

#[test]
fn the_best_are_those_of_each_prompt_with_the_highest_mean() {
    let completed = |mean: f64| Completed {
        text: mean.to_string(),
        logprobs: Vec::new(),
        reason: crate::engine::generate::sequence::FinishReason::Stop,
        completion_tokens: 1,
        cached_tokens: 0,
        mean_logprob: mean,
    };
    let all = [-3.0, -1.0, -2.0, -6.0, -5.0, -4.0].map(completed).to_vec();
    let means: Vec<f64> = best(all, 2, 3).iter().map(|one| one.mean_logprob).collect();
    assert_eq!(means, [-1.0, -2.0, -4.0, -5.0]);
}
