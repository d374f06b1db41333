//! Tensor values as slices, and the types that ops compute in.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Storage, StorageRef, Tensor, WithDType};
use half::bf16;

use super::product::{self, Matrix};
use crate::error::{Error, Result};

/// A type that activations are held in. Arithmetic inside an op is in f32.
pub(crate) trait Element: WithDType + Copy + Send + Sync {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
    /// [`product::product`] for values of this type.
    fn product(c: &mut [f32], beta: f32, alpha: f32, a: Matrix<'_, Self>, b: Matrix<'_, Self>);
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    fn product(c: &mut [f32], beta: f32, alpha: f32, a: Matrix<'_, Self>, b: Matrix<'_, Self>) {
        product::of_f32(c, beta, alpha, a, b);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Rounds to nearest even; written without branches on the value so that loops over it vectorise.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        // A NaN whose payload sits in the low half must not round to infinity.
        let nan = (bits >> 16) | 0x40;
        Self::from_bits(if value.is_nan() { nan } else { rounded } as u16)
    }

    fn product(c: &mut [f32], beta: f32, alpha: f32, a: Matrix<'_, Self>, b: Matrix<'_, Self>) {
        product::of_bf16(c, beta, alpha, a, b);
    }
}

/// The values of a contiguous tensor on the CPU, borrowed.
pub(crate) struct Values<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    element: PhantomData<T>,
}

impl<'a, T: Element> Values<'a, T> {
    /// Fails when `tensor` is not contiguous, not on the CPU or not of type `T`.
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::invalid(format!("tensor of shape {:?} is not contiguous", tensor.dims())));
        };
        match &*storage {
            Storage::Cpu(values) => values.as_slice::<T>()?,
            _ => return Err(Error::invalid("tensor is not on the CPU")),
        };
        Ok(Self { storage, range: start..end, element: PhantomData })
    }
}

impl<T: Element> Deref for Values<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let Storage::Cpu(values) = &*self.storage else { return &[] };
        // `of` has checked type and place of the storage, and nothing changes them while it is borrowed.
        values.as_slice::<T>().map_or(&[], |all| &all[self.range.clone()])
    }
}

/// The values of a tensor on the CPU that has just been computed: taken out, not copied, so that they can be changed. No other
/// tensor may share its storage.
pub(crate) fn into_values<T: Element>(tensor: Tensor) -> Result<Vec<T>> {
    struct Take<T>(RefCell<Vec<T>>);

    impl<T: Element> InplaceOp1 for Take<T> {
        fn name(&self) -> &'static str {
            "take"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
            let taken = std::mem::replace(storage, T::to_cpu_storage_owned(Vec::new()));
            *self.0.borrow_mut() = T::cpu_storage_data(taken)?;
            Ok(())
        }
    }

    let whole = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
    let take = Take(RefCell::new(Vec::new()));
    tensor.inplace_op1(&take)?;
    let values = take.0.into_inner();
    if !whole || values.len() != tensor.elem_count() {
        return Err(Error::invalid("part of a tensor cannot be taken out of it"));
    }
    Ok(values)
}

/// A tensor on the CPU that owns `values`.
pub(crate) fn to_tensor<T: Element>(values: Vec<T>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Calls `$function::<T>($arguments)` with the element type of `$dtype`.
macro_rules! dispatch {
    ($dtype:expr, $function:ident $(::<$other:ident>)? ( $($argument:expr),* $(,)? )) => {
        match $dtype {
            candle_core::DType::F32 => $function::<f32 $(, $other)?>($($argument),*),
            candle_core::DType::BF16 => $function::<half::bf16 $(, $other)?>($($argument),*),
            other => Err($crate::error::Error::invalid(format!(
                "values of type {other:?} are not computed with; expected F32 or BF16"
            ))),
        }
    };
}
pub(crate) use dispatch;
