//! Request ids that any replica of a router can recognise without having seen them. `r-<uuidv7>` names a request;
//! `r-<uuidv7>-<answers>-<12 hex digits of an HMAC>` also proves that it was answered, and with how many inputs or choices.

use athanor_contract::hexadecimal;
use athanor_feedback::signing::{Purpose, SharedKeys, SigningKeys};
use rand::RngCore;
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// Bytes of the HMAC in an id: 48 bits stop guessing through an API that answers one guess a request.
const TAG: usize = 6;
/// Digits of a number of answers.
const DIGITS: usize = 9;

/// Makes ids and recognises them by the deployment's keys.
#[derive(Clone, Debug)]
pub struct RequestIds {
    keys: SharedKeys,
}

/// The id of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId {
    pub uuid: Uuid,
    /// Uniform, and the same for every replica: chooses the revision.
    pub hash: u64,
}

/// What a proven id says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proven {
    pub id: RequestId,
    /// Number of inputs or choices that were answered.
    pub answers: u32,
}

impl RequestId {
    pub fn new(uuid: Uuid) -> Self {
        let digest = Sha256::digest(uuid.as_bytes());
        let mut hash = [0; 8];
        hash.copy_from_slice(&digest[..8]);
        Self { uuid, hash: u64::from_be_bytes(hash) }
    }

    /// The id without a proof, for logs and for answers to which there can be no feedback.
    pub fn unproven(&self) -> String {
        format!("r-{}", self.uuid.simple())
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
    #[error("it does not have the form r-<32 hex digits>-<number of answers>-<12 hex digits>")]
    Form,
    #[error("this deployment did not issue it")]
    Forged,
}

impl RequestIds {
    /// Ids under keys that all replicas share.
    pub fn new(keys: SharedKeys) -> Self {
        Self { keys }
    }

    /// Ids under a random key: only this process recognises them.
    pub fn random() -> Self {
        let mut key = [0; 32];
        rand::rng().fill_bytes(&mut key);
        Self::new(SigningKeys::new(&key, None).into())
    }

    pub fn generate(&self) -> RequestId {
        RequestId::new(Uuid::now_v7())
    }

    /// The id with the proof that the request had this number of answers.
    pub fn prove(&self, id: RequestId, answers: u32) -> String {
        let mac = self.keys.get().sign(Purpose::RequestId, &[id.uuid.as_bytes(), &answers.to_le_bytes()]);
        format!("{}-{answers}-{}", id.unproven(), hexadecimal::encode(&mac[..TAG]))
    }

    /// Reads a proven id of ours.
    ///
    /// # Errors
    /// The text is no proven id, or no key of the deployment made its proof.
    pub fn verify(&self, text: &str) -> Result<Proven, IdError> {
        let mut parts = text.strip_prefix("r-").ok_or(IdError::Form)?.split('-');
        let (Some(uuid), Some(answers), Some(tag), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(IdError::Form);
        };
        let lower = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        let is_number = (1..=DIGITS).contains(&answers.len()) && answers.bytes().all(|byte| byte.is_ascii_digit());
        let has_one_form = !(answers.len() > 1 && answers.starts_with('0'));
        if uuid.len() != 32 || !lower(uuid) || !lower(tag) || !is_number || !has_one_form {
            return Err(IdError::Form);
        }
        let uuid = Uuid::try_parse(uuid).map_err(|_| IdError::Form)?;
        let answers: u32 = answers.parse().map_err(|_| IdError::Form)?;
        let tag = hexadecimal::decode::<TAG>(tag).ok_or(IdError::Form)?;
        if !self.keys.get().verify(Purpose::RequestId, &[uuid.as_bytes(), &answers.to_le_bytes()], &tag) {
            return Err(IdError::Forged);
        }
        Ok(Proven { id: RequestId::new(uuid), answers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn under(current: &[u8], previous: Option<&[u8]>) -> RequestIds {
        RequestIds::new(SigningKeys::new(current, previous).into())
    }

    #[test]
    fn replicas_with_one_key_know_each_others_ids_and_no_others() {
        let (ours, replica, other) = (under(b"key", None), under(b"key", None), under(b"other", None));
        let id = RequestId::new(Uuid::from_u128(0x0193_0000_0000_7000_8000_0000_0000_0001));
        let text = ours.prove(id, 12);
        assert!(text.starts_with("r-01930000000070008000000000000001-12-"), "{text}");
        assert_eq!(replica.verify(&text), Ok(Proven { id, answers: 12 }));
        assert_eq!(other.verify(&text), Err(IdError::Forged));
        assert_eq!(ours.verify(&text.replace("0001-", "0002-")), Err(IdError::Forged));
        assert_eq!(ours.verify(&text.replace("-12-", "-13-")), Err(IdError::Forged), "more inputs than there were");
        let (upper, longer, padded) = (text.to_uppercase(), format!("{text}00"), text.replace("-12-", "-012-"));
        for bad in ["", "r-", "x", &text[..40], &text[1..], &upper, &longer, &padded, &id.unproven()] {
            assert_eq!(ours.verify(bad), Err(IdError::Form), "{bad}");
        }
    }

    #[test]
    fn ids_of_before_a_rotation_stay_valid_while_the_previous_key_is_there() {
        let id = RequestId::new(Uuid::from_u128(7));
        let old = under(b"old", None).prove(id, 1);
        assert!(under(b"new", Some(b"old")).verify(&old).is_ok());
        assert_eq!(under(b"newer", Some(b"new")).verify(&old), Err(IdError::Forged));
    }

    #[test]
    fn a_sample_has_its_share_of_each_revision() {
        let ids: Vec<RequestId> = (0..20_000).map(|index| RequestId::new(Uuid::from_u128(index))).collect();
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
    fn generated_ids_are_distinct() {
        let ids = RequestIds::random();
        assert_ne!(ids.generate(), ids.generate());
    }
}
