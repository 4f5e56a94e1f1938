//! Random numbers with the values that break processors.

/// SplitMix64: every seed gives a good sequence, and a sequence is found again from its seed.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
    /// An integer operand.
    pub fn value(&mut self) -> u64 {
        let v = self.next();
        match self.below(8) {
            0 => v & 0xff,
            1 => (v as i8 as i64) as u64,
            2 => 1 << (v & 63),
            3 => (1u64 << (v & 63)).wrapping_sub(1),
            4 => [0, 1, 0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, i64::MAX as u64, 1 << 63, u64::MAX]
                [(v % 11) as usize],
            5 => v & 0xffff_ffff,
            _ => v,
        }
    }
    pub fn small_immediate(&mut self) -> u8 {
        let v = self.next() as u8;
        if self.below(2) == 0 { v & 7 } else { v }
    }
    /// 32 bits of a floating-point operand.
    pub fn float(&mut self) -> u32 {
        let v = self.next();
        match self.below(6) {
            0 => [
                0,
                0x8000_0000,
                0x3f80_0000,
                0xbf80_0000,
                0x7f80_0000,
                0xff80_0000,
                0x7fc0_0000,
                0x7f80_0001,
                1,
                0x8000_0001,
                0x007f_ffff,
                0x0080_0000,
                0x7f7f_ffff,
                0x4f00_0000,
                0xcf00_0000,
            ][(v % 15) as usize],
            1 => ((v % 2000) as f32 - 1000.0).to_bits(),
            2 => ((v as i32) as f32 / 65536.0).to_bits(),
            _ => v as u32,
        }
    }
    /// 64 bits of a floating-point operand.
    pub fn double(&mut self) -> u64 {
        let v = self.next();
        match self.below(6) {
            0 => f64::from(f32::from_bits(self.float())).to_bits(),
            1 => ((v % 2000) as f64 - 1000.0).to_bits(),
            2 => ((v as i64) as f64 / 65536.0).to_bits(),
            3 => [0, 1 << 63, 0x7ff0 << 48, 0xfff0 << 48, 0x7ff8 << 48, 0x7ff0 << 48 | 1, 1, 0x000f_ffff_ffff_ffff]
                [(v % 8) as usize],
            _ => v,
        }
    }
    /// 16 bytes of a vector register or of memory.
    pub fn vector(&mut self) -> [u8; 16] {
        let mut out = [0; 16];
        match self.below(4) {
            0 => {
                for c in out.chunks_exact_mut(4) {
                    c.copy_from_slice(&self.float().to_le_bytes());
                }
            }
            1 => {
                for c in out.chunks_exact_mut(8) {
                    c.copy_from_slice(&self.double().to_le_bytes());
                }
            }
            _ => {
                for c in out.chunks_exact_mut(8) {
                    c.copy_from_slice(&self.value().to_le_bytes());
                }
            }
        }
        out
    }
}
