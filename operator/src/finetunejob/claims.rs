//! Data and models on PersistentVolumeClaims: the claim of `pvc://CLAIM/path` is mounted read-only, and the trainer
//! reads files.

use std::collections::BTreeSet;

use athanor_contract::train::TrainSpec;

const SCHEME: &str = "pvc://";
/// Parent folder of the mounted claims; each has its name.
const ROOT: &str = "/mnt/claims";

/// Returns the claims that a specification reads from.
pub fn of(spec: &TrainSpec) -> BTreeSet<String> {
    let mut spec = spec.clone();
    uris(&mut spec).filter_map(|uri| Some(uri.strip_prefix(SCHEME)?.split_once('/')?.0.to_owned())).collect()
}

/// Returns the folder that a claim is mounted at.
pub fn folder(claim: &str) -> String {
    format!("{ROOT}/{claim}")
}

/// Returns the specification with `file://` addresses in place of claims.
pub fn as_files(mut spec: TrainSpec) -> TrainSpec {
    for uri in uris(&mut spec) {
        if let Some(place) = uri.strip_prefix(SCHEME) {
            *uri = format!("file://{}", folder(place));
        }
    }
    spec
}

/// All addresses that a specification reads from.
fn uris(spec: &mut TrainSpec) -> impl Iterator<Item = &mut String> {
    let sources = spec.data.sources.iter_mut().filter_map(|source| source.uri.as_mut());
    let teacher = spec.teacher.as_mut().map(|teacher| &mut teacher.from);
    sources.chain([&mut spec.model.from]).chain(teacher).chain(&mut spec.evaluate.baseline)
}
