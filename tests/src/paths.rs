//! Where things are: the checkout, the caches, the binaries.

use std::path::PathBuf;

/// The checkout this was built from.
pub fn checkout() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// `ATHANOR_CACHE`, or `~/.cache/athanor`.
pub fn cache() -> PathBuf {
    variable("ATHANOR_CACHE").unwrap_or_else(|| variable("HOME").unwrap_or_default().join(".cache/athanor"))
}

/// Models that `scripts/fetch` brought.
pub fn models() -> PathBuf {
    variable("ATHANOR_MODELS").unwrap_or_else(|| cache().join("models"))
}

/// Data that `scripts/fetch` brought.
pub fn data() -> PathBuf {
    variable("ATHANOR_DATA").unwrap_or_else(|| cache().join("data"))
}

/// A binary of this workspace.
pub fn binary(name: &str) -> PathBuf {
    variable("CARGO_TARGET_DIR").unwrap_or_else(|| checkout().join("target")).join("release").join(name)
}

/// A tool that `cluster/tools` built: the newest folder `{tool}-*` that holds `name`.
pub fn tool(tool: &str, name: &str) -> Option<PathBuf> {
    let folders = std::fs::read_dir(cache().join("tools")).ok()?;
    let mut found: Vec<_> = folders
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{tool}-")))
        .map(|entry| entry.path().join(name))
        .filter(|path| path.is_file())
        .collect();
    found.sort_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok());
    found.pop()
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
