//! Block formats of ggml to FP32, bit for bit as `gguf.quants.dequantize` of the Python package computes them: products
//! before sums, each rounded, none fused.
//!
//! The layouts are those of ggml-common.h (<https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h>).

use athanor_cpu::Group;

/// How the numbers of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFormat {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
}

use BlockFormat::{Bf16, F16, F32, Iq4Nl, Iq4Xs, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};

/// Numbers of a block of the K formats.
const K: usize = 256;

impl BlockFormat {
    pub const ALL: [Self; 15] = [F32, F16, Bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K, Iq4Nl, Iq4Xs];

    /// The format of a type number in a file (`enum ggml_type`), else the name of that type.
    pub fn from_id(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => F32,
            1 => F16,
            2 => Q4_0,
            3 => Q4_1,
            6 => Q5_0,
            7 => Q5_1,
            8 => Q8_0,
            10 => Q2K,
            11 => Q3K,
            12 => Q4K,
            13 => Q5K,
            14 => Q6K,
            20 => Iq4Nl,
            23 => Iq4Xs,
            30 => Bf16,
            other => return Err(unsupported(other)),
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            F32 => "F32",
            F16 => "F16",
            Bf16 => "BF16",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q2K => "Q2_K",
            Q3K => "Q3_K",
            Q4K => "Q4_K",
            Q5K => "Q5_K",
            Q6K => "Q6_K",
            Iq4Nl => "IQ4_NL",
            Iq4Xs => "IQ4_XS",
        }
    }

    /// Bits of a whole number in a block; absent: floating-point numbers. Those of the IQ4 formats are read from a table.
    pub fn block_bits(self) -> Option<u32> {
        match self {
            F32 | F16 | Bf16 => None,
            Q2K => Some(2),
            Q3K => Some(3),
            Q4_0 | Q4_1 | Q4K => Some(4),
            Q5_0 | Q5_1 | Q5K => Some(5),
            Q6K => Some(6),
            Q8_0 | Iq4Nl | Iq4Xs => Some(8),
        }
    }

    /// Appends the groups of whole blocks to `to`, as they are but for products of scales. False: the format has no
    /// four bits.
    ///
    /// # Panics
    /// If `bytes` are not whole blocks.
    pub fn groups(self, bytes: &[u8], to: &mut Vec<Group>) -> bool {
        let group: fn(&[u8], &mut Vec<Group>) = match self {
            Q4_0 => |block, to| {
                let scale = half(block);
                to.push(Group { q: gathered(nibbles(&block[2..])), scale, minimum: -8.0 * scale });
            },
            Q4_1 => |block, to| {
                to.push(Group { q: gathered(nibbles(&block[4..])), scale: half(block), minimum: half(&block[2..]) });
            },
            Q4K => |block, to| {
                let (d, dmin, scales, qs) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
                for group in 0..8 {
                    let (scale, minimum) = scale_and_minimum(scales, group);
                    let (bytes, shift) = (&qs[group / 2 * 32..][..32], group % 2 * 4);
                    let q = gathered(bytes.iter().map(|byte| byte >> shift & 15));
                    to.push(Group { q, scale: d * scale, minimum: -dmin * minimum });
                }
            },
            _ => return false,
        };
        let blocks = bytes.chunks_exact(self.block_bytes());
        assert!(blocks.remainder().is_empty(), "{} bytes are not whole {} blocks", bytes.len(), self.name());
        blocks.for_each(|block| group(block, to));
        true
    }

    /// Numbers of a block.
    pub fn block_elements(self) -> usize {
        match self {
            F32 | F16 | Bf16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Iq4Nl => 32,
            Q2K | Q3K | Q4K | Q5K | Q6K | Iq4Xs => K,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            F32 => 4,
            F16 | Bf16 => 2,
            Q4_0 | Iq4Nl => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q2K => 84,
            Q3K => 110,
            Q4K => 144,
            Q5K => 176,
            Q6K => 210,
            Iq4Xs => 136,
        }
    }

    /// Appends the numbers of whole blocks to `to`.
    ///
    /// # Panics
    /// If `bytes` are not whole blocks.
    pub fn dequantize(self, bytes: &[u8], to: &mut Vec<f32>) {
        let blocks = bytes.chunks_exact(self.block_bytes());
        assert!(blocks.remainder().is_empty(), "{} bytes are not whole {} blocks", bytes.len(), self.name());
        match self {
            F32 => to.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            F16 => to.extend(blocks.map(half)),
            Bf16 => to.extend(blocks.map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))),
            Q4_0 => blocks.for_each(|block| q4_0(block, to)),
            Q4_1 => blocks.for_each(|block| q4_1(block, to)),
            Q5_0 => blocks.for_each(|block| q5_0(block, to)),
            Q5_1 => blocks.for_each(|block| q5_1(block, to)),
            Q8_0 => blocks.for_each(|block| q8_0(block, to)),
            Q2K => blocks.for_each(|block| q2_k(block, to)),
            Q3K => blocks.for_each(|block| q3_k(block, to)),
            Q4K => blocks.for_each(|block| q4_k(block, to)),
            Q5K => blocks.for_each(|block| q5_k(block, to)),
            Q6K => blocks.for_each(|block| q6_k(block, to)),
            Iq4Nl => blocks.for_each(|block| iq4_nl(block, to)),
            Iq4Xs => blocks.for_each(|block| iq4_xs(block, to)),
        }
    }
}

/// The name of a type that is not among [`BlockFormat::ALL`].
fn unsupported(id: u32) -> String {
    let name = match id {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {id}"),
    };
    name.to_owned()
}

/// The FP16 number in the first two bytes.
fn half(bytes: &[u8]) -> f32 {
    let bits = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    let (sign, exponent, mantissa) = ((bits & 0x8000) << 16, bits >> 10 & 0x1f, bits & 0x3ff);
    match exponent {
        // Zero and subnormal numbers: multiples of 2^-24, which FP32 holds exactly.
        0 => f32::from_bits((mantissa as f32 / 16_777_216.0).to_bits() | sign),
        // Infinity and NaN.
        31 => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// The first 32 of some numbers.
fn gathered(numbers: impl Iterator<Item = u8>) -> [u8; 32] {
    let mut all = [0; 32];
    all.iter_mut().zip(numbers).for_each(|(to, number)| *to = number);
    all
}

/// The low four bits of every byte, then the high four bits of every byte.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|byte| byte & 15).chain(bytes.iter().map(|byte| byte >> 4))
}

fn q4_0(block: &[u8], to: &mut Vec<f32>) {
    let d = half(block);
    to.extend(nibbles(&block[2..]).map(|q| d * f32::from(q as i8 - 8)));
}

fn q4_1(block: &[u8], to: &mut Vec<f32>) {
    let (d, m) = (half(block), half(&block[2..]));
    to.extend(nibbles(&block[4..]).map(|q| d * f32::from(q) + m));
}

/// The low four bits of 32 numbers with their fifth bits.
fn five_bits(fifth: &[u8], low: &[u8]) -> impl Iterator<Item = u8> {
    let fifth = u32::from_le_bytes([fifth[0], fifth[1], fifth[2], fifth[3]]);
    nibbles(low).enumerate().map(move |(i, q)| q | ((fifth >> i & 1) as u8) << 4)
}

fn q5_0(block: &[u8], to: &mut Vec<f32>) {
    let d = half(block);
    to.extend(five_bits(&block[2..6], &block[6..]).map(|q| d * f32::from(q as i8 - 16)));
}

fn q5_1(block: &[u8], to: &mut Vec<f32>) {
    let (d, m) = (half(block), half(&block[2..]));
    to.extend(five_bits(&block[4..8], &block[8..]).map(|q| d * f32::from(q) + m));
}

fn q8_0(block: &[u8], to: &mut Vec<f32>) {
    let d = half(block);
    to.extend(block[2..].iter().map(|&q| f32::from(q as i8) * d));
}

/// Scale and minimum of one of the eight groups of 32 numbers, six bits each, packed into twelve bytes.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 0x3f, packed[group + 4] & 0x3f)
    } else {
        let (scale, minimum, low) = (packed[group - 4], packed[group], packed[group + 4]);
        (low & 0x0f | scale >> 2 & 0x30, low >> 4 | minimum >> 2 & 0x30)
    };
    (f32::from(scale), f32::from(minimum))
}

fn q2_k(block: &[u8], to: &mut Vec<f32>) {
    let (scales, qs, d, dmin) = (&block[..16], &block[16..80], half(&block[80..]), half(&block[82..]));
    for (part, packed) in scales.iter().enumerate() {
        let (group, half) = (part / 2, part % 2 * 16);
        let (bytes, shift) = (&qs[group / 4 * 32 + half..][..16], group % 4 * 2);
        let (d, dm) = (d * f32::from(packed & 15), dmin * f32::from(packed >> 4));
        to.extend(bytes.iter().map(|byte| d * f32::from(byte >> shift & 3) - dm));
    }
}

fn q3_k(block: &[u8], to: &mut Vec<f32>) {
    let (third, qs, scales, d) = (&block[..32], &block[32..96], &block[96..108], half(&block[108..]));
    for part in 0..16 {
        // Scales of six bits: four in the first eight bytes, two in the last four.
        let (low, high) = (scales[part % 8] >> (part / 8 * 4) & 15, scales[8 + part % 4] >> (part / 4 * 2) & 3);
        let d = d * f32::from((low | high << 4) as i8 - 32);
        let (group, half) = (part / 2, part % 2 * 16);
        let (bytes, shift) = (&qs[group / 4 * 32 + half..][..16], group % 4 * 2);
        let q = bytes.iter().zip(&third[half..]).map(|(low, high)| low >> shift & 3 | (high >> group & 1) << 2);
        to.extend(q.map(|q| d * f32::from(q as i8 - 4)));
    }
}

fn q4_k(block: &[u8], to: &mut Vec<f32>) {
    let (d, dmin, scales, qs) = (half(block), half(&block[2..]), &block[4..16], &block[16..]);
    for group in 0..8 {
        let (scale, minimum) = scale_and_minimum(scales, group);
        let (d, dm) = (d * scale, dmin * minimum);
        let (bytes, shift) = (&qs[group / 2 * 32..][..32], group % 2 * 4);
        to.extend(bytes.iter().map(|byte| d * f32::from(byte >> shift & 15) - dm));
    }
}

fn q5_k(block: &[u8], to: &mut Vec<f32>) {
    let (d, dmin, scales) = (half(block), half(&block[2..]), &block[4..16]);
    let (fifth, qs) = (&block[16..48], &block[48..]);
    for group in 0..8 {
        let (scale, minimum) = scale_and_minimum(scales, group);
        let (d, dm) = (d * scale, dmin * minimum);
        let (bytes, shift) = (&qs[group / 2 * 32..][..32], group % 2 * 4);
        let q = bytes.iter().zip(fifth).map(|(low, high)| low >> shift & 15 | (high >> group & 1) << 4);
        to.extend(q.map(|q| d * f32::from(q) - dm));
    }
}

fn q6_k(block: &[u8], to: &mut Vec<f32>) {
    let (low, high, scales, d) = (&block[..128], &block[128..192], &block[192..208], half(&block[208..]));
    for group in 0..8 {
        // Each half of a block has four groups of 32: two in the low nibbles of 64 bytes, two in the high ones.
        let (part, index) = (group / 4, group % 4);
        let low = &low[part * 64 + index % 2 * 32..][..32];
        let high = &high[part * 32..][..32];
        let (low_shift, high_shift) = (index / 2 * 4, index * 2);
        for (i, (low, high)) in low.iter().zip(high).enumerate() {
            let q = (low >> low_shift & 15 | (high >> high_shift & 3) << 4) as i8 - 32;
            let scale = d * f32::from(scales[group * 2 + i / 16] as i8);
            to.push(scale * f32::from(q));
        }
    }
}

/// The numbers that four bits stand for in the IQ4 formats.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn iq4_nl(block: &[u8], to: &mut Vec<f32>) {
    let d = half(block);
    to.extend(nibbles(&block[2..]).map(|q| d * f32::from(IQ4[usize::from(q)])));
}

fn iq4_xs(block: &[u8], to: &mut Vec<f32>) {
    let (d, high, low, qs) = (half(block), u16::from_le_bytes([block[2], block[3]]), &block[4..8], &block[8..]);
    for group in 0..8 {
        let (low, high) = (low[group / 2] >> (group % 2 * 4) & 15, (high >> (group * 2) & 3) as u8);
        let d = d * f32::from((low | high << 4) as i8 - 32);
        to.extend(nibbles(&qs[group * 16..][..16]).map(|q| d * f32::from(IQ4[usize::from(q)])));
    }
}
