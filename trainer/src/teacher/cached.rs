//! A teacher's answers, computed once and kept next to the outputs of all jobs of a folder.
//!
//! Their name is a digest of the teacher's files and of the token ids that it was asked about, so that no other
//! question gets them.

use std::path::Path;

use athanor_contract::artifact::sha256_hex;
use athanor_models::{load, tokenizer::TokenRows};
use athanor_store::{Location, StoreError};
use athanor_torch::ProcessGroup;
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};
use tokio::runtime::Handle;

use crate::TrainError;

/// Cached answers take at most this many numbers; more of them are computed at each step.
pub const MOST_CACHED: usize = 1 << 26;
/// Name of the answers in their file.
const LOGITS: &str = "logits";

/// The location of kept answers: `teacher` is its folder, `ids` are the tokens that it is asked about, and `identity` is all
/// else that the answers follow from.
///
/// # Errors
/// A file of the teacher that cannot be read.
pub fn cached_at(
    output: &Location,
    teacher: &Path,
    ids: &TokenRows,
    identity: &impl serde::Serialize,
) -> Result<Location, TrainError> {
    let mut parts = Vec::new();
    for name in [load::WEIGHTS, "tokenizer.json", "config.json"] {
        let path = teacher.join(name);
        parts.push(sha256_hex(&std::fs::read(&path).map_err(TrainError::at(&path))?));
    }
    let identity = serde_json::to_vec(&(parts, digest(ids), identity)).map_err(TrainError::other)?;
    Ok(output.child(&format!("teacher-outputs/{}.safetensors", &sha256_hex(&identity)[..32])))
}

/// A digest of rows of token ids, in their order.
fn digest(rows: &TokenRows) -> String {
    let mut digest = Sha256::new();
    for ids in rows.iter() {
        digest.update((ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
    }
    sha256_hex(&digest.finalize())
}

/// Kept answers [rows, outputs], if every rank finds them: a rank that computes them waits for the sums of the others.
pub fn read_kept(
    place: &Location,
    [rows, outputs]: [usize; 2],
    runtime: &Handle,
    group: Option<&ProcessGroup>,
    device: Device,
    work: &Path,
) -> Result<Option<Tensor>, TrainError> {
    let kept = runtime.block_on(read_cached(place, rows, outputs, work))?;
    let found = Tensor::from_slice(&[i64::from(kept.is_some())]).to_device(device);
    if let Some(group) = group {
        group.all_reduce_sum(&found)?;
    }
    let by_all = found.int64_value(&[0]) == group.map_or(1, ProcessGroup::world) as i64;
    let kept = kept.filter(|_| by_all);
    if kept.is_some() {
        tracing::info!(uri = place.uri, "the teacher's answers were kept from another run");
    }
    Ok(kept)
}

/// Kept answers, if they are complete.
async fn read_cached(from: &Location, rows: usize, outputs: usize, work: &Path) -> Result<Option<Tensor>, TrainError> {
    let bytes = match from.read().await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let file = work.join("teacher-outputs.safetensors");
    tokio::fs::write(&file, &bytes).await.map_err(TrainError::at(&file))?;
    let shape = [rows as i64, outputs as i64];
    match load::Weights::load(&file, Device::Cpu).and_then(|mut weights| weights.take(LOGITS, &shape)) {
        Ok(logits) => Ok(Some(logits)),
        Err(error) => {
            tracing::warn!(%error, uri = from.uri, "the teacher's kept answers cannot be read and are computed again");
            Ok(None)
        }
    }
}

/// Keeps answers for later runs.
pub async fn write_cached(to: &Location, logits: &Tensor, work: &Path) -> Result<(), TrainError> {
    let file = work.join("teacher-outputs.safetensors");
    // A local disk's trouble is not the user's error.
    load::save(&file, &[(LOGITS.to_owned(), logits.shallow_clone())]).map_err(TrainError::other)?;
    let bytes = tokio::fs::read(&file).await.map_err(TrainError::at(&file))?;
    to.write(bytes.into()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_follows_from_the_teacher_and_the_ids() {
        let (folder, output) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in [load::WEIGHTS, "tokenizer.json", "config.json"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        let output = athanor_store::open(&format!("file://{}", output.path().display())).unwrap();
        let at = |rows: &[&[u32]], identity: &str| {
            let rows: TokenRows = rows.iter().collect();
            cached_at(&output, folder.path(), &rows, &identity).unwrap().uri
        };
        let first = at(&[&[1, 2], &[3]], "a");
        assert_eq!(at(&[&[1, 2], &[3]], "a"), first);
        // The same texts cut at another length, or split into other rows, are other questions.
        for other in [at(&[&[1], &[3]], "a"), at(&[&[1], &[2, 3]], "a"), at(&[&[1, 2], &[3]], "b")] {
            assert_ne!(other, first);
        }
        std::fs::write(folder.path().join("config.json"), "another").unwrap();
        assert_ne!(at(&[&[1, 2], &[3]], "a"), first, "another teacher");
    }
}
