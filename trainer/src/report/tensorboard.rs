//! Curves for TensorBoard: event files with scalars, texts and hyperparameters, written without TensorFlow.
//!
//! An event file is a sequence of TFRecords, each an `Event` of tensorflow/core/util/event.proto. Only the fields that
//! are used here are declared. A record is one write, so a process that is killed leaves a file that is readable up to
//! its last whole record. A resumed run writes another file into the same folder, and [`EventWriter::resume`] takes
//! back what was written beyond its checkpoint. Where the folder is and who uploads it is the caller's business.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use prost::Message;

/// Says that a file has events of this kind; readers take nothing back at a restart without it.
const FILE_VERSION: &str = "brain.Event:2";
/// `DataType::DT_STRING` of tensorflow/core/framework/types.proto.
const DT_STRING: i32 = 7;
/// `DataClass::DATA_CLASS_TENSOR` of tensorflow/core/framework/summary.proto.
const DATA_CLASS_TENSOR: i32 = 2;
/// `SessionLog::START`.
const SESSION_START: i32 = 1;
/// Tag under which the HPARAMS page looks for a run's hyperparameters.
const HPARAMS_TAG: &str = "_hparams_/session_start_info";

/// Writes one event file.
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Begins a new file in the folder, which is made if need be. Files sort by `started`, as readers want them.
    pub fn create(folder: &Path, started: Timestamp) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let (seconds, nanoseconds) = (started.as_second(), started.subsec_nanosecond());
        // Two processes may have begun at the same moment by their clocks.
        for number in 0.. {
            let path = folder.join(format!("events.out.tfevents.{seconds:010}.{nanoseconds:09}.{number}.athanor"));
            match File::options().append(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
                Ok(file) => {
                    let mut writer = Self { file, path };
                    writer.write(0, started, What::FileVersion(FILE_VERSION.into()))?;
                    return Ok(writer);
                }
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run goes on at this step: the records of earlier files about it and later steps are void.
    pub fn resume(&mut self, step: u64, wall_time: Timestamp) -> io::Result<()> {
        self.write(step, wall_time, What::SessionLog(SessionLog { status: SESSION_START }))
    }

    /// One number, such as `train/loss`.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f64, wall_time: Timestamp) -> io::Result<()> {
        self.scalars(step, &[(tag, value)], wall_time)
    }

    /// Numbers of one step, in one record.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)], wall_time: Timestamp) -> io::Result<()> {
        let value = values.iter().map(|(tag, value)| Value {
            tag: (*tag).to_owned(),
            metadata: None,
            value: Some(Content::SimpleValue(*value as f32)),
        });
        self.write(step, wall_time, What::Summary(Summary { value: value.collect() }))
    }

    /// Words, in Markdown, for the TEXT page.
    pub fn text(&mut self, tag: &str, step: u64, markdown: &str, wall_time: Timestamp) -> io::Result<()> {
        let tensor = Tensor {
            dtype: DT_STRING,
            shape: Some(Shape { dim: vec![Dimension { size: 1 }] }),
            string_val: vec![markdown.as_bytes().to_vec()],
        };
        let value = Value {
            tag: tag.to_owned(),
            metadata: Some(Metadata::of_plugin("text", Vec::new(), DATA_CLASS_TENSOR)),
            value: Some(Content::Tensor(tensor)),
        };
        self.write(step, wall_time, What::Summary(Summary { value: vec![value] }))
    }

    /// The run's hyperparameters for the HPARAMS page, where runs of one search are compared. A value that reads as a
    /// number is one.
    pub fn hyperparameters(&mut self, pairs: &[(String, String)], wall_time: Timestamp) -> io::Result<()> {
        let kind = |text: &str| match text.parse::<f64>() {
            Ok(number) if number.is_finite() => HparamKind::Number(number),
            _ => HparamKind::Text(text.to_owned()),
        };
        let hparams = pairs.iter().map(|(name, text)| (name.clone(), Hparam { kind: Some(kind(text)) })).collect();
        let start = SessionStartInfo { hparams, start_time_secs: seconds(wall_time) };
        let content = HparamsPluginData { session_start_info: Some(start) }.encode_to_vec();
        let value =
            Value { tag: HPARAMS_TAG.into(), metadata: Some(Metadata::of_plugin("hparams", content, 0)), value: None };
        self.write(0, wall_time, What::Summary(Summary { value: vec![value] }))
    }

    fn write(&mut self, step: u64, wall_time: Timestamp, what: What) -> io::Result<()> {
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let event = Event { wall_time: seconds(wall_time), step, what: Some(what) };
        // Unbuffered and in one piece.
        self.file.write_all(&record(&event.encode_to_vec()))
    }
}

fn seconds(time: Timestamp) -> f64 {
    time.as_second() as f64 + f64::from(time.subsec_nanosecond()) * 1e-9
}

/// A TFRecord: the length, its checksum, the data, its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_checksum(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_checksum(data).to_le_bytes());
    record
}

/// CRC-32C, masked as tensorflow/core/lib/hash/crc32c.h does: data that contains checksums would weaken a plain one.
fn masked_checksum(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 8")]
    value: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

/// `SummaryMetadata`.
#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
    #[prost(int32, tag = "4")]
    data_class: i32,
}

impl Metadata {
    fn of_plugin(name: &str, content: Vec<u8>, data_class: i32) -> Self {
        Self { plugin_data: Some(PluginData { plugin_name: name.into(), content }), data_class }
    }
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
    #[prost(bytes = "vec", tag = "2")]
    content: Vec<u8>,
}

/// `TensorProto`.
#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

/// `TensorShapeProto`.
#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
struct Dimension {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// tensorboard/plugins/hparams/plugin_data.proto.
#[derive(Clone, PartialEq, Message)]
struct HparamsPluginData {
    #[prost(message, optional, tag = "3")]
    session_start_info: Option<SessionStartInfo>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionStartInfo {
    #[prost(btree_map = "string, message", tag = "1")]
    hparams: BTreeMap<String, Hparam>,
    #[prost(double, tag = "5")]
    start_time_secs: f64,
}

/// `google.protobuf.Value`.
#[derive(Clone, PartialEq, Message)]
struct Hparam {
    #[prost(oneof = "HparamKind", tags = "2, 3")]
    kind: Option<HparamKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum HparamKind {
    #[prost(double, tag = "2")]
    Number(f64),
    #[prost(string, tag = "3")]
    Text(String),
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// CRC-32C bit by bit, by another algorithm than the crate's.
    fn checksum(data: &[u8]) -> u32 {
        let mut crc = !0_u32;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        let crc = !crc;
        let (low, high) = (crc >> 15, crc << 17);
        (high | low).wrapping_add(0xa282_ead8)
    }

    /// The records that are whole; panics on a wrong checksum.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while bytes.len() >= 12 {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(u32::from_le_bytes(bytes[8..12].try_into().unwrap()), checksum(&bytes[..8]));
            if bytes.len() < 16 + length {
                break;
            }
            let data = &bytes[12..12 + length];
            assert_eq!(u32::from_le_bytes(bytes[12 + length..16 + length].try_into().unwrap()), checksum(data));
            records.push(data.to_vec());
            bytes = &bytes[16 + length..];
        }
        records
    }

    #[derive(Clone, Debug, PartialEq)]
    enum Field {
        Varint(u64),
        Fixed64(u64),
        Fixed32(u32),
        Bytes(Vec<u8>),
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut number = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        number
    }

    /// Fields of a protobuf message with their numbers, in order.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let mut take = |length: usize| {
                let (taken, rest) = bytes.split_at(length);
                bytes = rest;
                taken.to_vec()
            };
            let field = match key & 7 {
                1 => Field::Fixed64(u64::from_le_bytes(take(8).try_into().unwrap())),
                5 => Field::Fixed32(u32::from_le_bytes(take(4).try_into().unwrap())),
                0 => Field::Varint(varint(&mut bytes)),
                2 => {
                    let length = varint(&mut bytes) as usize;
                    let (taken, rest) = bytes.split_at(length);
                    bytes = rest;
                    Field::Bytes(taken.to_vec())
                }
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    fn bytes(message: &[(u64, Field)], number: u64) -> Vec<u8> {
        match message.iter().find(|(found, _)| *found == number) {
            Some((_, Field::Bytes(bytes))) => bytes.clone(),
            other => panic!("field {number}: {other:?}"),
        }
    }

    /// Tag, step, value and time of every scalar.
    pub fn scalars(file: &Path) -> Vec<(String, u64, f32, f64)> {
        let mut scalars = Vec::new();
        for record in records(&std::fs::read(file).unwrap()) {
            let event = fields(&record);
            let Some((_, Field::Bytes(summary))) = event.iter().find(|(number, _)| *number == 5) else { continue };
            let step =
                event.iter().find_map(|field| if let (2, Field::Varint(step)) = field { Some(*step) } else { None });
            let (_, Field::Fixed64(time)) = event[0] else { panic!("{event:?}") };
            for (_, value) in fields(summary) {
                let Field::Bytes(value) = value else { panic!() };
                let value = fields(&value);
                if let Some((_, Field::Fixed32(bits))) = value.iter().find(|(number, _)| *number == 2) {
                    let tag = String::from_utf8(bytes(&value, 1)).unwrap();
                    scalars.push((tag, step.unwrap_or(0), f32::from_bits(*bits), f64::from_bits(time)));
                }
            }
        }
        scalars
    }

    fn at(milliseconds: i64) -> Timestamp {
        Timestamp::from_millisecond(1_760_000_000_000 + milliseconds).unwrap()
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_checksum(b"athanor"), checksum(b"athanor"));
    }

    #[test]
    fn what_is_written_can_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(&folder.path().join("tensorboard"), at(0)).unwrap();
        for step in 1..=3_u32 {
            let loss = 1.0 / f64::from(step);
            let values = [("train/loss", loss), ("train/learning_rate", 1e-5)];
            writer.scalars(step.into(), &values, at(i64::from(step) * 500)).unwrap();
        }
        writer.scalar("validation/accuracy", 3, 0.875, at(1500)).unwrap();
        let found = scalars(writer.path());
        assert_eq!(found.len(), 7);
        assert_eq!(found[2], ("train/loss".into(), 2, 0.5, 1_760_000_001.0));
        assert_eq!(found[6], ("validation/accuracy".into(), 3, 0.875, 1_760_000_001.5));

        let all = records(&std::fs::read(writer.path()).unwrap());
        assert_eq!(bytes(&fields(&all[0]), 3), b"brain.Event:2");
        assert!(writer.path().file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents.1760000000."));
    }

    #[test]
    fn texts_and_hyperparameters_name_their_plugins() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), at(0)).unwrap();
        writer.text("report", 0, "**fine**", at(1)).unwrap();
        let pairs = [("batchSize", "32"), ("optimizer", "AdamW")].map(|(name, text)| (name.into(), text.into()));
        writer.hyperparameters(&pairs, at(2)).unwrap();
        let values: Vec<_> = records(&std::fs::read(writer.path()).unwrap())[1..]
            .iter()
            .map(|record| fields(&bytes(&fields(&bytes(&fields(record), 5)), 1)))
            .collect();
        let plugin = |value: &[(u64, Field)]| fields(&bytes(&fields(&bytes(value, 9)), 1));
        assert_eq!(bytes(&plugin(&values[0]), 1), b"text");
        assert_eq!(bytes(&fields(&bytes(&values[0], 8)), 8), b"**fine**");
        assert_eq!(bytes(&plugin(&values[1]), 1), b"hparams");
        let start = fields(&bytes(&fields(&bytes(&plugin(&values[1]), 2)), 3));
        let entry = fields(&bytes(&start, 1));
        assert_eq!(bytes(&entry, 1), b"batchSize");
        assert_eq!(fields(&bytes(&entry, 2)), [(2, Field::Fixed64(32.0_f64.to_bits()))]);
    }

    #[test]
    fn a_killed_run_leaves_a_prefix_and_a_resumed_one_goes_on_in_another_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = EventWriter::create(folder.path(), at(0)).unwrap();
        for step in 1..=5 {
            first.scalar("train/loss", step, 0.5, at(1)).unwrap();
        }
        // Without closing it: every record is there, and half a record at the end takes nothing along.
        let whole = std::fs::read(first.path()).unwrap();
        assert_eq!(scalars(first.path()).len(), 5);
        for cut in 1..40 {
            std::fs::write(first.path(), &whole[..whole.len() - cut]).unwrap();
            assert_eq!(scalars(first.path()).len(), 4, "{cut} bytes less");
        }

        let mut second = EventWriter::create(folder.path(), at(0)).unwrap();
        assert!(second.path() > first.path(), "the same moment, another file");
        second.resume(4, at(10)).unwrap();
        second.scalar("train/loss", 4, 0.25, at(11)).unwrap();
        let log = fields(&records(&std::fs::read(second.path()).unwrap())[1]);
        assert!(log.contains(&(2, Field::Varint(4))) && bytes(&log, 7) == [8, 1], "START at step 4: {log:?}");
        assert_eq!(scalars(second.path())[0].1, 4);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
