//! The contents of tensors: read from an input of any datatype, typed or raw, and written to an output.
//!
//! A request with raw contents (tritonclient) is answered with raw contents, one with typed contents with typed ones.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde_json::{Number, Value};

use super::protocol::{
    InferTensorContents, ModelInferRequest, ModelInferResponse, model_infer_request::InferInputTensor,
    model_infer_response::InferOutputTensor, model_metadata_response::TensorMetadata,
};

pub const BYTES: &str = "BYTES";
pub const FP32: &str = "FP32";

/// What a request has wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("the request has {0} inputs; the model takes one, \"text\"")]
    InputCount(usize),
    #[error("the input is named {0:?}; the model takes \"text\"")]
    InputName(String),
    #[error("input {input:?} has datatype {datatype:?}; it takes {takes}")]
    Datatype { input: String, datatype: String, takes: &'static str },
    #[error("input {input:?} has shape {shape:?}; it takes {takes}")]
    Shape { input: String, shape: Vec<i64>, takes: &'static str },
    #[error("input {input:?} has shape {shape:?} but {elements} elements")]
    Elements { input: String, shape: Vec<i64>, elements: usize },
    #[error("raw_input_contents has {entries} entries for {inputs} inputs")]
    RawCount { entries: usize, inputs: usize },
    #[error("input {0:?} has both contents and raw_input_contents")]
    TwiceGiven(String),
    #[error("raw_input_contents of {input:?} ends in the middle of element {element}")]
    RawCut { input: String, element: usize },
    #[error("element {element} of input {input:?} is not UTF-8")]
    NotUtf8 { input: String, element: usize },
    #[error("input {0:?} has a number that is not finite")]
    NotFinite(String),
    #[error("there is no output {asked:?}; the outputs are {known}")]
    OutputName { asked: String, known: String },
}

/// Bytes of the contents of all inputs.
pub fn bytes(request: &ModelInferRequest) -> usize {
    let typed = request.inputs.iter().filter_map(|input| input.contents.as_ref());
    let typed = typed.flat_map(|contents| &contents.bytes_contents);
    typed.chain(&request.raw_input_contents).map(Bytes::len).sum()
}

/// Raw contents of one input; `None` if the request has typed contents.
fn raw(request: &ModelInferRequest, index: usize) -> Result<Option<Bytes>, TensorError> {
    let (entries, inputs) = (request.raw_input_contents.len(), request.inputs.len());
    if entries == 0 {
        return Ok(None);
    }
    if entries != inputs {
        return Err(TensorError::RawCount { entries, inputs });
    }
    let input = &request.inputs[index];
    match &input.contents {
        Some(contents) if *contents != InferTensorContents::default() => {
            Err(TensorError::TwiceGiven(input.name.clone()))
        }
        _ => Ok(Some(request.raw_input_contents[index].clone())),
    }
}

/// The elements of input `index`, whose datatype is BYTES.
pub fn texts(request: &ModelInferRequest, index: usize) -> Result<Vec<String>, TensorError> {
    let input = &request.inputs[index];
    if input.datatype != BYTES {
        let (datatype, takes) = (input.datatype.clone(), BYTES);
        return Err(TensorError::Datatype { input: input.name.clone(), datatype, takes });
    }
    let elements = match raw(request, index)? {
        Some(raw) => split(raw).map_err(|element| TensorError::RawCut { input: input.name.clone(), element })?,
        None => input.contents.as_ref().map(|contents| contents.bytes_contents.clone()).unwrap_or_default(),
    };
    let text = |(element, bytes): (usize, Bytes)| {
        String::from_utf8(bytes.into()).map_err(|_| TensorError::NotUtf8 { input: input.name.clone(), element })
    };
    elements.into_iter().enumerate().map(text).collect()
}

/// The elements of input `index` of any datatype that JSON has values for, in row-major order.
pub fn values(request: &ModelInferRequest, index: usize) -> Result<Vec<Value>, TensorError> {
    let input = &request.inputs[index];
    let values = if input.datatype == BYTES {
        texts(request, index)?.into_iter().map(Value::String).collect()
    } else {
        match raw(request, index)? {
            Some(raw) => raw_numbers(input, raw)?,
            None => typed_numbers(input)?,
        }
    };
    check_shape(input, values.len())?;
    Ok(values)
}

fn check_shape(input: &InferInputTensor, elements: usize) -> Result<(), TensorError> {
    let dimension = |product: usize, &size: &i64| product.checked_mul(usize::try_from(size).ok()?);
    if input.shape.iter().try_fold(1, dimension) == Some(elements) {
        return Ok(());
    }
    Err(TensorError::Elements { input: input.name.clone(), shape: input.shape.clone(), elements })
}

fn unknown(input: &InferInputTensor) -> TensorError {
    let takes = "BYTES, BOOL, FP32, FP64 or an integer";
    TensorError::Datatype { input: input.name.clone(), datatype: input.datatype.clone(), takes }
}

fn finite(input: &InferInputTensor, number: f64) -> Result<Value, TensorError> {
    Number::from_f64(number).map(Value::Number).ok_or_else(|| TensorError::NotFinite(input.name.clone()))
}

fn typed_numbers(input: &InferInputTensor) -> Result<Vec<Value>, TensorError> {
    let contents = input.contents.clone().unwrap_or_default();
    Ok(match input.datatype.as_str() {
        "BOOL" => contents.bool_contents.into_iter().map(Value::from).collect(),
        "INT8" | "INT16" | "INT32" => contents.int_contents.into_iter().map(Value::from).collect(),
        "INT64" => contents.int64_contents.into_iter().map(Value::from).collect(),
        "UINT8" | "UINT16" | "UINT32" => contents.uint_contents.into_iter().map(Value::from).collect(),
        "UINT64" => contents.uint64_contents.into_iter().map(Value::from).collect(),
        FP32 => {
            let numbers = contents.fp32_contents.into_iter();
            numbers.map(|number| finite(input, number.into())).collect::<Result<_, _>>()?
        }
        "FP64" => {
            let numbers = contents.fp64_contents.into_iter();
            numbers.map(|number| finite(input, number)).collect::<Result<_, _>>()?
        }
        _ => return Err(unknown(input)),
    })
}

/// Numbers in little endian.
fn raw_numbers(input: &InferInputTensor, mut raw: Bytes) -> Result<Vec<Value>, TensorError> {
    let mut values = Vec::new();
    while raw.has_remaining() {
        let cut = |_| TensorError::RawCut { input: input.name.clone(), element: values.len() };
        let value = match input.datatype.as_str() {
            "BOOL" => (raw.try_get_u8().map_err(cut)? != 0).into(),
            "INT8" => raw.try_get_i8().map_err(cut)?.into(),
            "INT16" => raw.try_get_i16_le().map_err(cut)?.into(),
            "INT32" => raw.try_get_i32_le().map_err(cut)?.into(),
            "INT64" => raw.try_get_i64_le().map_err(cut)?.into(),
            "UINT8" => raw.try_get_u8().map_err(cut)?.into(),
            "UINT16" => raw.try_get_u16_le().map_err(cut)?.into(),
            "UINT32" => raw.try_get_u32_le().map_err(cut)?.into(),
            "UINT64" => raw.try_get_u64_le().map_err(cut)?.into(),
            FP32 => finite(input, raw.try_get_f32_le().map_err(cut)?.into())?,
            "FP64" => finite(input, raw.try_get_f64_le().map_err(cut)?)?,
            _ => return Err(unknown(input)),
        };
        values.push(value);
    }
    Ok(values)
}

/// Each element is its length in four bytes, little endian, and its bytes. An error is the number of the element that is
/// cut off.
pub fn split(mut raw: Bytes) -> Result<Vec<Bytes>, usize> {
    let mut elements = Vec::new();
    while raw.has_remaining() {
        let length = raw.try_get_u32_le().map_err(|_| elements.len())? as usize;
        if raw.remaining() < length {
            return Err(elements.len());
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

/// The names of the outputs to send, in the order asked for; all that are `known` when none was named.
pub fn wanted<'a>(request: &'a ModelInferRequest, known: &[&'static str]) -> Result<Vec<&'a str>, TensorError> {
    if request.outputs.is_empty() {
        return Ok(known.to_vec());
    }
    match request.outputs.iter().find(|output| !known.contains(&output.name.as_str())) {
        Some(output) => {
            let quoted: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
            Err(TensorError::OutputName { asked: output.name.clone(), known: quoted.join(", ") })
        }
        None => Ok(request.outputs.iter().map(|output| output.name.as_str()).collect()),
    }
}

/// The elements of an output.
pub enum Elements<'a> {
    Texts(Vec<&'a str>),
    Floats(Vec<f32>),
}

/// Adds an output to a response. `is_raw`: whether its contents are raw.
pub fn put(response: &mut ModelInferResponse, is_raw: bool, name: &str, shape: Vec<i64>, elements: Elements<'_>) {
    let datatype = match &elements {
        Elements::Texts(_) => BYTES,
        Elements::Floats(_) => FP32,
    };
    let contents = match (is_raw, elements) {
        (true, elements) => {
            response.raw_output_contents.push(match elements {
                Elements::Texts(texts) => join(texts.into_iter()),
                Elements::Floats(floats) => floats.into_iter().flat_map(f32::to_le_bytes).collect(),
            });
            None
        }
        (false, Elements::Floats(fp32_contents)) => Some(InferTensorContents { fp32_contents, ..Default::default() }),
        (false, Elements::Texts(texts)) => {
            let bytes_contents = texts.into_iter().map(|text| Bytes::copy_from_slice(text.as_bytes())).collect();
            Some(InferTensorContents { bytes_contents, ..Default::default() })
        }
    };
    let (name, datatype) = (name.to_owned(), datatype.to_owned());
    response.outputs.push(InferOutputTensor { name, datatype, shape, parameters: Default::default(), contents });
}

/// The elements of an output of the datatype BYTES; `None` if there is no such output, or if it is not readable.
pub fn output_texts(response: &ModelInferResponse, name: &str) -> Option<Vec<String>> {
    let index = response.outputs.iter().position(|output| output.name == name)?;
    let elements = match response.raw_output_contents.is_empty() {
        true => response.outputs[index].contents.clone()?.bytes_contents,
        false => split(response.raw_output_contents.get(index)?.clone()).ok()?,
    };
    elements.into_iter().map(|bytes| String::from_utf8(bytes.into()).ok()).collect()
}

/// The elements of an output of the datatype FP32; `None` if there is no such output.
pub fn output_floats(response: &ModelInferResponse, name: &str) -> Option<Vec<f32>> {
    let index = response.outputs.iter().position(|output| output.name == name)?;
    if response.raw_output_contents.is_empty() {
        return Some(response.outputs[index].contents.as_ref()?.fp32_contents.clone());
    }
    let floats = response.raw_output_contents.get(index)?.chunks_exact(4);
    Some(floats.map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect())
}

/// An input or output for `ModelMetadata`.
pub fn metadata(name: &str, datatype: &str, shape: &[i64]) -> TensorMetadata {
    TensorMetadata { name: name.into(), datatype: datatype.into(), shape: shape.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(name: &str, datatype: &str, shape: &[i64], contents: Option<InferTensorContents>) -> InferInputTensor {
        let (name, datatype, shape) = (name.into(), datatype.into(), shape.into());
        InferInputTensor { name, datatype, shape, parameters: Default::default(), contents }
    }

    #[test]
    fn numbers_are_read_typed_and_raw() {
        let none = InferTensorContents::default;
        let cases: [(&str, InferTensorContents, &[u8], Value); 7] = [
            ("BOOL", InferTensorContents { bool_contents: vec![true], ..none() }, &[1], true.into()),
            ("INT8", InferTensorContents { int_contents: vec![-3], ..none() }, &[0xfd], (-3).into()),
            ("INT32", InferTensorContents { int_contents: vec![-3], ..none() }, &[0xfd, 0xff, 0xff, 0xff], (-3).into()),
            ("INT64", InferTensorContents { int64_contents: vec![7], ..none() }, &[7, 0, 0, 0, 0, 0, 0, 0], 7.into()),
            ("UINT16", InferTensorContents { uint_contents: vec![513], ..none() }, &[1, 2], 513.into()),
            ("FP32", InferTensorContents { fp32_contents: vec![0.5], ..none() }, &[0, 0, 0, 0x3f], 0.5.into()),
            ("FP64", InferTensorContents { fp64_contents: vec![0.5], ..none() }, &0.5f64.to_le_bytes(), 0.5.into()),
        ];
        for (datatype, typed, raw, expected) in cases {
            let mut request =
                ModelInferRequest { inputs: vec![input("x", datatype, &[1, 1], Some(typed))], ..Default::default() };
            assert_eq!(values(&request, 0).unwrap(), std::slice::from_ref(&expected), "{datatype} typed");
            request.inputs[0].contents = None;
            request.raw_input_contents = vec![Bytes::copy_from_slice(raw)];
            assert_eq!(values(&request, 0).unwrap(), [expected], "{datatype} raw");
        }
    }

    #[test]
    fn wrong_numbers_name_their_input() {
        let read = |datatype: &str, shape: &[i64], raw: &[u8]| {
            let inputs = vec![input("x", datatype, shape, None)];
            let raw_input_contents = vec![Bytes::copy_from_slice(raw)];
            values(&ModelInferRequest { inputs, raw_input_contents, ..Default::default() }, 0)
        };
        let cut = TensorError::RawCut { input: "x".into(), element: 1 };
        assert_eq!(read("INT32", &[2], &[1, 0, 0, 0, 2]), Err(cut));
        assert_eq!(read("FP32", &[1], &f32::NAN.to_le_bytes()), Err(TensorError::NotFinite("x".into())));
        let elements = TensorError::Elements { input: "x".into(), shape: vec![2], elements: 1 };
        assert_eq!(read("BOOL", &[2], &[1]), Err(elements));
        for shape in [vec![-1], vec![i64::MAX, i64::MAX]] {
            let elements = TensorError::Elements { input: "x".into(), shape: shape.clone(), elements: 1 };
            assert_eq!(read("BOOL", &shape, &[1]), Err(elements));
        }
        assert!(matches!(read("FP16", &[1], &[0, 0]), Err(TensorError::Datatype { .. })));
    }

    #[test]
    fn every_input_has_its_own_raw_contents() {
        let inputs = vec![input("a", BYTES, &[1], None), input("b", "BOOL", &[1], None)];
        let raw_input_contents = vec![Bytes::from_static(b"\x02\0\0\0hi"), Bytes::from_static(b"\0")];
        let mut request = ModelInferRequest { inputs, raw_input_contents, ..Default::default() };
        assert_eq!(
            (texts(&request, 0).unwrap(), values(&request, 1).unwrap()),
            (vec!["hi".into()], vec![false.into()])
        );
        assert_eq!(bytes(&request), 7);
        request.raw_input_contents.pop();
        assert_eq!(texts(&request, 0), Err(TensorError::RawCount { entries: 1, inputs: 2 }));
    }
}
