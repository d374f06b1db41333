//! Matrix products of tensors, on the CPU through `kernel::multiply`, elsewhere through candle. Sums are in f32 and rounded
//! once. A quantized weight is dequantized piece by piece on the way into the kernels.

use candle_core::{DType, Tensor};
use half::bf16;

use super::kernel::{self, Element, Factor, Values, multiply, to_tensor, written};
use super::{Quantized, Weight};
use crate::error::{Error, Result};

/// The right side of a product: a tensor or a weight, and which way round it is read.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    values: Right<'a>,
    transposed: bool,
}

#[derive(Debug, Clone, Copy)]
enum Right<'a> {
    Tensor(&'a Tensor),
    Quantized(&'a Quantized),
}

impl<'a> From<&'a Tensor> for Operand<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self { values: Right::Tensor(tensor), transposed: false }
    }
}

impl<'a> From<&'a Weight> for Operand<'a> {
    fn from(weight: &'a Weight) -> Self {
        let values = match weight {
            Weight::Dense(parameter) => Right::Tensor(parameter.tensor()),
            Weight::Quantized(quantized) => Right::Quantized(quantized),
        };
        Self { values, transposed: false }
    }
}

impl Operand<'_> {
    /// With rows and columns exchanged.
    #[must_use]
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn columns(&self) -> Result<usize> {
        let (rows, columns) = match self.values {
            Right::Tensor(tensor) => tensor.dims2()?,
            Right::Quantized(quantized) => quantized.dims(),
        };
        Ok(if self.transposed { rows } else { columns })
    }

    /// The values as a tensor, quantized ones dequantized as a whole.
    fn tensor(&self) -> Result<Tensor> {
        let tensor = match self.values {
            Right::Tensor(tensor) => tensor.clone(),
            Right::Quantized(quantized) => quantized.dequantize()?,
        };
        Ok(if self.transposed { tensor.t()? } else { tensor })
    }
}

/// `a [m, k]` times `b [k, n]`, in the type of `a`.
pub fn matmul<'b>(a: &Tensor, b: impl Into<Operand<'b>>) -> Result<Tensor> {
    sum_of_products(&[(a, b.into())], a.dtype())
}

/// `a [m, k]` times `b [k, n]`, in f32.
pub fn matmul_f32<'b>(a: &Tensor, b: impl Into<Operand<'b>>) -> Result<Tensor> {
    sum_of_products(&[(a, b.into())], DType::F32)
}

/// `scale` times `a [m, k]` times `b [k, n]`, in f32.
pub fn scaled_matmul_f32<'b>(scale: f64, a: &Tensor, b: impl Into<Operand<'b>>) -> Result<Tensor> {
    let terms = [(a, b.into())];
    if a.device().is_cpu() {
        multiplied::<f32>(scale as f32, &terms)
    } else {
        Ok((composed(&terms, DType::F32)? * scale)?)
    }
}

/// The sum of the products of all pairs, `[m, n]` in `dtype`, rounded once. Where one of the factors is bf16, the others
/// are rounded to it too.
pub fn sum_of_products(terms: &[(&Tensor, Operand<'_>)], dtype: DType) -> Result<Tensor> {
    let on_cpu = terms.iter().all(|(a, _)| a.device().is_cpu());
    if let Some(product) = product_of_few(terms, dtype) {
        return product;
    }
    match dtype {
        DType::F32 if on_cpu => multiplied::<f32>(1.0, terms),
        DType::BF16 if on_cpu => multiplied::<bf16>(1.0, terms),
        _ => composed(terms, dtype),
    }
}

/// The most rows whose products with a weight as stored, and with a low-rank term beside it where `adapted`, have each the bits
/// that they have alone.
#[must_use]
pub fn rows_alike(weight: &Weight, adapted: bool) -> usize {
    let of_weight = match weight {
        Weight::Quantized(_) => FEW,
        Weight::Dense(parameter) if !parameter.tensor().device().is_cpu() => 1,
        Weight::Dense(_) => kernel::rows_alike(weight.dtype() == DType::BF16),
    };
    if adapted { of_weight.min(kernel::rows_alike(false)) } else { of_weight }
}

/// Rows for which dequantizing a weight once for each is faster than packing it.
const FEW: usize = 2;

/// A few rows times a quantized weight, as in generating token by token, and the other terms added to that.
fn product_of_few(terms: &[(&Tensor, Operand<'_>)], dtype: DType) -> Option<Result<Tensor>> {
    let [(a, Operand { values: Right::Quantized(weight), transposed: true }), rest @ ..] = terms else {
        return None;
    };
    let sum = || {
        let product = weight.product_of_few(a)?;
        let sum = if rest.is_empty() { product } else { (product + sum_of_products(rest, DType::F32)?)? };
        Ok(sum.to_dtype(dtype)?)
    };
    (a.dim(0).ok()? <= FEW).then(sum)
}

/// The same through candle.
fn composed(terms: &[(&Tensor, Operand<'_>)], dtype: DType) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (a, b) in terms {
        let product = a.matmul(&b.tensor()?.to_dtype(a.dtype())?)?.to_dtype(dtype)?;
        sum = Some(match sum {
            None => product,
            Some(sum) => (sum + product)?,
        });
    }
    sum.ok_or_else(|| Error::invalid("a sum of no products"))
}

fn multiplied<T: Element>(alpha: f32, terms: &[(&Tensor, Operand<'_>)]) -> Result<Tensor> {
    let Some((a, b)) = terms.first() else { return Err(Error::invalid("a sum of no products")) };
    let shape = [a.dim(0)?, b.columns()?];
    with_factors(terms, |pairs| {
        to_tensor(written::<T>(shape[0] * shape[1], |out| multiply(out, 0.0, alpha, pairs)), &shape)
    })
}

/// Calls `f` with the terms as the kernels take them.
fn with_factors(
    terms: &[(&Tensor, Operand<'_>)],
    f: impl FnOnce(&[(Factor<'_>, Factor<'_>)]) -> Result<Tensor>,
) -> Result<Tensor> {
    let stored: Vec<Stored<'_>> = terms
        .iter()
        .flat_map(|(a, b)| [Stored::of(Operand::from(*a)), Stored::of(*b)])
        .collect::<Result<_>>()?;
    let views: Vec<View<'_>> = stored.iter().map(Stored::view).collect::<Result<_>>()?;
    let factors: Vec<Factor<'_>> = views.iter().map(View::factor).collect();
    let pairs: Vec<(Factor<'_>, Factor<'_>)> =
        factors.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    f(&pairs)
}

/// A matrix as it lies in memory, and whether it is read the other way round: a transposed view is not copied.
struct Stored<'a> {
    rows: Rows<'a>,
    transposed: bool,
}

enum Rows<'a> {
    Tensor(Tensor),
    Quantized(&'a Quantized),
}

impl<'a> Stored<'a> {
    fn of(operand: Operand<'a>) -> Result<Self> {
        let Operand { values, transposed } = operand;
        let x = match values {
            Right::Quantized(quantized) => return Ok(Self { rows: Rows::Quantized(quantized), transposed }),
            Right::Tensor(x) => x,
        };
        if !x.is_contiguous() && x.t()?.is_contiguous() {
            return Ok(Self { rows: Rows::Tensor(x.t()?), transposed: !transposed });
        }
        Ok(Self { rows: Rows::Tensor(x.contiguous()?), transposed })
    }

    fn view(&self) -> Result<View<'_>> {
        let (values, columns) = match &self.rows {
            Rows::Tensor(rows) if rows.dtype() == DType::BF16 => {
                (Either::Bf16(Values::of(rows)?), rows.dim(1)?)
            }
            Rows::Tensor(rows) => (Either::F32(Values::of(rows)?), rows.dim(1)?),
            Rows::Quantized(quantized) => (Either::Quantized(quantized), quantized.dims().1),
        };
        Ok(View { values, columns, transposed: self.transposed })
    }
}

struct View<'a> {
    values: Either<'a>,
    columns: usize,
    transposed: bool,
}

enum Either<'a> {
    Bf16(Values<'a, bf16>),
    F32(Values<'a, f32>),
    Quantized(&'a Quantized),
}

impl View<'_> {
    fn factor(&self) -> Factor<'_> {
        let factor = match &self.values {
            Either::Bf16(values) => Factor::bf16(values, self.columns),
            Either::F32(values) => Factor::f32(values, self.columns),
            Either::Quantized(quantized) => Factor::filled(*quantized, quantized.dims().0, self.columns),
        };
        if self.transposed { factor.t() } else { factor }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn matrix(rows: usize, columns: usize) -> Tensor {
        Tensor::rand(-1f32, 1.0, (rows, columns), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
    }

    #[test]
    fn a_sum_of_bf16_products_is_that_of_f32_products() {
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        for (m, k, n, r) in [(1, 1, 1, 1), (7, 33, 5, 3), (40, 64, 70, 16)] {
            let (a, b, u, v) = (matrix(m, k), matrix(n, k), matrix(m, r), matrix(r, n));
            let (bt, terms) = (b.t().unwrap(), (&a, &u));
            let expected = wide(&a).matmul(&wide(&b).t().unwrap()).unwrap();
            let expected = (expected + wide(&u).matmul(&wide(&v)).unwrap()).unwrap();
            let found =
                sum_of_products(&[(terms.0, (&bt).into()), (terms.1, (&v).into())], DType::F32).unwrap();
            let rounded =
                sum_of_products(&[(terms.0, (&bt).into()), (terms.1, (&v).into())], DType::BF16).unwrap();
            let rows =
                |x: &Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for ((found, rounded), expected) in rows(&found).iter().zip(rows(&rounded)).zip(rows(&expected)) {
                assert!((found - expected).abs() <= 1e-4, "{found} for {expected}");
                assert!(
                    (rounded - expected).abs() <= 1e-4 + expected.abs() / 200.0,
                    "{rounded} for {expected}"
                );
            }
        }
    }
}
