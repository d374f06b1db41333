//! Speed and memory of fine-tuning, on random tokens of one length:
//!
//!     cargo run --release --example bench_train -- MODEL [--dtype bf16] [--batch 4] [--length 512] [--rank 16]
//!         [--targets mlp|all] [--steps 8] [--piece TOKENS] [--recompute none|block] [--threads 2]
//!
//! A step is what `peft finetune` does in one: forward, loss over all tokens, backward, clipping, AdamW. Prints a line per step
//! and, as the last line, one JSON document: median tokens/s after two steps, seconds from the start to the end of the first
//! forward and first step, peak memory, and the share of the ceiling, which is the step's multiply-adds at the rate that the
//! products of the model's shapes reach by themselves.

#![expect(clippy::print_stdout, reason = "a program that tells what it measures")]

use std::time::Instant;

use candle_core::{DType, Device};
use clap::Parser;
use mimalloc::MiMalloc;
use peft::Result;
use peft::adapter::{LoraConfig, Targets, attach, init, resolve};
use peft::data::Batch;
use peft::model::{Decoder, Pretrained, Recompute};
use peft::ops::{KeepBuffers, Op};
use peft::train::{AdamW, AdamWConfig, peak_rss_bytes, step_gradients};
use serde_json::json;

/// As in the program.
#[global_allocator]
static ALLOCATOR: KeepBuffers<MiMalloc> = KeepBuffers::new(MiMalloc);

#[derive(Parser)]
struct Arguments {
    /// A folder or a GGUF file
    model: String,
    #[arg(long, default_value = "f32")]
    dtype: String,
    #[arg(long, default_value_t = 4)]
    batch: usize,
    #[arg(long, default_value_t = 512)]
    length: usize,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// mlp or all
    #[arg(long, default_value = "mlp")]
    targets: String,
    #[arg(long, default_value_t = 8)]
    steps: u64,
    /// Tokens computed at once
    #[arg(long, default_value_t = 1024)]
    piece: usize,
    /// none or block
    #[arg(long, default_value = "none")]
    recompute: String,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

fn main() -> Result<()> {
    let begin = Instant::now();
    let arguments = Arguments::parse();
    rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build_global().ok();
    let dtype = if arguments.dtype == "bf16" { DType::BF16 } else { DType::F32 };
    let recompute = if arguments.recompute == "block" { Recompute::Block } else { Recompute::None };

    let base = Pretrained::open(&arguments.model)?;
    let mut model = Decoder::open(&base, dtype, &Device::Cpu)?;
    let opened = begin.elapsed().as_secs_f64();
    let mut names = vec!["gate_proj", "up_proj", "down_proj"];
    if arguments.targets == "all" {
        names.extend(["q_proj", "k_proj", "v_proj", "o_proj"]);
    }
    let config = LoraConfig {
        rank: arguments.rank,
        alpha: Some(32.0),
        dropout: arguments.dropout,
        targets: Targets::names(names),
        ..LoraConfig::default()
    };
    let placements = resolve(&config, base.config())?;
    let first = init::fresh(&config, &placements.placements, base.config(), &Device::Cpu)?;
    let trainables = attach(model.linears_mut(), &placements.placements, &first, arguments.dropout, 0)?;
    let attached = begin.elapsed().as_secs_f64();

    let batch = random_batch(arguments.batch, arguments.length, base.config().vocab_size);
    let mut optimizer = AdamW::new(AdamWConfig::default(), &trainables, false)?;
    let mut rates = Vec::new();
    let mut before = Op::ALL.map(Op::seconds);
    let mut seconds_of_steps = 0.0;
    for step in 0..arguments.steps {
        let start = Instant::now();
        let pieces = batch.pieces(arguments.piece);
        let result = step_gradients(&model, &trainables, &pieces, Some(step), recompute)?;
        optimizer.update(&trainables, &result.gradients, (1.0 / result.norm).min(1.0), 1e-4)?;
        let seconds = start.elapsed().as_secs_f64();
        if step == 1 {
            (before, seconds_of_steps) = (Op::ALL.map(Op::seconds), 0.0);
        } else {
            seconds_of_steps += seconds;
        }
        rates.push(batch.tokens.len() as f64 / seconds);
        println!("{step} {:.4} {:.0} tokens/s", result.loss, rates[rates.len() - 1]);
    }
    let mut rest = seconds_of_steps;
    for (op, before) in Op::ALL.into_iter().zip(before) {
        let seconds = op.seconds() - before;
        rest -= seconds;
        println!("{:>16} {:5.1}%", format!("{op:?}"), 100.0 * seconds / seconds_of_steps);
    }
    println!("{:>16} {:5.1}%", "other", 100.0 * rest / seconds_of_steps);
    let mut steady = rates.split_off(2.min(rates.len()));
    steady.sort_by(f64::total_cmp);
    let report = json!({
        "tokens_per_second": steady.get(steady.len() / 2),
        "peak_rss_mb": peak_rss_bytes() >> 20,
        "peak_buffers_mb": ALLOCATOR.most_in_use() >> 20,
        "seconds_opened": opened,
        "seconds_attached": attached,
    });
    println!("{report}");
    Ok(())
}

/// Documents of `length` random tokens, all of them labelled.
fn random_batch(documents: usize, length: usize, vocab: usize) -> Batch {
    let mut state = 42u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    };
    let tokens = documents * length;
    Batch {
        tokens: (0..tokens).map(|_| token()).collect(),
        supervised: (0..tokens).map(|i| i % length > 0).collect(),
        offsets: (0..=documents).map(|i| i * length).collect(),
        documents: (0..documents as u64).collect(),
    }
}
