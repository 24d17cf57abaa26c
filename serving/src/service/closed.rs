//! Objects of a schema without properties that it does not name. A schema that says nothing about them allows any, and a small
//! model then invents some.

use serde_json::{Map, Value, map::Entry};

/// Keywords next to which an object's own properties are not all that it may have or needs.
const OPEN: [&str; 20] = [
    "$dynamicRef",
    "$recursiveRef",
    "$ref",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "enum",
    "if",
    "minProperties",
    "not",
    "oneOf",
    "patternProperties",
    "propertyNames",
    "then",
    "unevaluatedProperties",
];
/// Keywords by which one object is described in two places, each of which may name only some of its properties.
const TWICE: [&str; 8] =
    ["$dynamicRef", "$recursiveRef", "allOf", "dependencies", "dependentSchemas", "if", "not", "unevaluatedProperties"];
/// Keywords whose values are schemas by name.
const NAMED: [&str; 4] = ["$defs", "definitions", "patternProperties", "properties"];
/// Keywords whose values are a schema, or a list of them.
const NESTED: [&str; 4] = ["additionalItems", "additionalProperties", "items", "prefixItems"];

/// Adds `additionalProperties: false` to the objects of a schema that name their properties and do not say whether there may be
/// others. What the result accepts, the schema accepts. Schemas that describe one object in two places stay as they are.
pub fn close(schema: &mut Value) {
    if !is_twice(schema) {
        close_one(schema);
    }
}

/// Returns whether a keyword of [`TWICE`] is anywhere, or a reference next to other properties.
fn is_twice(value: &Value) -> bool {
    match value {
        Value::Object(fields) => {
            let refers =
                fields.contains_key("$ref") && (fields.contains_key("properties") || fields.contains_key("required"));
            refers || TWICE.iter().any(|key| fields.contains_key(*key)) || fields.values().any(is_twice)
        }
        Value::Array(values) => values.iter().any(is_twice),
        _ => false,
    }
}

fn close_one(schema: &mut Value) {
    let Some(fields) = schema.as_object_mut() else { return };
    for key in NAMED {
        if let Some(Value::Object(named)) = fields.get_mut(key) {
            named.values_mut().for_each(close_one);
        }
    }
    for key in NESTED {
        match fields.get_mut(key) {
            Some(Value::Array(schemas)) => schemas.iter_mut().for_each(close_one),
            Some(schema) => close_one(schema),
            None => {}
        }
    }
    // An option of an object that has properties of its own describes the rest of that object. Exactly one option of `oneOf` may
    // accept a value, so each stays as it is.
    if !fields.contains_key("properties")
        && let Some(Value::Array(options)) = fields.get_mut("anyOf")
    {
        options.iter_mut().for_each(close_one);
    }
    if names_all(fields)
        && let Entry::Vacant(entry) = fields.entry("additionalProperties")
    {
        entry.insert(false.into());
    }
}

/// Returns whether an object may consist of the properties that the schema names.
fn names_all(fields: &Map<String, Value>) -> bool {
    let Some(properties) = fields.get("properties").and_then(Value::as_object) else { return false };
    let required = fields.get("required").and_then(Value::as_array).into_iter().flatten();
    !OPEN.iter().any(|key| fields.contains_key(*key))
        && required.filter_map(Value::as_str).all(|name| properties.contains_key(name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn closed(mut schema: Value) -> Value {
        close(&mut schema);
        schema
    }

    #[test]
    fn objects_that_name_their_properties_have_no_others() {
        let schema = closed(json!({
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "places": {"type": "array", "items": {"properties": {"city": {}}}},
                "open": {"properties": {"a": {}}, "additionalProperties": true},
                "any": {"type": "object"},
                "either": {"anyOf": [{"properties": {"a": {}}}, {"$ref": "#/$defs/b"}]},
            },
            "$defs": {"b": {"properties": {"b": {}}}},
        }));
        let is_closed = |path: &str| schema.pointer(path).unwrap().get("additionalProperties") == Some(&json!(false));
        for path in ["", "/properties/places/items", "/properties/either/anyOf/0", "/$defs/b"] {
            assert!(is_closed(path), "{path}: {schema}");
        }
        for path in ["/properties/open", "/properties/any", "/properties/either", "/properties/either/anyOf/1"] {
            assert!(!is_closed(path), "{path}: {schema}");
        }
        // A function without parameters has no arguments.
        assert_eq!(closed(json!({"properties": {}})), json!({"properties": {}, "additionalProperties": false}));
    }

    #[test]
    fn an_object_that_needs_or_has_other_properties_stays_open() {
        for schema in [
            json!({"properties": {"a": {}}, "required": ["a", "b"]}),
            json!({"properties": {"a": {}}, "minProperties": 2}),
            json!({"properties": {"a": {}}, "patternProperties": {"^x": {}}}),
            json!({"properties": {"a": {}}, "enum": [{"a": 1, "b": 2}]}),
            json!({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}, "required": ["b"]}]}),
            json!({"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}, "required": ["b"]}]}),
            json!({"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {"properties": {"b": {}}}}}),
            // A value that both options accept is not valid.
            json!({"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}),
            json!(true),
        ] {
            assert_eq!(closed(schema.clone()), schema);
        }
    }
}
