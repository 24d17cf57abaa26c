//! Tensors of the Open Inference Protocol: BYTES `text` in; BYTES `label`, FP32 `score` and FP32 `probabilities` out.
//!
//! A request with raw contents (tritonclient) is answered with raw contents, one with typed contents with typed ones.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::protocol::{
    InferTensorContents, ModelInferRequest, ModelInferResponse, model_infer_request::InferInputTensor,
    model_infer_response::InferOutputTensor, model_metadata_response::TensorMetadata,
};
use crate::service::Classification;

pub const TEXT: &str = "text";
pub const LABEL: &str = "label";
pub const SCORE: &str = "score";
pub const PROBABILITIES: &str = "probabilities";
const BYTES: &str = "BYTES";
const FP32: &str = "FP32";

/// What a request has wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("the request has {0} inputs; the model takes one, \"text\"")]
    InputCount(usize),
    #[error("the input is named {0:?}; the model takes \"text\"")]
    InputName(String),
    #[error("input \"text\" has datatype {0:?}; it takes BYTES")]
    Datatype(String),
    #[error("input \"text\" has shape {0:?}; it takes [N] or [N, 1]")]
    Shape(Vec<i64>),
    #[error("input \"text\" has shape {shape:?} but {elements} elements")]
    Elements { shape: Vec<i64>, elements: usize },
    #[error("raw_input_contents has {0} entries for one input")]
    RawCount(usize),
    #[error("input \"text\" has both contents and raw_input_contents")]
    TwiceGiven,
    #[error("raw_input_contents of \"text\" ends in the middle of element {0}")]
    RawCut(usize),
    #[error("element {0} of input \"text\" is not UTF-8")]
    NotUtf8(usize),
    #[error("there is no output {0:?}; the outputs are \"label\", \"score\" and \"probabilities\"")]
    OutputName(String),
}

/// The texts of a request.
pub fn decode_texts(request: &ModelInferRequest) -> Result<Vec<String>, TensorError> {
    let [input] = request.inputs.as_slice() else { return Err(TensorError::InputCount(request.inputs.len())) };
    if input.name != TEXT {
        return Err(TensorError::InputName(input.name.clone()));
    }
    if input.datatype != BYTES {
        return Err(TensorError::Datatype(input.datatype.clone()));
    }
    let count = match *input.shape.as_slice() {
        [count] | [count, 1] => usize::try_from(count).ok(),
        _ => None,
    }
    .ok_or_else(|| TensorError::Shape(input.shape.clone()))?;
    let elements = elements(request, input)?;
    if elements.len() != count {
        return Err(TensorError::Elements { shape: input.shape.clone(), elements: elements.len() });
    }
    let text =
        |(index, bytes): (usize, Bytes)| String::from_utf8(bytes.into()).map_err(|_| TensorError::NotUtf8(index));
    elements.into_iter().enumerate().map(text).collect()
}

fn elements(request: &ModelInferRequest, input: &InferInputTensor) -> Result<Vec<Bytes>, TensorError> {
    let typed = input.contents.as_ref().map(|contents| contents.bytes_contents.clone()).unwrap_or_default();
    match request.raw_input_contents.as_slice() {
        [] => Ok(typed),
        [_] if !typed.is_empty() => Err(TensorError::TwiceGiven),
        [raw] => split(raw.clone()),
        raw => Err(TensorError::RawCount(raw.len())),
    }
}

/// Each element is its length in four bytes, little endian, and its bytes.
fn split(mut raw: Bytes) -> Result<Vec<Bytes>, TensorError> {
    let mut elements = Vec::new();
    while raw.has_remaining() {
        let cut = TensorError::RawCut(elements.len());
        let length = raw.try_get_u32_le().map_err(|_| cut.clone())? as usize;
        if raw.remaining() < length {
            return Err(cut);
        }
        elements.push(raw.split_to(length));
    }
    Ok(elements)
}

fn join<'a>(elements: impl Iterator<Item = &'a str>) -> Bytes {
    let mut raw = BytesMut::new();
    for element in elements {
        raw.put_u32_le(element.len() as u32);
        raw.put_slice(element.as_bytes());
    }
    raw.freeze()
}

/// The names of the outputs to send, in the order asked for; all of them when none was named.
fn wanted(request: &ModelInferRequest) -> Result<Vec<&str>, TensorError> {
    if request.outputs.is_empty() {
        return Ok(vec![LABEL, SCORE, PROBABILITIES]);
    }
    let known = |name: &str| matches!(name, LABEL | SCORE | PROBABILITIES);
    match request.outputs.iter().find(|output| !known(&output.name)) {
        Some(output) => Err(TensorError::OutputName(output.name.clone())),
        None => Ok(request.outputs.iter().map(|output| output.name.as_str()).collect()),
    }
}

/// Checks the named outputs before any work is done.
pub fn check_outputs(request: &ModelInferRequest) -> Result<(), TensorError> {
    wanted(request).map(drop)
}

/// Puts `results` into a response's outputs.
pub fn encode(
    request: &ModelInferRequest,
    labels: &[String],
    results: &[Classification],
    response: &mut ModelInferResponse,
) -> Result<(), TensorError> {
    let raw = !request.raw_input_contents.is_empty();
    let count = results.len() as i64;
    let chosen = || results.iter().map(|result| labels[result.label].as_str());
    for name in wanted(request)? {
        let (datatype, shape, floats) = match name {
            LABEL => (BYTES, vec![count], None),
            SCORE => {
                (FP32, vec![count], Some(results.iter().map(|result| result.probabilities[result.label]).collect()))
            }
            _ => {
                let all: Vec<f32> = results.iter().flat_map(|result| result.probabilities.iter().copied()).collect();
                (FP32, vec![count, labels.len() as i64], Some(all))
            }
        };
        let contents = match (raw, floats) {
            (true, Some(floats)) => {
                let bytes: Vec<u8> = floats.into_iter().flat_map(f32::to_le_bytes).collect();
                response.raw_output_contents.push(bytes.into());
                None
            }
            (true, None) => {
                response.raw_output_contents.push(join(chosen()));
                None
            }
            (false, Some(floats)) => Some(InferTensorContents { fp32_contents: floats, ..Default::default() }),
            (false, None) => {
                let bytes_contents = chosen().map(|label| Bytes::copy_from_slice(label.as_bytes())).collect();
                Some(InferTensorContents { bytes_contents, ..Default::default() })
            }
        };
        let (name, datatype) = (name.to_owned(), datatype.to_owned());
        response.outputs.push(InferOutputTensor { name, datatype, shape, parameters: Default::default(), contents });
    }
    Ok(())
}

/// Labels and scores of a response, when it has both: what the router records of an answer it passes on.
pub fn decode_results(response: &ModelInferResponse) -> Option<Vec<(String, f32)>> {
    let find = |name: &str| response.outputs.iter().position(|output| output.name == name);
    let (label, score) = (find(LABEL)?, find(SCORE)?);
    let (labels, scores) = if response.raw_output_contents.is_empty() {
        let contents = |index: usize| response.outputs[index].contents.clone();
        (contents(label)?.bytes_contents, contents(score)?.fp32_contents)
    } else {
        let floats = response.raw_output_contents.get(score)?.chunks_exact(4);
        let scores = floats.map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect();
        (split(response.raw_output_contents.get(label)?.clone()).ok()?, scores)
    };
    if labels.len() != scores.len() {
        return None;
    }
    labels
        .into_iter()
        .map(|label| String::from_utf8(label.into()).ok())
        .zip(scores)
        .map(|(l, s)| Some((l?, s)))
        .collect()
}

/// Inputs and outputs for `ModelMetadata`.
pub fn describe(labels: usize) -> (Vec<TensorMetadata>, Vec<TensorMetadata>) {
    let tensor = |name: &str, datatype: &str, shape: Vec<i64>| TensorMetadata {
        name: name.into(),
        datatype: datatype.into(),
        shape,
    };
    let outputs = vec![
        tensor(LABEL, BYTES, vec![-1]),
        tensor(SCORE, FP32, vec![-1]),
        tensor(PROBABILITIES, FP32, vec![-1, labels as i64]),
    ];
    (vec![tensor(TEXT, BYTES, vec![-1])], outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for (request, expected) in [
            (no_input, TensorError::InputCount(0)),
            (integers, TensorError::Datatype("INT32".into())),
            (request(vec![1, 2], &[b"a", b"b"], &[]), TensorError::Shape(vec![1, 2])),
            (request(vec![-1], &[], &[]), TensorError::Shape(vec![-1])),
            (request(vec![3], &[b"a"], &[]), TensorError::Elements { shape: vec![3], elements: 1 }),
            (request(vec![1], &[b"a"], &[b"\x01\0\0\0b"]), TensorError::TwiceGiven),
            (request(vec![2], &[], &[b"\x01\0\0\0a\x05\0\0\0bc"]), TensorError::RawCut(1)),
            (request(vec![1], &[], &[b"\x01\0"]), TensorError::RawCut(0)),
            (request(vec![1], &[b"\xff"], &[]), TensorError::NotUtf8(0)),
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
}
