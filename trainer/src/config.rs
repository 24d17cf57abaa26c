//! What to train: the operator's `train.json`, or the user's own manifest on a laptop.

use std::{collections::BTreeSet, path::Path};

use athanor_contract::{
    artifact::{EVENTS, sha256_hex},
    train::{CLUSTER_FIELDS, JobManifest, Task, TrainConfig, TrainSpec},
};
use serde::de::DeserializeOwned;

use crate::{TrainError, objectives};

/// Reads the configuration that the operator mounted.
pub fn load(path: &Path) -> Result<TrainConfig, TrainError> {
    let text = read(path)?;
    let config: TrainConfig = located(path, &mut serde_json::Deserializer::from_str(&text))?;
    refuse(path, mistakes(&config.spec))?;
    Ok(config)
}

/// Reads a FineTuneJob as `kubectl apply` takes it. Its folders are named by a hash of the specification, so that running the
/// same manifest again finds its checkpoints; nodes beyond this machine are left out.
pub fn load_manifest(path: &Path) -> Result<TrainConfig, TrainError> {
    let text = read(path)?;
    let refused = |message: String| TrainError::User(format!("{}: {message}", path.display()));
    let mut unknown = Vec::new();
    let mut note = |field: serde_ignored::Path| unknown.push(field.to_string());
    let yaml = serde_yaml::Deserializer::from_str(&text);
    let manifest: JobManifest = located(path, serde_ignored::Deserializer::new(yaml, &mut note))?;
    if manifest.kind != "FineTuneJob" || !manifest.api_version.starts_with("athanor.dev/") {
        let JobManifest { api_version, kind, .. } = manifest;
        return Err(refused(format!("this is {kind} of {api_version}, not FineTuneJob of athanor.dev/v1alpha1")));
    }
    let is_of_a_cluster = |field: &str| {
        field.starts_with("metadata.")
            || field == "status"
            || field.strip_prefix("spec.").is_some_and(|field| CLUSTER_FIELDS.contains(&field))
    };
    unknown.retain(|field| !is_of_a_cluster(field));
    refuse(path, unknown.into_iter().map(|field| format!("field {field} is not known")).collect())?;
    let mut spec = manifest.spec;
    refuse(path, mistakes(&spec))?;
    spec.distributed.num_nodes = 1;
    of_laptop(manifest.metadata.name, spec)
}

/// A run on this machine: its folders are named by a hash of the specification, so that the same one finds its checkpoints.
pub fn of_laptop(name: String, spec: TrainSpec) -> Result<TrainConfig, TrainError> {
    let identity = serde_json::to_vec(&(&name, &spec)).map_err(TrainError::other)?;
    let run_id = sha256_hex(&identity)[..32].to_owned();
    let folder = format!("{}/{name}-{}", spec.output.to.trim_end_matches('/'), &run_id[..8]);
    Ok(TrainConfig {
        checkpoint_to: format!("{folder}/checkpoints"),
        artifact_to: format!("{folder}/artifact"),
        events_to: format!("{folder}/{EVENTS}"),
        progress_to: None,
        name,
        run_id,
        spec,
    })
}

fn read(path: &Path) -> Result<String, TrainError> {
    std::fs::read_to_string(path).map_err(|error| TrainError::User(format!("{}: {error}", path.display())))
}

/// Deserializes with the path of the field in the error.
fn located<'de, T, D>(file: &Path, deserializer: D) -> Result<T, TrainError>
where
    T: DeserializeOwned,
    D: serde::Deserializer<'de>,
    D::Error: std::fmt::Display,
{
    serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let field = error.path().to_string();
        let field = if field == "." { "the document".into() } else { format!("field {field}") };
        TrainError::User(format!("{}: {field}: {}", file.display(), error.into_inner()))
    })
}

/// One error for all mistakes of a file.
fn refuse(path: &Path, mistakes: Vec<String>) -> Result<(), TrainError> {
    if mistakes.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = mistakes.into_iter().map(|mistake| format!("{}: {mistake}", path.display())).collect();
    Err(TrainError::User(lines.join("\n")))
}

/// The rules that the API server checks in a cluster and nobody on a laptop, and those between fields.
fn mistakes(spec: &TrainSpec) -> Vec<String> {
    let mut mistakes = Vec::new();
    let mut refuse = |message: String| mistakes.push(message);
    let names: BTreeSet<&str> = spec.data.sources.iter().map(|source| source.name.as_str()).collect();
    if spec.data.sources.is_empty() {
        refuse("data.sources is empty".into());
    }
    if names.len() < spec.data.sources.len() {
        refuse("data.sources: two sources have the same name".into());
    }
    for (index, source) in spec.data.sources.iter().enumerate() {
        if source.uri.is_some() == source.kafka.is_some() {
            refuse(format!("data.sources[{index}] ({}): set exactly one of uri and kafka", source.name));
        }
    }
    if let Some(labels) = &spec.model.labels {
        let distinct: BTreeSet<_> = labels.iter().collect();
        if labels.len() < 2 || distinct.len() < labels.len() {
            refuse("model.labels: at least two labels, each once".into());
        }
    }
    let head = spec.model.head.clone().unwrap_or_default();
    for (field, dropout) in [("model.head", head.dropout), ("hyperparameters", spec.hyperparameters.dropout)] {
        if dropout.is_some_and(|dropout| !(0.0..1.0).contains(&dropout)) {
            refuse(format!("{field}.dropout has to be at least 0 and below 1"));
        }
    }
    if head.hidden_units == Some(0) {
        refuse("model.head.hiddenUnits is at least 1".into());
    }
    if let Some(student) = &spec.model.student {
        if student.keep_layers.is_some() == student.fresh.is_some() {
            refuse("model.student: set exactly one of keepLayers and fresh".into());
        }
        if student.keep_layers.as_ref().is_some_and(Vec::is_empty) {
            refuse("model.student.keepLayers is empty".into());
        }
        if let Some(fresh) = student.fresh
            && (fresh.layers == 0
                || fresh.attention_heads == 0
                || fresh.hidden_size == 0
                || fresh.intermediate_size == 0
                || fresh.hidden_size % fresh.attention_heads != 0)
        {
            refuse("model.student.fresh: all sizes are at least 1, and attentionHeads divides hiddenSize".into());
        }
    }
    for mistake in objectives::mistakes(
        &spec.objective,
        spec.model.task,
        spec.teacher.is_some(),
        spec.hyperparameters.accumulate_steps,
    ) {
        refuse(mistake);
    }
    if let Some(annotate) = &spec.data.annotate {
        if spec.model.task != Task::TextClassification {
            refuse("data.annotate is for the task TextClassification".into());
        }
        match (&annotate.endpoint, &annotate.teacher) {
            (Some(endpoint), None) => {
                if endpoint.labels.is_none() && spec.model.labels.is_none() {
                    refuse(
                        "data.annotate.endpoint.labels, or model.labels, has to name the labels to choose from".into(),
                    );
                }
            }
            (None, Some(teacher)) => {
                if spec.teacher.is_none() {
                    refuse("data.annotate.teacher needs a teacher".into());
                }
                if !(0.0..=1.0).contains(&teacher.minimum_confidence.get()) {
                    refuse("data.annotate.teacher.minimumConfidence is from \"0\" to \"1\"".into());
                }
            }
            _ => refuse("data.annotate: set exactly one of endpoint and teacher".into()),
        }
    }
    if let Some(select) = &spec.data.select
        && !(1..100).contains(&select.keep_percent)
    {
        refuse("data.select.keepPercent is from 1 to 99".into());
    }
    for (index, step) in spec.compress.iter().enumerate() {
        if step.prune.is_some() == step.quantize.is_some() {
            refuse(format!("compress[{index}]: set exactly one of prune and quantize"));
        }
        if let Some(prune) = &step.prune
            && (prune.sparsity_percent.is_some() == prune.two_of_four
                || prune.sparsity_percent.is_some_and(|percent| !(1..100).contains(&percent)))
        {
            refuse(format!("compress[{index}].prune: set exactly one of sparsityPercent, from 1 to 99, and twoOfFour"));
        }
        if step.prune.is_some() && spec.compress[..index].iter().any(|before| before.quantize.is_some()) {
            refuse(format!("compress[{index}]: prune before quantize, which fixes the weights"));
        }
    }
    let split = &spec.data.split;
    let held_out = u32::from(split.validation_percent) + u32::from(split.test_percent);
    if split.validation_percent == 0 || split.test_percent == 0 || held_out >= 100 {
        refuse("data.split: validationPercent and testPercent are at least 1 each and leave rows to train on".into());
    }
    let h = &spec.hyperparameters;
    if let Some(search) = &h.search
        && let Err(mistake) = athanor_search::Search::new(search, h)
    {
        refuse(format!("hyperparameters.search: {mistake}"));
    }
    if h.cross_validation.is_some_and(|spec| !(2..=20).contains(&spec.folds)) {
        refuse("hyperparameters.crossValidation.folds is from 2 to 20".into());
    }
    for (field, fine) in [
        ("epochs or maxSteps, not both,", !(h.epochs.is_some() && h.max_steps.is_some())),
        ("epochs", h.epochs != Some(0)),
        ("maxSteps", h.max_steps != Some(0)),
        ("batchSize", h.batch_size > 0),
        ("learningRate", h.learning_rate > 0.0 && h.learning_rate.is_finite()),
        ("warmupRatio", (0.0..=1.0).contains(&h.warmup_ratio)),
        ("accumulateSteps", h.accumulate_steps > 0),
        ("momentum", (0.0..1.0).contains(&h.momentum)),
        ("beta1", (0.0..1.0).contains(&h.beta1)),
        ("beta2", (0.0..1.0).contains(&h.beta2)),
        ("epsilon", h.epsilon > 0.0 && h.epsilon.is_finite()),
        ("l1", (0.0..=1.0).contains(&h.l1)),
        ("l2", (0.0..=1.0).contains(&h.l2)),
        ("weightDecay", (0.0..=1.0).contains(&h.weight_decay)),
        ("clipNorm", h.clip_norm >= 0.0 && h.clip_norm.is_finite()),
        ("maxSequenceLength", h.max_sequence_length >= 8),
    ] {
        if !fine {
            refuse(format!("hyperparameters: {field} has no usable value"));
        }
    }
    for (index, gate) in spec.evaluate.gates.iter().enumerate() {
        if gate.minimum.is_some() == gate.minimum_gain.is_some() {
            refuse(format!("evaluate.gates[{index}]: set exactly one of minimum and minimumGain"));
        }
        if gate.minimum_gain.is_some() && spec.evaluate.baseline.is_none() {
            refuse(format!("evaluate.gates[{index}].minimumGain needs evaluate.baseline"));
        }
        if let Some(unknown) = gate.sources.iter().flatten().find(|name| !names.contains(name.as_str())) {
            refuse(format!("evaluate.gates[{index}].sources: no source is named {unknown:?}"));
        }
    }
    if spec.distributed.num_nodes == 0 || spec.distributed.processes_per_node == 0 {
        refuse("distributed: numNodes and processesPerNode are at least 1".into());
    }
    mistakes
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "
apiVersion: athanor.dev/v1alpha1
kind: FineTuneJob
metadata: {name: reviews}
spec:
  model: {from: file:///models/minilm, task: TextClassification}
  data:
    sources:
      - {name: reviews, uri: file:///data/reviews.jsonl}
  output: {to: file:///out}
  podTemplate: {}
";

    fn manifest(text: &str) -> Result<TrainConfig, TrainError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        load_manifest(file.path())
    }

    #[test]
    fn a_manifest_names_its_folders_by_its_content() {
        let config = manifest(MANIFEST).unwrap();
        assert_eq!(config.artifact_to, format!("file:///out/reviews-{}/artifact", &config.run_id[..8]));
        assert_eq!(manifest(MANIFEST).unwrap(), config);
        assert_ne!(manifest(&MANIFEST.replace("reviews.jsonl", "other.jsonl")).unwrap().run_id, config.run_id);
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            ("kind: FineTuneJob", "kind: Pod", "not FineTuneJob"),
            ("task: TextClassification", "task: Nonsense", "spec.model.task"),
            ("uri: file:///data/reviews.jsonl", "columns: {}", "exactly one of uri and kafka"),
            ("podTemplate: {}", "hyperparameters: {batchSize: 0}", "batchSize"),
            ("podTemplate: {}", "hyperparameters: {accumulateSteps: 0}", "accumulateSteps"),
            ("podTemplate: {}", "hyperparameters: {learningrate: 1}", "field spec.hyperparameters.learningrate"),
            ("task: TextClassification", "task: TextClassification, head: {dropout: 1.0}", "model.head.dropout"),
            (
                "podTemplate: {}",
                "objective: {terms: [{softLabel: {}}]}",
                "objective.terms[0].softLabel needs a teacher",
            ),
            ("  data:", "  data:\n    annotate: {}", "data.annotate: set exactly one of endpoint and teacher"),
            ("  data:", "  data:\n    annotate: {teacher: {}}", "data.annotate.teacher needs a teacher"),
            (
                "  data:",
                "  data:\n    annotate: {endpoint: {url: 'http://e/v1', model: m}}",
                "has to name the labels to choose from",
            ),
            ("podTemplate: {}", "objective: {terms: [{}]}", "objective.terms[0]: a term is exactly one of"),
            ("podTemplate: {}", "objective: {terms: [{contrastive: {}}]}", "is not for the task TextClassification"),
            ("podTemplate: {}", "compress: [{quantize: {}}, {prune: {twoOfFour: true}}]", "prune before quantize"),
            ("podTemplate: {}", "compress: [{prune: {}}]", "compress[0].prune: set exactly one of sparsityPercent"),
            (
                "task: TextClassification",
                "task: TextClassification, student: {keepLayers: [0], fresh: {layers: 1, hiddenSize: 8, attentionHeads: 1, intermediateSize: 8}}",
                "exactly one of keepLayers and fresh",
            ),
            (
                "podTemplate: {}",
                "evaluate: {gates: [{metric: Accuracy, minimum: '0.5', sources: [x]}]}",
                "no source is named \"x\"",
            ),
            ("podTemplate: {}", "evaluate: {gates: [{metric: Accuracy, minimumGain: '0'}]}", "needs evaluate.baseline"),
        ];
        for (from, to, part) in cases {
            let error = manifest(&MANIFEST.replace(from, to)).unwrap_err();
            assert!(matches!(error, TrainError::User(_)) && error.to_string().contains(part), "{error}");
        }
        let three = MANIFEST
            .replace("podTemplate: {}", "hyperparameters: {batchSize: 0, beta1: 1, crossValidation: {folds: 21}}");
        let error = manifest(&three).unwrap_err().to_string();
        let all = ["batchSize", "beta1", "crossValidation.folds is from 2 to 20"];
        assert!(all.iter().all(|part| error.contains(part)), "all at once: {error}");
    }
}
