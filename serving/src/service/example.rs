//! A text like the JSON that a schema describes. Answers repeat the names of its fields, so the engine proposes them.

use serde_json::Value;

/// Length in bytes from which the rest of a schema is left out.
const MOST_BYTES: usize = 4 << 10;
/// Number of schemas inside each other, references included.
const DEPTH: usize = 16;

/// JSON with all fields of a schema, in its order and with the spaces that models write. It need not be valid: values are
/// the first of an enumeration, or empty.
pub fn example(schema: &Value) -> String {
    let mut text = String::new();
    write(schema, schema, DEPTH, &mut text);
    text
}

fn write(schema: &Value, root: &Value, depth: usize, text: &mut String) {
    if depth == 0 || text.len() >= MOST_BYTES {
        return text.push_str("null");
    }
    let inner = |schema: &Value, text: &mut String| write(schema, root, depth - 1, text);
    let referred = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?));
    let options = ["anyOf", "oneOf", "allOf"].iter().find_map(|key| schema[key].get(0));
    if let Some(referred) = referred {
        inner(referred, text);
    } else if let Some(value) = schema.get("const").or(schema["enum"].get(0)) {
        text.push_str(&value.to_string());
    } else if let Some(properties) = schema["properties"].as_object() {
        text.push('{');
        for (index, (name, schema)) in properties.iter().enumerate() {
            text.push_str(if index > 0 { ", " } else { "" });
            text.push_str(&Value::from(name.as_str()).to_string());
            text.push_str(": ");
            inner(schema, text);
        }
        text.push('}');
    } else if schema["items"].is_object() {
        text.push('[');
        inner(&schema["items"], text);
        text.push_str(", ");
        inner(&schema["items"], text);
        text.push(']');
    } else if let Some(option) = options {
        inner(option, text);
    } else {
        let kind = schema["type"].as_str().or(schema["type"].get(0).and_then(Value::as_str));
        text.push_str(match kind {
            Some("string") => "\"\"",
            Some("integer" | "number") => "0",
            Some("boolean") => "true",
            Some("object") => "{}",
            Some("array") => "[]",
            _ => "null",
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_example_has_the_fields_of_its_schema_in_their_order() {
        let schema = json!({
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "kind": {"enum": ["loan", "lease"]},
                "parties": {"type": "array", "items": {"$ref": "#/$defs/party"}},
                "amount": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "due": {"type": ["string", "null"]},
                "open": {"type": "boolean"},
                "extra": true,
            },
            "$defs": {"party": {"type": "object", "properties": {"role": {"const": "bank"}, "tags": {"type": "array"}}}},
        });
        let party = r#"{"role": "bank", "tags": []}"#;
        let expected = format!(
            r#"{{"name": "", "kind": "loan", "parties": [{party}, {party}], "amount": 0, "due": "", "open": true, "extra": null}}"#
        );
        assert_eq!(example(&schema), expected);
        assert_eq!(example(&json!({"type": "object"})), "{}");
        assert_eq!(example(&json!({"$ref": "#/nowhere"})), "null");
    }

    #[test]
    fn a_schema_that_refers_to_itself_has_a_bounded_example() {
        let node = json!({"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}});
        let text = example(&node);
        assert!(text.starts_with(r#"{"left": {"left": "#), "{text}");
        assert!(text.len() < 2 * MOST_BYTES, "{}", text.len());
    }
}
