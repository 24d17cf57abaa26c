//! The header of a GGUF file, read with bounds.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufReader, Read},
    path::Path,
};

use super::{BlockFormat, Metadata, Value};
use crate::LoadError;

const MAGIC: [u8; 4] = *b"GGUF";
/// Bytes that tensors begin at multiples of, unless the file has `general.alignment`.
const ALIGNMENT: u64 = 32;
/// Arrays inside arrays.
const MOST_NESTED: usize = 4;
/// Array elements of the whole header: a vocabulary has three a token, so this is more than two million tokens.
const MOST_ELEMENTS: u64 = 8_000_000;
const MOST_KEY_BYTES: u64 = 65_535;
const MOST_NAME_BYTES: u64 = 1_024;
const MOST_DIMENSIONS: u32 = 4;
/// The least that a key with its value, and a tensor's entry, take in a file.
const LEAST_ENTRY: u64 = 13;
const LEAST_TENSOR: u64 = 32;

/// A tensor's place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name that llama.cpp gives to it.
    pub name: String,
    /// Sizes with the innermost dimension last, as in PyTorch.
    pub shape: Vec<i64>,
    pub format: BlockFormat,
    /// Where its data begin in the file.
    pub offset: u64,
    /// Bytes of its data.
    pub bytes: u64,
}

impl TensorInfo {
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    pub(super) fn rows(&self) -> i64 {
        self.shape[0]
    }

    /// Numbers of a row.
    pub(super) fn row(&self) -> usize {
        self.shape[1..].iter().product::<i64>() as usize
    }
}

/// What a header holds.
pub struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
}

/// Reads the header of a file of `size` bytes, and checks that every tensor lies in the file.
pub fn read(path: &Path, file: &std::fs::File, size: u64) -> Result<Header, LoadError> {
    let mut reader = Reader { path, file: BufReader::new(file), offset: 0, size, elements: 0 };
    if reader.bytes::<4>()? != MAGIC {
        return Err(reader.error(0, "not a GGUF file"));
    }
    match reader.u32()? {
        2 | 3 => {}
        version if (1..=3).contains(&version.swap_bytes()) => {
            return Err(reader.error(4, "a big-endian file, which is not supported"));
        }
        version => return Err(reader.error(4, format!("version {version} of GGUF; known are 2 and 3"))),
    }
    let tensors = reader.count("tensors", LEAST_TENSOR)?;
    let entries = reader.count("metadata entries", LEAST_ENTRY)?;
    let metadata = reader.metadata(entries)?;
    let mut infos = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..tensors {
        let begin = reader.offset;
        let info = reader.tensor()?;
        if !names.insert(info.name.clone()) {
            return Err(reader.error(begin, format!("tensor {} is there twice", info.name)));
        }
        infos.push(info);
    }
    let alignment = match metadata.integer("general.alignment")? {
        None => ALIGNMENT,
        Some(alignment) if alignment.is_power_of_two() && alignment <= 1 << 20 => alignment,
        Some(alignment) => {
            return Err(metadata.error("general.alignment", format!("{alignment} is not a power of two up to 2^20")));
        }
    };
    let data = reader.offset.next_multiple_of(alignment);
    for info in &mut infos {
        place(path, info, data, alignment, size)?;
    }
    Ok(Header { metadata, tensors: infos })
}

/// Turns a tensor's offset behind the header into an offset in the file, and checks its end.
fn place(path: &Path, info: &mut TensorInfo, data: u64, alignment: u64, size: u64) -> Result<(), LoadError> {
    let failed = |message: String| LoadError::Tensor { file: path.to_owned(), tensor: info.name.clone(), message };
    if !info.offset.is_multiple_of(alignment) {
        return Err(failed(format!("its offset {} is not a multiple of {alignment}", info.offset)));
    }
    let begin = data.checked_add(info.offset);
    match begin.and_then(|begin| Some((begin, begin.checked_add(info.bytes)?))) {
        Some((begin, end)) if end <= size => {
            info.offset = begin;
            Ok(())
        }
        Some((begin, end)) => Err(failed(format!("lies at bytes {begin} to {end}, but the file has {size} bytes"))),
        None => Err(failed(format!("its offset {} is beyond any file", info.offset))),
    }
}

/// A file read from its beginning, with the offset for messages.
struct Reader<'a> {
    path: &'a Path,
    file: BufReader<&'a std::fs::File>,
    offset: u64,
    size: u64,
    /// Array elements so far.
    elements: u64,
}

impl Reader<'_> {
    fn error(&self, offset: u64, message: impl std::fmt::Display) -> LoadError {
        LoadError::File { file: self.path.to_owned(), message: format!("offset {offset}: {message}") }
    }

    fn remaining(&self) -> u64 {
        self.size.saturating_sub(self.offset)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), LoadError> {
        let read = self.file.read_exact(buffer);
        read.map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                self.error(self.offset, format!("the file ends within its header, after {} bytes", self.size))
            }
            _ => self.error(self.offset, error),
        })?;
        self.offset += buffer.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        let mut buffer = [0; N];
        self.fill(&mut buffer)?;
        Ok(buffer)
    }

    fn u32(&mut self) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, LoadError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// A number of things that each take at least `least` bytes of what is left of the file.
    fn count(&mut self, what: &str, least: u64) -> Result<u64, LoadError> {
        let begin = self.offset;
        let count = self.u64()?;
        if count.checked_mul(least).is_none_or(|bytes| bytes > self.remaining()) {
            return Err(self.error(begin, format!("{count} {what} do not fit into {} bytes", self.remaining())));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str, most: u64) -> Result<String, LoadError> {
        let begin = self.offset;
        let bytes = self.u64()?;
        if bytes > most.min(self.remaining()) {
            let message = format!("{what} of {bytes} bytes; at most {} are possible", most.min(self.remaining()));
            return Err(self.error(begin, message));
        }
        let mut buffer = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        self.fill(&mut buffer)?;
        String::from_utf8(buffer).map_err(|error| self.error(begin, format!("{what} is not UTF-8: {error}")))
    }

    fn metadata(&mut self, entries: u64) -> Result<Metadata, LoadError> {
        let mut values = BTreeMap::new();
        for _ in 0..entries {
            let begin = self.offset;
            let key = self.string("a key", MOST_KEY_BYTES)?;
            let kind = self.u32()?;
            let value = self.value(kind, &key, 0)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(self.error(begin, format!("key {key} is there twice")));
            }
        }
        Ok(Metadata::new(self.path, values))
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value, LoadError> {
        let begin = self.offset;
        Ok(match kind {
            0 => Value::Unsigned(self.bytes::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes::<1>()?[0] {
                byte @ 0..=1 => Value::Bool(byte == 1),
                byte => return Err(self.error(begin, format!("key {key}: {byte} is not a boolean"))),
            },
            8 => Value::String(self.string("a string", u64::MAX)?),
            9 => self.array(key, depth)?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            kind => return Err(self.error(begin, format!("key {key}: unknown type {kind} of a value"))),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Value, LoadError> {
        let begin = self.offset;
        if depth == MOST_NESTED {
            return Err(self.error(begin, format!("key {key}: more than {MOST_NESTED} arrays inside each other")));
        }
        let kind = self.u32()?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        let count = self.count("array elements", least)?;
        self.elements += count;
        if self.elements > MOST_ELEMENTS {
            return Err(self.error(begin, format!("key {key}: more than {MOST_ELEMENTS} array elements")));
        }
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(self.value(kind, key, depth + 1)?);
        }
        Ok(Value::Array(values))
    }

    /// A tensor's entry, whose offset counts from the end of the header still.
    fn tensor(&mut self) -> Result<TensorInfo, LoadError> {
        let begin = self.offset;
        let name = self.string("a tensor's name", MOST_NAME_BYTES)?;
        let dimensions = self.u32()?;
        if dimensions == 0 || dimensions > MOST_DIMENSIONS {
            let message = format!("tensor {name}: {dimensions} dimensions; possible are 1 to {MOST_DIMENSIONS}");
            return Err(self.error(begin, message));
        }
        // The innermost dimension comes first.
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        let kind = self.u32()?;
        let offset = self.u64()?;
        let failed = |message: String| LoadError::Tensor {
            file: self.path.to_owned(),
            tensor: name.clone(),
            message: format!("offset {begin}: {message}"),
        };
        let format = BlockFormat::from_id(kind).map_err(|name| {
            let known = BlockFormat::ALL.map(BlockFormat::name).join(", ");
            failed(format!("its type {name} is not supported; supported are {known}"))
        })?;
        if !shape[0].is_multiple_of(format.block_elements() as u64) {
            let message =
                format!("rows of {} are not whole {} blocks of {}", shape[0], format.name(), format.block_elements());
            return Err(failed(message));
        }
        let elements = shape.iter().try_fold(1_u64, |all, &size| all.checked_mul(size)).filter(|&all| all > 0);
        let elements = elements.ok_or_else(|| failed(format!("impossible shape {shape:?}")))?;
        let blocks = elements / format.block_elements() as u64;
        let bytes = blocks.checked_mul(format.block_bytes() as u64).filter(|bytes| *bytes <= self.size);
        let bytes = bytes.ok_or_else(|| failed(format!("shape {shape:?} is larger than the file")))?;
        shape.reverse();
        let shape = shape.into_iter().map(|size| size as i64).collect();
        Ok(TensorInfo { name, shape, format, offset, bytes })
    }
}
