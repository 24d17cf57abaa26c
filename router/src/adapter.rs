//! Which adapter a request selects by its `model`.

use serde::Deserialize;

#[derive(Deserialize)]
struct Named {
    #[serde(default)]
    model: Option<String>,
}

/// Returns the adapter that is the `model` of a request's body, if it is one of these. The body is read only if there are
/// adapters.
pub fn selected<'a>(adapters: &'a [String], body: &[u8]) -> Option<&'a str> {
    if adapters.is_empty() {
        return None;
    }
    let model = serde_json::from_slice::<Named>(body).ok()?.model?;
    adapters.iter().find(|adapter| **adapter == model).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_selects_an_adapter_by_its_model() {
        let adapters = ["legal".to_owned(), "medical".to_owned()];
        for (body, expected) in [
            (r#"{"messages": [], "model": "legal"}"#, Some("legal")),
            (r#"{"model": "medical", "prompt": "legal"}"#, Some("medical")),
            (r#"{"model": "chat", "prompt": "legal"}"#, None),
            (r#"{"prompt": "legal"}"#, None),
            (r#"{"model": 7}"#, None),
            (r#"{"model": "legal""#, None),
            ("", None),
        ] {
            assert_eq!(selected(&adapters, body.as_bytes()), expected, "{body}");
        }
        assert_eq!(selected(&[], br#"{"model": "legal"}"#), None);
    }
}
