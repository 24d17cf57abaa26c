//! What the model is asked, and what counts as an answer.

use minijinja::{Environment, UndefinedBehavior, context};
use serde_json::Value;

use crate::error::DataError;

const NAME: &str = "prompt";

/// The template of `annotate.endpoint.prompt` with its labels.
pub(super) struct Prompt<'a> {
    environment: Environment<'a>,
    labels: &'a [String],
}

impl<'a> Prompt<'a> {
    /// # Errors
    /// The user's, for a template that does not parse, names something else than `text` and `labels`, or leaves the text out.
    pub(super) fn new(template: &'a str, labels: &'a [String]) -> Result<Self, DataError> {
        let refused =
            |error: &dyn std::fmt::Display| DataError::User(format!("data.annotate.endpoint.prompt: {error}"));
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.add_template(NAME, template).map_err(|error| refused(&error))?;
        let prompt = Self { environment, labels };
        let marker = "ebb0f1a4 text";
        if !prompt.render(marker)?.contains(marker) {
            return Err(refused(&"the template has to contain {{ text }}"));
        }
        Ok(prompt)
    }

    pub(super) fn render(&self, text: &str) -> Result<String, DataError> {
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context! { text, labels => self.labels }))
            .map_err(|error| DataError::User(format!("data.annotate.endpoint.prompt: {error}")))
    }
}

/// Index of the label that an answer names: the label alone, in whatever case, or a JSON object with it under `label`. Anything
/// else, such as a sentence around it, is no answer.
pub(super) fn parse_answer(answer: &str, labels: &[String]) -> Option<usize> {
    let answer = answer.trim();
    find_label(answer, labels).or_else(|| match serde_json::from_str(answer).ok()? {
        Value::Object(object) => match object.get("label")? {
            Value::String(label) => find_label(label.trim(), labels),
            label @ (Value::Number(_) | Value::Bool(_)) => find_label(&label.to_string(), labels),
            _ => None,
        },
        _ => None,
    })
}

fn find_label(answer: &str, labels: &[String]) -> Option<usize> {
    labels.iter().position(|label| label == answer).or_else(|| {
        let lower = answer.to_lowercase();
        let mut same = labels.iter().enumerate().filter(|(_, label)| label.to_lowercase() == lower);
        // Two labels that differ in case alone have to be written as they are.
        same.next().filter(|_| same.next().is_none()).map(|(index, _)| index)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> Vec<String> {
        ["positive", "negative", "Ja", "ja", "1"].map(str::to_owned).into()
    }

    #[test]
    fn only_a_known_label_is_an_answer() {
        for (answer, expected) in [
            ("positive", Some(0)),
            (" NEGATIVE\n", Some(1)),
            ("Ja", Some(2)),
            ("ja", Some(3)),
            ("JA", None),
            ("1", Some(4)),
            ("{\"label\": \"Positive\"}", Some(0)),
            ("{\"label\": 1, \"why\": \"x\"}", Some(4)),
            ("{\"label\": \"other\"}", None),
            ("{\"label\": [\"positive\"]}", None),
            ("{\"class\": \"positive\"}", None),
            ("[\"positive\"]", None),
            ("positive.", None),
            ("It is positive", None),
            ("positive negative", None),
            ("", None),
        ] {
            assert_eq!(parse_answer(answer, &labels()), expected, "{answer:?}");
        }
    }

    #[test]
    fn templates_are_checked_before_anything_is_paid() {
        let labels = labels();
        let prompt = Prompt::new("{{ labels | join('/') }}: {{ text }}", &labels).unwrap();
        assert_eq!(prompt.render("<a> & {{ b }}").unwrap(), "positive/negative/Ja/ja/1: <a> & {{ b }}");
        for (template, part) in [
            ("{{ labels }}", "has to contain {{ text }}"),
            ("{{ text", "data.annotate.endpoint.prompt: "),
            ("{{ text }} {{ txt }}", "undefined"),
        ] {
            let error = Prompt::new(template, &labels).map(|_| ()).unwrap_err();
            assert!(matches!(error, DataError::User(_)) && error.to_string().contains(part), "{error}");
        }
    }
}
