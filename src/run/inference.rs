//! A model ready to answer: weights, adapter, tokenizer.

use std::path::Path;

use candle_core::Device;

use super::kernels::ChosenKernels;
use super::told::{self, Told, check_records};
use crate::adapter::{attach, hf};
use crate::data::{Layout, Text};
use crate::error::{Context, Error, Result, is_there};
use crate::model::{Decoder, Pretrained};
use crate::recipe::{DtypeChoice, TemplateVariables};
use crate::train;
use crate::weights::SPECIAL_TOKENS;

/// A model with its tokenizer.
#[derive(Debug)]
pub struct Loaded {
    /// The weights, with the adapter beside them.
    pub model: Decoder,
    /// Tokenizer and chat template.
    pub text: Text,
    /// How the adapter's training data was laid out, where it says so.
    pub layout: Option<Layout>,
    /// These lines tell the user whose tokenizer files are used, what the chat template is told, and how control tokens are
    /// encoded.
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
        let is_of_adapter = metadata.is_some_and(|metadata| metadata.contains_key(SPECIAL_TOKENS));
        let adapter_text = match &adapter {
            Some((_, adapter)) => base.adapter_text(Path::new(&adapter.source))?,
            None => None,
        };
        let (files, owner, whose_files) = match (adapter_text, &adapter) {
            (Some(text), Some((_, adapter))) => {
                let source = adapter.source.as_str();
                let used = format!("the tokenizer files of the adapter `{source}` are used, not the model's");
                let said = text.said(&used);
                (text.files, source, Some(said))
            }
            _ => (base.text()?, base.name(), None),
        };
        let told = Told::by_records(&files, metadata, TemplateVariables::default())?;
        let text = told.text_with(files, &base).at(owner)?;
        let told = told.read_by(&text).map(|told| format!("the chat template is told {told}"));
        let trained = if is_of_adapter { "adapter" } else { "model" };
        let spelt = text
            .takes_control_tokens_for_text()
            .then(|| format!("control tokens in texts are encoded as text, as the {trained} was trained"));
        let notes = whose_files.into_iter().chain(told).chain(spelt).collect();
        let mut model = Decoder::open(&base, dtype.or(base.compute_dtype()), &Device::Cpu)?;
        let (mut warnings, mut layout) = (base.warnings().to_vec(), None);
        if let Some((placements, adapter)) = adapter {
            attach(model.linears_mut(), &placements.placements, &adapter.tensors, 0.0, 0)?;
            model.set_routers(&adapter.routers)?;
            layout = told::layout(&adapter.metadata)?;
            warnings.extend(adapter.base_mismatch(source));
            warnings.extend(adapter.warnings);
        }
        Ok(Self { model, text, layout, notes, warnings })
    }
}

/// The adapter in a folder; says of a run that has not ended where it stands.
pub fn read_adapter(folder: &Path) -> Result<hf::Adapter> {
    refuse_unfinished(folder, hf::CONFIG_FILE, "adapter")?;
    let adapter = hf::Adapter::read(folder, &Device::Cpu)?;
    check_records(&adapter.metadata).at(folder)?;
    Ok(adapter)
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
