//! Differentiation by candle's autograd on a small local graph: the judge of every hand-written backward, and the
//! backward on devices that have no fused kernel.

use candle_core::{Tensor, Var};

use crate::error::{Error, Result};

/// The gradients of `sum(f(inputs) * dy)` with respect to each of `inputs`, in their types.
///
/// `f` sees the inputs as variables; whatever else it uses is a constant.
pub fn differentiate(
    inputs: &[&Tensor],
    dy: &Tensor,
    f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let variables: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x)).collect::<Result<_, _>>()?;
    let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors)?;
    let gradients = (y * dy)?.sum_all()?.backward()?;
    tensors
        .iter()
        .map(|x| match gradients.get(x) {
            Some(gradient) => Ok(gradient.detach()),
            None => Ok(x.zeros_like()?),
        })
        .collect::<Result<_, Error>>()
}
