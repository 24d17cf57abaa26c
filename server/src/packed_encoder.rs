//! The engine's backend for encoders on a CPU without libtorch: packed weights of FP32, BF16 or eight bits.

use std::path::Path;

use anyhow::bail;
use athanor_contract::serve::Weights;
use athanor_cpu::{Encoder, Format, InstructionSet};
use athanor_models::{EncoderConfig, LoadError, Model, Options, Packing, Task, packed, quantize};
use athanor_serving::engine::backend::{BackendError, EncodeBackend};
use tch::Device;

/// A packed encoder with its head.
pub struct PackedEncoder(Encoder);

impl PackedEncoder {
    /// The format of the weights that a configuration asks for, and the kernels. None: libtorch computes in FP32, which it does on
    /// GPUs and on CPUs without AVX2.
    ///
    /// # Errors
    /// An encoder cannot have these weights, or not on this device.
    pub fn format(
        config: &EncoderConfig,
        weights: Weights,
        device: Device,
    ) -> anyhow::Result<Option<(Format, InstructionSet)>> {
        let set = if device == Device::Cpu { InstructionSet::best() } else { None };
        choose(weights, quantize::packing(config), set)
    }

    /// Reads a folder: a classifier with these labels, or an embedding model.
    ///
    /// # Errors
    /// A file of the folder cannot be used, or there is no memory.
    pub fn load(
        folder: &Path,
        labels: Option<Vec<String>>,
        (format, set): (Format, InstructionSet),
        threads: usize,
    ) -> Result<Self, LoadError> {
        let task = labels.map_or(Task::Embedding, Task::Classification);
        let model = Model::load(folder, task, &Options::default(), Device::Cpu)?;
        let encoder = packed::encoder::pack(&model, format, set, threads)?;
        tracing::info!(?format, instruction_set = ?set, threads, "encoder packed");
        Ok(Self(encoder))
    }
}

/// See [`PackedEncoder::format`]. `set`: the best kernels of the device; `packing`: how the artifact was compressed.
fn choose(
    weights: Weights,
    packing: Packing,
    set: Option<InstructionSet>,
) -> anyhow::Result<Option<(Format, InstructionSet)>> {
    let format = match weights {
        Weights::Int4 => bail!("engine.weights: Int4 is for language models; an encoder has Auto, FP32, BF16 or Int8"),
        Weights::Auto if packing == Packing::Int8 => Format::Int8,
        Weights::Auto if set == Some(InstructionSet::Avx512Bf16) => Format::BF16,
        Weights::Auto | Weights::FP32 => Format::FP32,
        Weights::BF16 => Format::BF16,
        Weights::Int8 => Format::Int8,
    };
    if set.is_none() && matches!(weights, Weights::BF16 | Weights::Int8) {
        bail!("engine.weights: {weights:?} of an encoder requires a CPU with AVX2; Auto or FP32 would do");
    }
    Ok(set.map(|set| (format, set)))
}

impl EncodeBackend for PackedEncoder {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        self.0.encode(rows).map_err(|error| BackendError(error.to_string()))
    }

    fn call_cost(&self) -> Option<usize> {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::PathBuf};

    use athanor_models::Classifier;

    use super::*;
    use crate::{
        packed::tests::instruction_sets,
        torch::{TorchClassifier, TorchEmbedder},
    };

    const ROWS: [&[u32]; 4] =
        [&[2, 9, 8, 33, 3], &[2, 40, 3], &[2, 3], &[2, 7, 7, 7, 12, 19, 5, 33, 21, 9, 40, 11, 8, 15, 16, 31, 3]];

    fn golden(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden").join(name)
    }

    const FORMATS: [Format; 3] = [Format::FP32, Format::BF16, Format::Int8];

    /// Largest difference over the largest number.
    fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
        let largest = b.iter().flatten().fold(0.0_f32, |most, value| most.max(value.abs()));
        std::iter::zip(a.iter().flatten(), b.iter().flatten()).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()))
            / largest
    }

    fn label(logits: &[f32]) -> Option<usize> {
        (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
    }

    #[test]
    fn packed_classifiers_are_near_libtorch_and_do_not_depend_on_their_batch() {
        for name in ["tiny-bert", "tiny-mpnet"] {
            let folder = golden(name);
            let model = Model::load_trained(&folder, Device::Cpu).unwrap();
            let to = tempfile::tempdir().unwrap();
            model.save(to.path()).unwrap();
            let classifier = Classifier::load(to.path(), Device::Cpu).unwrap();
            let labels = classifier.labels().to_vec();
            let exact = TorchClassifier::new(classifier, Device::Cpu).forward(&ROWS).unwrap();
            for (set, format) in instruction_sets().into_iter().flat_map(|set| FORMATS.map(|format| (set, format))) {
                let mut packed = PackedEncoder::load(to.path(), Some(labels.clone()), (format, set), 2).unwrap();
                let found = packed.forward(&ROWS).unwrap();
                let far = distance(&found, &exact);
                let bound = match format {
                    Format::FP32 => 1e-5,
                    Format::BF16 => 0.03,
                    Format::Int8 | Format::Int4 => 0.05,
                };
                assert!(far < bound, "{name} {set:?} {format:?}: {far}, {found:?} is not {exact:?}");
                for ((row, together), exact) in ROWS.iter().zip(&found).zip(&exact) {
                    assert_eq!(packed.forward(&[row]).unwrap()[0], *together, "{name} {set:?} {format:?}");
                    assert_eq!(label(together), label(exact), "{name} {set:?} {format:?}");
                }
            }
        }
    }

    /// Vectors of MiniLM-L6 of texts of 1 to 150 tokens by libtorch, and the least cosine with them of each format.
    #[test]
    fn packed_vectors_are_near_libtorchs() {
        let Some(models) = std::env::var_os("ATHANOR_MODELS") else {
            panic!("ATHANOR_MODELS is not set: run `make setup` and `. scripts/env`");
        };
        let folder = PathBuf::from(models).join("minilm-l6");
        let lengths = (1..24).chain([150]);
        let rows: Vec<Vec<u32>> = lengths
            .map(|length| (0..length).map(|place| 1000 + (length * 37 + place * 101) % 20_000).collect())
            .collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let exact = TorchEmbedder::load(&folder, Device::Cpu).unwrap().forward(&rows).unwrap();
        let best = InstructionSet::best().expect("the tests need AVX2");
        for set in BTreeSet::from([InstructionSet::Avx2, best]) {
            for (format, bound) in [(Format::FP32, 0.999_999), (Format::BF16, 0.9999), (Format::Int8, 0.99)] {
                let mut packed = PackedEncoder::load(&folder, None, (format, set), 2).unwrap();
                let found = packed.forward(&rows).unwrap();
                let cosine = |a: &[f32], b: &[f32]| std::iter::zip(a, b).map(|(a, b)| a * b).sum::<f32>();
                let least = std::iter::zip(&found, &exact).map(|(a, b)| cosine(a, b)).fold(f32::INFINITY, f32::min);
                assert!(least > bound, "{set:?} {format:?}: least cosine {least}");
                for pick in [0, 6, 13, 23] {
                    assert_eq!(packed.forward(&rows[pick..=pick]).unwrap()[0], found[pick], "{set:?} {format:?}");
                }
            }
        }
    }

    #[test]
    fn weights_that_an_encoder_cannot_have_are_errors() {
        let avx2 = Some(InstructionSet::Avx2);
        for (weights, set, part) in [
            (Weights::Int4, avx2, "Int4 is for language models"),
            (Weights::Int4, None, "Int4 is for language models"),
            (Weights::BF16, None, "BF16 of an encoder requires a CPU with AVX2"),
            (Weights::Int8, None, "Int8 of an encoder requires a CPU with AVX2"),
        ] {
            let error = choose(weights, Packing::Float, set).unwrap_err().to_string();
            assert!(error.starts_with("engine.weights: ") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn auto_follows_the_artifact_and_the_processor() {
        let (bf16, avx512, avx2) = (InstructionSet::Avx512Bf16, InstructionSet::Avx512, InstructionSet::Avx2);
        for (weights, packing, set, expected) in [
            (Weights::Auto, Packing::Float, Some(bf16), Some(Format::BF16)),
            (Weights::Auto, Packing::Float, Some(avx512), Some(Format::FP32)),
            (Weights::Auto, Packing::Int8, Some(bf16), Some(Format::Int8)),
            (Weights::Auto, Packing::Int8, Some(avx2), Some(Format::Int8)),
            (Weights::Auto, Packing::Float, None, None),
            (Weights::Auto, Packing::Int8, None, None),
            (Weights::FP32, Packing::Int8, Some(bf16), Some(Format::FP32)),
            (Weights::FP32, Packing::Float, None, None),
            (Weights::BF16, Packing::Float, Some(avx2), Some(Format::BF16)),
            (Weights::Int8, Packing::Float, Some(avx2), Some(Format::Int8)),
        ] {
            let found = choose(weights, packing, set).unwrap();
            assert_eq!(found, expected.zip(set), "{weights:?} {packing:?} {set:?}");
        }
    }

    #[test]
    fn texts_that_cannot_be_read_are_errors() {
        let mut packed =
            PackedEncoder::load(&golden("tiny-bert"), None, (Format::BF16, InstructionSet::Avx2), 1).unwrap();
        for (row, part) in [(vec![], "0 tokens"), (vec![1; 10_000], "10000 tokens"), (vec![1 << 30], "vocabulary")] {
            let error = packed.forward(&[&row]).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
