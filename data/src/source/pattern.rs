//! Patterns of file names.

use globset::{GlobBuilder, GlobMatcher};

use crate::DataError;

/// Whether a URI means the files that match it. In one of HTTP these characters are the server's matter.
pub(super) fn is_pattern(uri: &str) -> bool {
    !uri.starts_with("http") && uri.contains(['*', '?', '[', '{'])
}

/// Divides a pattern into the folder above its first wildcard and what is below it.
pub(super) fn divide(pattern: &str) -> (&str, &str) {
    let wildcard = pattern.find(['*', '?', '[', '{']).unwrap_or(pattern.len());
    let slash = pattern[..wildcard].rfind('/').map_or(0, |slash| slash + 1);
    pattern.split_at(slash)
}

pub(super) fn matcher(uri: &str, pattern: &str) -> Result<GlobMatcher, DataError> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    glob.map(|glob| glob.compile_matcher())
        .map_err(|error| DataError::User(format!("{uri}: not a pattern of file names: {}", error.kind())))
}

pub(super) fn nothing_matches(uri: &str) -> DataError {
    DataError::User(format!("{uri}: no file matches"))
}
