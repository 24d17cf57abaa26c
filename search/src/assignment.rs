//! One choice of hyperparameters, its name, and a specification that has it.

use std::{collections::BTreeMap, fmt};

use athanor_contract::{
    artifact::sha256_hex,
    train::{Hyperparameters, ParameterName, TrainSpec},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{limits::Limits, setting::Setting};

/// Characters of a trial's name.
const NAME_LENGTH: usize = 10;

/// A value for each hyperparameter that is searched for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Assignment(pub BTreeMap<ParameterName, Setting>);

impl Assignment {
    /// The trial's name: ten hexadecimal digits of a hash, the same wherever the same values are tried.
    pub fn name(&self) -> String {
        let mut digest = sha256_hex(self.to_string().as_bytes());
        digest.truncate(NAME_LENGTH);
        digest
    }

    /// The values as texts, for a status.
    pub fn to_strings(&self) -> BTreeMap<String, String> {
        self.0.iter().map(|(name, setting)| (name.to_string(), setting.to_string())).collect()
    }

    /// From a status.
    ///
    /// # Errors
    /// A name that is no hyperparameter's.
    pub fn from_strings(texts: &BTreeMap<String, String>) -> Result<Self, String> {
        let settings = texts.iter().map(|(name, text)| {
            let name = name.parse::<ParameterName>().map_err(|error| error.to_string())?;
            Ok((name, Setting::from(text.as_str())))
        });
        settings.collect::<Result<_, String>>().map(Self)
    }
}

impl fmt::Display for Assignment {
    /// Such as `batchSize=32, learningRate=0.00003`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, setting)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{name}={setting}")?;
        }
        Ok(())
    }
}

/// A specification with the assignment's values in place of its own, and without a search.
///
/// # Errors
/// A value that its hyperparameter cannot have, in words that name both.
pub fn apply(assignment: &Assignment, spec: &TrainSpec) -> Result<TrainSpec, String> {
    let mut spec = spec.clone();
    spec.hyperparameters.search = None;
    for (name, setting) in &assignment.0 {
        spec.hyperparameters = with(&spec.hyperparameters, *name, setting)?;
    }
    Ok(spec)
}

/// Hyperparameters with another value of one of them.
pub fn with(before: &Hyperparameters, name: ParameterName, setting: &Setting) -> Result<Hyperparameters, String> {
    Limits::of(name)?.check(name, setting)?;
    let wrong = |error: serde_json::Error| format!("{name}: {error}");
    let mut fields = serde_json::to_value(before).map_err(wrong)?;
    fields[name.to_string()] = setting.to_json();
    // Only one of the two may be set.
    match name {
        ParameterName::Epochs => fields["maxSteps"] = Value::Null,
        ParameterName::MaxSteps => fields["epochs"] = Value::Null,
        _ => {}
    }
    serde_json::from_value(fields).map_err(wrong)
}
