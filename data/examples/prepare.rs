//! Prepares a file as the trainer does, and says how long it took and how much memory at most.
//!
//! ```sh
//! cargo run --release -p athanor-data --example prepare -- FILE [--rows N [--copies PERCENT]] [--clean] [--near THRESHOLD] [--json]
//! ```
//! FILE is a path or a URI. With `--rows`, the file is made first if it is not there: JSON lines of 20 to 50 characters of text, of
//! which `--copies` percent (at most 50) are another row but for its last letter. `--clean` turns on all steps but near duplicates,
//! `--near` these too. `--json` prints one object, for `make bench-data`.

use std::{
    io::{BufWriter, Write},
    path::Path,
    sync::OnceLock,
    time::Instant,
};

use athanor_contract::train::{DataSpec, SplitSpec};
use athanor_data::{Progress, mix};
use serde_json::json;

type Error = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    athanor_data::pdf::serve_if_asked();
    let (mut file, mut rows, mut copies, mut clean, mut near, mut as_json) = (None, None, 0, false, None, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--rows" => rows = Some(value()?.parse()?),
            "--copies" => copies = value()?.parse()?,
            "--clean" => clean = true,
            "--near" => near = Some(value()?),
            "--json" => as_json = true,
            _ => file = Some(argument),
        }
    }
    let file = file.ok_or("which FILE?")?;
    if let Some(rows) = rows
        && !Path::new(&file).exists()
    {
        generate(&file, rows, copies)?;
    }
    let uri = if file.contains("://") { file } else { format!("file://{}", std::path::absolute(file)?.display()) };
    let mut spec = json!({"sources": [{"name": "file", "uri": uri}]});
    if clean || near.is_some() {
        spec["clean"] = json!({
            "removeControlCharacters": true, "normalizeUnicode": true, "collapseWhitespace": true,
            "redact": ["Email", "Phone", "Secret"], "minimumLength": 3, "maximumLength": 1000,
        });
    }
    if let Some(threshold) = near {
        spec["clean"]["nearDuplicates"] = json!({"threshold": threshold});
    }
    let spec: DataSpec = serde_json::from_value(spec)?;

    let start = Instant::now();
    let seconds = || start.elapsed().as_secs_f64();
    let last_byte = OnceLock::new();
    let report = |progress: Progress<'_>| {
        if let Progress::Reading { bytes_read, bytes_total, .. } = progress
            && bytes_total == Some(bytes_read)
        {
            last_byte.get_or_init(|| (seconds(), peak_memory()));
        }
    };
    let dataset = athanor_data::read(&spec, false, &report).await?;
    let (read, peak_read) = *last_byte.get().ok_or("an empty file")?;
    let (cleaned, peak_cleaned) = (seconds(), peak_memory());
    let parts = dataset.split(&spec.split)?.counts();
    let split = seconds();
    dataset.split(&SplitSpec { stratify: true, ..spec.split })?;
    let (stratified, peak) = (seconds(), peak_memory());
    let near = dataset.clusters.as_ref().map(|clusters| {
        // A row's cluster has the number of its first row, counted before rows went.
        let mut numbers = clusters.clone();
        numbers.sort_unstable();
        numbers.dedup();
        clusters.len() - numbers.len()
    });
    let result = json!({
        "rows": dataset.rows.len(), "near": near, "parts": parts,
        "seconds": {"read": read, "clean": cleaned - read, "split": split - cleaned, "stratified": stratified - split},
        "mebibytes": {"read": peak_read, "clean": peak_cleaned, "split": peak},
    });
    if as_json {
        println!("{result}");
    } else {
        println!("{result:#}");
    }
    Ok(())
}

/// VmHWM: the most memory that this process has had at once, in MiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default() / 1024
}

fn generate(file: &str, rows: u64, copies: u64) -> std::io::Result<()> {
    let mut writer = BufWriter::new(std::fs::File::create(file)?);
    for row in 0..rows {
        let mut text = sentence(row);
        if row % 100 >= 100 - copies {
            text = sentence(row - copies);
            text.pop();
            text.push('Z');
        }
        writeln!(writer, "{{\"text\": \"{text}\", \"label\": \"class {}\"}}", row % 7)?;
    }
    writer.flush()
}

/// Words of a vocabulary of 4,096, each of two to nine letters, to a length of 20 to 50 characters.
fn sentence(row: u64) -> String {
    let mut state = row;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(state)
    };
    let length = 20 + (next() % 31) as usize;
    let mut text = String::new();
    while text.len() < length {
        let word = mix(next() % 4096);
        text.extend((0..2 + word % 8).map(|letter| char::from(b'a' + (mix(word ^ letter) % 26) as u8)));
        text.push(' ');
    }
    text.truncate(length);
    // Not a space, which cleaning takes away.
    text.pop();
    text.push(char::from(b'a' + (next() % 26) as u8));
    text
}
