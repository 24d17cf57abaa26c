//! Memory of an upload and a download. The only test of its process, so that the process's peak is its own.

use athanor_contract::artifact::{Kind, Manifest};
use athanor_store::{artifact, open};

const FILE: u64 = 300 << 20;
const MOST_GROWTH: u64 = 64 << 20;

/// The largest resident size of this process so far.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

#[tokio::test]
async fn an_artifact_of_300_mb_travels_in_a_fraction_of_its_size() {
    let (from, store, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = std::fs::File::create(from.path().join("model.safetensors")).unwrap();
    file.set_len(FILE).unwrap();
    let folder = open(&format!("file://{}", store.path().display())).unwrap().child("artifact");
    let manifest = Manifest {
        kind: Kind::Model,
        job: "job".into(),
        model_digest: String::new(),
        data_digest: "d".into(),
        parent: "p".into(),
        code_version: "0".into(),
        step: 1,
        max_sequence_length: None,
        files: Default::default(),
        metrics: Default::default(),
    };
    let before = peak();
    let written = artifact::upload(from.path(), &folder, manifest).await.unwrap();
    let uploaded = peak() - before;
    assert!(uploaded < MOST_GROWTH, "the upload took {uploaded} bytes");
    assert_eq!(artifact::download(&folder, to.path()).await.unwrap(), written);
    let downloaded = peak() - before;
    assert!(downloaded < MOST_GROWTH, "upload and download took {downloaded} bytes");
    assert_eq!(to.path().join("model.safetensors").metadata().unwrap().len(), FILE);
}
