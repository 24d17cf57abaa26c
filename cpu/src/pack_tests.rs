use half::bf16;
use proptest::prelude::*;

use super::*;

/// The weights of an output as the kernels read them.
fn unpacked(matrix: &Matrix, output: usize) -> Vec<f32> {
    let groups = matrix.inputs.div_ceil(GROUP);
    let (format, lane) = (matrix.formats[output / TILE], output % TILE);
    // SAFETY: a tile lies in the matrix's memory.
    let tile = unsafe {
        std::slice::from_raw_parts(matrix.data.as_ptr().add(matrix.offsets[output / TILE]), format.tile_bytes(groups))
    };
    let half = |at: usize| f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
    (0..matrix.inputs)
        .map(|input| {
            let (group, i) = (input / GROUP, input % GROUP);
            let scales = groups * format.numbers() + group * format.scales();
            let numbers = &tile[group * format.numbers()..];
            match format {
                Format::BF16 => {
                    let at = i / 2 * 64 + lane * 4 + i % 2 * 2;
                    return bf16::from_le_bytes([numbers[at], numbers[at + 1]]).to_f32();
                }
                Format::FP32 => {
                    let at = i * 64 + lane * 4;
                    return f32::from_le_bytes(numbers[at..at + 4].try_into().unwrap());
                }
                Format::Int8 | Format::Int4 => {}
            }
            let byte = tile[group * format.numbers()
                + if format == Format::Int8 { i / 4 } else { i / 4 % 4 } * 64
                + lane * 4
                + i % 4];
            if format == Format::Int8 {
                return half(scales + lane * 2) * (f32::from(byte) - 128.0);
            }
            let q = if i < 16 { byte & 15 } else { byte >> 4 };
            half(scales + lane * 2) * f32::from(q) + half(scales + (TILE + lane) * 2)
        })
        .collect()
}

proptest! {
    /// Eight bits are off by at most half a scale. Four bits have no larger squared error than sixteen even steps from the
    /// smallest weight to the largest would have at worst.
    #[test]
    fn rounding_is_near(values in proptest::collection::vec(-3.0_f32..3.0, 70), outputs in 1_usize..40, pick in 0_usize..40) {
        let output = pick % outputs;
        for format in [Format::Int8, Format::Int4, Format::BF16, Format::FP32] {
            let mut matrix = Matrix::zeros(&[(outputs, format)], 70).unwrap();
            matrix.set_row(output, &values).unwrap();
            let found = unpacked(&matrix, output);
            for (group, (was, is)) in values.chunks(GROUP).zip(found.chunks(GROUP)).enumerate() {
                // A group that the row does not fill has zeros besides.
                let ends = if was.len() < GROUP { (0.0_f32, 0.0_f32) } else { (was[0], was[0]) };
                let (least, most) = was.iter().fold(ends, |(least, most), &value| (least.min(value), most.max(value)));
                // FP16 holds scale and minimum to a part in two thousand.
                let rounding = most.max(-least) / 1000.0;
                let errors = was.iter().zip(is).map(|(a, b)| (a - b).abs());
                match format {
                    Format::Int8 => {
                        let bound = most.max(-least) / 127.0 * 0.5 + rounding;
                        prop_assert!(errors.clone().all(|error| error <= bound), "group {group}: {was:?} became {is:?}");
                    }
                    Format::BF16 => {
                        prop_assert!(was.iter().zip(is).all(|(was, is)| bf16::from_f32(*was).to_f32() == *is), "{was:?}, {is:?}");
                    }
                    Format::FP32 => prop_assert_eq!(was, is),
                    Format::Int4 => {
                        let bound = ((most - least) / 15.0 * 0.5 + rounding).powi(2) * GROUP as f32;
                        let squared: f32 = errors.map(|error| error * error).sum();
                        prop_assert!(squared <= bound, "group {group}: {squared} above {bound}");
                    }
                }
            }
        }
    }

    /// What had four bits in groups of 32 before is found again, to the last bit of a q.
    #[test]
    fn four_bits_are_found_again(q in proptest::collection::vec(0_u8..16, 32), scale in 0.001_f32..1.0, minimum in -8.0_f32..0.0) {
        let mut q: [u8; GROUP] = q.try_into().unwrap();
        // A quantizer that uses the whole range, as ggml's Q4_1 does.
        (q[3], q[20]) = (0, 15);
        let (scale, minimum) = (rounded(scale), rounded(minimum));
        let group = Group { q, scale, minimum };
        prop_assert_eq!(four_bits(&values(&group)).q, q);
    }
}

#[test]
fn groups_are_stored_as_they_are() {
    let groups: Vec<Group> = (0..3_u8)
        .map(|index| Group {
            q: std::array::from_fn(|i| (i as u8 + index) % 16),
            scale: 0.5 * f32::from(index + 1),
            minimum: -0.25,
        })
        .collect();
    let mut matrix = Matrix::zeros(&[(20, Format::Int4)], 96).unwrap();
    matrix.set_groups(18, &groups).unwrap();
    assert_eq!(unpacked(&matrix, 18), groups.iter().flat_map(values).collect::<Vec<_>>());
    assert_eq!(unpacked(&matrix, 17), vec![0.0; 96]);
}

#[test]
fn a_tile_in_which_formats_meet_has_eight_bits() {
    let matrix = Matrix::zeros(&[(24, Format::Int4), (24, Format::Int8)], 32).unwrap();
    assert_eq!([0, 16, 32].map(|output| matrix.format(output)), [Format::Int4, Format::Int8, Format::Int8]);
    assert_eq!(unpacked(&matrix, 20), vec![0.0; 32]);
}

#[test]
fn a_matrix_of_floating_point_numbers_has_one_format() {
    for other in [Format::Int8, Format::Int4, Format::FP32] {
        let parts = [(32, other), (32, Format::BF16)];
        assert!(matches!(Matrix::zeros(&parts, 32), Err(Error::Invalid(_))), "{other:?}");
    }
}

#[test]
fn weights_that_cannot_be_rounded_are_errors() {
    let mut matrix = Matrix::zeros(&[(1, Format::Int8)], 2).unwrap();
    for bad in [f32::NAN, f32::INFINITY, 1e6] {
        let error = matrix.set_row(0, &[0.0, bad]).unwrap_err();
        assert!(error.to_string().contains("output 0"), "{error}");
    }
}
