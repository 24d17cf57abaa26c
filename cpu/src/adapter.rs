//! Low-rank adapters (LoRA, Hu et al. 2021, <https://arxiv.org/abs/2106.09685>) of a packed decoder.
//!
//! The parts of a matrix, such as queries, keys and values, have their ranks one behind the other. A is stored in tiles of
//! 16 ranks, [inputs, 16] each. B is stored in the tiles of 16 outputs that the matrix has, [ranks, 16] each, with the ranks
//! of those parts only that the tile has outputs of. All numbers are BF16; scales are FP32.

use half::bf16;

use crate::{Error, ffi, memory::Memory};

/// Outputs, or ranks, of a tile.
const TILE: usize = 16;

/// The update of one linear layer, `scale * (x A^T) B^T`.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    pub rank: usize,
    /// A, [rank, inputs].
    pub a: Vec<f32>,
    /// B, [outputs, rank].
    pub b: Vec<f32>,
    pub scale: f32,
}

/// Updates of the linear layers of one layer; absent: none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterLayer {
    pub query: Option<LowRank>,
    pub key: Option<LowRank>,
    pub value: Option<LowRank>,
    pub output: Option<LowRank>,
    pub gate: Option<LowRank>,
    pub up: Option<LowRank>,
    pub down: Option<LowRank>,
}

/// Sizes of a decoder that an adapter depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub layers: usize,
    pub hidden: usize,
    pub intermediate: usize,
    /// Outputs of the projection to queries.
    pub queries: usize,
    /// Outputs of the projection to keys, and of that to values.
    pub keys: usize,
}

/// An adapter of one decoder.
pub struct Adapter {
    sizes: Sizes,
    /// Largest rank of a matrix.
    rank: usize,
    layers: Vec<ffi::AdapterLayer>,
    /// What `layers` points into.
    _numbers: Memory,
    _scales: Vec<f32>,
    _tiles: Vec<ffi::LowRankTile>,
}

// SAFETY: all that is pointed to is owned by this value and never written again.
unsafe impl Send for Adapter {}
// SAFETY: see above.
unsafe impl Sync for Adapter {}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("sizes", &self.sizes).field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl Adapter {
    pub(crate) fn new(sizes: Sizes, layers: &[AdapterLayer]) -> Result<Self, Error> {
        if layers.len() != sizes.layers {
            return Err(Error::Invalid(format!("{} layers instead of {}", layers.len(), sizes.layers)));
        }
        let mut pack = Packing::default();
        let mut plans = Vec::with_capacity(layers.len());
        for (index, layer) in layers.iter().enumerate() {
            let wrong = |error: Error| Error::Invalid(format!("layer {index}, {error}"));
            plans.push(pack.layer(sizes, layer).map_err(wrong)?);
        }
        let mut numbers = Memory::zeroed(pack.numbers.len() * 2, "an adapter")?;
        for (place, number) in numbers.bytes_mut().chunks_exact_mut(2).zip(&pack.numbers) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        let at = |offset: usize| numbers.as_ptr().wrapping_add(offset * 2).cast::<u16>();
        let tile = |tile: &Tile| ffi::LowRankTile { b: at(tile.b), first: tile.first as i32, count: tile.count as i32 };
        let tiles: Vec<ffi::LowRankTile> = pack.tiles.iter().map(tile).collect();
        let scales = pack.scales;
        let native = |plan: &Plan| ffi::LowRank {
            rank: plan.rank as i64,
            a: at(plan.a),
            scales: scales.as_ptr().wrapping_add(plan.scales),
            tiles: tiles.as_ptr().wrapping_add(plan.tiles),
        };
        let layers = plans.iter().map(|[qkv, output, gate_up, down]| ffi::AdapterLayer {
            qkv: native(qkv),
            output: native(output),
            gate_up: native(gate_up),
            down: native(down),
        });
        let layers = layers.collect();
        let rank = plans.iter().flatten().map(|plan| plan.rank).max().unwrap_or(0);
        Ok(Self { sizes, rank, layers, _numbers: numbers, _scales: scales, _tiles: tiles })
    }

    /// Whether rows of a decoder of these sizes can have this adapter.
    pub(crate) fn fits(&self, sizes: Sizes) -> bool {
        self.sizes == sizes
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// One entry for each layer.
    pub(crate) fn native(&self) -> *const ffi::AdapterLayer {
        self.layers.as_ptr()
    }
}

/// A part of a matrix.
struct Part<'a> {
    name: &'static str,
    outputs: usize,
    low: Option<&'a LowRank>,
}

/// Place of a matrix' update in [`Packing`], in items.
struct Plan {
    rank: usize,
    a: usize,
    scales: usize,
    tiles: usize,
}

struct Tile {
    b: usize,
    /// First of the stacked ranks, and number of them.
    first: usize,
    count: usize,
}

#[derive(Default)]
struct Packing {
    numbers: Vec<u16>,
    scales: Vec<f32>,
    tiles: Vec<Tile>,
}

impl Packing {
    fn layer(&mut self, sizes: Sizes, layer: &AdapterLayer) -> Result<[Plan; 4], Error> {
        let Sizes { hidden, intermediate, queries, keys, .. } = sizes;
        let qkv = [
            Part { name: "query", outputs: queries, low: layer.query.as_ref() },
            Part { name: "key", outputs: keys, low: layer.key.as_ref() },
            Part { name: "value", outputs: keys, low: layer.value.as_ref() },
        ];
        let output = [Part { name: "output", outputs: hidden, low: layer.output.as_ref() }];
        let gate_up = [
            Part { name: "gate", outputs: intermediate, low: layer.gate.as_ref() },
            Part { name: "up", outputs: intermediate, low: layer.up.as_ref() },
        ];
        let down = [Part { name: "down", outputs: hidden, low: layer.down.as_ref() }];
        let starts = [0, queries, queries + keys];
        Ok([
            self.matrix(&qkv, hidden, (queries + 2 * keys).div_ceil(TILE), |part, row| starts[part] + row)?,
            self.matrix(&output, queries, hidden.div_ceil(TILE), |_, row| row)?,
            // Tiles of gate and up take turns.
            self.matrix(&gate_up, hidden, 2 * intermediate.div_ceil(TILE), |part, row| {
                row / TILE * 2 * TILE + part * TILE + row % TILE
            })?,
            self.matrix(&down, intermediate, hidden.div_ceil(TILE), |_, row| row)?,
        ])
    }

    /// `place`: output of the matrix for a row of a part.
    fn matrix(
        &mut self,
        parts: &[Part<'_>],
        inputs: usize,
        tiles: usize,
        place: impl Fn(usize, usize) -> usize,
    ) -> Result<Plan, Error> {
        let mut starts = Vec::with_capacity(parts.len());
        let mut total = 0;
        for part in parts {
            starts.push(total);
            if let Some(low) = part.low {
                check(part, low, inputs)?;
                total += low.rank;
            }
        }
        let plan = Plan {
            rank: total.next_multiple_of(TILE),
            a: self.numbers.len(),
            scales: self.scales.len(),
            tiles: self.tiles.len(),
        };
        if total == 0 {
            return Ok(plan);
        }
        self.numbers.resize(plan.a + plan.rank * inputs, 0);
        self.scales.resize(plan.scales + plan.rank, 0.0);
        for (part, &start) in parts.iter().zip(&starts) {
            let Some(low) = part.low else { continue };
            for (rank, row) in (start..).zip(low.a.chunks_exact(inputs)) {
                self.scales[plan.scales + rank] = low.scale;
                let tile = plan.a + rank / TILE * inputs * TILE + rank % TILE;
                for (input, &value) in row.iter().enumerate() {
                    self.numbers[tile + input * TILE] = rounded(value);
                }
            }
        }
        self.outputs(parts, &starts, tiles, place);
        Ok(plan)
    }

    /// Adds the tiles of B.
    fn outputs(&mut self, parts: &[Part<'_>], starts: &[usize], tiles: usize, place: impl Fn(usize, usize) -> usize) {
        // Part and row of each output.
        let mut rows = vec![None; tiles * TILE];
        for (index, part) in parts.iter().enumerate() {
            if part.low.is_some() {
                (0..part.outputs).for_each(|row| rows[place(index, row)] = Some((index, row)));
            }
        }
        let rank = |part: usize| parts[part].low.map_or(0, |low| low.rank);
        for outputs in rows.chunks_exact(TILE) {
            let present = || outputs.iter().flatten().map(|&(part, _)| part);
            let first = present().map(|part| starts[part]).min().unwrap_or(0);
            let end = present().map(|part| starts[part] + rank(part)).max().unwrap_or(0);
            let b = self.numbers.len();
            self.numbers.resize(b + (end - first) * TILE, 0);
            for (lane, output) in outputs.iter().enumerate() {
                let Some((part, row)) = *output else { continue };
                let Some(low) = parts[part].low else { continue };
                for (index, &value) in low.b[row * low.rank..][..low.rank].iter().enumerate() {
                    self.numbers[b + (starts[part] + index - first) * TILE + lane] = rounded(value);
                }
            }
            self.tiles.push(Tile { b, first, count: end - first });
        }
    }
}

fn rounded(value: f32) -> u16 {
    bf16::from_f32(value).to_bits()
}

fn check(part: &Part<'_>, low: &LowRank, inputs: usize) -> Result<(), Error> {
    let Part { name, outputs, .. } = part;
    let rank = low.rank;
    if rank == 0 || rank > 1 << 16 {
        return Err(Error::Invalid(format!("{name}: the rank is {rank}")));
    }
    if low.a.len() != rank * inputs {
        return Err(Error::Invalid(format!("{name}: A has {} numbers instead of {rank} x {inputs}", low.a.len())));
    }
    if low.b.len() != outputs * rank {
        return Err(Error::Invalid(format!("{name}: B has {} numbers instead of {outputs} x {rank}", low.b.len())));
    }
    // One that is not would reach other outputs of its tile.
    let is_finite = |values: &[f32]| values.iter().all(|&value| bf16::from_f32(value).is_finite());
    if !is_finite(&low.a) || !is_finite(&low.b) || !low.scale.is_finite() {
        return Err(Error::Invalid(format!("{name}: a number is not finite")));
    }
    Ok(())
}

#[cfg(test)]
#[path = "adapter_tests.rs"]
mod tests;
