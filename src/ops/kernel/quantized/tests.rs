use std::borrow::Cow;

use candle_core::CpuStorage;

use super::dots::rounded;
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
fn dots_are_those_of_the_values() {
    fn check<F: Format + Copy>(format: F, kind: Kind, row: &[u8], x: &[bf16], values: &[f32]) {
        let what = format!("{kind:?}");
        let exact = |x: &dyn Fn(usize) -> f32, w: &dyn Fn(f32) -> f32| -> (f64, f64) {
            let products = values.iter().enumerate().map(|(i, v)| f64::from(x(i)) * f64::from(w(*v)));
            products.fold((0.0, 0.0), |(sum, all), product| (sum + product, all + product.abs()))
        };
        let wide_x: Vec<f32> = x.iter().map(|x| x.to_f32() * 1.003).collect();
        let (expected, all) = exact(&|i| wide_x[i], &|w| w);
        let found = f64::from(wide(format, row, &wide_x));
        assert!((found - expected).abs() <= 1e-6 * all, "{what}: {found} for {expected}");
        #[cfg(target_arch = "x86_64")]
        if let words @ Row::Words(_) = Row::new(x) {
            let (expected, all) = exact(&|i| x[i].to_f32(), &|w| w);
            let found = f64::from(kind.dot_narrow(row, &words));
            assert!((found - expected).abs() <= 1e-6 * all, "{what} as integers: {found} for {expected}");
        }
        let (expected, all) = exact(&|i| x[i].to_f32(), &|w| bf16::from_f32(w).to_f32());
        let found = f64::from(rounded(format, row, x));
        assert!((found - expected).abs() <= 1e-6 * all, "{what} in bf16: {found} for {expected}");
    }
    // As many blocks of 32 as are taken at once, and more, and less.
    for (dtype, columns) in
        ALL.into_iter().flat_map(|dtype| [5 * 256, 7 * 256].map(|columns| (dtype, columns)))
    {
        let columns = if dtype.block_size() == 32 { columns - 32 } else { columns };
        let row = blocks(dtype, columns / dtype.block_size());
        let x: Vec<bf16> = (0..columns).map(|i| bf16::from_f32((i * 37 % 101) as f32 / 50.0 - 1.0)).collect();
        let kind = Kind::of(dtype).unwrap();
        let mut values = vec![0.0; columns];
        kind.fill(&row, 0, &mut values);
        with_format!(kind, check(kind, &row, &x, &values));
    }
}

#[test]
#[should_panic(expected = "column 16 is no multiple of 32")]
fn a_part_is_not_begun_in_its_middle() {
    Kind::Q4_0.fill(&blocks(GgmlDType::Q4_0, 2), 16, &mut [0.0; 16]);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_row_as_integers_is_the_row() {
    let words = |values: &[f32]| {
        let mut row = vec![bf16::ZERO; 64];
        row.iter_mut().zip(values).for_each(|(to, from)| *to = bf16::from_f32(*from));
        Words::of(&row).map(|words| words.to_f32())
    };
    // All eight bits of values within a factor of 128 of the greatest are there.
    let exact = [255.0, -2.0, 1.9921875, 3.15625, -0.0];
    assert_eq!(words(&exact).unwrap()[..5], exact);
    // Smaller ones are off by half a unit at most, which is 2^-15 of the greatest's power of two.
    let found = words(&[255.0, 1.0 / 128.0, 3.01e-3, -5e-4]).unwrap();
    for (found, expected) in found.iter().zip([255.0, 1.0 / 128.0, 3.01e-3, -5e-4]) {
        assert!((found - expected).abs() <= 128.0 / 32768.0, "{found} for {expected}");
    }
    assert_eq!(words(&[1e-30, -3e-38]).unwrap()[2..], [0.0; 62]);
    for value in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30] {
        assert!(words(&[1.0, value]).is_none(), "{value}");
    }
    let border = 2f32.powi(74);
    assert!(words(&[-border]).is_none() && words(&[border * 0.99]).is_some());
}

#[cfg(target_arch = "x86_64")]
#[test]
fn beside_outliers_integers_are_off_by_a_part_of_the_greatest() {
    for dtype in ALL {
        let (kind, columns) = (Kind::of(dtype).unwrap(), 4 * 256);
        let row = blocks(dtype, columns / dtype.block_size());
        let value = |i: usize| if i % 32 == 5 { 200.0 } else { (i * 37 % 101) as f32 / 50.0 - 1.0 };
        let x: Vec<bf16> = (0..columns).map(|i| bf16::from_f32(value(i) / 3.0)).collect();
        let Row::Words(words) = Row::new(&x) else { continue };
        let mut w = vec![0.0; columns];
        kind.fill(&row, 0, &mut w);
        let products = x.iter().zip(&w).map(|(x, w)| f64::from(x.to_f32()) * f64::from(*w));
        let sizes: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
        let expected: f64 = products.clone().sum();
        let (greatest, all) = (200.0 / 3.0, products.map(f64::abs).sum::<f64>());
        let off = (f64::from(kind.dot_narrow(&row, &Row::Words(words))) - expected).abs();
        assert!(off <= greatest * 2f64.powi(-15) * sizes + 1e-6 * all, "{dtype:?}: off by {off}");
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for dtype in ALL {
        let (kind, columns) = (Kind::of(dtype).unwrap(), 2 * dtype.block_size());
        let row = blocks(dtype, 2);
        let mut x = vec![bf16::ONE; columns];
        for value in [bf16::NAN, bf16::INFINITY] {
            x[columns - 3] = value;
            assert!(!kind.dot_narrow(&row, &Row::new(&x)).is_finite(), "{dtype:?}, {value}");
        }
    }
}
