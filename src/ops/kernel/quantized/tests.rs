use std::borrow::Cow;

use candle_core::CpuStorage;

use super::*;

pub(crate) const ALL: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Where a block has its f16 values, which are the only ones that could be NaN.
fn scales(dtype: GgmlDType) -> &'static [usize] {
    match dtype {
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q2K => &[80, 82],
        GgmlDType::Q3K => &[108],
        GgmlDType::Q6K => &[208],
        _ => &[0],
    }
}

/// Blocks of chance, every bit of them, with finite scales; subnormal ones among them.
fn blocks(dtype: GgmlDType, count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(count * dtype.type_size())
    .collect();
    for (number, block) in bytes.chunks_exact_mut(dtype.type_size()).enumerate() {
        for &at in scales(dtype) {
            // The highest exponent is that of infinity and NaN, the lowest that of subnormal numbers.
            block[at + 1] &= if number % 5 == 0 { 0x83 } else { 0xbf };
        }
    }
    bytes
}

#[test]
fn every_format_is_what_candle_dequantizes() {
    for dtype in ALL {
        let kind = Kind::of(dtype).unwrap();
        assert_eq!(kind.block(), (dtype.block_size(), dtype.type_size()));
        let columns = 40 * dtype.block_size();
        let row = blocks(dtype, 40);
        let CpuStorage::F32(expected) = dtype.from_data(Cow::Borrowed(&row)).dequantize(columns).unwrap()
        else {
            panic!("candle dequantizes to f32");
        };
        let mut found = vec![f32::NAN; columns];
        kind.fill(&row, 0, &mut found);
        assert!(expected.iter().any(|value| *value != 0.0));
        for (column, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{dtype:?}, value {column}: {found} {expected}");
        }
        // Any part is a beginning, and any length an end.
        for (column, len) in [(32, 32), (64, 7), (96, 300), (columns - 32, 32), (columns - 64, 45)] {
            let mut part = vec![f32::NAN; len];
            kind.fill(&row, column, &mut part);
            assert_eq!(part, expected[column..column + len], "{dtype:?} from {column}");
        }
    }
}

#[test]
#[should_panic(expected = "column 16 is no multiple of 32")]
fn a_part_is_not_begun_in_its_middle() {
    Kind::Q4_0.fill(&blocks(GgmlDType::Q4_0, 2), 16, &mut [0.0; 16]);
}

#[test]
#[ignore]
fn zz_speed() {
    let now = || {
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut t) };
        t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
    };
    for dtype in ALL {
        let columns = 1536;
        let row = blocks(dtype, columns / dtype.block_size());
        let kind = Kind::of(dtype).unwrap();
        let mut out = vec![0f32; columns];
        let x = vec![1f32; columns];
        let mut best = [f64::INFINITY; 3];
        let mut s = 0.0;
        for _ in 0..20 {
            let t = now();
            for _ in 0..500 {
                kind.fill(std::hint::black_box(&row), 0, &mut out);
                std::hint::black_box(&mut out);
            }
            let a = now();
            for _ in 0..500 {
                s += dot(std::hint::black_box(&x), std::hint::black_box(&out));
            }
            let b = now();
            for _ in 0..500 {
                for piece in out.chunks_mut(256).enumerate() {
                    kind.fill(std::hint::black_box(&row), 256 * piece.0, piece.1);
                }
            }
            let c = now();
            best = [best[0].min(a - t), best[1].min(b - a), best[2].min(c - b)];
        }
        let rate = |t: f64| 500.0 * columns as f64 / t / 1e9;
        println!(
            "{dtype:?}: fill {:.2} dot {:.2} pieces {:.2} G/s {s}",
            rate(best[0]),
            rate(best[1]),
            rate(best[2])
        );
    }
}
