//! Chat templates against `apply_chat_template` of transformers (`models/tests/golden/make_chat.py`), and the
//! assistant's part.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use athanor_models::tokenizer::chat::{Chat, ChatError, ChatTemplate, Clock, special_tokens};
use serde::Deserialize;

#[derive(Deserialize)]
struct Goldens {
    chats: BTreeMap<String, Chat>,
    templates: BTreeMap<String, Golden>,
}

#[derive(Deserialize)]
struct Golden {
    template: String,
    bos_token: String,
    eos_token: String,
    /// By conversation, without and with a generation prompt.
    rendered: BTreeMap<String, [Expected; 2]>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Expected {
    Text(String),
    Error(String),
}

fn goldens() -> Goldens {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn clock() -> Clock {
    Arc::new(|| jiff::civil::date(2026, 3, 7).at(8, 9, 10, 0))
}

fn tokens(bos: &str, eos: &str) -> BTreeMap<String, String> {
    [("bos_token".to_owned(), bos.to_owned()), ("eos_token".to_owned(), eos.to_owned())].into()
}

impl Golden {
    fn compile(&self) -> ChatTemplate {
        ChatTemplate::new(&self.template, tokens(&self.bos_token, &self.eos_token), clock()).unwrap()
    }
}

#[test]
fn templates_render_as_in_transformers() {
    let goldens = goldens();
    let mut refused = 0;
    for (name, golden) in &goldens.templates {
        let template = golden.compile();
        for (title, expected) in &golden.rendered {
            for (expected, prompt) in expected.iter().zip([false, true]) {
                let what = format!("{name}, {title}, prompt {prompt}");
                match (template.render(&goldens.chats[title], prompt), expected) {
                    (Ok(text), Expected::Text(expected)) => assert_eq!(&text, expected, "{what}"),
                    (Err(ChatError::Conversation(message)), Expected::Error(expected)) => {
                        refused += 1;
                        // Python names the missing attribute, here the operation is named that lacks it.
                        let own = expected.ends_with('!') || expected.ends_with("...");
                        assert!(!own || message.starts_with(expected), "{what}: {message} is not {expected}");
                    }
                    (Ok(text), Expected::Error(expected)) => {
                        panic!("{what}: {text:?}, but transformers says {expected}")
                    }
                    (Err(error), _) => panic!("{what}: {error}"),
                }
            }
        }
    }
    assert_eq!((goldens.templates.len(), goldens.chats.len()), (6, 12));
    assert!(refused > 0, "some conversations are refused");
}

/// What the assistant says in a conversation of the goldens.
fn said(name: &str, title: &str) -> Vec<String> {
    let goldens = goldens();
    let rendered = goldens.templates[name].compile().assistant_spans(&goldens.chats[title]).unwrap();
    let Expected::Text(text) = &goldens.templates[name].rendered[title][0] else { panic!("{title} has no text") };
    assert_eq!(&rendered.text, text);
    rendered.assistant.into_iter().map(|span| rendered.text[span].to_owned()).collect()
}

#[test]
fn the_assistants_part_is_found_in_any_template() {
    let turns = ["<think>\nhm\n</think>\n\nb", "d"];
    for name in ["smollm2", "qwen2.5", "chatml"] {
        assert_eq!(said(name, "several turns"), turns.map(|turn| format!("{turn}<|im_end|>")), "{name}");
        assert_eq!(said(name, "one question"), Vec::<String>::new());
    }
    assert_eq!(said("llama3", "several turns"), turns.map(|turn| format!("{turn}<|eot_id|>")));
    assert_eq!(said("mistral", "several turns"), turns.map(|turn| format!(" {turn}</s>")));
    assert_eq!(
        said("qwen2.5", "a tool call"),
        [
            "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"place\": \"東京\", \"days\": 2, \"x\": [1.5, null, true]}}\n</tool_call><|im_end|>",
            "20 °C<|im_end|>",
        ]
    );
    assert_eq!(said("qwen2.5", "two tool calls").len(), 2);
    assert!(said("mistral", "two tool calls")[0].starts_with("[TOOL_CALLS] [{\"name\": \"get_weather\""));
}

fn chat(json: serde_json::Value) -> Chat {
    serde_json::from_str(&json.to_string()).unwrap()
}

#[test]
fn a_conversation_whose_answers_cannot_be_found_is_refused_by_its_message() {
    let messages = serde_json::json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
    ]});
    let spans = |template: &str| {
        let template = ChatTemplate::new(template, BTreeMap::new(), clock()).unwrap();
        template.assistant_spans(&chat(messages.clone())).unwrap_err().to_string()
    };
    let counts = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(
        spans(counts),
        "the assistant's part of message 1 cannot be found: \
         the text with it does not begin with the text before it and the generation prompt"
    );
    let later = "{% for m in messages %}{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}";
    assert!(spans(later).contains("message 1"), "{}", spans(later));
    let hides = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}";
    assert!(
        spans(hides).ends_with("the template writes it differently when other messages follow"),
        "{}",
        spans(hides)
    );
    let template = ChatTemplate::new("x", BTreeMap::new(), clock()).unwrap();
    let error = template.assistant_spans(&chat(serde_json::json!({"messages": [{"content": "x"}]}))).unwrap_err();
    assert_eq!(error.to_string(), "message 0 has no role");
}

#[test]
fn a_template_that_is_wrong_says_where() {
    let error = ChatTemplate::new("{{ 1 }}\n{% for %}\n", BTreeMap::new(), clock()).unwrap_err();
    assert!(matches!(error, ChatError::Template { line: 2, .. }), "{error}");
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    let template = ChatTemplate::new(endless, BTreeMap::new(), clock()).unwrap();
    let error = template.render(&Chat::default(), false).unwrap_err();
    assert!(matches!(error, ChatError::Conversation(_)), "{error}");
    let template = ChatTemplate::new("{{ raise_exception('no \"x\" here') }}", BTreeMap::new(), clock()).unwrap();
    let error = template.render(&Chat::default(), false).unwrap_err().to_string();
    assert_eq!(error, "the chat template refuses the conversation: no \"x\" here (line 1 of the template)");
}

#[test]
fn a_folders_template_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let load = || {
        ChatTemplate::load(folder.path(), clock())
            .map(|found| found.map(|t| t.render(&Chat::default(), false).unwrap()))
    };
    assert_eq!(load().unwrap(), None);
    let config = |template: serde_json::Value| {
        let config = serde_json::json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null, "chat_template": template});
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        config
    };
    let written = config(serde_json::Value::Null);
    assert_eq!(load().unwrap(), None);
    assert_eq!(special_tokens(&written), tokens("<s>", "</s>"));
    config("{{ bos_token }}1{{ pad_token }}".into());
    assert_eq!(load().unwrap().unwrap(), "<s>1");
    config(
        serde_json::json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "2{{ eos_token }}"}]),
    );
    assert_eq!(load().unwrap().unwrap(), "2</s>");
    std::fs::write(folder.path().join("chat_template.jinja"), "3\n").unwrap();
    assert_eq!(load().unwrap().unwrap(), "3");
    std::fs::write(folder.path().join("chat_template.jinja"), "{% if %}").unwrap();
    let error = load().unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja: the chat template cannot be used: line 1"), "{error}");
}
