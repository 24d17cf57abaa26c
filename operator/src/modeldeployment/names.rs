//! Names of a ModelDeployment's children.

use athanor_contract::{artifact::sha256_hex, train::OffsetRange};
use athanor_crds::RetrainTemplate;

/// Component names, which are container names too.
pub const SERVER: &str = "server";
pub const ROUTER: &str = "router";
pub const MONITOR: &str = "monitor";

/// `{deployment}-{eight digits}`: the same model always gives the same revision.
pub fn revision(deployment: &str, digest: Option<&str>, uri: &str) -> String {
    let hexadecimal = digest.filter(|digest| digest.len() >= 8 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let digits = hexadecimal.map_or_else(|| sha256_hex(uri.as_bytes()), str::to_ascii_lowercase);
    format!("{deployment}-{}", &digits[..8])
}

/// `{deployment}-{ten digits}`, a hash of the deployment, the template and the offsets: creating a retraining twice is creating
/// it once.
pub fn retraining(deployment: &str, uid: &str, template: &RetrainTemplate, ranges: &[OffsetRange]) -> String {
    let text = serde_json::to_string(&(uid, template, ranges)).expect("a template has string keys only");
    format!("{deployment}-{}", &sha256_hex(text.as_bytes())[..10])
}

pub fn router(deployment: &str) -> String {
    format!("{deployment}-router")
}

pub fn router_key(deployment: &str) -> String {
    format!("{deployment}-router-key")
}

pub fn monitor(deployment: &str) -> String {
    format!("{deployment}-monitor")
}

/// 256 random bits for the HMAC of request ids. A key that exists already is never replaced by it.
pub fn random_key() -> String {
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
