//! What the families of encoders call their parts in `config.json` and in a checkpoint. A new family is one entry here, one
//! file beside this one and one line in `registry.rs`.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// The names that a family gives its parts.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// First part of the names of architectures: `BertModel`, `MPNetForMaskedLM`.
    pub name: &'static str,
    /// Prefix of the encoder's tensors in a checkpoint of a model with a head.
    pub prefix: &'static str,
    /// Positions are counted from the one behind the padding token's id, not from 0.
    pub positions_follow_padding: bool,
    pub sequence_head: SequenceHeadNames,
    pub masked_head: MaskedHeadNames,
}

/// Layers of a head that reads the first token's hidden state.
#[derive(Debug, PartialEq, Eq)]
pub struct SequenceHeadNames {
    /// The encoder's `tanh(x W + b)` in front of the head.
    pub pooler: Option<&'static str>,
    /// The head's own hidden layer, with tanh behind it.
    pub hidden: Option<&'static str>,
    pub output: &'static str,
}

/// Parts of the head of a masked language model. A file with the bias has this head.
#[derive(Debug, PartialEq, Eq)]
pub struct MaskedHeadNames {
    pub dense: &'static str,
    pub norm: &'static str,
    pub bias: &'static str,
}

pub static BERT: Family = Family {
    model_type: "bert",
    name: "Bert",
    prefix: "bert.",
    positions_follow_padding: false,
    sequence_head: SequenceHeadNames { pooler: Some("pooler.dense"), hidden: None, output: "classifier" },
    masked_head: MaskedHeadNames {
        dense: "cls.predictions.transform.dense",
        norm: "cls.predictions.transform.LayerNorm",
        bias: "cls.predictions.bias",
    },
};

pub static MPNET: Family = Family {
    model_type: "mpnet",
    name: "MPNet",
    prefix: "mpnet.",
    positions_follow_padding: true,
    sequence_head: SequenceHeadNames { pooler: None, hidden: Some("classifier.dense"), output: "classifier.out_proj" },
    masked_head: MaskedHeadNames { dense: "lm_head.dense", norm: "lm_head.layer_norm", bias: "lm_head.bias" },
};

/// The families that can be loaded.
pub static FAMILIES: [&Family; 2] = [&BERT, &MPNET];

impl Family {
    /// The family with this `model_type`.
    pub fn find(model_type: &str) -> Option<&'static Self> {
        FAMILIES.into_iter().find(|family| family.model_type == model_type)
    }

    /// The values of `model_type` that are known, for messages.
    pub fn known() -> String {
        FAMILIES.map(|family| format!("{:?}", family.model_type)).join(" and ")
    }
}

impl Serialize for Family {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.model_type.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for &'static Family {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Family::find(&name)
            .ok_or_else(|| D::Error::custom(format!("{name:?} is not supported, {} are", Family::known())))
    }
}
