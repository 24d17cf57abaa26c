//! One error for every store, sorted by who can mend it.

/// Why a store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{uri}: nothing there")]
    NotFound { uri: String },
    #[error("{uri}: access refused, check the credentials ({message})")]
    Unauthorized { uri: String, message: String },
    #[error("{uri}: {message}")]
    Invalid { uri: String, message: String },
    #[error("{uri}: the store does not answer: {message}")]
    Unavailable { uri: String, message: String },
    #[error("{uri}: another process writes into this folder at the same time")]
    Conflict { uri: String },
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
}

impl StoreError {
    /// Whether the user has to change something; otherwise a later try may do.
    pub fn is_user_error(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::Unauthorized { .. } | Self::Invalid { .. })
    }

    pub(crate) fn of(uri: &str, error: object_store::Error) -> Self {
        let uri = uri.to_owned();
        // The client's own words may span lines and carry the URL; the chain is what helps.
        let message = root(&error);
        match error {
            object_store::Error::NotFound { .. } => Self::NotFound { uri },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Self::Unauthorized { uri, message }
            }
            // S3 says 403 for an unknown key; some servers give it inside a generic error.
            // (The message holds the URI and times: a bare 403 may be anything.)
            _ if message.contains("status code: 403")
                || message.contains("InvalidAccessKeyId")
                || message.contains("SignatureDoesNotMatch") =>
            {
                Self::Unauthorized { uri, message }
            }
            _ if message.contains("NoSuchBucket") => Self::NotFound { uri },
            // A disk, which has no more room, or is not there.
            _ if uri.starts_with("file:") => Self::Io { path: uri, source: std::io::Error::other(message) },
            _ => Self::Unavailable { uri, message },
        }
    }

    pub(crate) fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }
}

fn root(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_of_a_uri_are_no_status() {
        let generic = |text: &str| object_store::Error::Generic { store: "S3", source: text.into() };
        let uri = "s3://b/step-00004030";
        let outage = StoreError::of(uri, generic("Error performing PUT http://s/b/step-00004030/x in 181.403912345s"));
        assert!(!outage.is_user_error(), "{outage}");
        let refused = StoreError::of(uri, generic("Server returned non-2xx status code: 403 Forbidden"));
        assert!(matches!(refused, StoreError::Unauthorized { .. }), "{refused}");
    }
}
