//! Template values as Python writes them: `json.dumps`, `str` and `repr`. Chat templates are written for Python's.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};

/// How `json.dumps` separates and orders.
struct Style {
    ensure_ascii: bool,
    /// Spaces of one level.
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
}

/// The filter `tojson` of transformers: `json.dumps` that escapes no HTML, and by default no characters beyond ASCII.
pub fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let [item, key] = match separators {
        Some(separators) => separators
            .try_into()
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "separators of tojson must be two strings"))?,
        None => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
    };
    let style = Style {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        item,
        key,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut text = String::new();
    style.write(value, 0, &mut text)?;
    Ok(text)
}

impl Style {
    fn write(&self, value: &Value, depth: usize, to: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => to.push_str("null"),
            ValueKind::Bool => to.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => to.push_str(&number(value, ["NaN", "Infinity", "-Infinity"])),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), to),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.items('{', '}', depth, keys.len(), to, |index, to| {
                    let key = &keys[index];
                    match key.as_str() {
                        Some(key) => self.string(key, to),
                        None => {
                            let mut text = String::new();
                            self.write(key, depth, &mut text)?;
                            self.string(&text, to);
                        }
                    }
                    to.push_str(&self.key);
                    self.write(&value.get_item(key)?, depth + 1, to)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items('[', ']', depth, items.len(), to, |index, to| self.write(&items[index], depth + 1, to))?;
            }
            other => {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("{other} value has no form in JSON")));
            }
        }
        Ok(())
    }

    fn items(
        &self,
        open: char,
        close: char,
        depth: usize,
        count: usize,
        to: &mut String,
        mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |depth: usize, to: &mut String| {
            if let Some(indent) = self.indent {
                to.push('\n');
                to.push_str(&" ".repeat(indent * depth));
            }
        };
        to.push(open);
        for index in 0..count {
            if index > 0 {
                to.push_str(&self.item);
            }
            line(depth + 1, to);
            item(index, to)?;
        }
        if count > 0 {
            line(depth, to);
        }
        to.push(close);
        Ok(())
    }

    fn string(&self, text: &str, to: &mut String) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ensure_ascii {
            return to.push_str(&quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                to.push(c);
            } else {
                let mut units = [0; 2];
                c.encode_utf16(&mut units).iter().for_each(|unit| to.push_str(&format!("\\u{unit:04x}")));
            }
        }
    }
}

/// `str(value)`, and nothing for an undefined value: what `{{ value }}` shows.
pub fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => repr(value),
    }
}

fn repr(value: &Value) -> String {
    let all = |value: &Value| value.try_iter().map(Iterator::collect::<Vec<Value>>).unwrap_or_default();
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number => number(value, ["nan", "inf", "-inf"]),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Map => {
            let pair = |key: &Value| format!("{}: {}", repr(key), repr(&value.get_item(key).unwrap_or_default()));
            format!("{{{}}}", all(value).iter().map(pair).collect::<Vec<_>>().join(", "))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            format!("[{}]", all(value).iter().map(repr).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut to = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => to.push_str("\\\\"),
            '\n' => to.push_str("\\n"),
            '\r' => to.push_str("\\r"),
            '\t' => to.push_str("\\t"),
            c if c == quote => to.extend(['\\', c]),
            c if c.is_control() && (c as u32) < 0x100 => to.push_str(&format!("\\x{:02x}", c as u32)),
            c => to.push(c),
        }
    }
    to.push(quote);
    to
}

/// A number as Python writes it; `special` are NaN and the infinities.
fn number(value: &Value, special: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return special[0].to_owned();
    }
    if float.is_infinite() {
        return special[if float > 0.0 { 1 } else { 2 }].to_owned();
    }
    // Digits and exponent of the shortest text that is read as this number, such as 1.5e-7.
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..16).contains(&exponent) {
        let text = float.to_string();
        return if text.contains('.') { text } else { text + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    use super::*;

    #[test]
    fn values_look_as_in_python() {
        let json = r#"{"b": [1, 2.0, 1e-5, 1e16, 0.0001, 123456.75], "a": {"x": null, "y": true}, "text": "<é'\"\n>", "none": {}, "no": []}"#;
        let value: Value = serde_json::from_str(json).unwrap();
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        let show = |template: &str| env.render_str(template, minijinja::context! { value }).unwrap();
        let numbers = "[1, 2.0, 1e-05, 1e+16, 0.0001, 123456.75]";
        assert_eq!(
            show("{{ value | tojson }}"),
            format!(r#"{{"b": {numbers}, "a": {{"x": null, "y": true}}, "text": "<é'\"\n>", "none": {{}}, "no": []}}"#)
        );
        assert_eq!(
            show("{{ value | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}"),
            r#"{"a":{"x":null,"y":true},"b":[1,2.0,1e-05,1e+16,0.0001,123456.75],"no":[],"none":{},"text":"<\u00e9'\"\n>"}"#
        );
        assert_eq!(
            show("{{ value.a | tojson(indent=2) }}{{ value.none | tojson(indent=2) }}"),
            "{\n  \"x\": null,\n  \"y\": true\n}{}"
        );
        assert_eq!(str(&value.get_attr("a").unwrap()), "{'x': None, 'y': True}");
        assert_eq!(str(&value.get_attr("b").unwrap()), numbers);
        assert_eq!(repr(&value.get_attr("text").unwrap()), r#"'<é\'"\n>'"#);
        assert_eq!(repr(&Value::from("it's")), "\"it's\"");
        assert!(env.render_str("{{ missing | tojson }}", ()).is_err());
    }
}
