//! A decoder whose own layers are zeros, so that all that happens to a token comes from its adapter, next to the same
//! computed number by number.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::{
    Decoder, Format, InstructionSet, Matrix, Row,
    decoder::tests::{HEAD_DIM, HEADS, HIDDEN, INNER, VOCABULARY, config, instruction_sets, layer},
};

const SIZES: Sizes =
    Sizes { layers: 1, hidden: HIDDEN, intermediate: INNER, queries: HEADS * HEAD_DIM, keys: HEAD_DIM };

fn uniform(random: &mut StdRng, count: usize, most: f32) -> Vec<f32> {
    (0..count).map(|_| (random.random::<f32>() * 2.0 - 1.0) * most).collect()
}

fn decoder(set: InstructionSet, threads: usize, embeddings: &[Vec<f32>]) -> Decoder {
    let zeros = |outputs: usize, inputs: usize| Matrix::zeros(&[(outputs, Format::Int8)], inputs).unwrap();
    let layer = layer(
        zeros(SIZES.queries + 2 * SIZES.keys, HIDDEN),
        zeros(HIDDEN, SIZES.queries),
        zeros(2 * INNER.next_multiple_of(16), HIDDEN),
        zeros(HIDDEN, INNER),
    );
    let mut table = zeros(VOCABULARY, HIDDEN);
    for (token, row) in embeddings.iter().enumerate() {
        table.set_row(token, row).unwrap();
    }
    Decoder::new(set, config(threads), vec![layer], table, None).unwrap()
}

fn embeddings(random: &mut StdRng) -> Vec<Vec<f32>> {
    (0..VOCABULARY).map(|_| uniform(random, HIDDEN, 1.0)).collect()
}

/// Its products are about as large as its inputs.
fn low_rank(random: &mut StdRng, rank: usize, inputs: usize, outputs: usize) -> LowRank {
    let a = uniform(random, rank * inputs, (3.0 / inputs as f32).sqrt());
    let b = uniform(random, outputs * rank, (3.0 / rank as f32).sqrt());
    LowRank { rank, a, b, scale: 0.7 }
}

fn adapter(random: &mut StdRng) -> AdapterLayer {
    let Sizes { queries, keys, .. } = SIZES;
    let mut low = |rank, inputs, outputs| Some(low_rank(random, rank, inputs, outputs));
    AdapterLayer {
        query: low(4, HIDDEN, queries),
        key: low(7, HIDDEN, keys),
        value: low(5, HIDDEN, keys),
        output: low(16, queries, HIDDEN),
        gate: low(20, HIDDEN, INNER),
        up: low(3, HIDDEN, INNER),
        down: low(17, INNER, HIDDEN),
    }
}

fn product(low: &Option<LowRank>, x: &[f32]) -> Vec<f32> {
    let low = low.as_ref().unwrap();
    let dot = |row: &[f32], x: &[f32]| std::iter::zip(row, x).map(|(a, b)| a * b).sum::<f32>();
    let inner: Vec<f32> = low.a.chunks_exact(x.len()).map(|row| dot(row, x)).collect();
    low.b.chunks_exact(low.rank).map(|row| low.scale * dot(row, &inner)).collect()
}

fn normalised(x: &[f32]) -> Vec<f32> {
    let mean = x.iter().map(|value| value * value).sum::<f32>() / x.len() as f32;
    x.iter().map(|value| value / (mean + 1e-5).sqrt()).collect()
}

fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
    std::iter::zip(a, b).map(|(a, b)| a + b).collect()
}

/// Logits of a sequence of one token, whose attention sees the token itself.
fn expected(embeddings: &[Vec<f32>], token: u32, adapter: &AdapterLayer) -> Vec<f32> {
    let x = &embeddings[token as usize];
    let value = product(&adapter.value, &normalised(x));
    let x = sum(x, &product(&adapter.output, &[value.as_slice(), &value].concat()));
    let normed = normalised(&x);
    let (gate, up) = (product(&adapter.gate, &normed), product(&adapter.up, &normed));
    let inner: Vec<f32> = std::iter::zip(gate, up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
    let x = normalised(&sum(&x, &product(&adapter.down, &inner)));
    embeddings.iter().map(|row| std::iter::zip(row, &x).map(|(a, b)| a * b).sum()).collect()
}

fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |most, value| most.max(value.abs()))
}

#[test]
fn updates_are_those_computed_number_by_number() {
    let mut random = StdRng::seed_from_u64(3);
    let embeddings = embeddings(&mut random);
    let (one, two) = (adapter(&mut random), adapter(&mut random));
    for set in instruction_sets() {
        let mut decoder = decoder(set, 2, &embeddings);
        let packed = [&one, &two].map(|layer| decoder.adapter(std::slice::from_ref(layer)).unwrap());
        let blocks: Vec<[u32; 1]> = (0..8).map(|block| [block]).collect();
        let tokens: Vec<u32> = (0..8).collect();
        let rows: Vec<Row<'_>> = (0..8)
            .map(|index| Row {
                tokens: &tokens[index..=index],
                start: 0,
                blocks: &blocks[index],
                logits: 1,
                adapter: packed.get(index % 3),
            })
            .collect();
        let mut logits = Vec::new();
        decoder.step(&rows, &mut logits).unwrap();
        for (index, found) in logits.chunks_exact(VOCABULARY).enumerate() {
            let plain = normalised(&embeddings[index]);
            let plain: Vec<f32> =
                embeddings.iter().map(|row| std::iter::zip(row, &plain).map(|(a, b)| a * b).sum()).collect();
            let adapted = [&one, &two].map(|layer| expected(&embeddings, index as u32, layer));
            let theirs = adapted.get(index % 3).unwrap_or(&plain);
            let size = largest(theirs.iter().copied());
            let far = |other: &[f32]| largest(std::iter::zip(found, other).map(|(a, b)| a - b)) / size;
            // Embeddings and what the head reads have eight bits, A and B the eight of BF16.
            assert!(far(theirs) < 0.04, "{set:?} row {index}: {}", far(theirs));
            for other in adapted.iter().chain([&plain]).filter(|other| *other != theirs) {
                assert!(far(other) > 0.1, "{set:?} row {index}: {}", far(other));
            }
        }
    }
}

/// To the last bit: with other rows, of the same adapter, another one or none, on one thread, token by token.
#[test]
fn a_row_does_not_depend_on_the_others() {
    let mut random = StdRng::seed_from_u64(4);
    let embeddings = embeddings(&mut random);
    let layers = [adapter(&mut random), adapter(&mut random)];
    let tokens: Vec<u32> = (0..30).map(|index| index * 7 % VOCABULARY as u32).collect();
    for set in instruction_sets() {
        let mut decoder = decoder(set, 2, &embeddings);
        let adapters = layers.each_ref().map(|layer| decoder.adapter(std::slice::from_ref(layer)).unwrap());
        let mut alone = Vec::new();
        for adapter in [None, Some(&adapters[0]), Some(&adapters[1])] {
            let mut logits = Vec::new();
            let row = Row { tokens: &tokens, start: 0, blocks: &[0, 1], logits: 1, adapter };
            decoder.step(&[row], &mut logits).unwrap();
            for (index, token) in tokens.iter().enumerate() {
                let mut last = Vec::new();
                let row = Row { tokens: &[*token], start: index, blocks: &[2, 3], logits: 1, adapter };
                decoder.step(&[row], &mut last).unwrap();
                assert!(index + 1 < tokens.len() || last == logits, "{set:?} token by token");
            }
            let mut one_thread = self::decoder(set, 1, &embeddings);
            let mut again = Vec::new();
            one_thread
                .step(&[Row { tokens: &tokens, start: 0, blocks: &[0, 1], logits: 1, adapter }], &mut again)
                .unwrap();
            assert_eq!(again, logits, "{set:?} on one thread");
            alone.push(logits);
        }
        assert!(alone[0] != alone[1] && alone[1] != alone[2]);
        for kinds in [[0, 1, 2, 0], [1, 1, 2, 2], [2, 1, 2, 1]] {
            let tables: Vec<[u32; 2]> = (0..4).map(|row| [row * 2, row * 2 + 1]).collect();
            let rows: Vec<Row<'_>> = std::iter::zip(&tables, kinds)
                .map(|(blocks, kind)| Row {
                    tokens: &tokens,
                    start: 0,
                    blocks,
                    logits: 1,
                    adapter: if kind == 0 { None } else { adapters.get(kind - 1) },
                })
                .collect();
            let mut logits = Vec::new();
            decoder.step(&rows, &mut logits).unwrap();
            for (found, kind) in std::iter::zip(logits.chunks_exact(VOCABULARY), kinds) {
                assert_eq!(found, alone[kind], "{set:?} {kinds:?}");
            }
        }
    }
}

type Change = fn(&mut LowRank);

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = StdRng::seed_from_u64(5);
    let good = low_rank(&mut random, 4, HIDDEN, INNER);
    let with = |change: fn(&mut LowRank)| {
        let mut low = good.clone();
        change(&mut low);
        Adapter::new(SIZES, &[AdapterLayer { up: Some(low), ..AdapterLayer::default() }])
    };
    assert!(with(|_| ()).is_ok());
    let cases: [(Change, &str); 5] = [
        (|low| low.rank = 0, "layer 0, up: the rank is 0"),
        (|low| low.a.truncate(low.a.len() - 1), "layer 0, up: A has 159 numbers instead of 4 x 40"),
        (|low| low.b.push(0.0), "layer 0, up: B has 225 numbers instead of 56 x 4"),
        (|low| low.b[3] = f32::NAN, "layer 0, up: a number is not finite"),
        (|low| low.scale = f32::INFINITY, "layer 0, up: a number is not finite"),
    ];
    for (change, part) in cases {
        assert_eq!(with(change).unwrap_err().to_string(), part);
    }
    assert!(Adapter::new(SIZES, &[]).is_err());
    let embeddings = embeddings(&mut random);
    let mut decoder = decoder(InstructionSet::Avx2, 1, &embeddings);
    let other = Adapter::new(Sizes { hidden: HIDDEN + 1, ..SIZES }, &[AdapterLayer::default()]).unwrap();
    let row = Row { tokens: &[1], start: 0, blocks: &[0], logits: 1, adapter: Some(&other) };
    assert!(decoder.step(&[row], &mut Vec::new()).unwrap_err().to_string().contains("another decoder"));
    // One that adds nothing.
    let empty = decoder.adapter(&[AdapterLayer::default()]).unwrap();
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let row = Row { tokens: &[1], start: 0, blocks: &[0], logits: 1, adapter: None };
    decoder.step(&[row], &mut without).unwrap();
    decoder.step(&[Row { adapter: Some(&empty), ..row }], &mut with).unwrap();
    assert_eq!(with, without);
}
