//! Matrix products of tensors, on the CPU through `kernel::multiply`, elsewhere through candle. Sums are in f32 and rounded
//! once.

use candle_core::{DType, Tensor};
use half::bf16;

use super::kernel::{Element, Factor, Values, multiply, to_tensor, written};
use crate::error::{Error, Result};

/// `a [m, k]` times `b [k, n]`, in the type of `a`.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    sum_of_products(&[(a, b)], a.dtype())
}

/// `a [m, k]` times `b [k, n]`, in f32.
pub fn matmul_f32(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    sum_of_products(&[(a, b)], DType::F32)
}

/// The sum of the products of all pairs, `[m, n]` in `dtype`, rounded once. Where one of the factors is bf16, the others
/// are rounded to it too.
pub fn sum_of_products(terms: &[(&Tensor, &Tensor)], dtype: DType) -> Result<Tensor> {
    let on_cpu = terms.iter().all(|(a, _)| a.device().is_cpu());
    match dtype {
        DType::F32 if on_cpu => multiplied::<f32>(terms),
        DType::BF16 if on_cpu => multiplied::<bf16>(terms),
        _ => composed(terms, dtype),
    }
}

/// The same through candle.
fn composed(terms: &[(&Tensor, &Tensor)], dtype: DType) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (a, b) in terms {
        let product = a.matmul(&b.to_dtype(a.dtype())?)?.to_dtype(dtype)?;
        sum = Some(match sum {
            None => product,
            Some(sum) => (sum + product)?,
        });
    }
    sum.ok_or_else(|| Error::invalid("a sum of no products"))
}

fn multiplied<T: Element>(terms: &[(&Tensor, &Tensor)]) -> Result<Tensor> {
    let stored: Vec<Stored> =
        terms.iter().flat_map(|(a, b)| [Stored::of(a), Stored::of(b)]).collect::<Result<_>>()?;
    let views: Vec<View<'_>> = stored.iter().map(Stored::view).collect::<Result<_>>()?;
    let factors: Vec<Factor<'_>> = views.iter().map(View::factor).collect();
    let pairs: Vec<(Factor<'_>, Factor<'_>)> =
        factors.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let Some((a, b)) = terms.first() else { return Err(Error::invalid("a sum of no products")) };
    let shape = [a.dim(0)?, b.dim(1)?];
    let out = written::<T>(shape[0] * shape[1], |out| multiply(out, 0.0, 1.0, &pairs));
    to_tensor(out, &shape)
}

/// A matrix as it lies in memory, and whether it is read the other way round: a transposed view is not copied.
struct Stored {
    rows: Tensor,
    transposed: bool,
}

impl Stored {
    fn of(x: &Tensor) -> Result<Self> {
        if !x.is_contiguous() && x.t()?.is_contiguous() {
            return Ok(Self { rows: x.t()?, transposed: true });
        }
        Ok(Self { rows: x.contiguous()?, transposed: false })
    }

    fn view(&self) -> Result<View<'_>> {
        let values = match self.rows.dtype() {
            DType::BF16 => Either::Bf16(Values::of(&self.rows)?),
            _ => Either::F32(Values::of(&self.rows)?),
        };
        Ok(View { values, columns: self.rows.dim(1)?, transposed: self.transposed })
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
}

impl View<'_> {
    fn factor(&self) -> Factor<'_> {
        let factor = match &self.values {
            Either::Bf16(values) => Factor::bf16(values, self.columns),
            Either::F32(values) => Factor::f32(values, self.columns),
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
            let found = sum_of_products(&[(terms.0, &bt), (terms.1, &v)], DType::F32).unwrap();
            let rounded = sum_of_products(&[(terms.0, &bt), (terms.1, &v)], DType::BF16).unwrap();
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
