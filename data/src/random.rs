//! Well-mixed numbers that are the same on every machine.

/// The finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
pub fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
