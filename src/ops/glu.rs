//! Gated linear unit: `activation(gate) * up`.

/// The activation of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`: SwiGLU.
    Silu,
    /// `x * Phi(x)`, with the error function.
    Gelu,
    /// The tanh approximation of `Gelu`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + exp(-x))`: the original GLU.
    Sigmoid,
    /// `x`: a bilinear unit.
    Identity,
}
