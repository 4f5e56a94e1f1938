//! Floating point, SIMD and block operations.

use crate::{Bench, Done, Work};
use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

const fn bench(name: &'static str, unit: &'static str, make: fn() -> Option<Work>) -> Bench {
    Bench { group: "vector", name, unit, make }
}

/// All measurements of this group.
pub const ALL: &[Bench] = &[
    bench("memcpy-1m", "byte", memcpy),
    bench("sse2-copy", "byte", sse2_copy),
    bench("rep-movsb", "byte", rep_movsb),
    bench("memset-4k", "byte", memset),
    bench("matmul-sse2", "multiply-add", matmul),
    bench("scalar-double", "step", scalar_double),
    bench("x87-long-double", "step", x87),
    bench("avx2-fma", "vector", avx2_fma),
    bench("avx2-int", "vector", avx2_int),
];

fn buffers(length: usize) -> (Vec<u8>, Vec<u8>) {
    ((0..length).map(|i| (i * 13 % 241) as u8).collect(), vec![0; length])
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().enumerate().map(|(i, b)| (i as u64 + 1).wrapping_mul(u64::from(*b))).fold(0, u64::wrapping_add)
}

/// The library's own copy, whatever it chooses on this processor.
fn memcpy() -> Option<Work> {
    const LENGTH: usize = 1 << 20;
    let (from, mut to) = buffers(LENGTH);
    let check = sum(&from);
    Some(Box::new(move |n| {
        for _ in 0..n {
            black_box(&mut to).copy_from_slice(black_box(&from));
        }
        Done { units: n * LENGTH as u64, check }
    }))
}

fn sse2_copy() -> Option<Work> {
    const LENGTH: usize = 64 << 10;
    let (from, mut to) = buffers(LENGTH);
    Some(Box::new(move |n| {
        for _ in 0..n {
            for offset in (0..LENGTH).step_by(32) {
                // SAFETY: the offset and the 31 bytes after it are inside both buffers; SSE2 is part of x86-64.
                unsafe {
                    let a = _mm_loadu_si128(from.as_ptr().add(offset).cast());
                    let b = _mm_loadu_si128(from.as_ptr().add(offset + 16).cast());
                    _mm_storeu_si128(to.as_mut_ptr().add(offset).cast(), a);
                    _mm_storeu_si128(to.as_mut_ptr().add(offset + 16).cast(), b);
                }
            }
            black_box(&mut to);
        }
        Done { units: n * LENGTH as u64, check: to[LENGTH - 1].into() }
    }))
}

fn rep_movsb() -> Option<Work> {
    const LENGTH: usize = 64 << 10;
    let (from, mut to) = buffers(LENGTH);
    Some(Box::new(move |n| {
        for _ in 0..n {
            // SAFETY: both buffers have LENGTH bytes and do not overlap; the direction flag is clear.
            unsafe {
                asm!("rep movsb", inout("rcx") LENGTH => _, inout("rsi") from.as_ptr() => _,
                     inout("rdi") to.as_mut_ptr() => _, options(nostack, preserves_flags));
            }
        }
        Done { units: n * LENGTH as u64, check: to[LENGTH - 1].into() }
    }))
}

fn memset() -> Option<Work> {
    let mut page = vec![0_u8; 4096];
    Some(Box::new(move |n| {
        for i in 0..n {
            black_box(&mut page).fill(black_box(i as u8));
        }
        Done { units: n * 4096, check: 0 }
    }))
}

/// Single precision, four columns at a time.
fn matmul() -> Option<Work> {
    const SIZE: usize = 32;
    let a: Vec<f32> = (0..SIZE * SIZE).map(|i| (i % 17) as f32 * 0.25).collect();
    let b: Vec<f32> = (0..SIZE * SIZE).map(|i| (i % 13) as f32 * 0.5).collect();
    let mut c = vec![0_f32; SIZE * SIZE];
    Some(Box::new(move |n| {
        for _ in 0..n {
            for row in 0..SIZE {
                for column in (0..SIZE).step_by(4) {
                    // SAFETY: row, column + 3 and k are below SIZE, so all indexes are below SIZE * SIZE.
                    unsafe {
                        let mut total = _mm_setzero_ps();
                        for k in 0..SIZE {
                            let left = _mm_set1_ps(*a.get_unchecked(row * SIZE + k));
                            let right = _mm_loadu_ps(b.as_ptr().add(k * SIZE + column));
                            total = _mm_add_ps(total, _mm_mul_ps(left, right));
                        }
                        _mm_storeu_ps(c.as_mut_ptr().add(row * SIZE + column), total);
                    }
                }
            }
            black_box(&mut c);
        }
        let check = c.iter().fold(0_u64, |s, v| s.rotate_left(3) ^ u64::from(v.to_bits()));
        Done { units: n * (SIZE * SIZE * SIZE) as u64, check }
    }))
}

fn scalar_double() -> Option<Work> {
    let mut x = 0.5_f64;
    Some(Box::new(move |n| {
        for _ in 0..n * 256 {
            x = black_box(x * 1.000_000_1 + 0.25) / 1.5 + (x - 0.125).abs().sqrt();
            x -= x.trunc() * 0.5;
        }
        Done { units: n * 256, check: x.to_bits() }
    }))
}

/// Extended precision on the x87 stack: multiply, add, divide, square root.
fn x87() -> Option<Work> {
    let mut x = 0.5_f64;
    let (factor, addend) = (1.000_000_1_f64, 0.25_f64);
    Some(Box::new(move |n| {
        // SAFETY: the loop reads and writes only the three doubles; the x87 stack is empty before and after it.
        unsafe {
            asm!(
                "fld qword ptr [{a}]",
                "fld qword ptr [{f}]",
                "fld qword ptr [{x}]",
                "2:",
                "fmul st(0), st(1)",
                "fadd st(0), st(2)",
                "fsqrt",
                "fdiv st(0), st(1)",
                "dec {i}",
                "jnz 2b",
                "fstp qword ptr [{x}]",
                "fstp st(0)",
                "fstp st(0)",
                x = in(reg) &raw mut x,
                f = in(reg) &raw const factor,
                a = in(reg) &raw const addend,
                i = inout(reg) n * 256 => _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack)
            );
        }
        Done { units: n * 256, check: x.to_bits() }
    }))
}

fn avx2_fma() -> Option<Work> {
    if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
        return None;
    }
    let data: Vec<f64> = (0..1024).map(|i| f64::from(i) * 0.001).collect();
    Some(Box::new(move |n| {
        // SAFETY: the processor has AVX2 and FMA, as checked above.
        let check = unsafe { fma_loop(&data, n) };
        Done { units: n * 256, check }
    }))
}

#[target_feature(enable = "avx2,fma")]
fn fma_loop(data: &[f64], n: u64) -> u64 {
    let factor = _mm256_set1_pd(0.999);
    let mut totals = [_mm256_setzero_pd(); 4];
    for _ in 0..n {
        for chunk in data.chunks_exact(16) {
            for (i, total) in totals.iter_mut().enumerate() {
                // SAFETY: a chunk has 16 doubles, and i is below 4.
                let value = unsafe { _mm256_loadu_pd(chunk.as_ptr().add(4 * i)) };
                *total = _mm256_fmadd_pd(*total, factor, value);
            }
        }
        black_box(&mut totals);
    }
    let mut out = [0_f64; 4];
    // SAFETY: the array has four doubles.
    unsafe { _mm256_storeu_pd(out.as_mut_ptr(), _mm256_add_pd(totals[0], totals[3])) };
    out.iter().fold(0, |s, v| s.rotate_left(5) ^ v.to_bits())
}

fn avx2_int() -> Option<Work> {
    if !is_x86_feature_detected!("avx2") {
        return None;
    }
    let data: Vec<u32> = (0..2048_u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    Some(Box::new(move |n| {
        // SAFETY: the processor has AVX2, as checked above.
        let check = unsafe { int_loop(&data, n) };
        Done { units: n * 256, check }
    }))
}

#[target_feature(enable = "avx2")]
fn int_loop(data: &[u32], n: u64) -> u64 {
    let mut total = _mm256_setzero_si256();
    let shuffle = _mm256_set_epi8(
        3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12,
    );
    for _ in 0..n {
        for chunk in data.chunks_exact(8) {
            // SAFETY: a chunk has eight words.
            let value = unsafe { _mm256_loadu_si256(chunk.as_ptr().cast()) };
            let mixed = _mm256_xor_si256(_mm256_shuffle_epi8(value, shuffle), _mm256_slli_epi32::<3>(value));
            total = _mm256_add_epi32(total, _mm256_max_epu32(mixed, _mm256_mullo_epi32(value, mixed)));
        }
        total = black_box(total);
    }
    let mut out = [0_u64; 4];
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), total) };
    out.iter().fold(0, |s, v| s.rotate_left(5) ^ v)
}
