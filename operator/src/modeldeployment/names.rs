//! Names of a ModelDeployment's children.

use athanor_contract::{artifact::sha256_hex, hexadecimal};
use athanor_crds::RevisionStatus;

/// Names of components and of their containers.
pub const SERVER: &str = "server";
pub const ROUTER: &str = "router";
pub const MONITOR: &str = "monitor";

/// Returns `{deployment}-{eight digits}`: the same model always has the same revision.
pub fn revision(deployment: &str, digest: Option<&str>, uri: &str) -> String {
    let hexadecimal = digest.filter(|digest| digest.len() >= 8 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let digits = hexadecimal.map_or_else(|| sha256_hex(uri.as_bytes()), str::to_ascii_lowercase);
    format!("{deployment}-{}", &digits[..8])
}

/// Returns the name of the revision that is this adapter of a base. The same adapter of another base is another
/// revision.
pub fn adapter_revision(deployment: &str, base: &str, digest: Option<&str>, uri: &str) -> String {
    revision(deployment, None, &format!("adapter {base} {}", digest.unwrap_or(uri)))
}

/// Returns the name of the servers that the revisions with this base share.
pub fn shared_servers(deployment: &str, base: &str) -> String {
    // Other servers than those of the revision that is the base alone.
    revision(deployment, None, &format!("base {base}"))
}

/// Returns the name of a revision's servers.
pub fn servers(deployment: &str, revision: &RevisionStatus) -> String {
    revision.base.as_deref().map_or_else(|| revision.name.clone(), |base| shared_servers(deployment, base))
}

/// Returns whether a name has the form of those of a deployment's revisions and servers.
pub fn is_revision(deployment: &str, name: &str) -> bool {
    let digits = name.strip_prefix(deployment).and_then(|rest| rest.strip_prefix('-'));
    digits.is_some_and(|digits| digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Returns `{deployment}-{ten digits}`, a hash of the deployment and the number of the retraining, from 1. The number is
/// in the status, so creating a retraining twice is creating it once, whatever events or defaults there are by then.
pub fn retraining(deployment: &str, uid: &str, number: u64) -> String {
    format!("{deployment}-{}", &sha256_hex(format!("{uid}/{number}").as_bytes())[..10])
}

pub fn router(deployment: &str) -> String {
    format!("{deployment}-router")
}

/// Returns the name of the Secret with the keys that sign request ids and events.
pub fn signing_keys(deployment: &str) -> String {
    format!("{deployment}-signing-keys")
}

pub fn monitor(deployment: &str) -> String {
    format!("{deployment}-monitor")
}

/// Returns a key for signatures, from 256 random bits.
pub fn signing_key(entropy: [u8; 32]) -> String {
    hexadecimal::encode(&entropy)
}
