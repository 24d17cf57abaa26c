//! Prepares a file as the trainer does, and says how long it took and how much memory at most.
//!
//! ```sh
//! cargo run --release -p athanor-data --example prepare -- FILE [ROWS]
//! ```
//! FILE is a path or a URI. With ROWS, the file is made first if it is not there: JSON lines of about 50 characters of text.

use std::{
    io::{BufWriter, Write},
    path::Path,
    time::Instant,
};

use athanor_contract::train::{DataSpec, SplitSpec};
use athanor_data::Progress;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let file = arguments.next().ok_or("usage: prepare FILE [ROWS]")?;
    if let Some(rows) = arguments.next()
        && !Path::new(&file).exists()
    {
        generate(&file, rows.parse()?)?;
    }
    let uri = if file.contains("://") { file } else { format!("file://{}", std::path::absolute(file)?.display()) };
    let spec: DataSpec = serde_json::from_value(serde_json::json!({"sources": [{"name": "file", "uri": uri}]}))?;
    let start = Instant::now();
    let report = |progress: Progress<'_>| {
        if progress.bytes_total == Some(progress.bytes_read) {
            println!("{}: {} bytes, {} rows read", progress.file, progress.bytes_read, progress.rows);
        }
    };
    let dataset = athanor_data::read(&spec, false, &report).await?;
    let read = start.elapsed().as_secs_f64();
    let after_reading = peak_memory();
    let parts = dataset.split(&spec.split)?.counts();
    let split = start.elapsed().as_secs_f64() - read;
    let stratified = dataset.split(&SplitSpec { stratify: true, ..spec.split })?.counts();
    let rows = dataset.rows.len();
    println!("rows            {rows} ({} labels)", dataset.rows.label_names().len());
    println!("read            {read:.2} s, {:.0} rows/s", rows as f64 / read);
    println!("split           {split:.2} s: {parts:?}");
    println!("stratified      {:.2} s: {stratified:?}", start.elapsed().as_secs_f64() - read - split);
    println!("peak memory     {after_reading} after reading, {} after splitting", peak_memory());
    Ok(())
}

/// VmHWM: the most memory that this process has had at once.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or_else(|| "unknown".into(), |value| value.trim().to_owned())
}

fn generate(file: &str, rows: u64) -> std::io::Result<()> {
    let mut writer = BufWriter::new(std::fs::File::create(file)?);
    for row in 0..rows {
        // Digits and letters that differ, so that no two rows are equal.
        let text = format!("row {row:08} says something about {:016x} ok", row.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        writeln!(writer, "{{\"text\": \"{text}\", \"label\": \"class {}\"}}", row % 7)?;
    }
    writer.flush()
}
