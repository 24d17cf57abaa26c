//! Tensors of models that read whole texts: BYTES `text` in; of a classifier BYTES `label`, FP32 `score` and FP32 `probabilities`
//! out, of an embedding model FP32 `embedding`.

use super::{
    contents::{self, BYTES, Elements, FP32, TensorError, output_floats, output_texts, put, wanted},
    protocol::{ModelInferRequest, ModelInferResponse, model_metadata_response::TensorMetadata},
};
use crate::service::Classification;

pub const TEXT: &str = "text";
pub const LABEL: &str = "label";
pub const SCORE: &str = "score";
pub const PROBABILITIES: &str = "probabilities";
pub const EMBEDDING: &str = "embedding";
/// Outputs of a classifier.
const CLASSIFIER: [&str; 3] = [LABEL, SCORE, PROBABILITIES];

/// The texts of a request.
pub fn decode_texts(request: &ModelInferRequest) -> Result<Vec<String>, TensorError> {
    let [input] = request.inputs.as_slice() else { return Err(TensorError::InputCount(request.inputs.len())) };
    if input.name != TEXT {
        return Err(TensorError::InputName(input.name.clone()));
    }
    let texts = contents::texts(request, 0)?;
    let count = match *input.shape.as_slice() {
        [count] | [count, 1] => usize::try_from(count).ok(),
        _ => None,
    };
    let (input, shape) = (input.name.clone(), input.shape.clone());
    match count {
        None => Err(TensorError::Shape { input, shape, takes: "[N] or [N, 1]" }),
        Some(count) if count != texts.len() => Err(TensorError::Elements { input, shape, elements: texts.len() }),
        Some(_) => Ok(texts),
    }
}

/// Checks the outputs that a request to a classifier names, before any work is done.
pub fn check_outputs(request: &ModelInferRequest) -> Result<(), TensorError> {
    wanted(request, &CLASSIFIER).map(drop)
}

/// Checks the outputs that a request to an embedding model names, before any work is done.
pub fn check_embedding(request: &ModelInferRequest) -> Result<(), TensorError> {
    wanted(request, &[EMBEDDING]).map(drop)
}

/// Puts `results` into a response's outputs.
pub fn encode(
    request: &ModelInferRequest,
    labels: &[String],
    results: &[Classification],
    response: &mut ModelInferResponse,
) -> Result<(), TensorError> {
    let is_raw = !request.raw_input_contents.is_empty();
    let count = results.len() as i64;
    for name in wanted(request, &CLASSIFIER)? {
        let (shape, elements) = match name {
            LABEL => {
                let chosen = results.iter().map(|result| labels[result.label].as_str());
                (vec![count], Elements::Texts(chosen.collect()))
            }
            SCORE => {
                let scores = results.iter().map(|result| result.probabilities[result.label]);
                (vec![count], Elements::Floats(scores.collect()))
            }
            _ => {
                let all = results.iter().flat_map(|result| result.probabilities.iter().copied());
                (vec![count, labels.len() as i64], Elements::Floats(all.collect()))
            }
        };
        put(response, is_raw, name, shape, elements);
    }
    Ok(())
}

/// Puts vectors of `size` numbers into a response's output.
pub fn encode_vectors(
    request: &ModelInferRequest,
    size: usize,
    vectors: &[Vec<f32>],
    response: &mut ModelInferResponse,
) -> Result<(), TensorError> {
    let is_raw = !request.raw_input_contents.is_empty();
    for name in wanted(request, &[EMBEDDING])? {
        put(response, is_raw, name, vec![vectors.len() as i64, size as i64], Elements::Floats(vectors.concat()));
    }
    Ok(())
}

/// Labels and scores of a response, when it has both: what the router records of an answer it passes on.
pub fn decode_results(response: &ModelInferResponse) -> Option<Vec<(String, f32)>> {
    let (labels, scores) = (output_texts(response, LABEL)?, output_floats(response, SCORE)?);
    (labels.len() == scores.len()).then(|| labels.into_iter().zip(scores).collect())
}

/// Inputs and outputs of a classifier for `ModelMetadata`.
pub fn describe(labels: usize) -> (Vec<TensorMetadata>, Vec<TensorMetadata>) {
    let outputs = vec![
        contents::metadata(LABEL, BYTES, &[-1]),
        contents::metadata(SCORE, FP32, &[-1]),
        contents::metadata(PROBABILITIES, FP32, &[-1, labels as i64]),
    ];
    (vec![contents::metadata(TEXT, BYTES, &[-1])], outputs)
}

/// Inputs and outputs of an embedding model for `ModelMetadata`. `size`: numbers of a vector.
pub fn describe_embedding(size: usize) -> (Vec<TensorMetadata>, Vec<TensorMetadata>) {
    let output = contents::metadata(EMBEDDING, FP32, &[-1, size as i64]);
    (vec![contents::metadata(TEXT, BYTES, &[-1])], vec![output])
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{
        super::protocol::{InferTensorContents, model_infer_request::InferInputTensor},
        *,
    };

    fn request(shape: Vec<i64>, typed: &[&[u8]], raw: &[&[u8]]) -> ModelInferRequest {
        let bytes = |all: &[&[u8]]| all.iter().map(|bytes| Bytes::copy_from_slice(bytes)).collect::<Vec<_>>();
        let contents = InferTensorContents { bytes_contents: bytes(typed), ..Default::default() };
        let input = InferInputTensor {
            name: TEXT.into(),
            datatype: BYTES.into(),
            shape,
            parameters: Default::default(),
            contents: Some(contents),
        };
        ModelInferRequest { inputs: vec![input], raw_input_contents: bytes(raw), ..Default::default() }
    }

    #[test]
    fn reads_typed_and_raw_texts() {
        let raw = b"\x02\0\0\0hi\0\0\0\0\x03\0\0\0\xe2\x82\xac".as_slice();
        for (request, expected) in [
            (request(vec![2], &[b"a", b"b"], &[]), vec!["a", "b"]),
            (request(vec![3, 1], &[], &[raw]), vec!["hi", "", "€"]),
            (request(vec![0], &[], &[]), vec![]),
        ] {
            assert_eq!(decode_texts(&request).unwrap(), expected);
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let mut no_input = request(vec![1], &[b"a"], &[]);
        no_input.inputs.clear();
        let mut integers = request(vec![1], &[b"a"], &[]);
        integers.inputs[0].datatype = "INT32".into();
        let shape = |shape: Vec<i64>| TensorError::Shape { input: TEXT.into(), shape, takes: "[N] or [N, 1]" };
        let cut = |element| TensorError::RawCut { input: TEXT.into(), element };
        let datatype = TensorError::Datatype { input: TEXT.into(), datatype: "INT32".into(), takes: BYTES };
        let elements = TensorError::Elements { input: TEXT.into(), shape: vec![3], elements: 1 };
        for (request, expected) in [
            (no_input, TensorError::InputCount(0)),
            (integers, datatype),
            (request(vec![1, 2], &[b"a", b"b"], &[]), shape(vec![1, 2])),
            (request(vec![-1], &[], &[]), shape(vec![-1])),
            (request(vec![3], &[b"a"], &[]), elements),
            (request(vec![1], &[b"a"], &[b"\x01\0\0\0b"]), TensorError::TwiceGiven(TEXT.into())),
            (request(vec![2], &[], &[b"\x01\0\0\0a\x05\0\0\0bc"]), cut(1)),
            (request(vec![1], &[], &[b"\x01\0"]), cut(0)),
            (request(vec![1], &[b"\xff"], &[]), TensorError::NotUtf8 { input: TEXT.into(), element: 0 }),
        ] {
            assert_eq!(decode_texts(&request), Err(expected));
        }
    }

    #[test]
    fn what_is_encoded_can_be_decoded() {
        let labels = ["no".to_owned(), "yes".to_owned()];
        let results = [
            Classification { label: 1, probabilities: vec![0.25, 0.75] },
            Classification { label: 0, probabilities: vec![0.9, 0.1] },
        ];
        for asked in [request(vec![2], &[b"a", b"b"], &[]), request(vec![2], &[], &[b"\x01\0\0\0a\x01\0\0\0b"])] {
            let mut response = ModelInferResponse::default();
            encode(&asked, &labels, &results, &mut response).unwrap();
            assert_eq!(response.outputs[2].shape, [2, 2]);
            assert_eq!(response.raw_output_contents.is_empty(), asked.raw_input_contents.is_empty());
            assert_eq!(decode_results(&response).unwrap(), [("yes".to_owned(), 0.75), ("no".to_owned(), 0.9)]);
        }
    }

    #[test]
    fn vectors_are_one_tensor() {
        let vectors = [vec![1.0, 2.0], vec![3.0, 4.0]];
        for asked in [request(vec![2], &[b"a", b"b"], &[]), request(vec![2], &[], &[b"\x01\0\0\0a\x01\0\0\0b"])] {
            let mut response = ModelInferResponse::default();
            encode_vectors(&asked, 2, &vectors, &mut response).unwrap();
            assert_eq!(response.outputs[0].shape, [2, 2]);
            assert_eq!(output_floats(&response, EMBEDDING).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        }
    }
}
