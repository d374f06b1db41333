//! A model ready to answer: weights, adapter, tokenizer.

use std::path::Path;

use candle_core::Device;

use super::choice::DtypeChoice;
use super::prepared::text_of;
use crate::adapter::{attach, hf};
use crate::data::Text;
use crate::error::{Context, Result};
use crate::model::{Decoder, Pretrained};

/// A model with its tokenizer.
#[derive(Debug)]
pub struct Loaded {
    /// The weights, with the adapter beside them.
    pub model: Decoder,
    /// Tokenizer and chat template.
    pub text: Text,
    /// What the user should look at.
    pub warnings: Vec<String>,
}

impl Loaded {
    /// Opens a folder, a `.gguf` file or a Hub id, with an adapter beside its weights.
    pub fn open(source: &str, adapter: Option<&Path>, dtype: DtypeChoice) -> Result<Self> {
        let base = Pretrained::open(source)?;
        let adapter = match adapter {
            Some(folder) => {
                let adapter = hf::Adapter::read(folder, &Device::Cpu)?;
                Some((adapter.fit(&base).at(folder)?, adapter))
            }
            None => None,
        };
        let text = text_of(&base, None)?;
        let mut model = Decoder::open(&base, dtype.of(&base), &Device::Cpu)?;
        let mut warnings = Vec::new();
        if let Some((placements, adapter)) = adapter {
            attach(model.linears_mut(), &placements.placements, &adapter.tensors, 0.0, 0)?;
            warnings.extend(adapter.base_mismatch(source));
            warnings.extend(adapter.warnings);
        }
        Ok(Self { model, text, warnings })
    }
}
