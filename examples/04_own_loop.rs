//! The training loop by hand, for those who want their own:
//!
//!     cargo run --release --example 04_own_loop
//!
//! Takes the bundled tiny model, puts low-rank pairs beside its feed-forward layers, makes thirty steps on the quickstart
//! data and writes an adapter that Hugging Face PEFT loads. `peft finetune` does the same with checkpoints, resuming,
//! evaluation and a receipt of its settings.

#![expect(clippy::print_stdout, reason = "a program that tells what it does")]

use std::path::Path;

use candle_core::Device;
use peft::Result;
use peft::adapter::{LoraConfig, Targets, attach, hf, init, resolve};
use peft::data::{Dataset, Format, Order, Preparation, Sampler, Source, SpecialTokens, TrainOn};
use peft::model::{Decoder, Pretrained, Recompute};
use peft::recipe::TemplateVariables;
use peft::run::text_of;
use peft::train::{AdamW, AdamWConfig, step_gradients};

fn main() -> Result<()> {
    // A model is opened without reading its weights: configuration, names and shapes are known at once.
    let base = Pretrained::open("examples/tiny-llama")?;
    let mut model = Decoder::open(&base, base.compute_dtype(), &Device::Cpu)?;

    // Data becomes rows: tokens, and for each of them whether it is to be learned.
    let text = text_of(&base, &TemplateVariables::default(), SpecialTokens::default())?;
    let source = Source { path: "datasets/quickstart.jsonl".into(), weight: 1.0, format: Format::Auto };
    let preparation = Preparation {
        max_length: 512,
        train_on: TrainOn::Completion,
        eval_share: 0.05,
        eval_least: 0,
        seed: 42,
    };
    let data = Dataset::load(&[source], &[], &text, &preparation)?;
    let order = Order { seed: 42, batch_size: 4, pack: true, max_length: 512 };
    let mut batches = Sampler::new(&data.train, order);

    // An adapter is something done to a model: the layers that it goes to, its first values, then attaching it. What
    // comes back are the trainables, which share storage with the model.
    let config = LoraConfig {
        rank: 16,
        alpha: Some(32.0),
        targets: Targets::names(["gate_proj", "up_proj", "down_proj"]),
        ..LoraConfig::default()
    };
    let placements = resolve(&config, base.config())?;
    let first = init::fresh(&config, &placements.placements, base.config(), &Device::Cpu)?;
    let trainables = attach(model.linears_mut(), &placements.placements, &first, 0.0, 0)?;

    // A step: the gradients of the mean loss over all labelled tokens, then an update.
    let mut optimizer = AdamW::new(AdamWConfig::default(), &trainables, false)?;
    for step in 0..30 {
        let batch = [batches.batch(step)];
        let result = step_gradients(&model, &trainables, &batch, Some(step), Recompute::None)?;
        let clip = (1.0 / result.norm).min(1.0);
        optimizer.update(&trainables, &result.gradients, clip, 2e-3)?;
        println!("step {:2}  loss {:.4}  gradient norm {:.3}", step + 1, result.loss, result.norm);
    }

    let folder = Path::new("runs/04_own_loop");
    std::fs::create_dir_all(folder)?;
    let tensors = trainables.iter().map(|(name, variable)| (&**name, variable.as_tensor()));
    let provenance =
        hf::Provenance { base_model: Some("examples/tiny-llama".to_string()), ..Default::default() };
    hf::write(folder, &config, &placements, tensors, &provenance)?;
    println!("wrote {}", folder.display());
    Ok(())
}
