//! A decimal number that is written as a string, as the Kubernetes API conventions ask of any number that may have a fraction.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Decimals that a measured value keeps, and that people are shown.
const PLACES: usize = 4;

/// A finite number written as a string, such as `"0.85"` or `"-0.01"`.
///
/// A number that was read is written with every digit that it was read with, so that a specification passes through any number of
/// processes unchanged.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Decimal(f64);

impl Decimal {
    /// A measured value, rounded to four decimals: enough for a metric, and the same number after it was written and read.
    /// `None` if the value is not finite.
    pub fn new(value: f64) -> Option<Self> {
        format!("{value:.PLACES$}").parse().ok().and_then(Self::exact)
    }

    /// A finite value as it is, without a negative zero.
    fn exact(value: f64) -> Option<Self> {
        value.is_finite().then_some(Self(value + 0.0))
    }

    pub fn get(self) -> f64 {
        self.0
    }
}

/// At most four decimals, for people.
impl std::fmt::Display for Decimal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{:.PLACES$}", self.0);
        let text = text.trim_end_matches('0').trim_end_matches('.');
        f.write_str(if text == "-0" { "0" } else { text })
    }
}

impl Serialize for Decimal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The shortest text that is read as this very number, never with an exponent.
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Decimal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse()
            .ok()
            .and_then(Self::exact)
            .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a decimal number such as \"0.85\"")))
    }
}

impl JsonSchema for Decimal {
    fn schema_name() -> Cow<'static, str> {
        "Decimal".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": r"^-?[0-9]{1,9}(\.[0-9]{1,9})?$", "maxLength": 20})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Decimal {
        serde_json::from_str(&format!("{text:?}")).unwrap()
    }

    #[test]
    fn a_measured_value_has_four_decimals_and_reads_back_as_itself() {
        for (value, text) in
            [(0.85, "0.85"), (1.0, "1"), (-0.01, "-0.01"), (0.123456, "0.1235"), (-0.00001, "0"), (1e6, "1000000")]
        {
            let decimal = Decimal::new(value).unwrap();
            assert_eq!(serde_json::to_string(&decimal).unwrap(), format!("{text:?}"));
            assert_eq!(decimal.to_string(), text);
            assert_eq!(read(text), decimal);
        }
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(Decimal::new(value), None);
        }
    }

    #[test]
    fn a_number_that_was_read_keeps_its_digits() {
        for text in ["0.99999", "0.00004", "0.000000001", "999999999.999999", "-0.123456789", "0.1", "100"] {
            let written = serde_json::to_string(&read(text)).unwrap();
            assert_eq!(written, format!("{text:?}"));
        }
        assert_eq!(read("0.99999").to_string(), "1", "people are shown four decimals");
        assert_eq!(serde_json::to_string(&read("-0.0")).unwrap(), "\"0\"");
        for bad in ["\"x\"", "0.5", "\"NaN\"", "\"inf\""] {
            assert!(serde_json::from_str::<Decimal>(bad).is_err(), "{bad}");
        }
    }
}
