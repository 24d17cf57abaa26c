//! Files of any size to and from a store, in pieces: memory does not grow with the file. Digests are computed on the
//! way.
//!
//! A process that is killed during an upload may leave parts in the store, which nothing shows and a lifecycle rule of
//! the bucket removes (AbortIncompleteMultipartUpload); an upload that fails removes its own. A plain HTTP server takes
//! no parts: a file that goes to one is held in memory.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use athanor_contract::{artifact::FileEntry, hexadecimal};
use bytes::Bytes;
use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use object_store::{GetResult, GetResultPayload, ObjectStoreExt, PutPayload, WriteMultipart};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::{Location, StoreError};

/// Bytes of one part of an upload, unless the file needs larger ones to have at most [`MOST_PARTS`].
const PART: u64 = 8 << 20;
/// S3 takes at most 10,000 parts.
const MOST_PARTS: u64 = 9_000;
/// Chunks of a download that wait for the disk.
const CHUNKS: usize = 16;
/// Bytes of a file that are read at a time.
const BLOCK: usize = 1 << 20;

/// Size and sha256 of what passes through.
#[derive(Default)]
struct Measure {
    hasher: Sha256,
    bytes: u64,
}

impl Measure {
    fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn finish(self) -> FileEntry {
        let sha256 = hexadecimal::encode(&self.hasher.finalize());
        FileEntry { sha256, bytes: self.bytes }
    }
}

/// Size and sha256 of a local file.
pub async fn measure_file(path: PathBuf) -> Result<FileEntry, StoreError> {
    blocking(move || {
        let failed = |error| StoreError::io(&path, error);
        let mut file = File::open(&path).map_err(failed)?;
        let (mut measure, mut buffer) = (Measure::default(), vec![0; BLOCK]);
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => return Ok(measure.finish()),
                read => measure.update(&buffer[..read]),
            }
        }
    })
    .await
}

impl Location {
    /// Sends the local file `from`, whose size and digest are `expected`, and returns the object's ETag if the store
    /// has one. The object appears complete or not at all.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the file is no longer as expected; nothing is written then.
    pub async fn send_file(&self, from: &Path, expected: &FileEntry) -> Result<Option<String>, StoreError> {
        if expected.bytes <= PART || self.uri.starts_with("http") {
            let path = from.to_owned();
            let bytes = blocking(move || std::fs::read(&path).map_err(|error| StoreError::io(&path, error))).await?;
            let mut measure = Measure::default();
            measure.update(&bytes);
            unchanged(from, measure, expected)?;
            let put = self.store.put(&self.path, PutPayload::from(bytes)).await;
            return Ok(put.map_err(|error| self.error(error))?.e_tag);
        }
        let upload = self.store.put_multipart(&self.path).await.map_err(|error| self.error(error))?;
        let size = part_size(expected.bytes);
        let mut parts = WriteMultipart::new_with_chunk_size(upload, size);
        match self.send_parts(from, expected, size, &mut parts).await {
            Ok(()) => Ok(parts.finish().await.map_err(|error| self.error(error))?.e_tag),
            Err(error) => {
                if let Err(abort) = parts.abort().await {
                    tracing::warn!(uri = self.uri, error = %abort, "parts of a failed upload remain in the store");
                }
                Err(error)
            }
        }
    }

    /// One part travels while the next one is read.
    async fn send_parts(
        &self,
        from: &Path,
        expected: &FileEntry,
        size: usize,
        parts: &mut WriteMultipart,
    ) -> Result<(), StoreError> {
        let (mut measure, mut file) = (Measure::default(), None::<File>);
        loop {
            let path = from.to_owned();
            let (read, bytes) = blocking(move || {
                let failed = |error| StoreError::io(&path, error);
                let mut opened = match file {
                    Some(file) => file,
                    None => File::open(&path).map_err(failed)?,
                };
                let mut bytes = Vec::with_capacity(size);
                Read::by_ref(&mut opened).take(size as u64).read_to_end(&mut bytes).map_err(failed)?;
                measure.update(&bytes);
                Ok(((opened, measure), bytes))
            })
            .await?;
            (file, measure) = (Some(read.0), read.1);
            if bytes.is_empty() {
                return unchanged(from, measure, expected);
            }
            parts.wait_for_capacity(1).await.map_err(|error| self.error(error))?;
            parts.put(Bytes::from(bytes));
        }
    }

    /// Fetches the object into the local file `to`, whose folder is created. `to` appears when the object has arrived
    /// and is `expected` (if given); until then its bytes are in a file of the same name with `.part` behind it.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if size or digest differ from `expected`.
    pub async fn fetch_file(&self, to: &Path, expected: Option<&FileEntry>) -> Result<FileEntry, StoreError> {
        let object = self.store.get(&self.path).await.map_err(|error| self.error(error))?;
        let size = object.meta.size;
        let mut part = to.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let (sender, receiver) = mpsc::channel(CHUNKS);
        let writer = {
            let part = part.clone();
            tokio::task::spawn_blocking(move || write_chunks(receiver, &part))
        };
        let received = async {
            let mut chunks = self.chunks(object);
            while let Some(chunk) = chunks.try_next().await? {
                if sender.send(chunk).await.is_err() {
                    // The writer has failed, and says below why.
                    break;
                }
            }
            Ok(())
        }
        .await;
        drop(sender);
        let written = joined(writer.await);
        let (to, uri, expected) = (to.to_owned(), self.uri.clone(), expected.cloned());
        blocking(move || {
            let found = received.and(written).and_then(|found| checked(found, size, expected, &uri));
            match found {
                Ok(found) => {
                    std::fs::rename(&part, &to).map_err(|error| StoreError::io(&to, error))?;
                    Ok(found)
                }
                Err(error) => {
                    // It may not exist: the folder could not be created.
                    let _ = std::fs::remove_file(&part);
                    Err(error)
                }
            }
        })
        .await
    }

    /// Size and sha256 of the object.
    pub async fn measure(&self) -> Result<FileEntry, StoreError> {
        let object = self.store.get(&self.path).await.map_err(|error| self.error(error))?;
        let (mut chunks, mut measure) = (self.chunks(object), Measure::default());
        while let Some(chunk) = chunks.try_next().await? {
            measure.update(&chunk);
        }
        Ok(measure.finish())
    }

    fn chunks(&self, object: GetResult) -> BoxStream<'_, Result<Bytes, StoreError>> {
        match object.payload {
            // The stream that object_store makes of a file has chunks of 8 KiB, each of them read on another thread.
            GetResultPayload::File(file, path) => {
                let next = |(mut file, path): (File, PathBuf)| {
                    blocking(move || {
                        let block = read_block(&mut file, &path)?;
                        Ok((!block.is_empty()).then_some((block, (file, path))))
                    })
                };
                stream::try_unfold((file, path), next).boxed()
            }
            GetResultPayload::Stream(stream) => stream.map_err(|error| self.error(error)).boxed(),
        }
    }
}

/// The next block of a file; empty at its end.
fn read_block(file: &mut File, path: &Path) -> Result<Bytes, StoreError> {
    let mut block = Vec::with_capacity(BLOCK);
    file.take(BLOCK as u64).read_to_end(&mut block).map_err(|error| StoreError::io(path, error))?;
    Ok(block.into())
}

/// Whole MiB, so that every store takes them: at least [`PART`], and few enough parts for S3.
fn part_size(bytes: u64) -> usize {
    let least = bytes.div_ceil(MOST_PARTS).next_multiple_of(1 << 20);
    usize::try_from(least.max(PART)).unwrap_or(usize::MAX)
}

fn unchanged(path: &Path, measure: Measure, expected: &FileEntry) -> Result<(), StoreError> {
    if measure.finish() == *expected {
        return Ok(());
    }
    Err(StoreError::io(path, std::io::Error::other("the file changed during its upload")))
}

fn checked(found: FileEntry, size: u64, expected: Option<FileEntry>, uri: &str) -> Result<FileEntry, StoreError> {
    let message = match expected {
        Some(expected) if found != expected => format!(
            "{} bytes with sha256 {}, the manifest says {} bytes with {}",
            found.bytes, found.sha256, expected.bytes, expected.sha256
        ),
        None if found.bytes != size => format!("{} bytes of {size} arrived", found.bytes),
        _ => return Ok(found),
    };
    Err(StoreError::Invalid { uri: uri.to_owned(), message })
}

fn write_chunks(mut chunks: mpsc::Receiver<Bytes>, to: &Path) -> Result<FileEntry, StoreError> {
    let failed = |error| StoreError::io(to, error);
    let parent = to.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|error| StoreError::io(parent, error))?;
    let mut file = File::create(to).map_err(failed)?;
    let mut measure = Measure::default();
    while let Some(chunk) = chunks.blocking_recv() {
        measure.update(&chunk);
        file.write_all(&chunk).map_err(failed)?;
    }
    Ok(measure.finish())
}

fn joined<T>(result: Result<T, tokio::task::JoinError>) -> T {
    match result {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    joined(tokio::task::spawn_blocking(work).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_few_enough_parts() {
        for (bytes, part) in [(1, 8 << 20), (1 << 30, 8 << 20), (70 << 30, 8 << 20), (200 << 30, 23 << 20)] {
            assert_eq!(part_size(bytes), part, "{bytes}");
            assert!(bytes.div_ceil(part as u64) <= 10_000);
        }
    }
}
