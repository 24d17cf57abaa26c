//! A decoder of one layer with random weights of floating-point numbers, next to the same computed number by number. Sequences have one
//! token, which attends to itself alone. Values are BF16 in the cache, which is most of the difference with FP32.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

// None is a multiple of 16, so that tiles have outputs without weights.
pub(crate) const HIDDEN: usize = 40;
pub(crate) const INNER: usize = 56;
pub(crate) const HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = 12;
pub(crate) const VOCABULARY: usize = 70;

pub(crate) fn instruction_sets() -> Vec<InstructionSet> {
    let best = InstructionSet::best().expect("the tests need AVX2");
    let all = [InstructionSet::Avx2, InstructionSet::Avx512, InstructionSet::Avx512Bf16];
    all.into_iter().filter(|set| *set <= best).collect()
}

/// A matrix, row by row, and the same packed.
struct Pair {
    rows: Vec<Vec<f32>>,
    packed: Matrix,
}

/// `place`: row of the packed matrix, which has `outputs` rows, for each of the `count` rows.
fn pair(
    random: &mut StdRng,
    format: Format,
    (count, outputs, inputs): (usize, usize, usize),
    place: impl Fn(usize) -> usize,
) -> Pair {
    let most = (3.0 / inputs as f32).sqrt();
    let mut row = || (0..inputs).map(|_| (random.random::<f32>() * 2.0 - 1.0) * most).collect::<Vec<f32>>();
    let rows: Vec<Vec<f32>> = (0..count).map(|_| row()).collect();
    let mut packed = Matrix::zeros(&[(outputs, format)], inputs).unwrap();
    for (index, row) in rows.iter().enumerate() {
        packed.set_row(place(index), row).unwrap();
    }
    Pair { rows, packed }
}

pub(crate) fn config(threads: usize) -> Config {
    Config {
        hidden: HIDDEN,
        intermediate: INNER,
        heads: HEADS,
        key_value_heads: 1,
        head_dim: HEAD_DIM,
        vocabulary: VOCABULARY,
        max_length: 32,
        blocks: VOCABULARY,
        threads,
        rms_norm_eps: 1e-5,
        frequencies: vec![0.5; HEAD_DIM / 2],
        norm: vec![1.0; HIDDEN],
    }
}

pub(crate) fn layer(qkv: Matrix, output: Matrix, gate_up: Matrix, down: Matrix) -> Layer {
    let (input_norm, post_attention_norm) = (vec![1.0; HIDDEN], vec![1.0; HIDDEN]);
    Layer { qkv, output, gate_up, down, input_norm, post_attention_norm, head_norms: None, window: None }
}

fn product(rows: &[Vec<f32>], x: &[f32]) -> Vec<f32> {
    rows.iter().map(|row| std::iter::zip(row, x).map(|(a, b)| a * b).sum()).collect()
}

fn normalised(x: &[f32]) -> Vec<f32> {
    let mean = x.iter().map(|value| value * value).sum::<f32>() / x.len() as f32;
    x.iter().map(|value| value / (mean + 1e-5).sqrt()).collect()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

#[test]
fn floating_point_decoders_compute_what_their_weights_say() {
    for set in instruction_sets() {
        for (format, tolerance) in [(Format::FP32, 0.01), (Format::BF16, 0.03)] {
            for threads in [1, 2] {
                compare(set, format, threads, tolerance);
            }
        }
    }
}

fn compare(set: InstructionSet, format: Format, threads: usize, tolerance: f32) {
    let random = &mut StdRng::seed_from_u64(5);
    let queries = HEADS * HEAD_DIM;
    let place = |row: usize| row % INNER / 16 * 32 + row / INNER * 16 + row % INNER % 16;
    let qkv = pair(random, format, (queries + 2 * HEAD_DIM, queries + 2 * HEAD_DIM, HIDDEN), |row| row);
    let output = pair(random, format, (HIDDEN, HIDDEN, queries), |row| row);
    let gate_up = pair(random, format, (2 * INNER, 2 * INNER.next_multiple_of(16), HIDDEN), place);
    let down = pair(random, format, (HIDDEN, HIDDEN, INNER), |row| row);
    let table = pair(random, format, (VOCABULARY, VOCABULARY, HIDDEN), |row| row);
    let expected = |token: usize| {
        let mut x = table.rows[token].clone();
        let values = product(&qkv.rows[queries + HEAD_DIM..], &normalised(&x));
        add(&mut x, &product(&output.rows, &values.repeat(HEADS)));
        let (gate, up) = gate_up.rows.split_at(INNER);
        let inner = normalised(&x);
        let inner: Vec<f32> = std::iter::zip(product(gate, &inner), product(up, &inner))
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        add(&mut x, &product(&down.rows, &inner));
        product(&table.rows, &normalised(&x))
    };
    let expected: Vec<Vec<f32>> = (0..VOCABULARY).map(expected).collect();
    let layer = layer(qkv.packed, output.packed, gate_up.packed, down.packed);
    let mut decoder = Decoder::new(set, config(threads), vec![layer], table.packed, None).unwrap();
    let mut alone = Vec::new();
    // Numbers of rows below, at and above those of a product, and of a part of gates.
    for count in [1, 3, 8, 9, VOCABULARY] {
        let ids: Vec<[u32; 1]> = (0..count as u32).map(|id| [id]).collect();
        let rows: Vec<Row<'_>> =
            ids.iter().map(|id| Row { tokens: id, start: 0, blocks: id, logits: 1, adapter: None }).collect();
        let mut logits = Vec::new();
        decoder.step(&rows, &mut logits).unwrap();
        for (found, expected) in logits.chunks_exact(VOCABULARY).zip(&expected) {
            let largest = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let far = (found - expected).abs() / largest;
                assert!(far < tolerance, "{set:?} {format:?}, {threads} threads, {count} rows: {far}");
            }
        }
        alone.push(logits[..VOCABULARY].to_vec());
    }
    assert!(alone.iter().all(|row| *row == alone[0]), "{set:?} {format:?}: a row depends on its batch");
}

#[test]
fn whole_and_floating_point_numbers_do_not_mix() {
    let build = |formats: [Format; 5]| {
        let zeros =
            |index: usize, outputs: usize, inputs: usize| Matrix::zeros(&[(outputs, formats[index])], inputs).unwrap();
        let queries = HEADS * HEAD_DIM;
        let layer = layer(
            zeros(0, queries + 2 * HEAD_DIM, HIDDEN),
            zeros(1, HIDDEN, queries),
            zeros(2, 2 * INNER.next_multiple_of(16), HIDDEN),
            zeros(3, HIDDEN, INNER),
        );
        Decoder::new(InstructionSet::Avx2, config(1), vec![layer], zeros(4, VOCABULARY, HIDDEN), None).map(|_| ())
    };
    let (int8, int4, bf16, fp32) = (Format::Int8, Format::Int4, Format::BF16, Format::FP32);
    for formats in [[bf16; 5], [fp32; 5], [int4, int4, int4, int8, int8]] {
        build(formats).unwrap();
    }
    for (formats, part) in [
        ([bf16, bf16, bf16, bf16, int8], "qkv: BF16 next to embeddings of whole numbers"),
        ([bf16, bf16, int8, bf16, bf16], "gate_up: whole numbers next to embeddings of BF16"),
        ([fp32, fp32, fp32, bf16, fp32], "down: BF16 next to embeddings of FP32"),
    ] {
        let error = build(formats).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
