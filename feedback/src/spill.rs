//! Events on disk while Kafka is away: segment files of checked JSON lines, appended with one fsync for a group.
//!
//! A line is `{first 16 hexadecimal digits of the JSON's sha256} {JSON of the event}`. A segment is deleted by its reader once all
//! of its events are acknowledged. All functions block on the disk; callers run them off the async threads.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use athanor_contract::{artifact::sha256_hex, event::Event};

/// A segment this long is closed and the next one begun.
const SEGMENT_BYTES: u64 = 8 << 20;
const SUFFIX: &str = ".jsonl";

#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is used by another process", path = path.display())]
    Busy { path: PathBuf },
    #[error("{path} holds {bytes} bytes already, the most allowed", path = path.display())]
    Full { path: PathBuf, bytes: u64 },
    #[error("event {id:?} cannot be written as JSON: {message}")]
    Encode { id: String, message: String },
}

/// A folder of segments, owned by one process at a time.
#[derive(Debug)]
pub struct Spill {
    dir: PathBuf,
    max_bytes: u64,
    /// Holds the advisory lock for as long as this value lives.
    _lock: File,
    open: Option<OpenSegment>,
    /// Closed segments by number, with their size in bytes.
    closed: BTreeMap<u64, u64>,
    next: u64,
}

#[derive(Debug)]
struct OpenSegment {
    number: u64,
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// A closed segment's content.
#[derive(Debug, PartialEq)]
pub struct Segment {
    pub number: u64,
    pub events: Vec<Event>,
    /// Lines before the last that do not match their checksum.
    pub damaged_lines: Vec<usize>,
    /// Whether the last line was cut off by a crash; it was never acknowledged.
    pub torn: bool,
}

impl Spill {
    /// Opens or creates the folder; the segments a former process left count as closed.
    pub fn open(dir: &Path, max_bytes: u64) -> Result<Self, SpillError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| SpillError::Io { path, source }
        };
        fs::create_dir_all(dir).map_err(at(dir))?;
        let lock_path = dir.join("lock");
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path).map_err(at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(SpillError::Busy { path: dir.to_owned() }),
            Err(fs::TryLockError::Error(source)) => return Err(SpillError::Io { path: lock_path, source }),
        }
        let mut closed = BTreeMap::new();
        let mut next = 0;
        for entry in fs::read_dir(dir).map_err(at(dir))? {
            let entry = entry.map_err(at(dir))?;
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(segment_number) else { continue };
            let bytes = entry.metadata().map_err(at(&entry.path()))?.len();
            next = next.max(number + 1);
            closed.insert(number, bytes);
        }
        Ok(Self { dir: dir.to_owned(), max_bytes, _lock: lock, open: None, closed, next })
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.closed.values().sum::<u64>() + self.open.as_ref().map_or(0, |open| open.bytes)
    }

    /// Whether nothing waits to be replayed.
    pub fn is_empty(&self) -> bool {
        self.bytes() == 0 && self.closed.is_empty()
    }

    /// Appends events and returns after fsync: from here on they survive a crash. On an error none of them counts as written.
    pub fn append<'a>(&mut self, events: impl IntoIterator<Item = &'a Event>) -> Result<(), SpillError> {
        let mut lines = Vec::new();
        for event in events {
            let json = serde_json::to_string(event)
                .map_err(|error| SpillError::Encode { id: event.id.clone(), message: error.to_string() })?;
            lines.extend_from_slice(checksum(json.as_bytes()).as_bytes());
            lines.push(b' ');
            lines.extend_from_slice(json.as_bytes());
            lines.push(b'\n');
        }
        let bytes = self.bytes();
        if bytes + lines.len() as u64 > self.max_bytes {
            return Err(SpillError::Full { path: self.dir.clone(), bytes });
        }
        if self.open.as_ref().is_some_and(|open| open.bytes >= SEGMENT_BYTES) {
            self.rotate();
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.create()?,
        };
        let written = open.file.write_all(&lines).and_then(|()| open.file.sync_data());
        match written {
            Ok(()) => {
                open.bytes += lines.len() as u64;
                self.open = Some(open);
                Ok(())
            }
            Err(source) => {
                // What was half written must not precede later lines: cut it off, and begin a new segment in any case.
                let kept =
                    open.file.set_len(open.bytes).map(|()| open.bytes).unwrap_or(open.bytes + lines.len() as u64);
                self.closed.insert(open.number, kept);
                Err(SpillError::Io { path: open.path, source })
            }
        }
    }

    /// Closes the segment that is being written, so that it can be replayed.
    pub fn rotate(&mut self) {
        if let Some(open) = self.open.take() {
            self.closed.insert(open.number, open.bytes);
        }
    }

    /// Numbers of the closed segments, oldest first.
    pub fn closed(&self) -> Vec<u64> {
        self.closed.keys().copied().collect()
    }

    /// Path of a segment, for [`read_segment`].
    pub fn path(&self, number: u64) -> PathBuf {
        segment_path(&self.dir, number)
    }

    /// Removes a closed segment whose events are all acknowledged. One with damaged lines is kept under another name, for a person.
    pub fn remove(&mut self, segment: &Segment) -> Result<(), SpillError> {
        let path = self.path(segment.number);
        let removed = if segment.damaged_lines.is_empty() {
            fs::remove_file(&path)
        } else {
            fs::rename(&path, path.with_extension("damaged"))
        };
        removed.map_err(|source| SpillError::Io { path: path.clone(), source })?;
        // From here on it is gone, whatever the folder's fsync says: at worst a crash brings it back to be sent once more.
        self.closed.remove(&segment.number);
        sync_dir(&self.dir).map_err(|source| SpillError::Io { path, source })
    }

    /// Puts a closed segment that cannot be read under another name, for a person, so that the others are replayed. A segment that
    /// cannot be renamed either is left alone until the next process.
    pub fn set_aside(&mut self, number: u64) {
        let path = self.path(number);
        if let Err(error) = fs::rename(&path, path.with_extension("unreadable")) {
            tracing::error!(%error, path = %path.display(), "a segment that cannot be read cannot be renamed");
        }
        self.closed.remove(&number);
    }

    fn create(&mut self) -> Result<OpenSegment, SpillError> {
        let number = self.next;
        let path = self.path(number);
        let opened = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = opened
            // A file whose name the folder forgets in a crash is no file: the name is made durable, too.
            .and_then(|file| sync_dir(&self.dir).map(|()| file))
            .map_err(|source| SpillError::Io { path: path.clone(), source })?;
        self.next += 1;
        Ok(OpenSegment { number, path, file, bytes: 0 })
    }
}

/// Gives the events of a folder that no process uses to `take`, a segment at a time, and removes those that were taken.
/// Returns their number.
///
/// # Errors
/// The folder cannot be used, or `take` refused a segment: that one and those after it stay.
pub async fn hand_over(dir: &Path, take: impl AsyncFn(Vec<Event>) -> Result<(), String>) -> Result<usize, String> {
    let mut spill = Spill::open(dir, u64::MAX).map_err(|error| error.to_string())?;
    let mut count = 0;
    for number in spill.closed() {
        let mut segment = match read_segment(&spill.path(number)) {
            Ok(segment) => segment,
            Err(error) => {
                tracing::error!(segment = number, %error, "a segment cannot be read and is set aside");
                spill.set_aside(number);
                continue;
            }
        };
        let events = std::mem::take(&mut segment.events);
        let taken = events.len();
        if taken > 0 {
            take(events).await?;
        }
        count += taken;
        spill.remove(&segment).map_err(|error| error.to_string())?;
    }
    Ok(count)
}

/// Reads a closed segment, checking every line.
pub fn read_segment(path: &Path) -> Result<Segment, SpillError> {
    let at = |source| SpillError::Io { path: path.to_owned(), source };
    let number = path.file_name().and_then(|name| name.to_str()).and_then(segment_number).unwrap_or_default();
    let mut reader = BufReader::new(File::open(path).map_err(at)?);
    let mut segment = Segment { number, events: Vec::new(), damaged_lines: Vec::new(), torn: false };
    let mut line = Vec::new();
    let mut row = 0;
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(at)? == 0 {
            return Ok(segment);
        }
        row += 1;
        match parse_line(&line) {
            Some(event) => segment.events.push(event),
            None if line.last() != Some(&b'\n') => segment.torn = true,
            None => segment.damaged_lines.push(row),
        }
    }
}

fn parse_line(line: &[u8]) -> Option<Event> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (sum, json) = line.split_once(' ')?;
    (checksum(json.as_bytes()) == sum).then(|| serde_json::from_str(json).ok())?
}

fn checksum(bytes: &[u8]) -> String {
    let mut text = sha256_hex(bytes);
    text.truncate(16);
    text
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("segment-{number:020}{SUFFIX}"))
}

fn segment_number(name: &str) -> Option<u64> {
    name.strip_prefix("segment-")?.strip_suffix(SUFFIX)?.parse().ok()
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use athanor_contract::event::{EventData, Feedback, Judgement};

    fn events(ids: std::ops::Range<u32>) -> Vec<Event> {
        ids.map(|id| Event {
            id: id.to_string(),
            source: "/athanor/default/reviews".into(),
            time: "2026-11-24T12:00:00Z".into(),
            trace_parent: None,
            data: EventData::Feedback(Feedback {
                request_id: format!("r-{id}"),
                index: 0,
                judgement: Judgement::ExpectedLabel("line\nbreak".into()),
                comment: None,
                caller: None,
            }),
        })
        .collect()
    }

    fn open(dir: &Path) -> Spill {
        Spill::open(dir, 1 << 20).expect("a fresh folder")
    }

    #[test]
    fn a_new_process_finds_what_the_old_one_wrote() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut spill = open(dir.path());
        assert!(matches!(Spill::open(dir.path(), 1), Err(SpillError::Busy { .. })));
        spill.append(&events(0..3)).expect("written");
        spill.rotate();
        spill.append(&events(3..5)).expect("written");
        let bytes = spill.bytes();
        drop(spill);

        let mut spill = open(dir.path());
        assert_eq!((spill.closed(), spill.bytes()), (vec![0, 1], bytes));
        let first = read_segment(&spill.path(0)).expect("readable");
        assert_eq!((first.events.clone(), first.torn), (events(0..3), false));
        spill.remove(&first).expect("removed");
        spill.append(&events(5..6)).expect("a new segment");
        spill.rotate();
        assert_eq!(spill.closed(), vec![1, 2]);
    }

    #[test]
    fn a_torn_last_line_is_skipped_and_a_damaged_one_is_named_and_kept() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut spill = open(dir.path());
        spill.append(&events(0..4)).expect("written");
        spill.rotate();
        let path = spill.path(0);
        let mut bytes = fs::read(&path).expect("readable");
        bytes.truncate(bytes.len() - 5);
        let second_line = bytes.iter().position(|byte| *byte == b'\n').expect("a line") + 30;
        bytes[second_line] ^= 1;
        fs::write(&path, &bytes).expect("writable");

        let segment = read_segment(&path).expect("readable");
        assert_eq!((segment.torn, segment.damaged_lines.as_slice()), (true, [2].as_slice()));
        assert_eq!(segment.events, [events(0..1), events(2..3)].concat());
        spill.remove(&segment).expect("renamed");
        assert!(spill.is_empty() && path.with_extension("damaged").exists() && !path.exists());
    }

    #[test]
    fn a_segment_that_cannot_be_read_is_set_aside() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut spill = open(dir.path());
        spill.append(&events(0..1)).expect("written");
        spill.rotate();
        spill.append(&events(1..2)).expect("written");
        spill.rotate();
        // Root reads every file, but no folder.
        let path = spill.path(0);
        fs::remove_file(&path).expect("removed");
        fs::create_dir(&path).expect("a folder");
        assert!(read_segment(&path).is_err());
        spill.set_aside(0);
        assert_eq!(spill.closed(), [1]);
        assert!(path.with_extension("unreadable").exists() && !path.exists());
    }

    #[tokio::test]
    async fn what_is_handed_over_is_removed_and_the_rest_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut spill = open(dir.path());
        for begin in [0, 2] {
            spill.append(&events(begin..begin + 2)).expect("written");
            spill.rotate();
        }
        let refused = hand_over(dir.path(), async |_| Ok(())).await.expect_err("the folder is in use");
        assert!(refused.contains("used by another process"), "{refused}");
        drop(spill);

        let taken = std::cell::RefCell::new(Vec::new());
        let first_only = async |events: Vec<Event>| {
            let mut taken = taken.borrow_mut();
            if taken.is_empty() {
                taken.extend(events);
                Ok(())
            } else {
                Err("no".to_owned())
            }
        };
        assert_eq!(hand_over(dir.path(), first_only).await, Err("no".to_owned()));
        assert_eq!(*taken.borrow(), events(0..2));
        let rest = async |events: Vec<Event>| {
            taken.borrow_mut().extend(events);
            Ok(())
        };
        assert_eq!(hand_over(dir.path(), rest).await, Ok(2));
        assert_eq!(*taken.borrow(), events(0..4));
        assert!(open(dir.path()).is_empty());
    }

    #[test]
    fn a_full_spill_refuses_and_keeps_what_it_has() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut spill = Spill::open(dir.path(), 600).expect("a fresh folder");
        spill.append(&events(0..1)).expect("fits");
        assert!(matches!(spill.append(&events(1..9)), Err(SpillError::Full { .. })));
        spill.rotate();
        assert_eq!(read_segment(&spill.path(0)).expect("readable").events, events(0..1));
    }
}
