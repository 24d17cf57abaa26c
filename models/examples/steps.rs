//! Times steps of a packed decoder without a server: milliseconds of a step of some sequences, each with some tokens in the cache, and
//! tokens a second of long prompts. For work on the kernels.
//!
//! `cargo run --release -p athanor-models --example steps MODEL [THREADS]`: MODEL is a folder or a GGUF file.

use std::{path::PathBuf, time::Instant};

use athanor_cpu::{Decoder, InstructionSet, Row};
use athanor_models::packed::{self, Bits, PackOptions};

/// Tokens of each sequence before its timed steps, and timed steps.
const BEFORE: usize = 100;
const STEPS: usize = 40;
const PROMPTS: [usize; 2] = [512, 2048];
const SEQUENCES: [usize; 3] = [1, 4, 16];

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = PathBuf::from(arguments.next().ok_or_else(|| anyhow::anyhow!("name a model"))?);
    let threads = arguments.next().map_or(Ok(2), |count| count.parse())?;
    let instruction_set = InstructionSet::best().ok_or_else(|| anyhow::anyhow!("this CPU has no AVX2"))?;
    for bits in [Bits::Sixteen, Bits::Eight, Bits::Four] {
        let options = PackOptions {
            bits,
            max_length: Some(4096),
            cache_memory: 1 << 30,
            sequences: 64,
            threads,
            instruction_set,
        };
        let mut decoder = packed::load(&model, &options)?;
        for sequences in SEQUENCES {
            let times = steps(&mut decoder, sequences)?;
            let (best, median) = (times[0], times[times.len() / 2]);
            println!("{bits:?}, {sequences} sequences: best {best:.2} ms, median {median:.2} ms");
        }
        for length in PROMPTS {
            let seconds = (0..3).map(|turn| prompt(&mut decoder, length, turn)).collect::<anyhow::Result<Vec<_>>>()?;
            let best = seconds.into_iter().fold(f64::INFINITY, f64::min);
            println!("{bits:?}, prompt of {length}: best {:.0} tokens/s", length as f64 / best);
        }
    }
    Ok(())
}

fn token(decoder: &Decoder, index: usize) -> u32 {
    (index * 7919 % decoder.config().vocabulary) as u32
}

/// Blocks of the cache for sequence `index`, which has up to `length` tokens.
fn blocks(index: usize, length: usize) -> Vec<u32> {
    let count = length.div_ceil(Decoder::BLOCK);
    (index * count..(index + 1) * count).map(|block| block as u32).collect()
}

/// Milliseconds of steps of one token of each sequence, in ascending order.
fn steps(decoder: &mut Decoder, sequences: usize) -> anyhow::Result<Vec<f64>> {
    let tables: Vec<Vec<u32>> = (0..sequences).map(|index| blocks(index, BEFORE + STEPS)).collect();
    let mut logits = Vec::new();
    for table in &tables {
        let tokens: Vec<u32> = (0..BEFORE).map(|place| token(decoder, place)).collect();
        decoder.step(&[Row { tokens: &tokens, start: 0, blocks: table, logits: 0, adapter: None }], &mut logits)?;
    }
    let mut times = Vec::with_capacity(STEPS);
    for start in BEFORE..BEFORE + STEPS {
        let tokens: Vec<[u32; 1]> = (0..sequences).map(|index| [token(decoder, start * 31 + index)]).collect();
        let rows: Vec<Row<'_>> = std::iter::zip(&tokens, &tables)
            .map(|(tokens, blocks)| Row { tokens, start, blocks, logits: 1, adapter: None })
            .collect();
        let began = Instant::now();
        decoder.step(&rows, &mut logits)?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Seconds of a prompt, 512 tokens a step.
fn prompt(decoder: &mut Decoder, length: usize, turn: usize) -> anyhow::Result<f64> {
    let table = blocks(0, length);
    let tokens: Vec<u32> = (0..length).map(|place| token(decoder, place + turn * 13)).collect();
    let mut logits = Vec::new();
    let began = Instant::now();
    for (index, part) in tokens.chunks(512).enumerate() {
        let last = usize::from((index + 1) * 512 >= length);
        decoder.step(
            &[Row { tokens: part, start: index * 512, blocks: &table, logits: last, adapter: None }],
            &mut logits,
        )?;
    }
    Ok(began.elapsed().as_secs_f64())
}
