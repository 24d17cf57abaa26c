//! Labels for rows that have none, from a language model or from the job's teacher. All ranks get the same ones.
//!
//! Answers are kept next to the output, so that a job that starts again asks about no row twice.

mod endpoint;
mod labels;
mod teacher;

use athanor_data::{Dataset, annotate::AnnotationReport};
use serde::Serialize;

pub use endpoint::labels as endpoint_labels;
pub use labels::{Context, open_rows};
pub use teacher::{TeacherReport, check_labels};

use crate::TrainError;

/// The results of annotation, for the report.
#[derive(Debug, Serialize)]
#[serde(tag = "by")]
pub enum Annotation {
    Endpoint(AnnotationReport),
    Teacher(TeacherReport),
}

/// Labels the rows without a label, and removes those that get none. The digest then covers the labels. Rank 0 gets the
/// report.
///
/// # Errors
/// Returns a user error if no row has a label afterwards, or if the endpoint or the teacher cannot be asked.
pub fn complete(dataset: &mut Dataset, context: &Context) -> Result<Option<Annotation>, TrainError> {
    let Some(spec) = &context.job.spec().data.annotate else { return Ok(None) };
    match (&spec.endpoint, &spec.teacher) {
        (Some(spec), None) => Ok(endpoint::complete(dataset, spec, context)?.map(Annotation::Endpoint)),
        (None, Some(spec)) => teacher::complete(dataset, spec, context).map(Annotation::Teacher).map(Some),
        _ => Err(TrainError::User("data.annotate: set exactly one of endpoint and teacher".into())),
    }
}
