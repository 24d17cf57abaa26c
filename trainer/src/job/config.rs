//! What to train: the operator's `train.json`, or the user's own manifest on a laptop.

use std::{collections::BTreeSet, path::Path};

use athanor_contract::{
    artifact::{EVENTS, sha256_hex},
    train::{CLUSTER_FIELDS, JobManifest, Task, TeacherOutputs, TrainConfig, TrainSpec},
};
use serde::de::DeserializeOwned;

use super::{bounds, setup};
use crate::{TrainError, objectives};

/// Reads the configuration that the operator mounted.
pub fn load(path: &Path) -> Result<TrainConfig, TrainError> {
    let text = read(path)?;
    let config: TrainConfig = located(path, &mut serde_json::Deserializer::from_str(&text))?;
    refuse(path, mistakes(&config.spec)?)?;
    Ok(config)
}

/// Reads a FineTuneJob as `kubectl apply` takes it. Its folders are named by a hash of the specification, so that
/// running the same manifest again finds its checkpoints; nodes beyond this machine are left out.
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
    refuse(path, mistakes(&spec)?)?;
    spec.distributed.num_nodes = 1;
    of_laptop(manifest.metadata.name, spec)
}

/// A run on this machine: its folders are named by a hash of the specification, so that the same one finds its
/// checkpoints.
pub fn of_laptop(name: String, spec: TrainSpec) -> Result<TrainConfig, TrainError> {
    let identity = serde_json::to_vec(&(&name, &spec)).map_err(TrainError::other)?;
    let run_id = sha256_hex(&identity)[..32].to_owned();
    let folder = format!("{}/{name}-{}", spec.output.to.trim_end_matches('/'), &run_id[..8]);
    Ok(TrainConfig {
        checkpoint_to: format!("{folder}/checkpoints"),
        artifact_to: format!("{folder}/artifact"),
        events_to: format!("{folder}/{EVENTS}"),
        trials: Vec::new(),
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
        let path = error.path().to_string();
        let field = if path == "." { "the document".into() } else { format!("field {path}") };
        // YAML's errors begin with the path themselves.
        let message = error.into_inner().to_string();
        let message = message.strip_prefix(&format!("{path}: ")).unwrap_or(&message);
        TrainError::User(format!("{}: {field}: {message}", file.display()))
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
fn mistakes(spec: &TrainSpec) -> Result<Vec<String>, TrainError> {
    let mut mistakes = bounds::mistakes(spec)?;
    mistakes.extend(spec.mistakes_of_task());
    let mut refuse = |message: String| mistakes.push(message);
    let names: BTreeSet<&str> = spec.data.sources.iter().map(|source| source.name.as_str()).collect();
    if names.len() < spec.data.sources.len() {
        refuse("data.sources: two sources have the same name".into());
    }
    for (index, source) in spec.data.sources.iter().enumerate() {
        if source.uri.is_some() == source.kafka.is_some() {
            refuse(format!("data.sources[{index}] ({}): set exactly one of uri and kafka", source.name));
        }
        if source.columns.pair.is_some() && spec.model.task != Task::Embedding {
            let task = spec.model.task;
            refuse(format!(
                "data.sources[{index}] ({}).columns.pair is for the task Embedding: {task:?} reads one text a row",
                source.name
            ));
        }
        for (place, range) in source.kafka.iter().flat_map(|kafka| &kafka.ranges).enumerate() {
            if range.begin > range.end {
                refuse(format!(
                    "data.sources[{index}] ({}).kafka.ranges[{place}]: begin must not be after end",
                    source.name
                ));
            }
        }
    }
    let uris = spec.data.sources.iter().enumerate();
    let uris = uris.filter_map(|(index, source)| Some((format!("data.sources[{index}].uri"), source.uri.as_ref()?)));
    let models = [
        ("model.from", Some(&spec.model.from)),
        ("teacher.from", spec.teacher.as_ref().map(|teacher| &teacher.from)),
        ("evaluate.baseline", spec.evaluate.baseline.as_ref()),
    ];
    let models = models.into_iter().filter_map(|(field, uri)| Some((field.to_owned(), uri?)));
    for (field, uri) in uris.chain(models).filter(|(_, uri)| uri.starts_with("pvc://")) {
        refuse(format!("{field}: {uri} is on a volume of a cluster: name what is on this machine by file://"));
    }
    if let Some(clean) = &spec.data.clean {
        if clean.minimum_length.zip(clean.maximum_length).is_some_and(|(least, most)| least > most) {
            refuse("data.clean: minimumLength must not be above maximumLength".into());
        }
        if clean.near_duplicates.is_some_and(|near| !(0.5..=1.0).contains(&near.threshold.get())) {
            refuse("data.clean.nearDuplicates.threshold is from \"0.5\" to \"1\"".into());
        }
    }
    if let Some(labels) = &spec.model.labels {
        let distinct: BTreeSet<_> = labels.iter().collect();
        if distinct.len() < labels.len() {
            refuse("model.labels: each label once".into());
        }
    }
    if let Some(student) = &spec.model.student {
        if student.keep_layers.is_some() == student.fresh.is_some() {
            refuse("model.student: set exactly one of keepLayers and fresh".into());
        }
        if student.fresh.is_some_and(|fresh| !fresh.hidden_size.is_multiple_of(fresh.attention_heads)) {
            refuse("model.student.fresh: attentionHeads has to divide hiddenSize".into());
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
                if endpoint.temperature.is_some_and(|temperature| !(0.0..=2.0).contains(&temperature.get())) {
                    refuse("data.annotate.endpoint.temperature is from \"0\" to \"2\"".into());
                }
                let prices = endpoint.input_token_price.zip(endpoint.output_token_price);
                if endpoint.maximum_cost.is_some() && prices.is_none() {
                    refuse("data.annotate.endpoint.maximumCost needs inputTokenPrice and outputTokenPrice".into());
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
    if let Some(teacher) = &spec.teacher {
        let terms = objectives::terms(&spec.objective, spec.model.task, Some(teacher));
        if !setup::learns_from_teacher(spec) && !spec.data.teacher_annotates() {
            let names: Vec<&str> = terms.iter().map(objectives::name).collect();
            refuse(format!(
                "teacher: nothing uses it: objective.terms ({}) do not, and neither data.select nor data.annotate.teacher is set",
                names.join(", ")
            ));
        }
        if spec.data.augment.is_some() && !setup::objective_asks(spec) {
            refuse(
                "data.augment: no term of the objective asks the teacher, so that the new texts would teach nothing"
                    .into(),
            );
        }
        let by_token = terms.iter().any(|term| term.hidden_state.is_some());
        if teacher.outputs == Some(TeacherOutputs::Cached) && (by_token || spec.model.task != Task::TextClassification)
        {
            refuse("teacher.outputs: Cached is for the task TextClassification without hiddenState terms".into());
        }
    }
    for (index, step) in spec.compress.iter().enumerate() {
        if step.prune.is_some() == step.quantize.is_some() {
            refuse(format!("compress[{index}]: set exactly one of prune and quantize"));
        }
        if let Some(prune) = &step.prune
            && prune.sparsity_percent.is_some() == prune.two_of_four
        {
            refuse(format!("compress[{index}].prune: set exactly one of sparsityPercent and twoOfFour"));
        }
        if step.prune.is_some() && spec.compress[..index].iter().any(|before| before.quantize.is_some()) {
            refuse(format!("compress[{index}]: prune before quantize, which fixes the weights"));
        }
    }
    let split = &spec.data.split;
    let held_out = u32::from(split.validation_percent) + u32::from(split.test_percent);
    if held_out >= 100 {
        refuse("data.split: validationPercent and testPercent leave no rows to train on".into());
    }
    let h = &spec.hyperparameters;
    if let Some(search) = &h.search
        && let Err(mistake) = athanor_search::Search::new(search, h)
    {
        refuse(format!("hyperparameters.search: {mistake}"));
    }
    if h.epochs.is_some() && h.max_steps.is_some() {
        refuse("hyperparameters: set epochs or maxSteps, not both".into());
    }
    for (index, gate) in spec.evaluate.gates.iter().enumerate() {
        let limits = [&gate.minimum, &gate.minimum_gain, &gate.minimum_of_teacher];
        if limits.into_iter().flatten().count() != 1 {
            refuse(format!("evaluate.gates[{index}]: set exactly one of minimum, minimumGain and minimumOfTeacher"));
        }
        if gate.minimum_gain.is_some() && spec.evaluate.baseline.is_none() {
            refuse(format!("evaluate.gates[{index}].minimumGain needs evaluate.baseline"));
        }
        if let Some(unknown) = gate.sources.iter().flatten().find(|name| !names.contains(name.as_str())) {
            refuse(format!("evaluate.gates[{index}].sources: no source is named {unknown:?}"));
        }
    }
    Ok(mistakes)
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
            ("podTemplate: {}", "hyperparameters: {dropout: x}", ": field spec.hyperparameters.dropout: invalid type"),
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
            ("name: reviews, uri", "name: Reviews, uri", "data.sources[0].name: \"Reviews\" does not match"),
            (
                "file:///data/reviews.jsonl",
                "/data/reviews.jsonl",
                "data.sources[0].uri: \"/data/reviews.jsonl\" does not",
            ),
            (
                "uri: file:///data/reviews.jsonl",
                "kafka: {bootstrapServers: k, topic: t, ranges: [{partition: 0, begin: -1, end: 2}]}",
                "data.sources[0].kafka.ranges[0].begin: -1 is less than 0",
            ),
            (
                "uri: file:///data/reviews.jsonl",
                "kafka: {bootstrapServers: k, topic: t, ranges: [{partition: 0, begin: 3, end: 2}]}",
                "data.sources[0] (reviews).kafka.ranges[0]: begin must not be after end",
            ),
            (
                "uri: file:///data/reviews.jsonl",
                "uri: file:///data/reviews.jsonl, columns: {pair: answer}",
                "data.sources[0] (reviews).columns.pair is for the task Embedding",
            ),
            (
                "file:///data/",
                "pvc://reviews/data/",
                "data.sources[0].uri: pvc://reviews/data/reviews.jsonl is on a volume of",
            ),
            ("file:///models/", "pvc://models/", "model.from: pvc://models/minilm is on a volume of a cluster"),
            ("  data:", "  data:\n    clean: {minimumLength: 3, maximumLength: 2}", "minimumLength must not be above"),
            (
                "  data:",
                "  data:\n    clean: {nearDuplicates: {threshold: '0.4'}}",
                "data.clean.nearDuplicates.threshold is from",
            ),
            (
                "  data:",
                "  data:\n    annotate: {endpoint: {url: 'http://e/v1', model: m, labels: [a, b], maximumCost: '1'}}",
                "data.annotate.endpoint.maximumCost needs inputTokenPrice and outputTokenPrice",
            ),
            (
                "  data:",
                "  data:\n    annotate: {endpoint: {url: 'http://e/v1', model: m, labels: [a, b], temperature: '3'}}",
                "data.annotate.endpoint.temperature is from",
            ),
            (
                "  data:",
                "  data:\n    annotate: {endpoint: {url: 'http://e/v1', model: m, labels: [a, b], samples: 17}}",
                "data.annotate.endpoint.samples: 17 is more than 16",
            ),
            (
                "podTemplate: {}",
                "teacher: {from: 'file:///t'}\n  objective: {terms: [{hiddenState: {layers: []}}]}",
                "objective.terms[0].hiddenState.layers: 0 items is less than 1",
            ),
            (
                "podTemplate: {}",
                "teacher: {from: 'file:///t'}\n  objective: {terms: [{crossEntropy: {}}]}",
                "teacher: nothing uses it: objective.terms (crossEntropy) do not",
            ),
            (
                "task: TextClassification}",
                "task: TextRegression}\n  teacher: {from: 'file:///t'}",
                "teacher: nothing uses it: objective.terms (meanSquaredError) do not",
            ),
            (
                "podTemplate: {}",
                "teacher: {from: 'file:///t', outputs: Cached}\n  objective: {terms: [{hiddenState: {layers: [{student: 0, teacher: 0}]}}]}",
                "teacher.outputs: Cached is for the task TextClassification without hiddenState terms",
            ),
            (
                "task: TextClassification}",
                "task: MaskedLanguageModel}\n  teacher: {from: 'file:///t', outputs: Cached}",
                "teacher.outputs: Cached is for the task TextClassification",
            ),
            (
                "podTemplate: {}",
                "evaluate: {gates: [{metric: PearsonCorrelation, minimum: '0.5'}]}",
                "evaluate.gates[0].metric: TextClassification has no PearsonCorrelation, but Accuracy or MacroF1",
            ),
        ];
        for (from, to, part) in cases {
            let error = manifest(&MANIFEST.replace(from, to)).unwrap_err();
            assert!(matches!(error, TrainError::User(_)) && error.to_string().contains(part), "{error}");
        }
        for fine in [
            "teacher: {from: 'file:///t', outputs: Cached}",
            "teacher: {from: 'file:///t'}\n  objective: {terms: [{crossEntropy: {}}, {softLabel: {}}]}",
        ] {
            manifest(&MANIFEST.replace("podTemplate: {}", fine)).unwrap();
        }
        let annotates = MANIFEST.replace("  data:", "  data:\n    annotate: {teacher: {}}");
        let only = "teacher: {from: 'file:///t'}\n  objective: {terms: [{crossEntropy: {}}]}";
        manifest(&annotates.replace("podTemplate: {}", only)).unwrap();
        let three = MANIFEST
            .replace("podTemplate: {}", "hyperparameters: {batchSize: 0, beta1: 1, crossValidation: {folds: 21}}");
        let error = manifest(&three).unwrap_err().to_string();
        let all = ["batchSize", "beta1", "crossValidation.folds: 21 is more than 20"];
        assert!(all.iter().all(|part| error.contains(part)), "all at once: {error}");
    }
}
