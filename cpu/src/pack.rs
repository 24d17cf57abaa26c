//! Packed matrices.
//!
//! A tile holds 16 outputs. In it the inputs come in groups of 32, and in a group the four inputs `4 i` to `4 i + 3` of
//! output `o` are side by side at byte `64 i + 4 o`, for i from 0 to 7. Eight bits are stored as q + 128. Of four bits, a
//! byte holds that of `i` in its low half and that of `i + 4` in its high half. Behind the numbers of a tile come its
//! scales, in FP16: for each group 16 scales, and for four bits 16 minimums as well.
//!
//! BF16 and FP32 have no scales. In a group of FP32 the 16 outputs of an input are side by side, one input behind the
//! other; of BF16 the inputs `2 i` and `2 i + 1` of output `o` are side by side at byte `64 i + 4 o`.
//!
//! Outputs and inputs that the matrix lacks are zeros.

use half::f16;

use crate::{Error, ffi, memory::Memory};

/// Outputs of a tile.
pub(crate) const TILE: usize = 16;
/// Inputs of a group.
pub(crate) const GROUP: usize = 32;

/// How the weights of a tile are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `scale * q`, q from -127 to 127: 8.5 bits a weight.
    Int8,
    /// `scale * q + minimum`, q from 0 to 15: 5 bits a weight.
    Int4,
    /// Rounded to the nearest: 16 bits a weight.
    BF16,
    /// As they are: 32 bits a weight.
    FP32,
}

impl Format {
    /// The number of `native/abi.hpp`.
    const fn number(self) -> i32 {
        match self {
            Self::Int8 => 0,
            Self::Int4 => 1,
            Self::BF16 => 2,
            Self::FP32 => 3,
        }
    }

    /// Whether weights are floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::BF16 | Self::FP32)
    }

    const fn numbers(self) -> usize {
        match self {
            Self::Int8 => TILE * GROUP,
            Self::Int4 => TILE * GROUP / 2,
            Self::BF16 => TILE * GROUP * 2,
            Self::FP32 => TILE * GROUP * 4,
        }
    }

    const fn scales(self) -> usize {
        match self {
            Self::Int8 => TILE * 2,
            Self::Int4 => TILE * 4,
            Self::BF16 | Self::FP32 => 0,
        }
    }

    /// Bytes of a tile of `groups` groups, whole cache lines.
    fn tile_bytes(self, groups: usize) -> usize {
        (groups * (self.numbers() + self.scales())).next_multiple_of(64)
    }
}

/// 32 weights of four bits: `scale * q + minimum`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    pub q: [u8; GROUP],
    pub scale: f32,
    pub minimum: f32,
}

/// A matrix [outputs, inputs] laid out for products with rows of activations.
pub struct Matrix {
    outputs: usize,
    inputs: usize,
    formats: Vec<Format>,
    offsets: Vec<usize>,
    data: Memory,
    bias: Option<Vec<f32>>,
}

impl Matrix {
    /// A matrix of zeros whose outputs `parts[0].0` first ones have the format `parts[0].1`, and so on. A tile in which
    /// formats meet has eight bits. A matrix of floating-point numbers has one format.
    ///
    /// # Errors
    /// There is no memory, or `parts` have a format of floating-point numbers and another one.
    pub fn zeros(parts: &[(usize, Format)], inputs: usize) -> Result<Self, Error> {
        let each: Vec<Format> =
            parts.iter().flat_map(|&(outputs, format)| std::iter::repeat_n(format, outputs)).collect();
        if each.iter().any(|format| format.is_float()) && each.iter().any(|&format| format != each[0]) {
            return Err(Error::Invalid("BF16 or FP32 and another format in one matrix".into()));
        }
        let formats: Vec<Format> =
            each.chunks(TILE).map(|tile| if tile.contains(&Format::Int8) { Format::Int8 } else { tile[0] }).collect();
        let groups = inputs.div_ceil(GROUP);
        let mut bytes = 0;
        let mut offsets = Vec::with_capacity(formats.len());
        for format in &formats {
            offsets.push(bytes);
            bytes += format.tile_bytes(groups);
        }
        let mut data = Memory::zeroed(bytes, "a matrix")?;
        for (&format, &offset) in formats.iter().zip(&offsets) {
            if format == Format::Int8 {
                data.bytes_mut()[offset..offset + groups * format.numbers()].fill(128);
            }
        }
        Ok(Self { outputs: each.len(), inputs, formats, offsets, data, bias: None })
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The format of an output's tile.
    pub fn format(&self, output: usize) -> Format {
        self.formats[output / TILE]
    }

    /// Rounds the weights of an output, [inputs], to the format of its tile.
    ///
    /// # Errors
    /// A weight is not finite or is too large for FP16 scales.
    ///
    /// # Panics
    /// `output` or the number of weights is not the matrix's.
    pub fn set_row(&mut self, output: usize, weights: &[f32]) -> Result<(), Error> {
        assert_eq!(weights.len(), self.inputs, "a row has as many weights as the matrix has inputs");
        // Without an early end, so that the compiler compares several at once; NaN is not in the range either.
        let is_in_range = |weight: &f32| weight.abs() <= 65_000.0;
        if !weights.iter().fold(true, |all, weight| all & is_in_range(weight)) {
            let weight = weights.iter().find(|weight| !is_in_range(weight)).copied().unwrap_or(f32::NAN);
            return Err(Error::Invalid(format!("weight {weight} of output {output} cannot be rounded")));
        }
        for (index, chunk) in weights.chunks(GROUP).enumerate() {
            let mut values = [0.0; GROUP];
            values[..chunk.len()].copy_from_slice(chunk);
            match self.format(output) {
                Format::Int8 => {
                    let (q, scale) = eight_bits(&values);
                    self.put(output, index, &q, scale, 0.0);
                }
                Format::Int4 => {
                    let group = four_bits(&values);
                    self.put(output, index, &group.q, group.scale, group.minimum);
                }
                Format::BF16 | Format::FP32 => self.put_floats(output, index, &values),
            }
        }
        Ok(())
    }

    /// Stores the weights of an output as they are, or rounds them to the format of its tile if it has not four bits.
    ///
    /// # Errors
    /// See [`Self::set_row`].
    ///
    /// # Panics
    /// `output` or the number of groups is not the matrix's.
    pub fn set_groups(&mut self, output: usize, groups: &[Group]) -> Result<(), Error> {
        assert_eq!(groups.len(), self.inputs.div_ceil(GROUP), "a row has as many groups as the matrix");
        if self.format(output) != Format::Int4 {
            let mut weights: Vec<f32> = groups.iter().flat_map(values).collect();
            weights.truncate(self.inputs);
            return self.set_row(output, &weights);
        }
        for (index, group) in groups.iter().enumerate() {
            let largest = group.scale.abs().max(group.minimum.abs());
            if !largest.is_finite() || largest > 65_000.0 {
                return Err(Error::Invalid(format!("scale {largest} of output {output} does not fit FP16")));
            }
            self.put(output, index, &group.q, group.scale, group.minimum);
        }
        Ok(())
    }

    /// Adds `bias` [outputs] to the products.
    ///
    /// # Panics
    /// The number of biases is not that of outputs.
    pub fn set_bias(&mut self, bias: &[f32]) {
        assert_eq!(bias.len(), self.outputs, "a bias has as many numbers as the matrix has outputs");
        let mut padded = bias.to_vec();
        padded.resize(self.formats.len() * TILE, 0.0);
        self.bias = Some(padded);
    }

    fn put(&mut self, output: usize, group: usize, q: &[u8; GROUP], scale: f32, minimum: f32) {
        let (format, lane) = (self.formats[output / TILE], output % TILE);
        let groups = self.inputs.div_ceil(GROUP);
        let tile = &mut self.data.bytes_mut()[self.offsets[output / TILE]..];
        let (numbers, scales) = tile.split_at_mut(groups * format.numbers());
        let numbers = &mut numbers[group * format.numbers()..][..format.numbers()];
        let scales = &mut scales[group * format.scales()..][..format.scales()];
        let mut half = |at: usize, value: f32| {
            scales[at * 2..at * 2 + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        };
        half(lane, scale);
        if format == Format::Int4 {
            half(TILE + lane, minimum);
        }
        let mut four = |index: usize, bytes: [u8; 4]| numbers[index * 64 + lane * 4..][..4].copy_from_slice(&bytes);
        if format == Format::Int8 {
            q.as_chunks::<4>().0.iter().enumerate().for_each(|(index, &four_of)| four(index, four_of));
        } else {
            let (low, high) = q.split_at(GROUP / 2);
            for (index, (low, high)) in low.chunks_exact(4).zip(high.chunks_exact(4)).enumerate() {
                four(index, std::array::from_fn(|at| low[at] | high[at] << 4));
            }
        }
    }

    fn put_floats(&mut self, output: usize, group: usize, values: &[f32; GROUP]) {
        let (format, lane) = (self.formats[output / TILE], output % TILE);
        let start = self.offsets[output / TILE] + group * format.numbers();
        let numbers = &mut self.data.bytes_mut()[start..][..format.numbers()];
        if format == Format::BF16 {
            for (index, pair) in values.as_chunks::<2>().0.iter().enumerate() {
                let [low, high] = pair.map(bf16_bits);
                numbers[(index * TILE + lane) * 4..][..4].copy_from_slice(&(low | high << 16).to_le_bytes());
            }
        } else {
            for (index, value) in values.iter().enumerate() {
                numbers[(index * TILE + lane) * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// The matrix as the kernels read it. The table of tiles is kept in `tables`; both point into this matrix.
    pub(crate) fn native(&self, tables: &mut Vec<Vec<ffi::Tile>>) -> ffi::Matrix {
        let tile = |(&offset, &format): (&usize, &Format)| ffi::Tile {
            data: self.data.as_ptr().wrapping_add(offset),
            format: format.number(),
        };
        let table: Vec<ffi::Tile> = self.offsets.iter().zip(&self.formats).map(tile).collect();
        let found = ffi::Matrix {
            outputs: self.outputs as i64,
            inputs: self.inputs as i64,
            tiles: table.as_ptr(),
            bias: self.bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_ptr()),
        };
        tables.push(table);
        found
    }
}

/// The weights of a group.
fn values(group: &Group) -> [f32; GROUP] {
    group.q.map(|q| group.scale * f32::from(q) + group.minimum)
}

/// All values joined by `join`, in eight lanes, which the compiler computes at once.
#[inline]
fn folded(values: [f32; GROUP], join: impl Fn(f32, f32) -> f32) -> f32 {
    let (lanes, _) = values.as_chunks::<8>();
    let lanes = lanes[1..].iter().fold(lanes[0], |joined, each| std::array::from_fn(|at| join(joined[at], each[at])));
    lanes[1..].iter().fold(lanes[0], |joined, &value| join(joined, value))
}

/// As FP16 holds it.
fn rounded(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

/// A finite value rounded to the nearest BF16, to the even one of two. Without branches, unlike `half`, whose value it is.
fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    (bits + 0x7fff + (bits >> 16 & 1)) >> 16
}

/// The nearest whole number of a value from 0 to 255. FP32 has whole numbers only from 2^23 to 2^24, so that the addition rounds:
/// several values at once, where `round` is a call for each.
fn nearest(value: f32) -> u8 {
    (value + (3_u32 << 22) as f32).to_bits() as u8
}

/// Weights as `q + 128` and their scale, which FP16 holds.
fn eight_bits(values: &[f32; GROUP]) -> ([u8; GROUP], f32) {
    let largest = folded(values.map(f32::abs), f32::max);
    // Rounded up, so that the largest weight is at most 127 scales.
    let mut scale = rounded(largest / 127.0);
    if scale * 127.0 < largest {
        scale = f16::from_bits(f16::from_f32(scale).to_bits() + 1).to_f32();
    }
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    (values.map(|value| nearest(value * inverse + 128.0)), scale)
}

/// The group of four bits with the least squared error among a few: the full range, and ranges shrunk at both ends, each
/// improved by least squares. A group that had four bits before is found again.
fn four_bits(values: &[f32; GROUP]) -> Group {
    let (least, most) = (folded(*values, f32::min), folded(*values, f32::max));
    if least >= most {
        return Group { q: [0; GROUP], scale: 0.0, minimum: rounded(least) };
    }
    let mut best: Option<(f32, Group)> = None;
    for shrink in [0.0, 0.04, 0.08] {
        let cut = (most - least) * shrink;
        let (mut scale, mut minimum) = ((most - least - 2.0 * cut) / 15.0, least + cut);
        for _ in 0..3 {
            let group = at_scale(values, scale, minimum);
            let rounded = self::values(&group);
            let errors = std::array::from_fn(|at| (values[at] - rounded[at]) * (values[at] - rounded[at]));
            let error = folded(errors, std::ops::Add::add);
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, group));
            }
            let Some(fit) = least_squares(values, &group.q) else { break };
            (scale, minimum) = fit;
        }
    }
    best.map_or(Group { q: [0; GROUP], scale: 0.0, minimum: rounded(least) }, |(_, group)| group)
}

/// Weights rounded to the nearest of `scale * q + minimum`.
fn at_scale(values: &[f32; GROUP], scale: f32, minimum: f32) -> Group {
    let (scale, minimum) = (rounded(scale), rounded(minimum));
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    Group { q: values.map(|value| nearest(((value - minimum) * inverse).clamp(0.0, 15.0))), scale, minimum }
}

/// Scale and minimum with the least squared error for these whole numbers.
fn least_squares(values: &[f32; GROUP], q: &[u8; GROUP]) -> Option<(f32, f32)> {
    let n = GROUP as f32;
    // At most 32 * 15 * 15, which FP32 holds.
    let whole = |each: fn(u32) -> u32| q.iter().map(|&q| each(u32::from(q))).sum::<u32>() as f32;
    let (sum, squares) = (whole(|q| q), whole(|q| q * q));
    let total = folded(*values, std::ops::Add::add);
    let products = folded(std::array::from_fn(|at| f32::from(q[at]) * values[at]), std::ops::Add::add);
    let spread = n * squares - sum * sum;
    (spread > 0.0).then(|| {
        let scale = (n * products - sum * total) / spread;
        (scale, (total - scale * sum) / n)
    })
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
