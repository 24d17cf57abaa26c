//! `report.json` and `report.html` of a finished job: what was trained on what, how it went, and what the result is
//! worth.

use std::{collections::BTreeMap, path::Path};

use athanor_contract::train::{Hyperparameters, TrainSummary, TrialOutcome, WeightedTerm};
use athanor_data::{Overlap, SkippedRows, TopicReport, clean::CleaningReport};
use serde::Serialize;

pub use super::classes::ClassReport;
use super::{
    chart,
    classes::{Calibration, Confusion},
    fields::pairs,
    history::{History, Point},
};
use crate::{
    TrainError,
    compress::Form,
    curate::{annotate::Annotation, augment::AugmentReport, select::SelectionReport},
    data::{Dataset, Parts},
    evaluate::{Evaluation, GeneratedAnswer, SHARE_OF_TEACHER},
    job::cross_validation::{CrossValidation, FoldResult},
};

pub const JSON: &str = "report.json";
pub const HTML: &str = "report.html";
const TEMPLATE: &str = include_str!("report.html.jinja");

/// Labels that a confusion matrix can show.
const MATRIX_LABELS: usize = 24;

/// Everything the page shows.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report<'a> {
    pub job: &'a str,
    pub created: String,
    pub version: &'static str,
    pub parent: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<&'a str>,
    pub objective: Vec<Term>,
    pub labels: &'a [String],
    pub summary: &'a TrainSummary,
    pub hyperparameters: &'a Hyperparameters,
    pub history: &'a History,
    pub sources: Vec<SourceRows>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<&'a SkippedRows>,
    /// What the offset ranges of Kafka sources held, and what of it is no row; empty without such a source.
    #[serde(skip_serializing_if = "<[TopicReport]>::is_empty")]
    pub topics: &'a [TopicReport],
    /// Rows that are in no part because a source with a part has them too; absent if no source has a part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out_overlap: Option<&'a Overlap>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cleaning: Option<&'a CleaningReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotation: Option<&'a Annotation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selection: Option<&'a SelectionReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub augmented: Option<&'a AugmentReport>,
    /// The search that the hyperparameters come from; empty without one.
    #[serde(skip_serializing_if = "<[TrialOutcome]>::is_empty")]
    pub trials: &'a [TrialOutcome],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cross_validation: Option<&'a CrossValidation>,
    /// The trained model and its smaller forms; empty where none were asked for.
    #[serde(skip_serializing_if = "<[Form]>::is_empty")]
    pub forms: &'a [Form],
    /// Answers of a language model to some test rows; empty for other tasks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<AnswerRow>,
    /// Absent for tasks without classes.
    #[serde(flatten)]
    pub classes: Option<ClassReport>,
}

/// What a language model answered to one test row.
#[derive(Debug, PartialEq, Serialize)]
pub struct AnswerRow {
    #[serde(flatten)]
    pub answer: GeneratedAnswer,
    /// The baseline's answer to the same row, if it was measured.
    pub baseline: Option<String>,
}

/// Answers that a report shows: those of the first rows.
const SHOWN_ANSWERS: usize = 50;

/// The first answers, each with the baseline's.
pub fn answers(found: &Evaluation, baseline: Option<&Evaluation>) -> Vec<AnswerRow> {
    let before = baseline.map_or(&[][..], |baseline| baseline.results.answers());
    let row = |answer: &GeneratedAnswer| {
        let same = before.iter().find(|other| other.row == answer.row);
        AnswerRow { answer: answer.clone(), baseline: same.map(|other| other.text.clone()) }
    };
    found.results.answers().iter().take(SHOWN_ANSWERS).map(row).collect()
}

/// A term of the objective in words.
#[derive(Debug, PartialEq, Serialize)]
pub struct Term {
    pub name: &'static str,
    pub weight: f64,
    pub settings: String,
}

impl Term {
    pub fn new(term: &WeightedTerm) -> Self {
        let name = term.name();
        let mut whole = serde_json::to_value(&term.term).unwrap_or_default();
        whole.sort_all_objects();
        let settings = match &whole[name] {
            serde_json::Value::Object(settings) => {
                let word = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                settings.iter().map(|(name, value)| format!("{name} {}", word(value))).collect::<Vec<_>>().join(", ")
            }
            _ => String::new(),
        };
        Self { name, weight: term.weight, settings }
    }
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceRows {
    pub name: String,
    pub train: usize,
    pub validation: usize,
    pub test: usize,
}

/// Rows of each source in each part.
pub fn sources(dataset: &Dataset, parts: &Parts) -> Vec<SourceRows> {
    let count = |part: &[usize], source: usize| part.iter().filter(|&&row| dataset.rows.source(row) == source).count();
    let names = dataset.sources.iter().enumerate();
    names
        .map(|(index, name)| SourceRows {
            name: name.clone(),
            train: count(&parts.train, index),
            validation: count(&parts.validation, index),
            test: count(&parts.test, index),
        })
        .collect()
}

/// What the template needs besides the report.
#[derive(Serialize)]
struct Page<'a> {
    report: &'a Report<'a>,
    failed_gates: &'a [String],
    /// (title, SVG).
    pictures: Vec<(&'static str, String)>,
    /// Name and value of each metric, with the baseline's and the teacher's.
    metrics: Vec<(String, String, String, String)>,
    /// The share of the teacher's metrics that the result reaches, in percent, and whether that is
    /// little.
    of_teacher: BTreeMap<String, (String, bool)>,
    hyperparameters: Vec<(String, String)>,
    chosen: Vec<(String, String)>,
    timeline: Vec<(String, String)>,
    /// Rows of the confusion matrix: label and (rows, share of the label's rows) for each prediction; empty for many
    /// labels.
    matrix: Vec<(String, Vec<(usize, f64)>)>,
    folds: Option<FoldTable>,
    /// Instead of the matrix.
    confused: Vec<&'a Confusion>,
}

/// A cross-validation fold by fold.
#[derive(Serialize)]
struct FoldTable {
    /// Metrics over all rows of a fold.
    names: Vec<String>,
    /// Rows trained on, rows held out and best step of each fold, and its metrics as text.
    rows: Vec<(usize, usize, u64, Vec<String>)>,
    /// Mean and deviation of each metric.
    spreads: Vec<String>,
}

impl FoldTable {
    fn new(found: &CrossValidation) -> Self {
        let whole: Vec<_> = found.metrics.iter().filter(|(name, _)| !name.contains('/')).collect();
        let row = |fold: &FoldResult| {
            let value = |name: &String| fold.metrics.get(name).map_or("-".to_owned(), |value| format!("{value:.4}"));
            (fold.train, fold.held_out, fold.best_step, whole.iter().map(|(name, _)| value(name)).collect())
        };
        Self {
            names: whole.iter().map(|(name, _)| (*name).clone()).collect(),
            rows: found.folds.iter().map(row).collect(),
            spreads: whole.iter().map(|(_, spread)| format!("{:.4} ± {:.4}", spread.mean, spread.deviation)).collect(),
        }
    }
}

/// Writes both files into a folder.
pub fn write(folder: &Path, report: &Report) -> Result<(), TrainError> {
    let json = serde_json::to_vec_pretty(report).map_err(TrainError::other)?;
    for (name, bytes) in [(JSON, json), (HTML, html(report)?.into_bytes())] {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(TrainError::at(&path))?;
    }
    Ok(())
}

fn html(report: &Report) -> Result<String, TrainError> {
    let curve = |value: fn(&Point) -> f64| -> Vec<(f64, f64)> {
        report.history.points.iter().map(|point| (point.step as f64, value(point))).collect()
    };
    let validations: Vec<(f64, f64)> =
        report.history.validations.iter().map(|one| (one.step as f64, one.score)).collect();
    let nothing = ClassReport { confusion: Vec::new(), calibration: Calibration::default(), mistakes: Vec::new() };
    let classes = report.classes.as_ref().unwrap_or(&nothing);
    let bins: Vec<_> = classes.calibration.bins.iter().map(|bin| (bin.lower, bin.upper, bin.accuracy)).collect();
    let score = match report.history.score_name.as_str() {
        "" => "score",
        name => name,
    };
    let of_forms: Vec<_> =
        report.forms.iter().map(|form| (form.name.as_str(), form.bytes as f64 / 1e6, form.validation)).collect();
    let of_trials: Vec<_> =
        report.trials.iter().map(|trial| (trial.results.last().map(|result| result.get()), trial.best)).collect();
    let pictures = vec![
        ("Training loss", chart::line(&curve(|point| point.loss), "loss", false)),
        ("Validation", chart::line(&validations, score, true)),
        ("Learning rate", chart::line(&curve(|point| point.learning_rate), "learning rate", false)),
        ("Gradient norm", chart::line(&curve(|point| point.gradient_norm), "norm before clipping", false)),
        ("Search", chart::trials(&of_trials, "validation")),
        ("Calibration on the test rows", chart::calibration(&bins)),
        (
            "Size against quality on the validation rows",
            chart::forms(&of_forms, report.forms.first().map_or("", |form| form.metric.as_str())),
        ),
    ];
    let metrics = &report.summary.metrics;
    let own = || metrics.iter().filter(|(name, _)| !name.starts_with("baseline/") && !name.starts_with("teacher/"));
    let rounded = |value: &athanor_contract::Decimal| format!("{:.4}", value.get());
    let confused = || {
        let mut wrong: Vec<&Confusion> = classes.confusion.iter().filter(|cell| cell.label != cell.predicted).collect();
        wrong.sort_by_key(|cell| std::cmp::Reverse(cell.rows));
        wrong.truncate(MATRIX_LABELS);
        wrong
    };
    let small = report.labels.len() <= MATRIX_LABELS;
    let page = Page {
        report,
        failed_gates: &report.summary.failed_gates,
        pictures,
        metrics: own()
            .map(|(name, value)| {
                let other = |whose: &str| metrics.get(&format!("{whose}/{name}")).map(rounded).unwrap_or_default();
                (name.clone(), rounded(value), other("baseline"), other("teacher"))
            })
            .collect(),
        of_teacher: own()
            .filter_map(|(name, value)| {
                let share = value.get() / metrics.get(&format!("teacher/{name}"))?.get();
                Some((name.clone(), (format!("{:.1}", share * 100.0), share < SHARE_OF_TEACHER)))
            })
            .collect(),
        hyperparameters: pairs(report.hyperparameters)?,
        chosen: report.summary.chosen.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        timeline: {
            let mut marks: Vec<_> = report.summary.timeline.iter().collect();
            marks.sort_by(|a, b| a.1.get().total_cmp(&b.1.get()));
            marks.into_iter().map(|(name, value)| (name.clone(), format!("{:.1} s", value.get()))).collect()
        },
        matrix: if small { matrix(report.labels, &classes.confusion) } else { Vec::new() },
        folds: report.cross_validation.map(FoldTable::new),
        confused: if small { Vec::new() } else { confused() },
    };
    let mut environment = minijinja::Environment::new();
    environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
    environment.add_filter("fixed", |number: f64, digits: usize| format!("{number:.digits$}"));
    environment.add_template(HTML, TEMPLATE).map_err(TrainError::other)?;
    environment.get_template(HTML).and_then(|template| template.render(page)).map_err(TrainError::other)
}

fn matrix(labels: &[String], confusion: &[Confusion]) -> Vec<(String, Vec<(usize, f64)>)> {
    let rows = |label: &String, predicted: &String| {
        let cell = confusion.iter().find(|cell| cell.label == *label && cell.predicted == *predicted);
        cell.map_or(0, |cell| cell.rows)
    };
    let line = |label: &String| {
        let counts: Vec<usize> = labels.iter().map(|predicted| rows(label, predicted)).collect();
        let all = counts.iter().sum::<usize>().max(1) as f64;
        (label.clone(), counts.into_iter().map(|count| (count, count as f64 / all)).collect())
    };
    labels.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use athanor_contract::{
        Decimal,
        train::{DataSpec, ObjectiveSpec, Task},
    };

    use super::*;
    use crate::evaluate::{Classes, Predictions};

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table of cases")]
    fn a_page_shows_everything_and_escapes_texts() {
        let labels = ["negative".to_owned(), "positive".to_owned()];
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f.csv");
        std::fs::write(&file, "label,text\npositive,good\nnegative,<script>alert(1)</script>\n").unwrap();
        let spec: DataSpec = serde_json::from_value(serde_json::json!({
            "sources": [{"name": "reviews", "uri": format!("file://{}", file.display())}],
        }))
        .unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dataset = runtime.block_on(athanor_data::read(&spec, true, &|_| ())).unwrap();
        let predictions = Predictions { labels: vec![1, 1], confidences: vec![0.9, 0.8] };
        let found = Classes { truth: vec![Some(1), Some(0)], predictions };
        let mut summary = TrainSummary { artifact: "s3://b/out".into(), ..TrainSummary::default() };
        for (name, value) in [("accuracy", 0.5), ("baseline/accuracy", 0.25), ("teacher/accuracy", 0.75)] {
            summary.metrics.insert(name.into(), Decimal::new(value).unwrap());
        }
        let mut history = History::default();
        history.validated(10, 1.0, "accuracy", 0.5);
        let form = |name: &str, bytes, left_out: Option<&str>| Form {
            name: name.into(),
            bytes,
            sparsity: 0.0,
            metric: "accuracy".into(),
            validation: 0.5,
            test: left_out.is_none().then_some(0.4375),
            milliseconds: 1.5,
            left_out: left_out.map(str::to_owned),
        };
        let forms = [form("trained", 4_000_000, None), form("int8 weights", 1_000_000, Some("it costs 0.1 accuracy"))];
        let fold = |fold, accuracy: f64| FoldResult {
            fold,
            train: 31,
            held_out: 17,
            steps: 9,
            best_step: 8,
            metrics: [("accuracy".to_owned(), accuracy), ("reviews/accuracy".to_owned(), accuracy)].into(),
        };
        let trial = |name: &str, result: Option<f64>, best| TrialOutcome {
            name: name.into(),
            parameters: [("learningRate".to_owned(), "0.0003".to_owned())].into(),
            results: result.into_iter().filter_map(Decimal::new).collect(),
            failed: result.is_none(),
            best,
        };
        let trials = [trial("t1", Some(0.8125), false), trial("t2", Some(0.9375), true), trial("t3", None, false)];
        let cross_validation = CrossValidation::new(vec![fold(1, 0.625), fold(2, 0.875)]);
        let topic =
            TopicReport { source: "feedback".into(), rows: 40, deleted: 17, orphans: 5, ..TopicReport::default() };
        let overlap = Overlap { rows: 3, examples: vec!["a row 1, also held out as b row 2".into()] };
        let report = Report {
            job: "first",
            created: "2026-01-01T00:00:00Z".into(),
            version: "0",
            parent: "s3://b/base",
            labels: &labels,
            summary: &summary,
            hyperparameters: &Hyperparameters::default(),
            history: &history,
            sources: sources(&dataset, &Parts { train: vec![0], test: vec![1], ..Parts::default() }),
            teacher: Some("s3://b/teacher"),
            objective: ObjectiveSpec::default()
                .terms_of(Task::TextClassification, false)
                .iter()
                .map(Term::new)
                .collect(),
            skipped: None,
            topics: &[topic],
            held_out_overlap: Some(&overlap),
            cleaning: None,
            annotation: None,
            selection: None,
            augmented: None,
            trials: &trials,
            cross_validation: Some(&cross_validation),
            forms: &forms,
            answers: vec![AnswerRow {
                answer: GeneratedAnswer {
                    row: 0,
                    question: "who <b>lends</b>?".into(),
                    expected: "the bank".into(),
                    text: "a bank".into(),
                    exact: false,
                    token_f1: 0.5,
                    tokens: 3,
                    mean_log_probability: -1.0,
                },
                baseline: Some("I cannot tell".into()),
            }],
            classes: Some(ClassReport::new(&labels, &dataset, &[0, 1], &found)),
        };
        write(folder.path(), &report).unwrap();
        let html = std::fs::read_to_string(folder.path().join(HTML)).unwrap();
        for part in [
            "first",
            "0.5000",
            "0.2500",
            "teacher 0.7500: <span class=\"bad\">66.7 % of it",
            "reviews",
            "learningRate",
            "f.csv row 3",
            "&lt;script&gt;",
            "<svg",
            "crossEntropy",
            "it costs 0.1",
            "0.4375",
            "0.6250",
            "0.7500 ± 0.1768",
            "Search: 3 trials",
            "0.0003</td>\n          <td class=\"number\">0.9375</td>\n          <td><span class=\"good\">the best",
            "<span class=\"bad\">failed",
            "s3:&#x2f;&#x2f;b&#x2f;teacher",
            "who &lt;b&gt;lends&lt;&#x2f;b&gt;?",
            "I cannot tell",
            "<td>feedback</td><td class=\"number\">40</td><td class=\"number\">17</td>",
        ] {
            assert!(html.contains(part), "{part} is not in {html}");
        }
        assert!(!html.contains("<script"), "a text of the data reached the page as markup");
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.path().join(JSON)).unwrap()).unwrap();
        assert_eq!(json["mistakes"][0]["predicted"], "positive");
        assert_eq!(json["crossValidation"]["metrics"]["accuracy"]["mean"], 0.75);
        assert_eq!(json["crossValidation"]["folds"][1]["heldOut"], 17);
        assert_eq!((&json["topics"][0]["deleted"], &json["topics"][0]["orphans"]), (&17.into(), &5.into()));
        assert_eq!(json["confusion"].as_array().unwrap().len(), 2);
    }
}
