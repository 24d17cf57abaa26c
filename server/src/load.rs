//! From an artifact's folder to a service: its files say what the model does.

use std::{path::Path, sync::Arc};

use anyhow::Context;
use athanor_contract::serve::ServeConfig;
use athanor_models::{
    Classifier, DecoderTokenizer, EncoderConfig, Tokenizer, config::PLAIN, registry, tokenizer::decoder,
};
use athanor_serving::{
    engine::{encode, generate},
    service::{self, Service},
};
use tch::Device;

use crate::{
    generate::{TorchGenerator, engine_limits},
    packed::PackedGenerator,
    packed_encoder::PackedEncoder,
    tokenizer::{ChatTokenizer, TextTokenizer},
    torch::{TorchClassifier, TorchEmbedder},
};

/// Loads the model of a folder and starts its engine. `max_sequence_length`: tokens that texts were cut to in training.
///
/// # Errors
/// A file of the folder cannot be used, or the model is of no kind that is served.
pub fn load(config: &ServeConfig, folder: &Path, max_sequence_length: Option<u32>) -> anyhow::Result<Service> {
    // libtorch's default counts the machine's cores, not those this container may use.
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    let device = Device::cuda_if_available();
    let path = decoder::locate(folder)?;
    let mut config = config.clone();
    if is_language_model(&path)? {
        let model = language_model(&config, &path, device, threads)?;
        tracing::info!(?device, threads, "model loaded");
        return Ok(Service::new(&config, service::Model::Generator(model)));
    }
    let encoder = EncoderConfig::load(&path)?;
    let format = PackedEncoder::format(&encoder, config.engine.weights, device)?;
    let own = encoder.max_length();
    let limits = &mut config.limits;
    limits.max_sequence_length =
        max_sequence_length.map_or(limits.max_sequence_length, |length| length as usize).min(own);
    let limits = config.limits;
    let tokenizer = Arc::new(TextTokenizer(Tokenizer::load(&path)?));
    let engine = "starting the engine's thread";
    let model = if encoder.architectures.iter().any(|name| *name == format!("{}{PLAIN}", encoder.model_type.name)) {
        let engine = match format {
            Some(format) => encode::Engine::start(PackedEncoder::load(&path, None, format, threads)?, &limits),
            None => encode::Engine::start(TorchEmbedder::load(&path, device)?, &limits),
        }
        .context(engine)?;
        let vocabulary = usize::try_from(encoder.vocab_size).context("vocab_size")?;
        let size = usize::try_from(encoder.hidden_size).context("hidden_size")?;
        service::Model::Embedder(service::Embedder::new(limits, vocabulary, size, tokenizer, engine))
    } else {
        let labels = Classifier::labels_of(&path, &encoder)?;
        let engine = match format {
            Some(format) => {
                encode::Engine::start(PackedEncoder::load(&path, Some(labels.clone()), format, threads)?, &limits)
            }
            None => encode::Engine::start(TorchClassifier::new(Classifier::load(&path, device)?, device), &limits),
        }
        .context(engine)?;
        service::Model::Classifier(service::Classifier::new(limits, labels, tokenizer, engine))
    };
    tracing::info!(?device, threads, "model loaded");
    Ok(Service::new(&config, model))
}

/// Whether a GGUF file or the config.json of a folder is a decoder's.
fn is_language_model(path: &Path) -> anyhow::Result<bool> {
    if path.is_file() {
        return Ok(true);
    }
    let path = path.join("config.json");
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let config: serde_json::Value =
        serde_json::from_slice(&bytes).with_context(|| format!("{}: not JSON", path.display()))?;
    Ok(config["model_type"].as_str().is_some_and(registry::is_decoder))
}

fn language_model(
    config: &ServeConfig,
    path: &Path,
    device: Device,
    threads: usize,
) -> anyhow::Result<service::Generator> {
    let limits = engine_limits(&config.limits, device);
    let (engine, sequences, name) = (&config.engine, limits.step.sequences, &config.model_name);
    let packed = if device == Device::Cpu { PackedGenerator::bits(path, engine.weights)? } else { None };
    let start = || {
        match packed {
            Some(bits) => {
                generate::Engine::start(PackedGenerator::load(path, engine, sequences, threads, bits)?, limits, name)
            }
            None => generate::Engine::start(TorchGenerator::load(path, engine, sequences, device)?, limits, name),
        }
        .context("starting the engine's thread")
    };
    // At the same time, since a large vocabulary takes one thread a good part of the start.
    let (tokenizer, engine) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| DecoderTokenizer::load(path));
        let engine = start();
        (tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), engine)
    });
    let (tokenizer, engine) = (tokenizer?, engine?);
    let stop_tokens = tokenizer.stop_tokens().to_vec();
    Ok(service::Generator::new(config.limits, stop_tokens, Arc::new(ChatTokenizer(tokenizer)), engine))
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "seed_tests.rs"]
mod seed_tests;
