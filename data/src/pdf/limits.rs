//! What a document may take of memory and processor time.

use std::{fs, io};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Memory for a document of any size, and as a multiple of its bytes. A document of text takes some times its size.
const MEMORY: u64 = 512 << 20;
const TIMES_SIZE: u64 = 4;
/// Seconds of processor time for a document of any size, and for each MiB of it. A page takes milliseconds. A test
/// waits for the end of a document that never ends.
const SECONDS: u64 = if cfg!(test) { 10 } else { 60 };
const SECONDS_A_MIB: u64 = 4;
/// Address space as a multiple of the memory. The reader takes an allocation that fails for the end of a damaged stream
/// and would give a part of the text for the whole: the memory that a document has taken says so (`Bounds::exceeded`),
/// and to reach this bound it must have taken more than it may.
const SPACE: u64 = 3;
/// Units of processor time in `/proc`.
const TICKS_A_SECOND: u64 = 100;

/// Bytes of memory that a document of this size may take.
pub(super) fn memory(size: usize) -> u64 {
    MEMORY + TIMES_SIZE * size as u64
}

/// Seconds of processor time that a document of this size may take.
pub(super) fn seconds(size: usize) -> u64 {
    SECONDS + SECONDS_A_MIB * (size as u64 >> 20)
}

/// The bounds of one document in this process.
pub(super) struct Bounds {
    memory: u64,
    /// Bytes that the process had before.
    before: u64,
}

impl Bounds {
    /// Sets the bounds of this process for a document of `size` bytes, from what it has taken so far.
    pub fn set(size: usize) -> io::Result<Self> {
        let memory = memory(size);
        // The highest use of memory is counted anew; where that is refused, the count includes earlier documents.
        let _ = fs::write("/proc/self/clear_refs", "5");
        lower(Resource::As, status("VmSize:")? + SPACE * memory)?;
        lower(Resource::Cpu, processor_seconds()? + seconds(size))?;
        Ok(Self { memory, before: status("VmRSS:")? })
    }

    /// Whether the document has taken more memory than it may.
    pub fn exceeded(&self) -> io::Result<bool> {
        Ok(status("VmHWM:")?.saturating_sub(self.before) > self.memory)
    }
}

/// No core dumps, and the first to go where the machine has no memory left.
pub(super) fn be_expendable() -> io::Result<()> {
    lower(Resource::Core, 0)?;
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    Ok(())
}

/// Sets a soft limit; the hard one stays, so that the next document can have its own.
fn lower(resource: Resource, limit: u64) -> io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(resource);
    let current = Some(maximum.map_or(limit, |maximum| maximum.min(limit)));
    Ok(setrlimit(resource, Rlimit { current, maximum })?)
}

/// A number of `/proc/self/status`, in bytes.
fn status(name: &str) -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other(format!("/proc/self/status has no {name}")))
}

/// Processor time of this process so far, rounded up.
fn processor_seconds() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/stat")?;
    // The name of the program may have spaces; user and system time are the 12th and 13th field behind it.
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    let ticks: Option<u64> = fields.skip(11).take(2).map(|field| field.parse::<u64>().ok()).sum();
    ticks.map(|ticks| ticks.div_ceil(TICKS_A_SECOND)).ok_or_else(|| io::Error::other("/proc/self/stat is unknown"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_process_has_taken_is_known() {
        assert!(status("VmHWM:").unwrap() >= 1 << 20);
        assert!(status("VmSize:").unwrap() >= status("VmRSS:").unwrap());
        assert!(processor_seconds().unwrap() < 100_000);
        assert!(status("Nothing:").is_err());
        assert_eq!((memory(1 << 20), seconds(3 << 20)), (516 << 20, SECONDS + 12));
    }
}
