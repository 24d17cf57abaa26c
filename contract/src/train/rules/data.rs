//! Rules of `data`.

use std::collections::BTreeSet;

use super::{
    cel::{
        BEGIN_BEFORE_END, COST_NEEDS_PRICES, ENDPOINT_OR_TEACHER, FROM_0_TO_1, FROM_0_TO_2, FROM_HALF_TO_1,
        LENGTHS_IN_ORDER, MESSAGES_OR_PROMPT, ONE_SOURCE_WITHOUT_PART, PROMPT_AND_COMPLETION, SPLIT_LEAVES_ROWS,
        URI_OR_KAFKA,
    },
    model::require_classifier_and_teacher,
    rule::Found,
};
use crate::{
    Decimal,
    train::{
        AnnotateSpec, DataSpec, EndpointAnnotator, SelectMethod, SelectSpec, SelectViewer, Source, Task, TrainSpec,
    },
};

pub(super) fn check(spec: &TrainSpec, found: &mut Found) {
    let data = &spec.data;
    let mut names = BTreeSet::new();
    for (index, source) in data.sources.iter().enumerate() {
        if !names.insert(source.name.as_str()) {
            found.add(format!("data.sources[{index}].name"), format!("two sources are named {:?}", source.name));
        }
        check_source(spec.model.task, source, &format!("data.sources[{index}]"), found);
    }
    let has_training_rows = data.sources.iter().any(|source| source.part.is_none());
    found.require(has_training_rows, "data", &ONE_SOURCE_WITHOUT_PART);
    if let Some(clean) = &data.clean {
        let holds = clean.minimum_length.zip(clean.maximum_length).is_none_or(|(least, most)| least <= most);
        found.require(holds, "data.clean", &LENGTHS_IN_ORDER);
        let threshold = clean.near_duplicates.map(|near| near.threshold);
        found.require(is_within(threshold, 0.5, 1.0), "data.clean.nearDuplicates.threshold", &FROM_HALF_TO_1);
    }
    check_kafka_secrets(data, found);
    let held_out = u32::from(data.split.validation_percent) + u32::from(data.split.test_percent);
    found.require(held_out < 100, "data.split", &SPLIT_LEAVES_ROWS);
    if let Some(annotate) = &data.annotate {
        check_annotate(spec, annotate, found);
    }
    if let Some(select) = &data.select {
        check_select(spec, select, found);
    }
    if data.augment.is_some() {
        require_classifier_and_teacher(spec, "data.augment", found);
        if spec.teacher.is_some() && !spec.objective_asks_teacher() {
            found.add(
                "data.augment",
                "no term of the objective needs the teacher, so nothing learns from the new texts",
            );
        }
    }
}

fn is_within(value: Option<Decimal>, least: f64, most: f64) -> bool {
    value.is_none_or(|value| (least..=most).contains(&value.get()))
}

fn check_source(task: Task, source: &Source, field: &str, found: &mut Found) {
    found.require(source.uri.is_some() != source.kafka.is_some(), field, &URI_OR_KAFKA);
    let columns = &source.columns;
    let field_of_columns = format!("{field}.columns");
    let is_one = columns.messages.is_none() || columns.prompt.is_none();
    found.require(is_one, &field_of_columns, &MESSAGES_OR_PROMPT);
    found.require(columns.prompt.is_some() == columns.completion.is_some(), &field_of_columns, &PROMPT_AND_COMPLETION);
    if source.columns.pair.is_some() && task != Task::Embedding {
        found.add(
            format!("{field}.columns.pair"),
            format!("requires the task Embedding; {task:?} reads one text from each row"),
        );
    }
    for (place, range) in source.kafka.iter().flat_map(|kafka| &kafka.ranges).enumerate() {
        found.require(range.begin <= range.end, format!("{field}.kafka.ranges[{place}]"), &BEGIN_BEFORE_END);
    }
}

/// A pod has one set of credentials and one of keys.
fn check_kafka_secrets(data: &DataSpec, found: &mut Found) {
    let sources = data.sources.iter().enumerate();
    let mut kafka = sources.filter_map(|(index, source)| Some((index, source.kafka.as_ref()?)));
    let Some((first, one)) = kafka.next() else { return };
    for (index, other) in kafka {
        for (field, is_same) in [
            ("credentialsSecretName", one.credentials_secret_name == other.credentials_secret_name),
            ("signingKeysSecretName", one.signing_keys_secret_name == other.signing_keys_secret_name),
        ] {
            if !is_same {
                found.add(
                    format!("data.sources[{index}].kafka.{field}"),
                    format!("must be that of data.sources[{first}]: a pod has one for all Kafka sources"),
                );
            }
        }
    }
}

fn check_annotate(spec: &TrainSpec, annotate: &AnnotateSpec, found: &mut Found) {
    if spec.model.task != Task::TextClassification {
        found.add("data.annotate", "requires the task TextClassification");
    }
    found.require(annotate.endpoint.is_some() != annotate.teacher.is_some(), "data.annotate", &ENDPOINT_OR_TEACHER);
    if let Some(endpoint) = &annotate.endpoint {
        check_endpoint(spec, endpoint, found);
    }
    if let Some(teacher) = &annotate.teacher {
        if spec.teacher.is_none() {
            found.add("data.annotate.teacher", "requires a teacher");
        }
        let minimum = Some(teacher.minimum_confidence);
        found.require(is_within(minimum, 0.0, 1.0), "data.annotate.teacher.minimumConfidence", &FROM_0_TO_1);
    }
}

fn check_endpoint(spec: &TrainSpec, endpoint: &EndpointAnnotator, found: &mut Found) {
    if endpoint.labels.is_none() && spec.model.labels.is_none() {
        found.add("data.annotate.endpoint.labels", "required unless model.labels is set: the labels to choose from");
    }
    found.require(is_within(endpoint.temperature, 0.0, 2.0), "data.annotate.endpoint.temperature", &FROM_0_TO_2);
    let has_prices = endpoint.input_token_price.is_some() && endpoint.output_token_price.is_some();
    found.require(endpoint.maximum_cost.is_none() || has_prices, "data.annotate.endpoint", &COST_NEEDS_PRICES);
}

fn check_select(spec: &TrainSpec, select: &SelectSpec, found: &mut Found) {
    let task = spec.model.task;
    let needs_labels = matches!(select.method, SelectMethod::Uncertainty | SelectMethod::GradientMatching);
    if needs_labels && task != Task::TextClassification {
        found.add(
            "data.select.method",
            format!("{:?} requires labels, which the task {task:?} does not have", select.method),
        );
    }
    if select.minimum_agreement.is_some() {
        require_classifier_and_teacher(spec, "data.select.minimumAgreement", found);
    }
    found.require(is_within(select.minimum_agreement, 0.0, 1.0), "data.select.minimumAgreement", &FROM_0_TO_1);
    let is_fresh = spec.model.student.as_ref().is_some_and(|student| student.fresh.is_some());
    if is_fresh && select.viewer == SelectViewer::Model {
        found.add(
            "data.select.viewer",
            "Model requires a model with trained weights, but model.student.fresh begins at random",
        );
    }
}
