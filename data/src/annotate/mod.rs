//! Labels from any OpenAI-compatible endpoint: bounded concurrency, retries, strict answers, a bound on cost, and a journal by
//! which a run that was killed pays for no answer twice.
//!
//! Texts that are the same are asked about once. Leaves out streaming, tools and batches: an answer is one label.

mod endpoint;
mod journal;
mod prompt;
mod report;
mod run;

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::{Duration, Instant},
};

use athanor_contract::train::EndpointAnnotator;
use futures::StreamExt;

pub use report::{AnnotationReport, FailureExample, FailureReport};

use crate::error::DataError;
use endpoint::Endpoint;
use journal::Journal;
use prompt::Prompt;
use report::Failures;
use run::{Outcome, Question, Run};

/// Pause before the first retry.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);

/// What became of the rows, in the order in which they were given.
#[derive(Clone, Debug, PartialEq)]
pub struct Annotations {
    pub rows: Vec<Annotation>,
    pub report: AnnotationReport,
}

/// One row's label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Annotation {
    /// The row's number, as it was given.
    pub row: usize,
    /// Index of the label; `None` for a row that got none: the report says why.
    pub label: Option<usize>,
    /// Share of the row's usable samples that name the label; 0 without one.
    pub agreement: f64,
}

/// How far annotation is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AnnotationProgress {
    /// Rows that are done, with a label or without.
    pub done: usize,
    pub total: usize,
    /// Spent so far, earlier runs included; `None` without prices.
    pub cost: Option<f64>,
}

/// Labels texts. Each comes with a number of the caller's, by which it is named in the result; the report names its `place`.
///
/// Dropping the future ends it at once; whatever had been answered is in the journal, and the next call goes on from there.
///
/// # Errors
/// The user's, for a prompt that does not work, a missing API key, and whatever the endpoint refuses (4xx other than 408 and 429).
/// Others, for a journal that cannot be written and an endpoint that fails every request.
pub async fn annotate(
    texts: &[(usize, &str)],
    spec: &EndpointAnnotator,
    labels: &[String],
    journal: &Path,
    place: &(dyn Fn(usize) -> String + Sync),
    progress: &(dyn Fn(AnnotationProgress) + Sync),
) -> Result<Annotations, DataError> {
    let agent = concat!("athanor/", env!("CARGO_PKG_VERSION"));
    let builder = reqwest::Client::builder().user_agent(agent);
    let endpoint = Endpoint::new(spec, api_key(spec)?, builder, SHORTEST_PAUSE)?;
    annotate_at(endpoint, texts, spec, labels, journal, place, progress).await
}

/// What annotation would ask at most; answers that are kept from before are not subtracted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// One for each sample of each different text.
    pub questions: u64,
    /// Tokens of all prompts, estimated from their bytes; endpoints count fewer.
    pub input_tokens: u64,
}

/// Reckons what [`annotate`] would ask about these texts, without asking.
///
/// # Errors
/// The user's, for a prompt that does not work.
pub fn estimate(texts: &[&str], spec: &EndpointAnnotator, labels: &[String]) -> Result<Estimate, DataError> {
    let prompt = Prompt::new(&spec.prompt, labels)?;
    let different: HashSet<&str> = texts.iter().copied().collect();
    let mut bytes = 0;
    for text in &different {
        bytes += prompt.render(text)?.len() as u64;
    }
    let samples = u64::from(spec.samples.max(1));
    Ok(Estimate {
        questions: different.len() as u64 * samples,
        input_tokens: bytes.div_ceil(run::BYTES_PER_TOKEN) * samples,
    })
}

/// The API key, from the environment variable that the specification names.
fn api_key(spec: &EndpointAnnotator) -> Result<Option<String>, DataError> {
    let Some(name) = &spec.api_key_variable else { return Ok(None) };
    match std::env::var(name) {
        Ok(key) if !key.trim().is_empty() => Ok(Some(key.trim().to_owned())),
        _ => Err(DataError::User(format!(
            "data.annotate.endpoint.apiKeyVariable: the environment has no {name}, or an empty one"
        ))),
    }
}

async fn annotate_at(
    endpoint: Endpoint,
    texts: &[(usize, &str)],
    spec: &EndpointAnnotator,
    labels: &[String],
    journal: &Path,
    place: &(dyn Fn(usize) -> String + Sync),
    progress: &(dyn Fn(AnnotationProgress) + Sync),
) -> Result<Annotations, DataError> {
    let began = Instant::now();
    if labels.len() < 2 {
        return Err(DataError::User("data.annotate.endpoint needs two labels or more to choose from".into()));
    }
    let prompt = Prompt::new(&spec.prompt, labels)?;
    let mut questions = questions(texts, spec, labels)?;
    let numbers: HashMap<&str, usize> =
        questions.iter().enumerate().map(|(number, question)| (question.key.as_str(), number)).collect();
    let (journal, entries) = Journal::open(journal, |key| numbers.contains_key(key))?;
    drop(numbers);
    let run = Run::new(endpoint, prompt, spec, labels, journal);
    let mut waiting = Vec::with_capacity(questions.len());
    let (mut done, mut resumed) = (0, 0);
    for question in &mut questions {
        let known = entries.get(&question.key).map_or(&[][..], Vec::as_slice);
        let open = run.resume(question, known, spec.samples);
        waiting.push(open);
        if open == 0 {
            done += question.rows.len();
            resumed += question.rows.len();
        }
    }
    drop(entries);
    let tell = |done: usize| progress(AnnotationProgress { done, total: texts.len(), cost: run.cost() });
    tell(done);

    let jobs: Vec<(usize, usize)> = questions
        .iter()
        .enumerate()
        .flat_map(|(number, question)| {
            let open = question.samples.iter().enumerate().filter(|(_, outcome)| outcome.is_open());
            open.map(move |(sample, _)| (number, sample))
        })
        .collect();
    let asked = futures::stream::iter(jobs).map(|(number, sample)| {
        let (run, question) = (&run, &questions[number]);
        async move { (number, sample, run.ask(question, sample).await) }
    });
    let mut asked = asked.buffer_unordered(spec.concurrency.max(1) as usize);
    let mut outcomes = Vec::new();
    while let Some((number, sample, outcome)) = asked.next().await {
        waiting[number] -= 1;
        if waiting[number] == 0 {
            done += questions[number].rows.len();
            tell(done);
        }
        outcomes.push((number, sample, outcome));
    }
    drop(asked);
    for (number, sample, outcome) in outcomes {
        questions[number].samples[sample] = outcome;
    }
    let mut report = run.finish()?;
    report.model = spec.model.clone();
    report.rows = texts.len() as u64;
    report.resumed = resumed as u64;
    let rows = conclude(texts, &questions, labels.len(), place, &mut report);
    report.seconds = began.elapsed().as_secs_f64();
    Ok(Annotations { rows, report })
}

/// One question for each different text.
fn questions<'t>(
    texts: &[(usize, &'t str)],
    spec: &EndpointAnnotator,
    labels: &[String],
) -> Result<Vec<Question<'t>>, DataError> {
    let mut questions: Vec<Question> = Vec::new();
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    for (position, &(_, text)) in texts.iter().enumerate() {
        match numbers.get(text) {
            Some(&number) => questions[number].rows.push(position),
            None => {
                numbers.insert(text, questions.len());
                let key = journal::key(&spec.model, &spec.prompt, labels, text)?;
                questions.push(Question { key, text, rows: vec![position], samples: Vec::new() });
            }
        }
    }
    Ok(questions)
}

/// Counts the votes of each question and gives its rows what they decide.
fn conclude(
    texts: &[(usize, &str)],
    questions: &[Question],
    labels: usize,
    place: &(dyn Fn(usize) -> String + Sync),
    report: &mut AnnotationReport,
) -> Vec<Annotation> {
    let mut rows: Vec<Annotation> =
        texts.iter().map(|&(row, _)| Annotation { row, label: None, agreement: 0.0 }).collect();
    let mut failures = Failures::default();
    let (mut comparable, mut differing) = (0_u64, 0_u64);
    for question in questions {
        let size = question.rows.len() as u64;
        let mut votes = vec![0_u32; labels];
        question.samples.iter().filter_map(Outcome::label).for_each(|label| votes[label] += 1);
        let usable: u32 = votes.iter().sum();
        let most = votes.iter().copied().max().unwrap_or(0);
        if usable >= 2 {
            comparable += size;
            differing += if most < usable { size } else { 0 };
        }
        let mut winners = (0..labels).filter(|&label| most > 0 && votes[label] == most);
        let (winner, tied) = (winners.next(), winners.next().is_some());
        match winner.filter(|_| !tied) {
            Some(label) => {
                report.labelled += size;
                for &position in &question.rows {
                    rows[position].label = Some(label);
                    rows[position].agreement = f64::from(most) / f64::from(usable);
                }
            }
            None => {
                let (reason, detail) = match question.samples.iter().find_map(Outcome::failure) {
                    _ if tied => ("the samples are tied", ""),
                    Some(failure) => failure,
                    None => ("not asked", ""),
                };
                for &position in &question.rows {
                    failures.count(reason, detail, || place(texts[position].0), question.text);
                }
            }
        }
    }
    report.failures = failures.into_reports();
    report.disagreement = (comparable > 0).then(|| differing as f64 / comparable as f64);
    rows
}

#[cfg(test)]
mod tests;
