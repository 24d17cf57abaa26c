//! The bounds of numbers, lengths and patterns in a type's schema, checked where no API server checks them.

use regex::Regex;
use schemars::{JsonSchema, generate::SchemaSettings};
use serde::Serialize;
use serde_json::Value;

use crate::TrainError;

/// Characters of a value that a message shows.
const SHOWN: usize = 80;

/// The values outside the bounds of their fields, each with its path. Rules between fields (CEL) are not checked.
pub fn mistakes<T: JsonSchema + Serialize>(value: &T) -> Result<Vec<String>, TrainError> {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<T>();
    let mut mistakes = Vec::new();
    let value = serde_json::to_value(value).map_err(TrainError::other)?;
    walk(schema.as_value(), &value, "", &mut mistakes);
    Ok(mistakes)
}

fn walk(schema: &Value, value: &Value, path: &str, mistakes: &mut Vec<String>) {
    // An optional field is of its type or null; a value that is there is not null.
    for kind in schema["anyOf"].as_array().into_iter().flatten().filter(|kind| kind["type"] != "null") {
        walk(kind, value, path, mistakes);
    }
    mistakes.extend(mistake(schema, value).map(|mistake| format!("{path}: {mistake}")));
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                walk(&schema["items"], item, &format!("{path}[{index}]"), mistakes);
            }
        }
        Value::Object(fields) => {
            let dot = if path.is_empty() { "" } else { "." };
            for (name, field) in fields {
                walk(&schema["properties"][name], field, &format!("{path}{dot}{name}"), mistakes);
            }
        }
        _ => {}
    }
}

/// What is wrong with a value, whatever is inside it.
fn mistake(schema: &Value, value: &Value) -> Option<String> {
    let (size, least, most, unit) = match value {
        Value::Number(number) => (number.as_f64()?, "minimum", "maximum", ""),
        Value::String(text) => (text.chars().count() as f64, "minLength", "maxLength", " characters"),
        Value::Array(items) => (items.len() as f64, "minItems", "maxItems", " items"),
        // JSON has no other way to write it.
        Value::Null => return Some("is not a finite number".into()),
        _ => return None,
    };
    let shown = match value {
        Value::Number(number) => number.to_string(),
        _ => format!("{size}{unit}"),
    };
    if let Some(least) = schema[least].as_f64().filter(|least| size < *least) {
        return Some(format!("{shown} is less than {least}"));
    }
    if let Some(most) = schema[most].as_f64().filter(|most| size > *most) {
        return Some(format!("{shown} is more than {most}"));
    }
    let (text, pattern) = (value.as_str()?, schema["pattern"].as_str()?);
    let fits = Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(text));
    (!fits).then(|| format!("{:?} does not match {pattern}", text.chars().take(SHOWN).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Serialize, JsonSchema)]
    struct Outer {
        #[schemars(range(min = 0.5, max = 1.0))]
        share: f64,
        #[schemars(length(min = 1, max = 2), inner(regex(pattern = "^[a-z]+$")))]
        names: Vec<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(range(min = 1))]
        count: Option<u32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        inner: Option<Inner>,
    }

    #[derive(Serialize, JsonSchema)]
    struct Inner {
        #[schemars(length(min = 1, max = 3))]
        text: String,
    }

    #[test]
    fn bounds_hold_at_every_depth() {
        let outer = |share: f64, names: &[&str], count: Option<u32>, text: Option<&str>| {
            let names = names.iter().map(|&name| name.to_owned()).collect();
            let inner = text.map(|text| Inner { text: text.to_owned() });
            mistakes(&Outer { share, names, count, inner }).unwrap()
        };
        let none: [String; 0] = [];
        assert_eq!(outer(0.5, &["a", "b"], Some(1), Some("äöü")), none);
        assert_eq!(outer(1.0, &["a"], None, None), none);
        assert_eq!(outer(0.4, &[], Some(0), Some("abcd")).len(), 4, "all at once");
        let one = |share: f64, names: &[&str], count: Option<u32>, text: Option<&str>| {
            outer(share, names, count, text).join("\n")
        };
        assert_eq!(one(0.4, &["a"], None, None), "share: 0.4 is less than 0.5");
        assert_eq!(one(f64::NAN, &["a"], None, None), "share: is not a finite number");
        assert_eq!(one(0.5, &[], None, None), "names: 0 items is less than 1");
        assert_eq!(one(0.5, &["a", "B"], None, None), "names[1]: \"B\" does not match ^[a-z]+$");
        assert_eq!(one(0.5, &["a"], Some(0), None), "count: 0 is less than 1");
        assert_eq!(one(0.5, &["a"], None, Some("abcd")), "inner.text: 4 characters is more than 3");
    }

    #[test]
    fn a_specification_has_a_schema_without_references() {
        let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
        let schema = settings.into_generator().into_root_schema_for::<athanor_contract::train::TrainSpec>();
        let text = json!(schema).to_string();
        assert!(!text.contains("$ref") && !text.contains("allOf"), "a bound behind them would not be seen");
    }
}
