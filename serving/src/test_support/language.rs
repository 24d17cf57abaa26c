//! A language model by a rule: it answers what stands between the last `[` and the `]` behind it in its prompt. Its
//! adapters have one module, `shout`, and answer in capital letters.
//!
//! A token is a byte. A prompt ends with [`BEGIN`], an answer with [`END`].

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use athanor_contract::serve::{ServeConfig, ServeLimits};
use serde_json::Value;

use super::gate::Gate;
use crate::{
    engine::{
        backend::{AdapterId, AdapterWeights, BackendError, GenerateBackend, GenerateLimits, Row, RowOutput},
        generate::{Engine, EngineLimits, sampling::logprobs, scheduler::StepLimits},
    },
    service::{ChatTokenize, Generator, Model, Service, ServiceError, StreamDecode, Vocabulary},
};

/// The last token of a prompt.
pub const BEGIN: u32 = 1;
/// The token that ends an answer.
pub const END: u32 = 256;
const VOCABULARY: usize = 258;
/// Tokens of prompt and answer together.
pub const LONGEST: usize = 256;

/// Makes the same service with the source of a template, of which only the format of calls is read.
struct Bytes {
    gate: Arc<Gate>,
    template: &'static str,
}

impl Vocabulary for Bytes {
    fn tokens(&self, text: &str, with_special: bool) -> Result<Vec<u32>, String> {
        Ok(if with_special { tokens(text) } else { text.bytes().map(u32::from).collect() })
    }

    fn text(&self, tokens: &[u32]) -> Result<String, String> {
        let bytes: Vec<u8> = tokens.iter().flat_map(|&token| self.token_bytes(token)).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn name(&self, token: u32) -> Option<String> {
        ((token as usize) < VOCABULARY).then(|| String::from_utf8_lossy(&self.token_bytes(token)).into_owned())
    }
}

impl ChatTokenize for Bytes {
    fn render_whole(&self, messages: &[Value]) -> Result<Vec<u32>, ServiceError> {
        let mut tokens = self.render_chat(messages, None)?;
        tokens.pop();
        Ok(tokens)
    }

    fn render_chat(&self, messages: &[Value], tools: Option<&[Value]>) -> Result<Vec<u32>, ServiceError> {
        self.gate.tokenised.fetch_add(1, Ordering::SeqCst);
        if messages[0]["role"] == "tool" {
            return Err(ServiceError::Conversation("a conversation begins with no tool".into()));
        }
        let line = |message: &Value| {
            let calls = message.get("tool_calls").map(Value::to_string).unwrap_or_default();
            format!(
                "{}: {}{calls}\n",
                message["role"].as_str().unwrap_or_default(),
                message["content"].as_str().unwrap_or_default()
            )
        };
        let tools = tools.map(|tools| format!("tools: {}\n", tools.len()));
        let text: String = tools.into_iter().chain(messages.iter().map(line)).collect();
        Ok(tokens(&text))
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.gate.tokenised.fetch_add(1, Ordering::SeqCst);
        Ok(tokens(text))
    }

    fn stream(&self) -> Box<dyn StreamDecode> {
        Box::new(Text(Vec::new()))
    }

    fn token_bytes(&self, token: u32) -> Vec<u8> {
        u8::try_from(token).map_or_else(|_| b"<end>".to_vec(), |byte| vec![byte])
    }

    fn is_special(&self, token: u32) -> bool {
        token >= END
    }

    fn has_token(&self, _: &str) -> bool {
        false
    }

    fn template(&self) -> String {
        self.template.to_owned()
    }
}

fn tokens(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).chain([BEGIN]).collect()
}

/// Bytes that are no characters yet.
struct Text(Vec<u8>);

impl StreamDecode for Text {
    fn push(&mut self, token: u32) -> String {
        self.0.extend(u8::try_from(token));
        match String::from_utf8(std::mem::take(&mut self.0)) {
            Ok(text) => text,
            Err(error) => {
                self.0 = error.into_bytes();
                String::new()
            }
        }
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned()
    }
}

/// Fails where it would say `!`, and has logits that are not finite where it would say `?`.
struct Rule {
    limits: GenerateLimits,
    /// Token and adapter of each slot.
    slots: Vec<(u32, Option<AdapterId>)>,
    gate: Arc<Gate>,
}

impl Rule {
    fn next(prefix: &[u32]) -> u32 {
        let begin = prefix.iter().rposition(|&token| token == BEGIN).unwrap_or_default();
        let (prompt, answer) = prefix.split_at(begin);
        let from = prompt.iter().rposition(|&token| token == u32::from(b'[')).map_or(prompt.len(), |open| open + 1);
        let said = prompt[from..].iter().copied().take_while(|&token| token != u32::from(b']'));
        said.chain([END]).nth(answer.len().saturating_sub(1)).unwrap_or(END)
    }
}

impl GenerateBackend for Rule {
    fn limits(&self) -> GenerateLimits {
        self.limits
    }

    fn load_adapter(&mut self, id: AdapterId, adapter: AdapterWeights) -> Result<(), BackendError> {
        match adapter.modules.as_slice() {
            [module] if module.module == "shout" => {
                self.gate.adapters.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
                Ok(())
            }
            modules => Err(BackendError(format!("{} modules; one with the name shout is expected", modules.len()))),
        }
    }

    fn unload_adapter(&mut self, id: AdapterId) {
        self.gate.adapters.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<RowOutput>, BackendError> {
        self.gate.batches.fetch_add(1, Ordering::SeqCst);
        let _gate = self.gate.lock.lock().map_err(|error| BackendError(error.to_string()))?;
        let size = self.limits.block_size;
        let slot = |row: &Row<'_>, place: usize| row.blocks[place / size] as usize * size + place % size;
        let loaded: BTreeSet<AdapterId> = self.gate.adapters.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for row in rows {
            if row.adapter.is_some_and(|id| !loaded.contains(&id)) {
                return Err(BackendError("the adapter is gone".into()));
            }
            for (index, &token) in row.tokens.iter().enumerate() {
                self.slots[slot(row, row.start + index)] = (token, row.adapter);
            }
            if (0..row.start).any(|place| self.slots[slot(row, place)].1 != row.adapter) {
                return Err(BackendError("a block of another adapter".into()));
            }
        }
        let behind = |row: &Row<'_>, end: usize| {
            let prefix: Vec<u32> = (0..end).map(|place| self.slots[slot(row, place)].0).collect();
            let next = match u8::try_from(Self::next(&prefix)) {
                Ok(byte) if row.adapter.is_some() => u32::from(byte.to_ascii_uppercase()),
                _ => Self::next(&prefix),
            };
            let mut logits = vec![0.0; VOCABULARY];
            logits[next as usize] = if next == u32::from(b'?') { f32::NAN } else { 10.0 };
            logits[next as usize + 1] = 5.0;
            (next, logits)
        };
        rows.iter()
            .map(|row| {
                let targets = (row.start + 1..).zip(row.targets);
                let targets = targets.map(|(end, &token)| logprobs(&behind(row, end).1, token as usize, row.top));
                let mut output = RowOutput { targets: targets.collect(), ..RowOutput::default() };
                if row.logits > 0 {
                    let (next, logits) = behind(row, row.start + row.tokens.len());
                    if next == u32::from(b'!') {
                        return Err(BackendError("out of memory".into()));
                    }
                    output.logits.push(logits.into());
                }
                Ok(output)
            })
            .collect()
    }
}

/// Model `writer`, revision `writer-1`, of [`LONGEST`] tokens, and the gate that holds it. Its calls have the format of
/// Hermes.
pub fn language_model(limits: ServeLimits) -> (Arc<Service>, Arc<Gate>) {
    language_model_with_template(limits, "{{ tools }}<tool_call>")
}

/// The same with another source of its chat template, from which the format of calls follows.
pub fn language_model_with_template(limits: ServeLimits, template: &'static str) -> (Arc<Service>, Arc<Gate>) {
    let config = ServeConfig {
        model_name: "writer".into(),
        revision: "writer-1".into(),
        model_uri: "file:///nowhere".into(),
        http_port: 0,
        grpc_port: 0,
        limits,
        engine: Default::default(),
        adapters: Vec::new(),
        accept_any_model: false,
    };
    let gate = Arc::<Gate>::default();
    let sizes = GenerateLimits { blocks: 256, block_size: 8, max_length: LONGEST, vocabulary: VOCABULARY };
    let backend = Rule { limits: sizes, slots: vec![(0, None); sizes.blocks * sizes.block_size], gate: gate.clone() };
    let step = StepLimits { tokens: 64, sequences: limits.max_batch_inputs };
    let wait = Duration::from_secs(limits.max_queue_seconds);
    let bounds = EngineLimits { queue: limits.queue_inputs, wait, step };
    let engine = Engine::start(backend, bounds, "writer").expect("a thread starts");
    let tokenizer = Bytes { gate: gate.clone(), template };
    let generator = Generator::new(limits, vec![END], Arc::new(tokenizer), engine);
    (Arc::new(Service::new(&config, Model::Generator(generator))), gate)
}
