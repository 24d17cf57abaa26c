//! What to train: the operator's `train.json`, or the user's own manifest on a laptop.

use std::path::Path;

use athanor_contract::{
    artifact::{EVENTS, sha256_hex},
    process::api,
    train::{self, CLUSTER_FIELDS, JobManifest, TrainConfig, TrainSpec},
};
use serde::de::DeserializeOwned;

use super::bounds;
use crate::TrainError;

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
    let is_of_group = manifest.api_version.split('/').next() == Some(api::GROUP);
    if manifest.kind != api::FINE_TUNE_JOB || !is_of_group {
        let JobManifest { api_version, kind, .. } = manifest;
        let expected = format!("{} of {}", api::FINE_TUNE_JOB, api::API_VERSION);
        return Err(refused(format!("the document is a {kind} of {api_version}; expected a {expected}")));
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

/// The bounds and rules that the API server and the operator check in a cluster, and that no address is on a cluster's volume.
fn mistakes(spec: &TrainSpec) -> Result<Vec<String>, TrainError> {
    let mut found = bounds::mistakes(spec)?;
    found.extend(train::mistakes(spec).iter().map(ToString::to_string));
    let h = &spec.hyperparameters;
    if let Some(search) = &h.search
        && let Err(mistake) = athanor_search::Search::new(search, h)
    {
        found.push(format!("hyperparameters.{mistake}"));
    }
    let sources = spec.data.sources.iter().enumerate();
    let sources =
        sources.filter_map(|(index, source)| Some((format!("data.sources[{index}].uri"), source.uri.as_ref()?)));
    let models = [
        ("model.from", Some(&spec.model.from)),
        ("teacher.from", spec.teacher.as_ref().map(|teacher| &teacher.from)),
        ("evaluate.baseline", spec.evaluate.baseline.as_ref()),
    ];
    let models = models.into_iter().filter_map(|(field, uri)| Some((field.to_owned(), uri?)));
    for (field, uri) in sources.chain(models).filter(|(_, uri)| uri.starts_with("pvc://")) {
        found.push(format!("{field}: {uri} is on a cluster's volume; use file:// for a file on this machine"));
    }
    Ok(found)
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
    #[expect(clippy::too_many_lines, reason = "a table of cases")]
    fn errors_name_the_field() {
        let cases = [
            ("kind: FineTuneJob", "kind: Pod", "expected a FineTuneJob of athanor.dev/v1alpha1"),
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
                "objective.terms[0].softLabel: requires a teacher",
            ),
            ("  data:", "  data:\n    annotate: {}", "data.annotate: set exactly one of endpoint and teacher"),
            ("  data:", "  data:\n    annotate: {teacher: {}}", "data.annotate.teacher: requires a teacher"),
            (
                "  data:",
                "  data:\n    annotate: {endpoint: {url: 'http://e/v1', model: m}}",
                "data.annotate.endpoint.labels: required unless model.labels is set",
            ),
            ("podTemplate: {}", "objective: {terms: [{}]}", "objective.terms[0]: set exactly one of crossEntropy"),
            (
                "podTemplate: {}",
                "objective: {terms: [{contrastive: {}}]}",
                "contrastive: the task TextClassification does not have this term",
            ),
            (
                "podTemplate: {}",
                "compress: [{quantize: {}}, {prune: {twoOfFour: true}}]",
                "compress[1]: prune must come before quantize",
            ),
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
            (
                "podTemplate: {}",
                "evaluate: {gates: [{metric: Accuracy, minimumGain: '0'}]}",
                "evaluate.gates[0].minimumGain: a gate with minimumGain requires evaluate.baseline",
            ),
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
                "data.sources[0].kafka.ranges[0]: begin must not be after end",
            ),
            (
                "uri: file:///data/reviews.jsonl",
                "uri: file:///data/reviews.jsonl, columns: {pair: answer}",
                "data.sources[0].columns.pair: requires the task Embedding",
            ),
            (
                "file:///data/",
                "pvc://reviews/data/",
                "data.sources[0].uri: pvc://reviews/data/reviews.jsonl is on a cluster's volume",
            ),
            ("file:///models/", "pvc://models/", "model.from: pvc://models/minilm is on a cluster's volume"),
            ("  data:", "  data:\n    clean: {minimumLength: 3, maximumLength: 2}", "minimumLength must not be above"),
            (
                "  data:",
                "  data:\n    clean: {nearDuplicates: {threshold: '0.4'}}",
                "data.clean.nearDuplicates.threshold: must be between 0.5 and 1",
            ),
            (
                "  data:",
                "  data:\n    annotate: {endpoint: {url: 'http://e/v1', model: m, labels: [a, b], maximumCost: '1'}}",
                "data.annotate.endpoint: maximumCost requires inputTokenPrice and outputTokenPrice",
            ),
            (
                "  data:",
                "  data:\n    annotate: {endpoint: {url: 'http://e/v1', model: m, labels: [a, b], temperature: '3'}}",
                "data.annotate.endpoint.temperature: must be between 0 and 2",
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
                "teacher: nothing uses it: no term of objective.terms (crossEntropy)",
            ),
            (
                "task: TextClassification}",
                "task: TextRegression}\n  teacher: {from: 'file:///t'}",
                "teacher: nothing uses it: no term of objective.terms (meanSquaredError)",
            ),
            (
                "podTemplate: {}",
                "teacher: {from: 'file:///t', outputs: Cached}\n  objective: {terms: [{hiddenState: {layers: [{student: 0, teacher: 0}]}}]}",
                "teacher.outputs: Cached requires the task TextClassification without hiddenState terms",
            ),
            (
                "task: TextClassification}",
                "task: MaskedLanguageModel}\n  teacher: {from: 'file:///t', outputs: Cached}",
                "teacher.outputs: Cached requires the task TextClassification",
            ),
            (
                "podTemplate: {}",
                "evaluate: {gates: [{metric: PearsonCorrelation, minimum: '0.5'}]}",
                "evaluate.gates[0].metric: the task TextClassification has no PearsonCorrelation; use Accuracy or MacroF1",
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
