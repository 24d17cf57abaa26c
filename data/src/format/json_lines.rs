//! JSON lines: an object a line. Only the columns that are asked for are kept of it.

use std::{borrow::Cow, fmt, io::BufRead};

use athanor_contract::train::Columns;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Number, Value};

use super::lines::Lines;
use crate::{DataError, reading::Reading, rows::Fields};

pub(super) fn read(reader: impl BufRead, reading: &mut Reading) -> Result<(), DataError> {
    let columns = reading.columns().clone();
    let mut lines = Lines::new(reader);
    let mut is_empty = true;
    while let Some((number, line)) = lines.next(reading)? {
        is_empty = false;
        let row = line.and_then(|line| read_row(line, number, &columns, reading));
        reading.go_on(row)?;
    }
    if is_empty { Err(reading.user("the file is empty")) } else { Ok(()) }
}

fn read_row(line: &str, number: u64, columns: &Columns, reading: &mut Reading) -> Result<(), DataError> {
    let not_json = |error| reading.user_at(number, format!("not JSON: {error}"));
    if !line.trim_start().starts_with('{') {
        serde_json::from_str::<IgnoredAny>(line).map_err(not_json)?;
        return Err(reading.user_at(number, "not a JSON object"));
    }
    let mut deserializer = serde_json::Deserializer::from_str(line);
    let object = Object(columns).deserialize(&mut deserializer).map_err(not_json)?;
    deserializer.end().map_err(not_json)?;
    let field = |field, name: &str| text_of(field, name, number, reading);
    let text = field(object.text, columns.input())?;
    let label = match object.label {
        Field::Text(label) => Some(label),
        missing if reading.needs_labels() => Some(field(missing, &columns.label)?),
        _ => None,
    };
    let pair = columns.second().map(|name| field(object.pair, name)).transpose()?;
    let group = columns.group.as_deref().map(|name| field(object.group, name)).transpose()?;
    let (label, pair, group) = (label.as_deref(), pair.as_deref(), group.as_deref());
    reading.row(number, Fields { text: &text, label, pair, group, ..Fields::default() })
}

fn text_of<'a>(field: Field<'a>, name: &str, number: u64, reading: &Reading) -> Result<Cow<'a, str>, DataError> {
    match field {
        Field::Text(text) => Ok(text),
        Field::Missing => Err(reading.user_at(number, format!("field {name:?} is missing"))),
        Field::Other => Err(reading.user_at(number, format!("field {name:?} is not text"))),
    }
}

#[derive(Clone, Default)]
enum Field<'a> {
    #[default]
    Missing,
    Text(Cow<'a, str>),
    /// A list, an object or null.
    Other,
}

#[derive(Default)]
struct Found<'a> {
    text: Field<'a>,
    label: Field<'a>,
    pair: Field<'a>,
    group: Field<'a>,
}

/// Reads an object and keeps the columns.
struct Object<'c>(&'c Columns);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Found<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Found<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let columns = self.0;
        let mut found = Found::default();
        while let Some(Name(key)) = map.next_key()? {
            // One key may be two columns, such as a label that is the group too.
            let mut value = None;
            if columns.messages.as_deref() == Some(&*key) {
                found.text = Field::Text(list_as_text(map.next_value()?).into());
                continue;
            }
            for (name, place) in [
                (Some(columns.input()), &mut found.text),
                (Some(columns.label.as_str()), &mut found.label),
                (columns.second(), &mut found.pair),
                (columns.group.as_deref(), &mut found.group),
            ] {
                if name.is_some_and(|name| name == key) {
                    let value = match &value {
                        Some(value) => value,
                        None => value.insert(map.next_value_seed(Scalar)?),
                    };
                    *place = Field::clone(value);
                }
            }
            if value.is_none() {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// A list as JSON with sorted keys; text may be such a list already.
fn list_as_text(mut value: Value) -> String {
    value.sort_all_objects();
    match value {
        Value::String(text) => text,
        value => value.to_string(),
    }
}

/// A key, borrowed where it has no escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// Text, or a number or boolean as text: classes are often those.
struct Scalar;

impl<'de> DeserializeSeed<'de> for Scalar {
    type Value = Field<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Scalar {
    type Value = Field<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Field::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Field::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Field::Text(value.to_string().into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Field::Text(value.to_string().into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Field::Text(value.to_string().into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Number::from_f64(value).map_or(Field::Other, |number| Field::Text(Value::Number(number).to_string().into())))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Field::Other)
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Field::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Field::Other)
    }
}
