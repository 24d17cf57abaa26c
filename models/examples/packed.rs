//! Speed of a packed decoder: `cargo run --release --example packed -- MODEL BITS THREADS`.
use std::{path::Path, time::Instant};

use athanor_cpu::{InstructionSet, Row};
use athanor_models::packed::{Bits, PackOptions, load};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let bits = if args[2] == "4" { Bits::Four } else { Bits::Eight };
    let set = if std::env::var("AVX2").is_ok() { InstructionSet::Avx2 } else { InstructionSet::best().unwrap() };
    let options = PackOptions { bits, max_length: Some(4096), cache_memory: 1 << 30, sequences: 32, threads: args[3].parse().unwrap(), instruction_set: set };
    let begin = Instant::now();
    let mut decoder = load(Path::new(&args[1]), &options).unwrap();
    println!("loaded in {:?}", begin.elapsed());
    let mut logits = Vec::new();
    let per = 2048 / 16 + 1;
    for streams in [1, 4, 16] {
        let tables: Vec<Vec<u32>> = (0..streams).map(|s| (s * per..(s + 1) * per).collect()).collect();
        let mut best = f64::MAX;
        for turn in 0..40 {
            let tokens: Vec<[u32; 1]> = (0..streams).map(|s| [100 + s + turn]).collect();
            let rows: Vec<Row> = (0..streams as usize).map(|s| Row { tokens: &tokens[s], start: turn as usize, blocks: &tables[s], wants_logits: true }).collect();
            let begin = Instant::now();
            decoder.step(&rows, &mut logits).unwrap();
            best = best.min(begin.elapsed().as_secs_f64());
        }
        println!("{streams} streams: {:.1} tokens/s best", streams as f64 / best);
    }
    for length in [128_usize, 512, 2048] {
        let tokens: Vec<u32> = (0..length as u32).map(|i| i * 7 % 10000).collect();
        let blocks: Vec<u32> = (0..per).collect();
        for _ in 0..2 {
            let begin = Instant::now();
            for (chunk, start) in tokens.chunks(512).zip((0..).step_by(512)) {
                decoder.step(&[Row { tokens: chunk, start, blocks: &blocks, wants_logits: true }], &mut logits).unwrap();
            }
            println!("prefill {length}: {:.1} tokens/s", length as f64 / begin.elapsed().as_secs_f64());
        }
    }
}
