//! What a specification means with the data and the models at hand.

use std::path::Path;

use athanor_contract::train::{self, Gate, Precision, TrainSpec};
use athanor_models::{
    CausalLanguageModel, CausalOptions, DecoderTokenizer, EncoderConfig, Initializer, LoraOptions, Model, Options,
    Shape,
    config::{HeadActivation, HiddenHead},
    tokenizer::decoder,
};
use tch::{Device, Kind};

use crate::{
    TrainError,
    data::{Dataset, Parts, TaskTokenizer},
    network::Network,
    tasks,
    teacher::{Online, Student},
};

/// A gate over sources without test rows could only fail after all the work.
pub fn check_gates(gates: &[Gate], dataset: &Dataset, parts: &Parts) -> Result<(), TrainError> {
    for (index, gate) in gates.iter().enumerate() {
        let Some(names) = &gate.sources else { continue };
        let is_covered = parts.test.iter().any(|&row| names.contains(&dataset.sources[dataset.rows.source(row)]));
        if !is_covered {
            return Err(TrainError::User(format!(
                "evaluate.gates[{index}]: none of the test rows comes from {}",
                names.join(", ")
            )));
        }
    }
    Ok(())
}

/// Class names in the order of the outputs; none for tasks without. `teacher` is its folder.
pub fn choose_labels(
    spec: &TrainSpec,
    dataset: &Dataset,
    parent: &Path,
    teacher: Option<&Path>,
) -> Result<Vec<String>, TrainError> {
    if !tasks::of(spec.model.task).has_classes() {
        return Ok(Vec::new());
    }
    // A teacher that labels rows may have given one of its labels to none of them.
    let inherited = teacher.filter(|_| spec.data.teacher_annotates()).unwrap_or(parent);
    let inherited = EncoderConfig::load(inherited)?.labels();
    Ok(dataset.choose_labels(spec.model.labels.as_deref(), inherited.as_deref())?)
}

/// The model that is trained, before its first step.
pub fn load_model(spec: &TrainSpec, parent: &Path, labels: &[String], device: Device) -> Result<Network, TrainError> {
    let Some(head) = tasks::of(spec.model.task).head(labels) else {
        return Ok(load_decoder(spec, parent, device)?.into());
    };
    Ok(load_encoder(spec, parent, head, device)?.into())
}

/// A decoder, with adapters if the specification has some. Frozen weights need no more digits than the matrix products
/// read of them.
fn load_decoder(spec: &TrainSpec, parent: &Path, device: Device) -> Result<CausalLanguageModel, TrainError> {
    let h = &spec.hyperparameters;
    let lora = spec.adapter.as_ref().map(|adapter| LoraOptions {
        rank: i64::from(adapter.lora.rank),
        alpha: adapter.lora.alpha,
        dropout: adapter.lora.dropout,
        target_modules: adapter.lora.target_modules.clone(),
        seed: h.seed as u64,
    });
    let is_frozen = lora.is_some() && uses_bf16(h.precision, device);
    let kind = Some(if is_frozen { Kind::BFloat16 } else { Kind::Float });
    Ok(CausalLanguageModel::load(&decoder::locate(parent)?, &CausalOptions { kind, device, lora })?)
}

/// A trained decoder, to measure it.
pub fn load_trained_decoder(folder: &Path, device: Device) -> Result<CausalLanguageModel, TrainError> {
    let options = CausalOptions { kind: Some(Kind::Float), device, lora: None };
    Ok(CausalLanguageModel::load(&decoder::locate(folder)?, &options)?)
}

/// The tokenizer in a model's folder, and the tokens that rows are cut to.
pub fn load_tokenizer(spec: &TrainSpec, folder: &Path) -> Result<(TaskTokenizer, usize), TrainError> {
    if !tasks::of(spec.model.task).generates() {
        let longest = max_length(spec, &EncoderConfig::load(folder)?);
        return Ok((TaskTokenizer::of_encoder(folder)?, longest));
    }
    let tokenizer = DecoderTokenizer::load(&decoder::locate(folder)?)?;
    let asked = spec.hyperparameters.max_sequence_length as usize;
    let longest = tokenizer.max_length().map_or(asked, |longest| longest.min(asked));
    Ok((TaskTokenizer::Decoder(tokenizer.into()), longest))
}

fn load_encoder(
    spec: &TrainSpec,
    parent: &Path,
    task: athanor_models::Task,
    device: Device,
) -> Result<Model, TrainError> {
    let head = spec.model.head.clone().unwrap_or_default();
    let student = spec.model.student.as_ref();
    let options = Options {
        seed: spec.hyperparameters.seed as u64,
        keep_layers: student
            .and_then(|student| student.keep_layers.as_ref())
            .map(|layers| layers.iter().map(|&layer| layer as usize).collect()),
        fresh: student.and_then(|student| student.fresh).map(|fresh| Shape {
            layers: fresh.layers as usize,
            hidden_size: i64::from(fresh.hidden_size),
            heads: i64::from(fresh.attention_heads),
            intermediate_size: i64::from(fresh.intermediate_size),
        }),
        hidden_head: head.hidden_units.map(|units| HiddenHead {
            units: i64::from(units),
            activation: match head.activation {
                train::HeadActivation::Tanh => HeadActivation::Tanh,
                train::HeadActivation::GELU => HeadActivation::Gelu,
                train::HeadActivation::ReLU => HeadActivation::Relu,
            },
        }),
        initializer: match head.initializer {
            train::Initializer::Normal => Initializer::Normal,
            train::Initializer::XavierUniform => Initializer::XavierUniform,
            train::Initializer::KaimingUniform => Initializer::KaimingUniform,
        },
        head_dropout: head.dropout,
        dropout: spec.hyperparameters.dropout,
    };
    Ok(Model::load(parent, task, &options, device)?)
}

/// The teacher, with `texts` as it reads them. `parent` is the folder with the student's tokenizer.
pub fn load_teacher<'t>(
    spec: &TrainSpec,
    folder: &Path,
    parent: &Path,
    labels: &[String],
    max_length: usize,
    texts: impl IntoIterator<Item = &'t str>,
    device: Device,
) -> Result<Online, TrainError> {
    let by_token = spec.objective.compares_hidden_states();
    let student = Student { task: spec.model.task, labels, folder: parent, by_token, max_length };
    let mut teacher = Online::load(folder, &student, device)?;
    teacher.read_rows(texts)?;
    Ok(teacher)
}

/// Tokens that texts are cut to.
pub fn max_length(spec: &TrainSpec, config: &EncoderConfig) -> usize {
    (spec.hyperparameters.max_sequence_length as usize).min(config.max_length())
}

/// Whether matrix products are in bfloat16.
pub fn uses_bf16(precision: Precision, device: Device) -> bool {
    match precision {
        Precision::FP32 => false,
        Precision::BF16 => true,
        Precision::Auto => athanor_torch::computes_in_bf16(device),
    }
}
