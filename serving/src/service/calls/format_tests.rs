use serde_json::json;

use super::*;

#[test]
fn the_format_follows_from_template_and_vocabulary() {
    let qwen = "{%- if tools %}<tools>{{ tool | tojson }}</tools> within <tool_call></tool_call> XML tags{% endif %}";
    let llama = r#"{%- if tools is not none %}{"name": function name, "parameters": dictionary}{% endif %}"#;
    let plain = "{% for message in messages %}{{ message.content }}{% endfor %}";
    for (template, tokens, format, shows) in [
        (qwen, &["<tool_call>"][..], CallFormat::Hermes, true),
        (qwen, &[], CallFormat::Hermes, true),
        (llama, &["<|python_tag|>"], CallFormat::Llama3, true),
        ("{% if tools %}<|python_tag|>{% endif %}", &[], CallFormat::Llama3, true),
        (llama, &[], CallFormat::Fenced, true),
        // The vocabulary of Llama 3 with another template.
        (plain, &["<|python_tag|>"], CallFormat::Fenced, false),
        (plain, &["<tool_call>"], CallFormat::Fenced, false),
        ("{{ my_tools }}{{ toolset }}", &[], CallFormat::Fenced, false),
        ("", &[], CallFormat::Fenced, false),
    ] {
        assert_eq!(CallFormat::of(template, |token| tokens.contains(&token)), format, "{template} {tokens:?}");
        assert_eq!(shows_functions(template), shows, "{template}");
    }
}

#[test]
fn the_grammar_has_a_rule_for_each_function() {
    let function = |name: &str| Function { name: name.into(), parameters: json!({"type": "object"}) };
    let grammar = CallFormat::Hermes.grammar(&[function("a"), function("b-2")], true);
    let lines: Vec<&str> = grammar.lines().collect();
    assert_eq!(lines[0], r#"start: call ("\n" call)~0..15"#);
    assert_eq!(lines[1], r#"call: "<tool_call>\n{\"name\": \"" ( call_0 | call_1 ) "}\n</tool_call>""#);
    assert_eq!(lines[2], r#"call_0: "a\", \"arguments\": " arguments_0"#);
    assert!(lines[3].starts_with(r#"arguments_0: %json {"type":"object","x-guidance":"#), "{}", lines[3]);
    assert_eq!(lines[4], r#"call_1: "b-2\", \"arguments\": " arguments_1"#);
    let grammar = CallFormat::Llama3.grammar(&[function("a")], true);
    assert!(grammar.starts_with("start: call\ncall: \"{\\\"name\\\": \\\"\" ( call_0 ) \"}\"\n"), "{grammar}");
    assert!(grammar.contains(r#"call_0: "a\", \"parameters\": ""#), "{grammar}");
    assert!(CallFormat::Fenced.grammar(&[function("a")], false).starts_with("start: call\n"));
    let grammar = CallFormat::Llama3.grammar_or_json(&[function("a")], false, &json!({"type": "integer"}));
    let lines: Vec<&str> = grammar.lines().collect();
    assert_eq!(lines[0], "start: calls | answer");
    assert!(lines[1].starts_with(r#"answer: %json {"type":"integer","x-guidance":"#), "{grammar}");
    assert_eq!(lines[2..4], ["calls: call", r#"call: "```json\n{\"name\": \"" ( call_0 ) "}\n```""#], "{grammar}");
}
