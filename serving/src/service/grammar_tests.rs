use super::*;
use crate::service::{
    ServiceError, StreamDecode, Vocabulary,
    calls::{CallFormat, Function},
};

const END: u32 = 256;
const TRUE: u32 = 257;
const VOCABULARY: usize = 260;

/// A token is a byte; besides there are an end, a word of four bytes, and ids without a token.
struct Bytes;

impl Vocabulary for Bytes {
    fn tokens(&self, text: &str, _: bool) -> Result<Vec<u32>, String> {
        Ok(text.replace("true", "\u{1}").bytes().map(|byte| if byte == 1 { TRUE } else { byte.into() }).collect())
    }

    fn text(&self, _: &[u32]) -> Result<String, String> {
        unreachable!("nothing is decoded")
    }

    fn name(&self, _: u32) -> Option<String> {
        unreachable!("nothing is named")
    }
}

impl ChatTokenize for Bytes {
    fn render_whole(&self, _: &[Value]) -> Result<Vec<u32>, ServiceError> {
        Err(ServiceError::Conversation("not in these tests".into()))
    }

    fn render_chat(&self, _: &[Value], _: Option<&[Value]>) -> Result<Vec<u32>, ServiceError> {
        Err(ServiceError::Conversation("not in these tests".into()))
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn stream(&self) -> Box<dyn StreamDecode> {
        unreachable!("nothing is decoded")
    }

    fn token_bytes(&self, token: u32) -> Vec<u8> {
        match token {
            END => b"<end>".to_vec(),
            TRUE => b"true".to_vec(),
            token => u8::try_from(token).map(|byte| vec![byte]).unwrap_or_default(),
        }
    }

    fn is_special(&self, token: u32) -> bool {
        token == END
    }

    fn has_token(&self, _: &str) -> bool {
        false
    }

    fn template(&self) -> String {
        String::new()
    }
}

fn grammars() -> Grammars {
    Grammars::new(Arc::new(Bytes), VOCABULARY, Arc::new([END]))
}

/// How far a text follows: the bytes that are allowed, and whether the answer is complete or may end after them.
fn follow(mut constraint: Box<dyn Constraint>, text: &str) -> (usize, bool) {
    for (at, byte) in text.bytes().enumerate() {
        if !constraint.mask().unwrap().contains(usize::from(byte)) {
            return (at, false);
        }
        if constraint.accept(u32::from(byte)).unwrap() == Progress::Complete {
            return (at + 1, true);
        }
    }
    (text.len(), constraint.mask().unwrap().contains(END as usize))
}

#[tokio::test]
async fn json_follows_its_schema_and_ends_with_it() {
    let grammars = grammars();
    let any = json!({"type": "object"});
    let person = json!({"type": "object", "required": ["name", "age"], "additionalProperties": false, "properties": {
        "name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0},
        "kind": {"enum": ["a", "b"]}, "friends": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 1},
    }, "$defs": {"n": {"type": "number"}}});
    for (schema, text, expected) in [
        (&any, "{}", (2, true)),
        (&any, r#"{"a": [1, {"b": null}]} more"#, (23, true)),
        (&any, "[1]", (0, false)),
        (&any, "Sure: {}", (0, false)),
        (&any, r#"{"a": 1"#, (7, false)),
        (&person, r#"{"name": "Ada", "age": 36}"#, (26, true)),
        // In the order of the schema.
        (&person, r#"{"age": 36"#, (2, false)),
        (&person, r#"{"name": "Babbage"#, (15, false)),
        (&person, r#"{"name": "é", "age": -1"#, (22, false)),
        (&person, r#"{"name":"", "age":1, "kind":"b", "friends":[1.5]}"#, (49, true)),
        (&person, r#"{"name":"", "age":1, "friends":[1,"#, (33, false)),
    ] {
        let constraint = grammars.compile(&Grammar::Json(schema.clone())).await.unwrap();
        assert_eq!(follow(constraint, text), expected, "{text}");
    }
    // Nobody writes white space for ever.
    let constraint = grammars.compile(&Grammar::Json(any)).await.unwrap();
    assert_eq!(follow(constraint, &format!("{{{}", "\n".repeat(99))).0, 33);
}

#[tokio::test]
async fn tokens_of_several_bytes_are_allowed_and_special_ones_are_no_text() {
    let grammars = grammars();
    let compile = async |schema| grammars.compile(&Grammar::Json(schema)).await.unwrap();
    let mut boolean = compile(json!({"type": "boolean"})).await;
    let mask = boolean.mask().unwrap();
    assert!(mask.contains(TRUE as usize) && mask.contains(usize::from(b't')) && mask.contains(usize::from(b'f')));
    assert!(!mask.contains(END as usize) && !mask.contains(258) && !mask.contains(usize::from(b'r')));
    assert_eq!(boolean.accept(TRUE), Ok(Progress::Complete));
    let mut string = compile(json!({"type": "string"})).await;
    string.mask().unwrap();
    string.accept(u32::from(b'"')).unwrap();
    let mask = string.mask().unwrap();
    assert!(mask.contains(usize::from(b'<')) && mask.contains(TRUE as usize) && !mask.contains(END as usize));
}

#[tokio::test]
async fn the_fields_of_a_schema_are_an_example_of_its_answers() {
    let schema = json!({"type": "object", "properties": {"name": {"type": "string"}, "open": {"type": "boolean"}}});
    let constraint = grammars().compile(&Grammar::Json(schema)).await.unwrap();
    let text: Vec<u32> = br#"{"name": "", "open": true}"#.iter().copied().map(u32::from).collect();
    assert_eq!(*constraint.example(), *text);
    assert_eq!(constraint.fork().example(), constraint.example());
    let lark = grammars().compile(&Grammar::Lark("start: \"a\"".into())).await.unwrap();
    assert!(lark.example().is_empty());
}

#[tokio::test]
async fn forced_text_is_that_of_the_answer_and_changes_no_mask() {
    let schema = json!({"type": "object", "required": ["name", "open"], "additionalProperties": false, "properties": {
        "name": {"enum": ["anna", "otto"]}, "open": {"type": "boolean"}}});
    let json = Grammar::Json(schema);
    let call = Grammar::Lark(r#"start: "<call>" ("get" | "set") " true</call>""#.into());
    for (grammar, text, places) in [
        (json, r#"{"name":"anna","open":true}"#, [(0, "{"), (2, "name\""), (10, "nna\""), (16, "open\"")]),
        (call, "<call>get true</call>", [(0, "<call>"), (6, ""), (7, "et true</call>"), (13, "e</call>")]),
    ] {
        let mut constraint = grammars().compile(&grammar).await.unwrap();
        let mut other = constraint.fork();
        for (at, byte) in text.bytes().enumerate() {
            let tokens = constraint.forced();
            let forced: Vec<u8> = tokens.iter().flat_map(|&token| Bytes.token_bytes(token)).collect();
            assert!(text.as_bytes()[at..].starts_with(&forced), "{text}, {at}: {}", String::from_utf8_lossy(&forced));
            if let Some((_, expected)) = places.iter().find(|(place, _)| *place == at) {
                assert!(forced.starts_with(expected.as_bytes()), "{text}, {at}: {}", String::from_utf8_lossy(&forced));
                assert_eq!(tokens.contains(&TRUE), expected.contains("true"), "the tokenizer's own division");
            }
            assert_eq!(constraint.mask(), other.mask(), "{text}, {at}");
            assert_eq!(constraint.accept(byte.into()), other.accept(byte.into()));
        }
    }
}

#[tokio::test]
async fn a_fork_goes_its_own_way() {
    let schema = json!({"enum": ["ab", "ac"]});
    let mut first = grammars().compile(&Grammar::Json(schema)).await.unwrap();
    for byte in [b'"', b'a'] {
        first.mask().unwrap();
        first.accept(u32::from(byte)).unwrap();
    }
    let second = first.fork();
    assert_eq!(follow(first, "b\""), (2, true));
    assert_eq!(follow(second, "c\""), (2, true));
}

#[tokio::test]
async fn a_schema_that_cannot_be_followed_is_refused_with_the_reason() {
    let grammars = grammars();
    for (schema, reason) in [
        (json!({"type": "object", "if": {}}), "Unimplemented keys: [\"if\"]"),
        (json!({"type": "strin"}), "Invalid type: strin"),
        (json!({"$ref": "#/$defs/none"}), "Reference segment '$defs' not found"),
        (json!({"$ref": "https://example.com/schema"}), "Only absolute $ref's"),
        (json!({"type": "string", "pattern": "(?=x)"}), "regex parse error"),
        (json!({"allOf": [false]}), "Unsatisfiable schema"),
    ] {
        let error = grammars.compile(&Grammar::Json(schema.clone())).await.map(drop).unwrap_err().to_string();
        assert!(error.starts_with(reason) && !error.contains('<'), "{schema}: {error}");
    }
    let large = json!({"enum": ["x".repeat(MOST_BYTES)]});
    let error = grammars.compile(&Grammar::Json(large)).await.map(drop).unwrap_err();
    assert!(matches!(error, GrammarError::TooLarge { bytes, .. } if bytes > MOST_BYTES), "{error}");
}

#[tokio::test]
async fn calls_have_the_models_format() {
    let grammars = grammars();
    let integer = json!({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
        "additionalProperties": false});
    let functions = [
        Function { name: "get".into(), parameters: integer },
        Function { name: "get_all".into(), parameters: json!({"type": "object"}) },
    ];
    for (format, call) in [
        (CallFormat::Hermes, "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"x\": 1}}\n</tool_call>"),
        (CallFormat::Llama3, "{\"name\": \"get\", \"parameters\": {\"x\": 1}}"),
        (CallFormat::Fenced, "```json\n{\"name\": \"get\", \"arguments\": {\"x\": 1}}\n```"),
    ] {
        let compile = async |several| {
            let grammar = Grammar::Lark(format.grammar(&functions, several));
            grammars.compile(&grammar).await.unwrap()
        };
        let one = compile(false).await;
        assert_eq!(follow(one.fork(), call), (call.len(), true), "{format:?}");
        let other = call.replace("\"get\"", "\"get_all\"").replace("{\"x\": 1}", "{}");
        assert_eq!(follow(one.fork(), &other), (other.len(), true), "{format:?}");
        let wrong = call.replace("1}", "true}");
        assert_eq!(follow(one.fork(), &wrong), (call.find("1}").unwrap(), false), "{format:?}");
        let unknown = call.replace("\"get\"", "\"got\"");
        assert_eq!(follow(one, &unknown), (call.find("et\"").unwrap(), false), "{format:?}");
        if format != CallFormat::Llama3 {
            let several = compile(true).await;
            assert_eq!(follow(several.fork(), call), (call.len(), true), "it may end");
            let three = [call, other.as_str(), call].join("\n");
            assert_eq!(follow(several, &three), (three.len(), true), "{format:?}");
        }
    }
}
