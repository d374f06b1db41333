//! `peft merge`: adapters folded into a model, and what is left of them.

use std::path::Path;
use std::sync::atomic::Ordering;

use candle_core::DType;

use super::models::{self, EVAL_TOKENS};
use super::terminal::Terminal;
use super::{Merge, WrittenDtype, interrupt};
use crate::data::eval_batches;
use crate::error::Result;
use crate::eval::evaluate;
use crate::merge::{self, RECEIPT_FILE};
use crate::model::Pretrained;
use crate::recipe::DtypeChoice;
use crate::run::{self, Loaded};

/// Folds adapters into a model, and says what that changed.
pub(super) fn merge(arguments: &Merge, terminal: &mut Terminal) -> Result<()> {
    // Before any work, so that data that cannot be read costs nothing.
    let losses = arguments.data.as_ref().map(|data| before(arguments, data, terminal)).transpose()?;
    let base = Pretrained::open(&arguments.model)?;
    let adapters = arguments.adapter.iter().map(|folder| run::read_adapter(folder)?.for_model(base.config()));
    let adapters = adapters.collect::<Result<Vec<_>>>()?;
    let dtype = arguments.dtype.map(|dtype| match dtype {
        WrittenDtype::F32 => DType::F32,
        WrittenDtype::Bf16 => DType::BF16,
        WrittenDtype::F16 => DType::F16,
    });
    let counter = terminal.counter("folding and reading back");
    let promise = "removing what was written; press Ctrl-C again to stop at once";
    let interrupted = interrupt::listen(terminal, promise)?;
    interrupt::begin();
    let mut progress = |now: merge::Progress| {
        counter.at(now.done as u64, now.total as u64);
        !interrupted.load(Ordering::SeqCst)
    };
    let receipt = merge::merge(&base, &adapters, &arguments.output, dtype, &mut progress)?;
    drop(counter);
    for warning in &receipt.warnings {
        terminal.warn(warning);
    }
    let folded = receipt.tensors.len();
    let share = 100.0 * receipt.changed as f64 / receipt.values.max(1) as f64;
    let adapters = match adapters.len() {
        1 => "the adapter".to_string(),
        many => format!("{many} adapters"),
    };
    terminal
        .say(format_args!("folded {adapters} into {folded} tensors; {share:.1}% of their values changed"));
    terminal.say(format_args!("{:.1}% of the delta survived rounding", 100.0 * receipt.survived));
    terminal.say(format_args!(
        "{} other tensors are byte-identical to the base, {} were converted",
        receipt.identical, receipt.converted
    ));
    if let Some(text) = &receipt.text {
        terminal.say(format_args!("{text}"));
    }
    let output = arguments.output.display();
    terminal.say(format_args!("wrote {output}, with the receipt in {output}/{}", RECEIPT_FILE));
    if let (Some(data), Some(mut losses)) = (&arguments.data, losses) {
        losses.push(("merged", loss(&output_name(arguments), None, data, terminal)?));
        let width = losses.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, loss) in losses {
            terminal.write(format_args!("{name:width$}  {loss:.6}\n"))?;
        }
    }
    Ok(())
}

fn output_name(arguments: &Merge) -> String {
    arguments.output.to_string_lossy().into_owned()
}

/// The loss of the model, and of the model with its adapter where there is one alone.
fn before(arguments: &Merge, data: &Path, terminal: &Terminal) -> Result<Vec<(&'static str, f64)>> {
    let mut losses = vec![("base", loss(&arguments.model, None, data, terminal)?)];
    if let [adapter] = arguments.adapter.as_slice() {
        losses.push(("with the adapter", loss(&arguments.model, Some(adapter), data, terminal)?));
    }
    Ok(losses)
}

/// The mean loss of a model for each token of a file that it is to predict.
fn loss(model: &str, adapter: Option<&Path>, data: &Path, terminal: &Terminal) -> Result<f64> {
    let loaded = Loaded::open(model, adapter, DtypeChoice::Auto)?;
    let rows = models::rows(data, None, &loaded, terminal)?;
    Ok(evaluate(&loaded.model, &eval_batches(&rows, EVAL_TOKENS))?.nll())
}
