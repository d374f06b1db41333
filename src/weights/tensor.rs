//! Describes a tensor as its file does: by name, shape and stored type.

use std::fmt;

use candle_core::DType;
use candle_core::quantized::GgmlDType;

/// A tensor as its file has it, without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// The shape, rows first.
    pub shape: Vec<usize>,
    /// Says how the values are stored.
    pub dtype: StoredType,
}

impl TensorInfo {
    /// Returns the number of values in the tensor.
    #[must_use]
    pub fn num_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the number of bytes that the values take in the file.
    #[must_use]
    pub fn size_in_bytes(&self) -> usize {
        match self.dtype {
            StoredType::Float(dtype) => self.num_values() * dtype.size_in_bytes(),
            StoredType::Quantized(dtype) => self.num_values() / dtype.block_size() * dtype.type_size(),
            StoredType::Other(dtype) => self.num_values() * dtype.bitsize() / 8,
        }
    }
}

/// Says how the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// f32, f16 or bf16: what can be read as it is.
    Float(DType),
    /// One of ggml's block formats.
    Quantized(GgmlDType),
    /// Values of another safetensors type are copied but never read.
    Other(safetensors::Dtype),
}

impl StoredType {
    /// The type in a safetensors file; quantized values have none.
    #[must_use]
    pub fn safetensors(self) -> Option<safetensors::Dtype> {
        match self {
            Self::Float(DType::F32) => Some(safetensors::Dtype::F32),
            Self::Float(DType::F16) => Some(safetensors::Dtype::F16),
            Self::Float(DType::BF16) => Some(safetensors::Dtype::BF16),
            Self::Other(dtype) => Some(dtype),
            Self::Float(_) | Self::Quantized(_) => None,
        }
    }
}

impl From<safetensors::Dtype> for StoredType {
    fn from(dtype: safetensors::Dtype) -> Self {
        match dtype {
            safetensors::Dtype::F32 => Self::Float(DType::F32),
            safetensors::Dtype::F16 => Self::Float(DType::F16),
            safetensors::Dtype::BF16 => Self::Float(DType::BF16),
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => f.write_str(dtype.as_str()),
            Self::Quantized(dtype) => f.write_str(&format!("{dtype:?}").to_lowercase()),
            Self::Other(dtype) => f.write_str(&dtype.to_string().to_lowercase()),
        }
    }
}
