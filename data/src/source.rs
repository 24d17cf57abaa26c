//! One source to rows: which files it means, their bytes as a stream, and the digest of what was read.

mod hub;
mod object;
mod opened;
mod pattern;
mod pipe;
mod topic;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use athanor_contract::{
    artifact::sha256_hex,
    hexadecimal,
    train::{DataFormat, Source},
};
use athanor_store::Location;
use futures::TryStreamExt;
use sha2::{Digest, Sha256};

use crate::{
    DataError, Progress,
    builder::Builder,
    format::{self, Compression},
    progress::Report,
    reading::Reading,
};

pub(crate) use hub::Hub;
use opened::{CHUNK, Opened};
use pattern::is_pattern;

/// What reading a source requires besides it.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub needs_labels: bool,
    pub report: Report<'a>,
    pub hub: &'a Hub,
    /// The folder in which rows of topics are kept for the next reading of the same ranges.
    pub snapshots: Option<&'a Location>,
}

/// A file of a source.
enum Input {
    Object(object::Object),
    Hub(hub::HubFile),
}

impl Input {
    fn uri(&self) -> &str {
        match self {
            Self::Object(object) => object.uri(),
            Self::Hub(file) => file.uri(),
        }
    }

    /// Absent if it is unknown before the file is opened.
    fn size(&self) -> Option<u64> {
        match self {
            Self::Object(object) => object.size(),
            Self::Hub(_) => None,
        }
    }

    async fn open(&self) -> Result<Opened, DataError> {
        match self {
            Self::Object(object) => object.open().await,
            Self::Hub(file) => file.open().await,
        }
    }
}

/// Reads a source onto the rows of those before it. Also returns the digest of its content, or of its rows in the
/// offset ranges.
pub(crate) async fn read(
    source: &Source,
    index: usize,
    mut builder: Builder,
    context: Context<'_>,
) -> Result<(String, Builder), DataError> {
    let name = &source.name;
    builder.begin_source(index);
    let (digest, from, builder) = match (&source.uri, &source.kafka) {
        (None, Some(kafka)) => {
            let (digest, left_out) = topic::read(name, kafka, &mut builder, context.snapshots, context.report).await?;
            (digest, format!("the offset ranges of topic {}{left_out}", kafka.topic), builder)
        }
        (Some(uri), None) => {
            let (digest, builder) = read_files(source, uri, builder, context).await?;
            (digest, object::without_query(uri).to_owned(), builder)
        }
        _ => return Err(DataError::User(format!("source {name}: set exactly one of uri and kafka"))),
    };
    if builder.rows_of_source() == 0 {
        let labelled = if context.needs_labels { "labelled " } else { "" };
        let skipped = match builder.skipped().examples.first() {
            Some(mistake) => format!(" but bad ones, such as {mistake}"),
            None => String::new(),
        };
        return Err(DataError::User(format!("source {name}: no {labelled}rows in {from}{skipped}")));
    }
    Ok((digest, builder))
}

/// Rows of the files that a URI means, in the order of their names.
async fn read_files(
    source: &Source,
    uri: &str,
    mut builder: Builder,
    context: Context<'_>,
) -> Result<(String, Builder), DataError> {
    let is_pattern = is_pattern(uri);
    let inputs = if uri.starts_with("hf://") {
        context.hub.files(uri).await?.into_iter().map(Input::Hub).collect()
    } else if is_pattern {
        object::matching(uri).await?.into_iter().map(Input::Object).collect()
    } else {
        vec![Input::Object(object::Object::at(uri)?)]
    };
    // A format that nothing can be done about is said before anything is read.
    let kinds: Vec<_> =
        inputs.iter().map(|input| format::of_name(input.uri(), source.format)).collect::<Result<_, _>>()?;
    let mut position = Position {
        source: &source.name,
        is_one_file: inputs.len() == 1,
        read: 0,
        total: inputs.iter().map(Input::size).sum(),
        rows: Arc::default(),
        report: context.report,
    };
    let mut digests = Vec::with_capacity(inputs.len());
    for (input, &kind) in inputs.iter().zip(&kinds) {
        let reading = Reading::new(input.uri(), &source.columns, context.needs_labels, position.rows.clone(), builder);
        let (digest, reading) = read_file(input, kind, reading, &mut position).await?;
        builder = reading.into_builder();
        digests.push((input.uri(), digest));
    }
    let digest = match &mut digests[..] {
        // A file's digest is that of its bytes.
        [(_, digest)] if !is_pattern => std::mem::take(digest),
        digests => sha256_hex(&serde_json::to_vec(digests).map_err(|error| DataError::Other(error.to_string()))?),
    };
    Ok((digest, builder))
}

/// How far the reading of a source has come.
struct Position<'a> {
    source: &'a str,
    /// Whose size, once it is open, is that of the source.
    is_one_file: bool,
    read: u64,
    total: Option<u64>,
    rows: Arc<AtomicU64>,
    report: Report<'a>,
}

impl Position<'_> {
    fn report(&self, file: &str) {
        (self.report)(Progress::Reading {
            source: self.source,
            file,
            bytes_read: self.read,
            bytes_total: self.total,
            rows: self.rows.load(Ordering::Relaxed),
        });
    }
}

/// Streams a file into its parser, which has a thread of its own. Also returns the sha256 of the bytes as they are
/// stored.
async fn read_file(
    input: &Input,
    (format, compression): (DataFormat, Compression),
    mut reading: Reading,
    position: &mut Position<'_>,
) -> Result<(String, Reading), DataError> {
    let uri = input.uri();
    let Opened { size, mut bytes } = input.open().await?;
    if position.is_one_file {
        position.total = size;
    }
    let (sender, pipe) = pipe::pipe();
    let parsing =
        tokio::task::spawn_blocking(move || format::parse(format, compression, pipe, &mut reading).map(|()| reading));
    let mut digest = Sha256::new();
    let (mut received, mut chunk) = (0, Vec::with_capacity(CHUNK));
    // Parsers read to the end; one that ends before has found a mistake.
    let mut has_ended = false;
    while let Some(bytes) = bytes.try_next().await? {
        digest.update(&bytes);
        received += bytes.len() as u64;
        chunk.extend_from_slice(&bytes);
        if chunk.len() >= CHUNK {
            position.read += chunk.len() as u64;
            if sender.send(std::mem::replace(&mut chunk, Vec::with_capacity(CHUNK))).await.is_err() {
                has_ended = true;
                break;
            }
            position.report(uri);
        }
    }
    if !has_ended {
        if let Some(size) = size
            && received != size
        {
            return Err(DataError::Other(format!("{uri}: ended after {received} of {size} bytes")));
        }
        position.read += chunk.len() as u64;
        let _ = sender.send(chunk).await;
    }
    drop(sender);
    let reading = parsing.await.map_err(|error| {
        if error.is_panic() {
            // Only a library's reader of damaged files does that.
            DataError::User(format!("{uri}: not readable: the file is damaged"))
        } else {
            DataError::Other(format!("{uri}: the reader was stopped"))
        }
    })??;
    position.report(uri);
    Ok((hexadecimal::encode(&digest.finalize()), reading))
}

#[cfg(test)]
mod tests;
