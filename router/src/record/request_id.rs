//! Request ids that any replica of a router can recognise without having seen them: `r-<uuidv7>-<12 hex digits of an HMAC>`.

use hmac::{Hmac, Mac};
use rand::RngCore;
use sha2::Sha256;
use uuid::Uuid;

/// Bytes of the HMAC in an id: 48 bits stop guessing through an API that answers one guess a request.
const TAG: usize = 6;

/// Makes and recognises ids under one key.
#[derive(Clone)]
pub struct RequestIds {
    key: Hmac<Sha256>,
}

/// A new id, and bits that are the same for everyone who knows the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId {
    pub text: String,
    /// Uniform, independent of what the text shows: chooses the revision.
    pub hash: u64,
}

impl RequestId {
    /// The id without its proof, for answers to which there can be no feedback: it is found in logs and verifies nowhere.
    pub fn without_proof(&self) -> &str {
        self.text.rsplit_once('-').map_or(&self.text, |(id, _)| id)
    }

    /// Whether the request is among the `percent` of requests that are recorded: the same for every replica. The upper
    /// half of the hash decides, because the whole of it has chosen the revision.
    pub fn is_sampled(&self, percent: u32) -> bool {
        (self.hash >> 32) % 100 < u64::from(percent)
    }
}

/// Why an id is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("it does not have the form r-<32 hex digits>-<12 hex digits>")]
    Form,
    #[error("this deployment did not issue it")]
    Forged,
}

impl RequestIds {
    /// Ids under `key`, which all replicas share; any length, 32 random bytes are best.
    pub fn new(key: &[u8]) -> Self {
        // HMAC takes keys of every length.
        Self { key: Hmac::new_from_slice(key).expect("HMAC takes keys of every length") }
    }

    /// Ids under a random key: only this process recognises them.
    pub fn random() -> Self {
        let mut key = [0; 32];
        rand::rng().fill_bytes(&mut key);
        Self::new(&key)
    }

    pub fn generate(&self) -> RequestId {
        self.sign(Uuid::now_v7())
    }

    /// The id of a UUID.
    pub fn sign(&self, uuid: Uuid) -> RequestId {
        let mac = self.mac(uuid).finalize().into_bytes();
        let tag: String = mac[..TAG].iter().map(|byte| format!("{byte:02x}")).collect();
        let mut hash = [0; 8];
        hash.copy_from_slice(&mac[TAG..TAG + 8]);
        RequestId { text: format!("r-{}-{tag}", uuid.simple()), hash: u64::from_be_bytes(hash) }
    }

    /// The UUID of an id of ours.
    pub fn verify(&self, text: &str) -> Result<Uuid, IdError> {
        let (uuid, tag) = text.strip_prefix("r-").and_then(|rest| rest.split_once('-')).ok_or(IdError::Form)?;
        let lower = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if uuid.len() != 32 || tag.len() != 2 * TAG || !lower(uuid) || !lower(tag) {
            return Err(IdError::Form);
        }
        let uuid = Uuid::try_parse(uuid).map_err(|_| IdError::Form)?;
        let tag: Vec<u8> = (0..TAG)
            .map(|index| u8::from_str_radix(&tag[2 * index..2 * index + 2], 16))
            .collect::<Result<_, _>>()
            .map_err(|_| IdError::Form)?;
        // Constant time.
        self.mac(uuid).verify_truncated_left(&tag).map_err(|_| IdError::Forged)?;
        Ok(uuid)
    }

    fn mac(&self, uuid: Uuid) -> Hmac<Sha256> {
        let mut mac = self.key.clone();
        mac.update(uuid.as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_with_one_key_know_each_others_ids_and_no_others() {
        let (ours, replica, other) = (RequestIds::new(b"key"), RequestIds::new(b"key"), RequestIds::new(b"other"));
        let uuid = Uuid::from_u128(0x0193_0000_0000_7000_8000_0000_0000_0001);
        let id = ours.sign(uuid);
        assert!(id.text.starts_with("r-01930000000070008000000000000001-"), "{id:?}");
        assert_eq!(id.text.len(), 2 + 32 + 1 + 12);
        assert_eq!(replica.verify(&id.text), Ok(uuid));
        assert_eq!(other.verify(&id.text), Err(IdError::Forged));
        let moved = id.text.replace("0001-", "0002-");
        assert_eq!(ours.verify(&moved), Err(IdError::Forged));
        let upper = id.text.to_uppercase();
        for bad in ["", "r-", "x", &id.text[..40], &id.text[1..], &upper, &format!("{}00", id.text)] {
            assert_eq!(ours.verify(bad), Err(IdError::Form), "{bad}");
        }
    }

    #[test]
    fn a_sample_has_its_share_of_each_revision() {
        let ids: Vec<RequestId> =
            (0..20_000).map(|index| RequestIds::new(b"key").sign(Uuid::from_u128(index))).collect();
        for canary in [true, false] {
            let of_revision = ids.iter().filter(|id| (id.hash % 100 < 10) == canary);
            let (mut all, mut sampled) = (0.0, 0.0);
            for id in of_revision {
                all += 1.0;
                sampled += f64::from(u8::from(id.is_sampled(30)));
                assert!(id.is_sampled(100) && !id.is_sampled(0));
            }
            // More than five standard deviations for 2,000 ids.
            assert!((0.25..0.35_f64).contains(&(sampled / all)), "{sampled} of {all}");
        }
    }

    #[test]
    fn generated_ids_are_distinct_and_verify() {
        let ids = RequestIds::random();
        let (one, two) = (ids.generate(), ids.generate());
        assert_ne!(one, two);
        assert!(ids.verify(&one.text).is_ok() && ids.verify(&two.text).is_ok());
    }
}
