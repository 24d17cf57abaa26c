//! Whether student and teacher read the same tokens.

use std::path::Path;

use athanor_contract::artifact::sha256_hex;
use athanor_models::{
    Tokenizer,
    tokenizer::{SameTokens, TokenRows},
};

use crate::TrainError;

/// Digest of the vocabulary of a folder's tokenizer, for comparison.
pub fn vocabulary(folder: &Path) -> Result<String, TrainError> {
    let path = folder.join("tokenizer.json");
    let bytes = std::fs::read(&path).map_err(|error| TrainError::User(format!("{}: {error}", path.display())))?;
    let whole: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|error| TrainError::User(format!("{}: not JSON: {error}", path.display())))?;
    Ok(sha256_hex(whole["model"]["vocab"].to_string().as_bytes()))
}

/// Tokenizer and rows of one model.
pub struct Side<'a> {
    pub tokenizer: &'a Tokenizer,
    pub rows: &'a TokenRows,
}

/// Checks that both models split each row into the same tokens. `place` names the origin of a row.
///
/// # Errors
/// A row that is split differently is a user error: the job needs another teacher or objective.
pub fn check_same(student: &Side, teacher: &Side, place: impl Fn(usize) -> String) -> Result<(), TrainError> {
    let same = SameTokens::new(student.tokenizer, teacher.tokenizer);
    for (row, (students, teachers)) in student.rows.iter().zip(teacher.rows.iter()).enumerate() {
        let Some(at) = same.first_difference(students, teachers) else { continue };
        let token = |ids: &[u32], tokenizer: &Tokenizer| match ids.get(at) {
            Some(&id) => format!("{:?}", tokenizer.token(id)),
            None => "no more".to_owned(),
        };
        let (students, teachers) = (token(students, student.tokenizer), token(teachers, teacher.tokenizer));
        return Err(TrainError::User(format!(
            "teacher.from: hiddenState compares the tokens of each text one by one, but of {} the student's token {} is \
             {students}, the teacher's {teachers}",
            place(row),
            at + 1,
        )));
    }
    Ok(())
}
