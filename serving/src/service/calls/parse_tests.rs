use proptest::prelude::*;
use serde_json::json;

use super::*;

fn reading(format: CallFormat) -> Reading {
    let function = |name: &str| Function { name: name.into(), parameters: json!({"type": "object"}) };
    let functions = [function("get"), function("put"), function("get_all")].into();
    Reading { format, functions, enforced: false, several: true }
}

/// What an answer is when it comes in these pieces: content, and calls with their arguments.
fn read(reading: &Reading, pieces: &[&str]) -> (String, Vec<(String, String)>) {
    let mut parser = CallParser::new(reading.clone());
    let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    parts.extend(parser.finish());
    let (mut content, mut calls) = (String::new(), Vec::new());
    for part in parts {
        match part {
            Part::Content(text) => content.push_str(&text),
            Part::Call { name } => calls.push((name, String::new())),
            Part::Arguments(text) => calls.last_mut().unwrap().1.push_str(&text),
        }
    }
    assert_eq!(parser.calls(), calls.len());
    (content, calls)
}

fn characters(text: &str) -> Vec<&str> {
    text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]).collect()
}

/// An answer, its content, and its calls.
type Case<'t> = (&'t str, &'t str, &'t [(&'t str, &'t str)]);

fn check(reading: &Reading, cases: &[Case<'_>]) {
    for (text, content, calls) in cases {
        let calls: Vec<(String, String)> = calls.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        assert_eq!(read(reading, &[text]), ((*content).to_owned(), calls.clone()), "{text:?}");
        assert_eq!(read(reading, &characters(text)), ((*content).to_owned(), calls), "{text:?} in characters");
    }
}

const CALL: &str = r#"{"name": "get", "arguments": {"x": 1}}"#;

#[test]
fn calls_of_hermes_are_in_tags() {
    let tagged = format!("<tool_call>\n{CALL}\n</tool_call>");
    let two = format!("{tagged}\n<tool_call>{{\"name\": \"put\", \"arguments\": {{}}}}</tool_call>\n");
    let before = format!("I look it up.\n\n{tagged}");
    let after = format!("{tagged} Done <b>.");
    let cut = &tagged[..tagged.len() - "\n</tool_call>".len()];
    check(
        &reading(CallFormat::Hermes),
        &[
            ("", "", &[]),
            ("Hello <b>world</b>. \n", "Hello <b>world</b>. \n", &[]),
            (&tagged, "", &[("get", r#"{"x": 1}"#)]),
            (&two, "", &[("get", r#"{"x": 1}"#), ("put", "{}")]),
            (&before, "I look it up.", &[("get", r#"{"x": 1}"#)]),
            (&after, " Done <b>.", &[("get", r#"{"x": 1}"#)]),
            // The object is whole, the tag behind it is not.
            (cut, "", &[("get", r#"{"x": 1}"#)]),
            // Strings with braces, quotes and the mark itself.
            (
                r#"<tool_call>{"name": "get", "arguments": {"x": "}\"</tool_call>é"}}</tool_call>"#,
                "",
                &[("get", r#"{"x": "}\"</tool_call>é"}"#)],
            ),
            (r#"<tool_call>{"name": "get"}</tool_call>"#, "", &[("get", "{}")]),
            (r#"<tool_call>{"arguments": {"a":[{}]}, "name": "put"}</tool_call>"#, "", &[("put", r#"{"a":[{}]}"#)]),
            (r#"<tool_call>{"name": "put", "arguments": "{\"a\": 2}"}</tool_call>"#, "", &[("put", r#"{"a": 2}"#)]),
        ],
    );
}

#[test]
fn what_is_no_call_stays_content() {
    for text in [
        // Cut off.
        "<tool",
        "<tool_call>",
        r#"<tool_call>{"name": "get", "arguments": {"x": 1"#,
        r#"<tool_call>{"name": "get", "argu"#,
        "```json\n{\"name\": \"get\"",
        // Malformed.
        "<tool_call>get(1)</tool_call>",
        r#"<tool_call>{"name": "unknown", "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "get", "arguments": {"x": tru}}</tool_call>"#,
        r#"<tool_call>{"name": "get", "arguments": [1]}</tool_call>"#,
        r#"<tool_call>{"name": "get", "arguments": "text"}</tool_call>"#,
        r#"<tool_call>{"name": 3, "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "get", "arguments": {}} and more</tool_call>"#,
        "<tool_call>{]</tool_call>",
        // JSON of another kind.
        r#"{"name": "Ada", "born": 1815}"#,
        r#"{"colour": "red"}"#,
        "```json\n[1, 2]\n```",
        "```json\n{\"a\": 1}\n```\nis JSON.",
        r#"{"name": "get", "arguments": {}} is a call."#,
        "```python\nget(1)\n```",
    ] {
        for format in [CallFormat::Hermes, CallFormat::Llama3, CallFormat::Fenced] {
            check(&reading(format), &[(text, text, &[])]);
        }
    }
}

#[test]
fn calls_of_llama_are_bare_or_after_a_mark() {
    let call = r#"{"name": "get", "parameters": {"x": 1}}"#;
    let marked = format!("<|python_tag|>{call}");
    let two = format!("{call}; {call}");
    let lines = format!(" {marked}\n{marked}");
    let get = ("get", r#"{"x": 1}"#);
    check(
        &reading(CallFormat::Llama3),
        &[
            (call, "", &[get]),
            (&marked, "", &[get]),
            (&two, "", &[get, get]),
            (&lines, "", &[get, get]),
            (&format!("Yes: {call}"), &format!("Yes: {call}"), &[]),
            (r#"{"type": "function", "name": "get", "parameters": {}}"#, "", &[("get", "{}")]),
        ],
    );
}

#[test]
fn calls_in_blocks_are_read_of_every_model() {
    let block = format!("Sure:\n```json\n{CALL}\n```\n");
    let get = ("get", r#"{"x": 1}"#);
    for format in [CallFormat::Hermes, CallFormat::Llama3, CallFormat::Fenced] {
        check(&reading(format), &[(&block, "Sure:", &[get]), (CALL, "", &[get])]);
    }
    // The tags of another model are text here.
    let tagged = format!("<tool_call>{CALL}</tool_call>");
    check(&reading(CallFormat::Fenced), &[(&tagged, &tagged, &[])]);
    // Content that looks like the beginning of a call does not hide one.
    let both = format!("```json\n{{}}\n```\n```json\n{CALL}\n```");
    check(&reading(CallFormat::Fenced), &[(&both, "```json\n{}\n```", &[get])]);
}

#[test]
fn one_mark_may_hold_several_calls() {
    let put = r#"{"name": "put", "arguments": {"y": [2, {}]}}"#;
    let calls = [("get", r#"{"x": 1}"#), ("put", r#"{"y": [2, {}]}"#)];
    let list = format!("[\n  {CALL},\n  {put}\n]");
    let block = |inner: &str| format!("Both:\n```json\n{inner}\n```\n");
    let [in_block, alone] = [block(&list), block(&format!("[{put}]"))];
    let [lines, commas, twice] =
        [block(&format!("{CALL}\n{put}")), block(&format!("{CALL},\n{put}")), block(CALL) + &block(put)];
    let many = Reading { several: true, ..reading(CallFormat::Hermes) };
    check(
        &many,
        &[
            (&in_block, "Both:", &calls),
            (&alone, "Both:", &calls[1..]),
            (&lines, "Both:", &calls),
            (&commas, "Both:", &calls),
            (&twice, "Both:\nBoth:", &calls),
            (&list, "", &calls),
            (&format!("<tool_call>\n{CALL}\n{put}\n</tool_call>"), "", &calls),
            (&format!("<tool_call>{list}</tool_call>\n"), "", &calls),
        ],
    );
    // One member that is no call makes all of them content, and so does a text behind a list without a mark.
    for text in [
        block(&format!("[{CALL}, 1]")),
        block(&format!("[{CALL}, {{\"name\": \"no\"}}]")),
        block(&format!("[{CALL} {put}]")),
        block(&format!("{CALL}\nand {put}")),
        block(&format!("[[{CALL}]]")),
        block("[]"),
        format!("[{CALL}, {}", &put[..put.len() - 1]),
        format!("{list} are calls."),
        "[1] is a note.".to_owned(),
    ] {
        check(&many, &[(&text, &text, &[])]);
    }
    let one = Reading { several: false, ..many };
    check(&one, &[(&in_block, "Both:", &calls[..1]), (&list, "", &calls[..1])]);
}

#[test]
fn one_call_is_all_if_several_are_not_asked_for() {
    let tagged = format!("Now.<tool_call>{CALL}</tool_call>");
    let three = format!("{tagged}{tagged}{tagged} more");
    let one = Reading { several: false, ..reading(CallFormat::Hermes) };
    check(&one, &[(&three, "Now.", &[("get", r#"{"x": 1}"#)])]);
}

#[test]
fn arguments_of_a_grammars_call_come_as_they_grow() {
    for (format, text) in [
        (CallFormat::Hermes, "<tool_call>\n{\"name\": \"get_all\", \"arguments\": {\"x\": \"é}\"}}\n</tool_call>"),
        (CallFormat::Llama3, "{\"name\": \"get_all\", \"parameters\": {\"x\": \"é}\"}}"),
        (CallFormat::Fenced, "```json\n{\"name\": \"get_all\", \"arguments\": {\"x\": \"é}\"}}\n```"),
    ] {
        let enforced = Reading { enforced: true, ..reading(format) };
        check(&enforced, &[(text, "", &[("get_all", "{\"x\": \"é}\"}")])]);
        let mut parser = CallParser::new(enforced.clone());
        let parts: Vec<Part> = characters(text).into_iter().flat_map(|piece| parser.push(piece)).collect();
        assert_eq!(parts[0], Part::Call { name: "get_all".into() });
        assert_eq!(parts[1..4], ["{", "\"", "x"].map(|text| Part::Arguments(text.into())));
        // Two calls, the second one cut off within its arguments or before its name.
        if format != CallFormat::Llama3 {
            let twice = format!("{text}\n{}", &text[..text.find('é').unwrap()]);
            check(&enforced, &[(&twice, "", &[("get_all", "{\"x\": \"é}\"}"), ("get_all", "{\"x\": \"")])]);
        }
        let cut = &text[..text.find("get_").unwrap()];
        check(&enforced, &[(cut, cut, &[])]);
    }
}

fn fragments() -> impl Strategy<Value = String> {
    let fragment = prop_oneof![
        Just("<tool_call>".to_owned()),
        Just("</tool_call>".to_owned()),
        Just("<|python_tag|>".to_owned()),
        Just("```json\n".to_owned()),
        Just("```".to_owned()),
        Just(CALL.to_owned()),
        Just(r#"{"name": "put", "parameters": {"s": "a}\"{"}}"#.to_owned()),
        Just(r#"{"name": "no"}"#.to_owned()),
        Just(";".to_owned()),
        Just(format!("[{CALL}, {CALL}]")),
        "[ \\n]{0,2}",
        "[\\[\\]{}a\":,é]{0,4}",
    ];
    proptest::collection::vec(fragment, 0..8).prop_map(|fragments| fragments.concat())
}

proptest! {
    #[test]
    fn the_pieces_joined_are_the_whole(
        text in fragments(),
        cuts in proptest::collection::vec(1..9_usize, 1..40),
        format in prop_oneof![Just(CallFormat::Hermes), Just(CallFormat::Llama3), Just(CallFormat::Fenced)],
        enforced in any::<bool>(),
        several in any::<bool>(),
    ) {
        let reading = Reading { enforced, several, ..reading(format) };
        let characters = characters(&text);
        let (mut pieces, mut rest) = (Vec::new(), &characters[..]);
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, more) = rest.split_at((*cut).min(rest.len()));
            pieces.push(piece.concat());
            rest = more;
        }
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let whole = read(&reading, &[&text]);
        prop_assert_eq!(&whole, &read(&reading, &pieces));
        if !enforced {
            prop_assert!(whole.1.iter().all(|(_, arguments)| serde_json::from_str::<Value>(arguments).is_ok()));
        }
        if whole.1.is_empty() && !enforced {
            prop_assert_eq!(whole.0, text);
        }
    }
}
