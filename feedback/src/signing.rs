//! Keys of a deployment that sign its request ids and its events (HMAC-SHA256, RFC 2104).
//!
//! The current key signs. The previous one still verifies, so that a key can be rotated: what was signed before the rotation stays
//! valid for as long as the previous key is there.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use athanor_contract::process::{file, variable};
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Length of a signature in bytes.
pub const LENGTH: usize = 32;
/// Between two looks at the key files.
const PERIOD: Duration = Duration::from_secs(10);

/// What a signature is for. One made for one purpose is not valid for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    RequestId,
    Event,
    HandOver,
}

impl Purpose {
    fn name(self) -> &'static [u8] {
        match self {
            Self::RequestId => b"request-id",
            Self::Event => b"event",
            Self::HandOver => b"hand-over",
        }
    }
}

/// The current key and, after a rotation, the previous one.
#[derive(Clone)]
pub struct SigningKeys {
    current: Hmac<Sha256>,
    previous: Option<Hmac<Sha256>>,
}

impl std::fmt::Debug for SigningKeys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SigningKeys").field("has_previous", &self.previous.is_some()).finish_non_exhaustive()
    }
}

impl SigningKeys {
    /// Keys of any length; 32 random bytes are best.
    pub fn new(current: &[u8], previous: Option<&[u8]>) -> Self {
        let mac = |key: &[u8]| Hmac::new_from_slice(key).expect("HMAC takes keys of every length");
        Self { current: mac(current), previous: previous.map(mac) }
    }

    /// Reads the files `key` and `previous` of a folder; white space around a key is not part of it, an empty `previous` is none.
    ///
    /// # Errors
    /// `key` cannot be read or is empty, or `previous` is there and cannot be read.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let trimmed = |bytes: Vec<u8>| bytes.trim_ascii().to_vec();
        let at = |name: &str| folder.join(name);
        let of_file =
            |name: &str, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", at(name).display()));
        let current = trimmed(std::fs::read(at(file::CURRENT_KEY)).map_err(|error| of_file(file::CURRENT_KEY, error))?);
        if current.is_empty() {
            let message = format!("{}: the file is empty", at(file::CURRENT_KEY).display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let previous = match std::fs::read(at(file::PREVIOUS_KEY)) {
            Ok(bytes) => Some(trimmed(bytes)).filter(|key| !key.is_empty()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(of_file(file::PREVIOUS_KEY, error)),
        };
        Ok(Self::new(&current, previous.as_deref()))
    }

    /// Reads the keys of the folder that [`variable::SIGNING_KEYS`] names; `None` without the variable.
    ///
    /// # Errors
    /// As for [`SigningKeys::read`].
    pub fn from_environment() -> io::Result<Option<Self>> {
        folder_of_environment().map(|folder| Self::read(&folder)).transpose()
    }

    /// Signs the parts with the current key.
    pub fn sign(&self, purpose: Purpose, parts: &[&[u8]]) -> [u8; LENGTH] {
        fed(&self.current, purpose, parts).finalize().into_bytes().into()
    }

    /// Whether `signature`, or the beginning of a signature, was made of the same parts by one of the keys. Takes the same time
    /// for all signatures of one length.
    pub fn verify(&self, purpose: Purpose, parts: &[&[u8]], signature: &[u8]) -> bool {
        let mut keys = std::iter::once(&self.current).chain(&self.previous);
        !signature.is_empty() && keys.any(|key| fed(key, purpose, parts).verify_truncated_left(signature).is_ok())
    }
}

/// Each part is preceded by its length, so that no two lists of parts are the same bytes.
fn fed(key: &Hmac<Sha256>, purpose: Purpose, parts: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = key.clone();
    for part in std::iter::once(&purpose.name()).chain(parts) {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac
}

/// The keys of a process. Clones see the same keys.
#[derive(Clone, Debug)]
pub struct SharedKeys(Arc<RwLock<SigningKeys>>);

impl From<SigningKeys> for SharedKeys {
    fn from(keys: SigningKeys) -> Self {
        Self(Arc::new(RwLock::new(keys)))
    }
}

impl SharedKeys {
    pub fn get(&self) -> SigningKeys {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the folder again every ten seconds, for as long as the process lives: a mounted Secret changes when its keys are
    /// rotated.
    async fn follow(self, folder: PathBuf) {
        loop {
            tokio::time::sleep(PERIOD).await;
            match SigningKeys::read(&folder) {
                Ok(keys) => *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys,
                Err(error) => tracing::warn!(%error, "the signing keys cannot be read; the last ones stay"),
            }
        }
    }
}

/// The keys of the folder that [`variable::SIGNING_KEYS`] names, followed by a task of the current runtime; `None` without the
/// variable.
///
/// # Errors
/// As for [`SigningKeys::read`].
pub fn keys_of_environment() -> io::Result<Option<SharedKeys>> {
    let Some(folder) = folder_of_environment() else { return Ok(None) };
    let keys = SharedKeys::from(SigningKeys::read(&folder)?);
    tokio::spawn(keys.clone().follow(folder));
    Ok(Some(keys))
}

fn folder_of_environment() -> Option<PathBuf> {
    std::env::var_os(variable::SIGNING_KEYS).filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_of_one_purpose_one_key_and_these_parts() {
        let keys = SigningKeys::new(b"one", None);
        let signature = keys.sign(Purpose::Event, &[b"ab", b"c"]);
        assert!(keys.verify(Purpose::Event, &[b"ab", b"c"], &signature));
        assert!(keys.verify(Purpose::Event, &[b"ab", b"c"], &signature[..6]));
        assert!(!keys.verify(Purpose::RequestId, &[b"ab", b"c"], &signature));
        assert!(!keys.verify(Purpose::Event, &[b"a", b"bc"], &signature));
        assert!(!keys.verify(Purpose::Event, &[b"ab", b"c"], &[]));
        assert!(!SigningKeys::new(b"two", None).verify(Purpose::Event, &[b"ab", b"c"], &signature));
    }

    #[test]
    fn the_previous_key_verifies_and_does_not_sign() {
        let (old, new) = (SigningKeys::new(b"old", None), SigningKeys::new(b"new", Some(b"old")));
        let before = old.sign(Purpose::Event, &[b"a"]);
        assert!(new.verify(Purpose::Event, &[b"a"], &before));
        let after = new.sign(Purpose::Event, &[b"a"]);
        assert_ne!(before, after);
        assert!(!old.verify(Purpose::Event, &[b"a"], &after));
    }

    #[test]
    fn keys_are_read_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let missing = SigningKeys::read(folder.path()).unwrap_err().to_string();
        assert!(missing.contains("/key: "), "{missing}");
        std::fs::write(folder.path().join("key"), "\n").unwrap();
        assert!(SigningKeys::read(folder.path()).unwrap_err().to_string().contains("is empty"));
        std::fs::write(folder.path().join("key"), "new\n").unwrap();
        std::fs::write(folder.path().join("previous"), "old").unwrap();
        let keys = SigningKeys::read(folder.path()).unwrap();
        for key in [b"old", b"new"] {
            assert!(keys.verify(Purpose::Event, &[b"a"], &SigningKeys::new(key, None).sign(Purpose::Event, &[b"a"])));
        }
    }
}
