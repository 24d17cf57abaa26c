//! Functions and calls as plain messages, for models whose chat template shows neither.

use serde_json::{Value, json};

/// The messages with the functions in the first one, calls as the text of [`super::CallFormat::Fenced`], and results as
/// messages of the user.
pub fn plain(messages: &[Value], functions: Option<&[Value]>) -> Vec<Value> {
    let mut plain: Vec<Value> = messages.iter().map(message).collect();
    let Some(functions) = functions.filter(|functions| !functions.is_empty()) else { return plain };
    let list: Vec<String> = functions.iter().map(Value::to_string).collect();
    let text = format!(
        "You can call these functions, each described by a JSON schema:\n{}\n\nTo call a function, answer with\n\
         ```json\n{{\"name\": \"the function's name\", \"arguments\": {{the function's arguments}}}}\n```",
        list.join("\n")
    );
    match plain.first_mut().filter(|first| first["role"] == "system") {
        Some(first) => {
            let own = first["content"].as_str().unwrap_or_default();
            first["content"] = format!("{own}\n\n{text}").into();
        }
        None => plain.insert(0, json!({"role": "system", "content": text})),
    }
    plain
}

fn message(message: &Value) -> Value {
    let content = message["content"].as_str().unwrap_or_default();
    if message["role"] == "tool" {
        let name = message["name"].as_str().map(|name| format!(" of {name}")).unwrap_or_default();
        return json!({"role": "user", "content": format!("Result{name}: {content}")});
    }
    let Some(calls) = message["tool_calls"].as_array().filter(|calls| !calls.is_empty()) else {
        return message.clone();
    };
    let call = |call: &Value| {
        let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
        format!("```json\n{{\"name\": {name}, \"arguments\": {arguments}}}\n```")
    };
    let before = (!content.is_empty()).then(|| content.to_owned());
    let texts: Vec<String> = before.into_iter().chain(calls.iter().map(call)).collect();
    json!({"role": "assistant", "content": texts.join("\n")})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_calls_and_results_are_plain_text() {
        let call = json!({"id": "1", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}});
        let messages = [
            json!({"role": "user", "content": "1 + 2?"}),
            json!({"role": "assistant", "content": "", "tool_calls": [call, call]}),
            json!({"role": "tool", "content": "3", "tool_call_id": "1"}),
        ];
        let functions = [json!({"type": "function", "function": {"name": "add"}})];
        let shown = plain(&messages, Some(&functions));
        assert_eq!(shown.len(), 4);
        let system = shown[0]["content"].as_str().unwrap();
        assert!(system.contains("\n{\"type\":\"function\",\"function\":{\"name\":\"add\"}}\n"), "{system}");
        let text = "```json\n{\"name\": \"add\", \"arguments\": {\"b\":1,\"a\":2}}\n```";
        assert_eq!(shown[2], json!({"role": "assistant", "content": format!("{text}\n{text}")}));
        assert_eq!(shown[3], json!({"role": "user", "content": "Result: 3"}));
        // A system message stays the first one; without functions nothing is added.
        let own = [json!({"role": "system", "content": "Be brief."}), messages[0].clone()];
        let shown = plain(&own, Some(&functions));
        assert_eq!(shown.len(), 2);
        assert!(shown[0]["content"].as_str().unwrap().starts_with("Be brief.\n\nYou can call"), "{shown:?}");
        assert_eq!(plain(&own, None), own);
        assert_eq!(plain(&own, Some(&[])), own);
    }
}
