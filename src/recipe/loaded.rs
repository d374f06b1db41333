//! A model ready to answer: weights, adapter, tokenizer.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use serde::de::DeserializeOwned;

use super::artifact::{LAYOUT, SPECIAL_TOKENS, TEMPLATE};
use super::choice::DtypeChoice;
use super::kernels::ChosenKernels;
use super::prepared::text_of;
use super::template::TemplateVariables;
use crate::adapter::{attach, hf};
use crate::data::{Layout, SpecialTokens, Text};
use crate::error::{Context, Error, Result, is_there};
use crate::model::{Decoder, Pretrained};
use crate::train;

/// A model with its tokenizer.
#[derive(Debug)]
pub struct Loaded {
    /// The weights, with the adapter beside them.
    pub model: Decoder,
    /// Tokenizer and chat template.
    pub text: Text,
    /// How the adapter's training data was laid out, where it says so.
    pub layout: Option<Layout>,
    /// What the user should know: what the chat template is told, and how control tokens are encoded.
    pub notes: Vec<String>,
    /// What the user should look at.
    pub warnings: Vec<String>,
}

impl Loaded {
    /// Opens a folder, a `.gguf` file or a Hub id, with an adapter beside its weights.
    pub fn open(source: &str, adapter: Option<&Path>, dtype: DtypeChoice) -> Result<Self> {
        refuse_unfinished(Path::new(source), "config.json", "model")?;
        let base = Pretrained::open(source)?;
        ChosenKernels::of(base.config())?;
        let adapter = match adapter {
            Some(folder) => {
                let adapter = read_adapter(folder)?.for_model(base.config())?;
                Some((adapter.fit(&base).at(folder)?, adapter))
            }
            None => None,
        };
        let metadata = adapter.as_ref().map(|(_, adapter)| &adapter.metadata);
        let told: TemplateVariables = recorded(metadata, TEMPLATE)?;
        let special_tokens: SpecialTokens = recorded(metadata, SPECIAL_TOKENS)?;
        let text = text_of(&base, &told, special_tokens)?;
        let told = told.told(&text).map(|told| format!("the chat template is told {told}"));
        let spelt = text
            .takes_control_tokens_for_text()
            .then(|| "control tokens in texts are encoded as text, as the adapter was trained".to_string());
        let notes = told.into_iter().chain(spelt).collect();
        let mut model = Decoder::open(&base, dtype.of(&base), &Device::Cpu)?;
        let (mut warnings, mut layout) = (base.warnings().to_vec(), None);
        if let Some((placements, adapter)) = adapter {
            attach(model.linears_mut(), &placements.placements, &adapter.tensors, 0.0, 0)?;
            model.set_routers(&adapter.routers)?;
            layout = adapter.metadata.get(LAYOUT).and_then(|name| Layout::parse(name));
            warnings.extend(adapter.base_mismatch(source));
            warnings.extend(adapter.warnings);
        }
        Ok(Self { model, text, layout, notes, warnings })
    }
}

/// What the metadata of an adapter says under a key; the default where it says nothing.
fn recorded<T: DeserializeOwned + Default>(
    metadata: Option<&BTreeMap<String, String>>,
    key: &str,
) -> Result<T> {
    let Some(written) = metadata.and_then(|metadata| metadata.get(key)) else { return Ok(T::default()) };
    serde_json::from_str(written)
        .map_err(|error| Error::invalid(format!("`{key}` in the metadata is not readable: {error}")))
}

/// The adapter in a folder; says of a run that has not ended where it stands.
pub fn read_adapter(folder: &Path) -> Result<hf::Adapter> {
    refuse_unfinished(folder, hf::CONFIG_FILE, "adapter")?;
    hf::Adapter::read(folder, &Device::Cpu)
}

/// A run leaves its result at its end; until then there are checkpoints, which hold the same files.
fn refuse_unfinished(folder: &Path, file: &str, what: &str) -> Result<()> {
    let has_ended = [hf::CONFIG_FILE, "config.json"].iter().any(|result| is_there(&folder.join(result)));
    if has_ended || !train::is_run(folder) {
        return Ok(());
    }
    let checkpoints = train::checkpoints(folder)?;
    let newest = checkpoints.iter().rfind(|(_, path)| path.join(file).is_file());
    let hint = match newest {
        Some((_, path)) => format!(
            "its newest checkpoint is `{}`; `peft finetune --resume` goes on with the run",
            path.display()
        ),
        None if checkpoints.is_empty() => {
            "it has no checkpoint either; `peft finetune --resume` goes on with it".to_string()
        }
        // What it trains is of the other kind, as whoever opens it will say.
        None => return Ok(()),
    };
    let folder = folder.display();
    Err(Error::request(format!("`{folder}` is a run that has not ended, so there is no {what} in it yet"))
        .with_hint(hint))
}
