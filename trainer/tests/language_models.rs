//! Language models by the real binary, on a decoder of two layers with random weights.

mod place;

use std::path::Path;

use athanor_contract::train::TrainResult;
use place::{Place, folder};
use serde_json::{Value, json};

/// Words of the tokenizer; a token each.
const WORDS: [&str; 12] =
    ["who", "lends", "borrows", "bank", "borrower", "nobody", "says", "it", "user", "assistant", "the", "and"];
/// Marks of the chat template, tokens as well.
const MARKS: [&str; 3] = ["<|start|>", "<|end|>", "<|pad|>"];
const TEMPLATE: &str = "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}\
                        {% endif %}<|start|> {{ message.role }} {{ message.content }} <|end|>{% endfor %}\
                        {% if add_generation_prompt %}<|start|> assistant {% endif %}";

/// A decoder with a tokenizer of whole words, in the folder `decoder`.
fn decoder(place: &Place) {
    let to = place.folder.path().join("decoder");
    std::fs::create_dir(&to).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden/decoders/llama");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), to.join(name)).unwrap();
    }
    // Byte-level: a space is a token of its own, as nothing merges.
    let letters: Vec<String> = ('a'..='z').map(String::from).chain(["Ġ".into(), "Ċ".into()]).collect();
    let vocabulary: serde_json::Map<String, Value> = MARKS
        .iter()
        .map(|mark| mark.to_string())
        .chain(letters)
        .zip(0..)
        .map(|(token, id)| (token, id.into()))
        .collect();
    let added = MARKS.iter().zip(0..).map(|(mark, id)| {
        json!({"id": id, "content": mark, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": []},
    });
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"eos_token": "<|end|>", "chat_template": TEMPLATE});
    std::fs::write(to.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// Conversations of a few words, of different lengths.
fn conversations(place: &Place) {
    let row = |number: usize| {
        let word = |place: usize| WORDS[(number * 7 + place * 5) % WORDS.len()];
        let question = (0..2 + number % 3).map(word).collect::<Vec<_>>().join(" ");
        let answer = if number.is_multiple_of(2) { "bank" } else { "nobody" };
        let messages = json!([
            {"role": "user", "content": format!("{question} {}", "and ".repeat(number / 24))},
            {"role": "assistant", "content": answer},
        ]);
        format!("{}\n", json!({"messages": messages}))
    };
    std::fs::write(place.folder.path().join("chat.jsonl"), (0..72).map(row).collect::<String>()).unwrap();
}

fn spec(place: &Place, more: &Value) -> Value {
    let mut spec = json!({
        "model": {"from": place.uri("decoder"), "task": "CausalLanguageModel"},
        "data": {
            "sources": [{"name": "chats", "uri": place.uri("chat.jsonl"), "columns": {"messages": "messages"}}],
        },
        "hyperparameters": {"maxSteps": 6, "batchSize": 9, "precision": "FP32", "maxSequenceLength": 96, "learningRate": 1e-3},
        "evaluate": {"generation": {"samples": 6, "maxNewTokens": 8}},
    });
    for (part, fields) in more.as_object().unwrap() {
        match spec.get_mut(part).and_then(Value::as_object_mut) {
            Some(known) => known.extend(fields.as_object().unwrap().clone()),
            None => spec[part] = fields.clone(),
        }
    }
    spec
}

fn run(place: &Place, out: &str, more: &Value) -> Vec<f64> {
    let child = place.start(out, &spec(place, more));
    place.finish(out, child, 0);
    place.losses(out).into_iter().map(|(_, loss)| loss).collect()
}

fn assert_close(found: &[f64], expected: &[f64], name: &str) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (step, (a, b)) in found.iter().zip(expected).enumerate() {
        // Sums in another order, made larger by the optimizer.
        assert!((a - b).abs() < 2e-4 * b.abs().max(1.0), "{name}, step {step}: {a} is not {b}");
    }
}

/// The loss is divided by the targets of the whole batch, wherever they are computed.
#[test]
fn ranks_and_parts_have_the_losses_of_one_pass() {
    let place = Place::new(0.0);
    decoder(&place);
    conversations(&place);
    for (kind, adapter) in [("all weights", json!({})), ("lora", json!({"adapter": {"lora": {"rank": 4}}}))] {
        let with = |more: Value| {
            let mut all = adapter.clone();
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            all
        };
        let one = run(&place, &format!("one-{kind}"), &with(json!({})));
        assert_eq!(one.len(), 6);
        let two_ranks = with(json!({"distributed": {"processesPerNode": 2, "backend": "Gloo"}}));
        assert_close(&run(&place, &format!("two-{kind}"), &two_ranks), &one, &format!("{kind}, two ranks"));
        let parts = with(json!({"hyperparameters": {"accumulateSteps": 3}}));
        assert_close(&run(&place, &format!("parts-{kind}"), &parts), &one, &format!("{kind}, three parts"));
    }
}

#[test]
fn an_artifact_has_the_model_its_tokenizer_its_adapter_and_answers() {
    let place = Place::new(0.0);
    decoder(&place);
    conversations(&place);
    let gates =
        json!([{"metric": "Perplexity", "maximum": "1000"}, {"metric": "TokenAccuracy", "minimumGain": "0.01"}]);
    let more = json!({
        "adapter": {"lora": {"rank": 8}},
        "hyperparameters": {"maxSteps": 60, "learningRate": 2e-2},
        "evaluate": {"gates": gates, "generation": {"samples": 6, "maxNewTokens": 8}},
    });
    let losses = run(&place, "out", &more);
    assert!(losses[59] < losses[0] / 2.0, "it learns: {losses:?}");
    let summary = place.summary("out");
    for name in ["perplexity", "tokenAccuracy", "exactMatch", "tokenF1", "crossEntropy"] {
        for prefix in ["", "baseline/"] {
            assert!(summary.metrics.contains_key(&format!("{prefix}{name}")), "{prefix}{name}: {:?}", summary.metrics);
        }
    }
    assert!(summary.metrics.contains_key("chats/tokenF1"), "{:?}", summary.metrics);
    let artifact = folder(&summary.artifact);
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "report.html",
    ] {
        assert!(artifact.join(name).exists(), "{name}");
    }
    let read = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(artifact.join(name)).unwrap()).unwrap() };
    let reference = read("reference.json");
    assert_eq!(reference["rows"], 6, "{reference}");
    assert_eq!(reference["answerTokens"].as_array().unwrap().len(), 6, "{reference}");
    let answers = read("report.json")["answers"].clone();
    assert_eq!(answers.as_array().unwrap().len(), 6);
    assert!(answers[0]["baseline"].is_string() && answers[0]["expected"].is_string(), "{answers}");
}

/// A checkpoint of adapters has no weight of the model, and a run that goes on from it ends as one that was not cut.
#[test]
fn a_run_goes_on_from_a_checkpoint_of_adapters_alone() {
    let place = Place::new(0.0);
    decoder(&place);
    conversations(&place);
    let steps = |steps: u32| {
        json!({
            "adapter": {"lora": {"rank": 4, "dropout": 0.1}},
            "hyperparameters": {"maxSteps": steps, "schedule": "Constant", "warmupRatio": 0.0},
            "checkpoint": {"everySteps": 2},
        })
    };
    let whole = run(&place, "whole", &steps(6));
    let manifest = place.manifest("cut", &spec(&place, &steps(6)));
    let mut child = place.start("cut", &spec(&place, &steps(6)));
    while place.losses("cut").len() < 3 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was cut");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(manifest.exists());
    run(&place, "cut", &steps(6));
    let mut by_step = std::collections::BTreeMap::new();
    by_step.extend(place.losses("cut"));
    assert_close(&by_step.into_values().collect::<Vec<_>>(), &whole, "a cut run");
    let mut checkpoints = Vec::new();
    find(&place.folder.path().join("whole"), "model.safetensors", &mut checkpoints);
    let small: Vec<u64> = checkpoints
        .iter()
        .filter(|path| path.to_string_lossy().contains("checkpoints"))
        .map(|path| std::fs::metadata(path).unwrap().len())
        .collect();
    let base = std::fs::metadata(place.folder.path().join("decoder/model.safetensors")).unwrap().len();
    assert!(!small.is_empty() && small.iter().all(|size| *size < base / 2), "{small:?} of {base} bytes");
}

fn find(folder: &Path, name: &str, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            find(&path, name, found);
        } else if path.file_name().is_some_and(|file| file == name) {
            found.push(path);
        }
    }
}

#[test]
fn packing_keeps_documents_apart() {
    let place = Place::new(0.0);
    decoder(&place);
    conversations(&place);
    // All rows of an epoch are one batch: packed or not, the loss is the mean over the same targets.
    let whole = |packing: bool| json!({"hyperparameters": {"maxSteps": 3, "batchSize": 1000, "packing": packing, "maxSequenceLength": 120}});
    let apart = run(&place, "apart", &whole(false));
    assert_close(&run(&place, "packed", &whole(true)), &apart, "packed");
}

#[test]
fn what_a_row_lacks_is_named() {
    let place = Place::new(0.0);
    decoder(&place);
    let failed = |out: &str, lines: &str, more: Value| {
        std::fs::write(place.folder.path().join("chat.jsonl"), lines.repeat(40)).unwrap();
        let spec = spec(&place, &more);
        let child = place.start(out, &spec);
        place.finish(out, child, 3);
        let TrainResult::Failed { message } = place.result(out) else { panic!("{:?}", place.result(out)) };
        assert!(place.losses(out).is_empty(), "before the first step");
        message
    };
    let user = r#"{"role": "user", "content": "who lends"}"#;
    let message = failed("open", &format!("{{\"messages\": [{user}]}}\n"), json!({}));
    assert!(
        message.contains("chat.jsonl row 1: field \"messages\": the last message is not the assistant's"),
        "{message}"
    );
    let rows = |word: &str| -> String {
        let tool = r#"{"role": "tool", "content": "x"}"#;
        (0..40)
            .map(|number| {
                let number = "and ".repeat(number);
                format!(
                    "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{number}{word}\"}}, {tool}, \
                     {{\"role\": \"assistant\", \"content\": \"bank\"}}]}}\n"
                )
            })
            .collect()
    };
    let message = failed("tool", &rows("who"), json!({}));
    assert!(message.contains("chat.jsonl row ") && message.contains("no tools here"), "{message}");
    conversations(&place);
    let short = json!({"hyperparameters": {"maxSequenceLength": 8}});
    let spec = spec(&place, &short);
    let child = place.start("short", &spec);
    place.finish("short", child, 3);
    let TrainResult::Failed { message } = place.result("short") else { panic!("{:?}", place.result("short")) };
    assert!(message.starts_with("hyperparameters.maxSequenceLength: all "), "{message}");
}
