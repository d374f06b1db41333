//! Speed and memory of fine-tuning, on random tokens of one length:
//!
//!     cargo run --release --example bench_train -- MODEL [--dtype bf16] [--batch 4] [--length 512] [--rank 16]
//!         [--targets mlp|all] [--steps 8] [--piece TOKENS] [--recompute none|block] [--threads 2] [--products]
//!
//! A step is what `peft finetune` does in one: forward, loss over all tokens, backward, clipping, AdamW. Prints a line per step,
//! the share of each operation in the time, and, as the last line, one JSON document: median tokens/s after two steps, seconds
//! from the start to the end of the first forward, peak memory, the step's floating-point operations per token and, with
//! `--products`, the rate that the products of the model's shapes reach by themselves, and the share that the step has of it.

#![expect(clippy::print_stdout, reason = "a program that tells what it measures")]

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use mimalloc::MiMalloc;
use peft::Result;
use peft::adapter::{LoraConfig, Targets, attach, init, resolve};
use peft::data::Batch;
use peft::model::config::{FeedForwardConfig, LinearConfig, Site};
use peft::model::{Decoder, DecoderConfig, Pretrained, Recompute};
use peft::ops::{Documents, KeepBuffers, Kernels, Op, matmul};
use peft::run::ChosenKernels;
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
    /// Tokens computed at once; 1024 unless told
    #[arg(long)]
    piece: Option<usize>,
    /// none or block
    #[arg(long, default_value = "none")]
    recompute: String,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// All cores unless told
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Measure the products of the model's shapes too
    #[arg(long)]
    products: bool,
}

fn main() -> Result<()> {
    let begin = Instant::now();
    let arguments = Arguments::parse();
    rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build_global().ok();
    let dtype = if arguments.dtype == "bf16" { DType::BF16 } else { DType::F32 };
    let recompute = if arguments.recompute == "block" { Recompute::Block } else { Recompute::None };

    let base = Pretrained::open(&arguments.model)?;
    println!("{}", ChosenKernels::of(base.config())?);
    let mut model = Decoder::open(&base, dtype, &Device::Cpu)?;
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

    let batch = random_batch(arguments.batch, arguments.length, base.config().vocab_size);
    let piece = arguments.piece.unwrap_or(1024);
    let pieces = batch.pieces(piece);
    let documents = Documents::new(pieces[0].offsets.clone(), pieces[0].documents.clone());
    model.forward(&pieces[0].tokens, &documents)?;
    let first_forward = begin.elapsed().as_secs_f64();
    let mut optimizer = AdamW::new(AdamWConfig::default(), &trainables, false)?;
    let mut rates = Vec::new();
    let mut before = Op::ALL.map(Op::seconds);
    let mut seconds_of_steps = 0.0;
    for step in 0..arguments.steps {
        let start = Instant::now();
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
    let rate = steady.get(steady.len() / 2).copied().unwrap_or(f64::NAN);
    let peak = peak_rss_bytes() as f64 / f64::from(1 << 20);
    let flops = flops_per_token(base.config(), &arguments);
    let mut report = json!({
        "kernels": Kernels::current().to_string(),
        "tokens_per_second": rate,
        "peak_rss_mb": peak,
        "peak_buffers_mb": ALLOCATOR.most_in_use() >> 20,
        "seconds_to_first_forward": first_forward,
        "flops_per_token": flops,
    });
    if arguments.products {
        let products = product_rate(base.config(), dtype, batch.tokens.len())?;
        report["product_gflops"] = json!(products);
        report["share_of_ceiling"] = json!(rate * flops / products / 1e9);
    }
    println!("{report}");
    Ok(())
}

/// What a step computes for each token: every weight forward and for the gradient of its input, adapters, and attention,
/// where a token sees half of its document. Of experts those that a token goes to.
fn flops_per_token(config: &DecoderConfig, arguments: &Arguments) -> f64 {
    let mut multiplications = 0.0;
    for linear in config.linears() {
        let (n, k) = (linear.out_features as f64, linear.in_features as f64);
        let in_attention = linear.path.contains("self_attn");
        let is_adapted = linear.layer.is_some_and(|_| linear.site != Site::Router)
            && (arguments.targets == "all" || !in_attention);
        let rank = if is_adapted { arguments.rank as f64 } else { 0.0 };
        multiplications += share(config, &linear) * (2.0 * n * k + 3.0 * rank * (n + k));
    }
    for layer in &config.layers {
        // Two products forward and four backward.
        multiplications += 6.0 * layer.attention.q_width() as f64 * arguments.length as f64 / 2.0;
    }
    2.0 * multiplications
}

/// Of the tokens those that go through a layer, at even load.
fn share(config: &DecoderConfig, linear: &LinearConfig) -> f64 {
    let layer = linear.layer.map(|layer| &config.layers[layer].feed_forward);
    match (linear.site, layer) {
        (Site::Expert(_), Some(FeedForwardConfig::Sparse(moe))) => moe.active as f64 / moe.experts as f64,
        _ => 1.0,
    }
}

/// GFLOP/s over all layers' products, forward and for the gradient of the input, each shape at its best of five.
fn product_rate(config: &DecoderConfig, dtype: DType, tokens: usize) -> Result<f64> {
    // Shapes and rows, and how often they come.
    let mut shapes: BTreeMap<(usize, usize, usize), usize> = BTreeMap::new();
    for linear in config.linears() {
        let rows = (tokens as f64 * share(config, &linear)).round() as usize;
        *shapes.entry((linear.out_features, linear.in_features, rows)).or_default() += 1;
    }
    let random = |shape: (usize, usize)| Tensor::rand(-1f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype);
    let (mut work, mut seconds) = (0.0, 0.0);
    for ((n, k, tokens), count) in shapes {
        let (x, dy, w) = (random((tokens, k))?, random((tokens, n))?, random((n, k))?);
        for (left, right) in [(&x, w.t()?), (&dy, w.clone())] {
            let mut best = f64::INFINITY;
            for _ in 0..5 {
                let start = Instant::now();
                matmul(left, &right)?;
                best = best.min(start.elapsed().as_secs_f64());
            }
            seconds += count as f64 * best;
            work += count as f64 * 2.0 * (tokens * n * k) as f64;
        }
    }
    Ok(work / seconds / 1e9)
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
