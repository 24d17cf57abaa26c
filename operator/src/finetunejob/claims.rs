//! Data and models on PersistentVolumeClaims: `pvc://CLAIM/path` is mounted read-only, and files are what the trainer reads.

use std::collections::BTreeSet;

use athanor_contract::train::TrainSpec;

const SCHEME: &str = "pvc://";
/// Where claims are mounted, each by its name.
const ROOT: &str = "/mnt/claims";

/// The claims that a specification reads from.
pub fn of(spec: &TrainSpec) -> BTreeSet<String> {
    let mut spec = spec.clone();
    uris(&mut spec).filter_map(|uri| Some(uri.strip_prefix(SCHEME)?.split_once('/')?.0.to_owned())).collect()
}

/// Where a claim is mounted.
pub fn folder(claim: &str) -> String {
    format!("{ROOT}/{claim}")
}

/// The specification with files instead of claims.
pub fn as_files(mut spec: TrainSpec) -> TrainSpec {
    for uri in uris(&mut spec) {
        if let Some(place) = uri.strip_prefix(SCHEME) {
            *uri = format!("file://{}", folder(place));
        }
    }
    spec
}

/// Everything that is read.
fn uris(spec: &mut TrainSpec) -> impl Iterator<Item = &mut String> {
    let sources = spec.data.sources.iter_mut().filter_map(|source| source.uri.as_mut());
    let teacher = spec.teacher.as_mut().map(|teacher| &mut teacher.from);
    sources.chain([&mut spec.model.from]).chain(teacher).chain(&mut spec.evaluate.baseline)
}
