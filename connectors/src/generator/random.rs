//! Random numbers that can be asked for in any order: a counter put through a mixer.

/// Step of the counter; odd, so that it visits every number.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The numbers of one column: number `n` depends on the seed, the column and `n`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column(u64);

impl Column {
    fn new(seed: u64, column: u64) -> Self {
        Self(mix(
            mix(seed.wrapping_add(GAMMA)) ^ column.wrapping_mul(0xd6e8_feb8_6659_fd93)
        ))
    }
    /// The numbers of a column of that name.
    pub(super) fn named(seed: u64, name: &str) -> Self {
        // FNV-1a: the name itself makes the column's numbers its own.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self::new(seed, hash)
    }
    #[inline]
    pub(super) fn at(self, n: u64) -> u64 {
        mix(self.0.wrapping_add(n.wrapping_mul(GAMMA)))
    }
    /// Further numbers for the same `n`, where one is not enough.
    #[inline]
    pub(super) fn more(self, n: u64, i: u64) -> u64 {
        mix(self.at(n).wrapping_add((i + 1).wrapping_mul(GAMMA)))
    }
}

/// SplitMix64's output function.
#[inline]
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Evenly in `0..range`, from the upper half of a random number; `range` is small beside 2^32.
#[inline]
pub(super) fn below(random: u64, range: u64) -> u64 {
    ((random >> 32) * range) >> 32
}

/// Eight lowercase letters from eight random bytes.
#[inline]
pub(super) fn letters(random: u64) -> [u8; 8] {
    const EVEN: u64 = 0x00ff_00ff_00ff_00ff;
    // In lanes of 16 bits: byte * 26 / 256 is below 26.
    let even = (((random & EVEN) * 26) >> 8) & EVEN;
    let odd = (((random >> 8) & EVEN) * 26) & !EVEN;
    ((even | odd) + 0x6161_6161_6161_6161).to_le_bytes()
}

/// `length` letters.
#[inline]
pub(super) fn append_letters(out: &mut Vec<u8>, column: Column, n: u64, length: usize) {
    let end = out.len() + length;
    for i in 0..length.div_ceil(8) as u64 {
        out.extend_from_slice(&letters(column.more(n, i)));
    }
    out.truncate(end);
}
