//! Speed of generation, on random tokens as the prompt:
//!
//!     cargo run --release --example bench_generate -- MODEL [--dtype bf16] [--prompt 512] [--tokens 128] [--runs 3]
//!         [--temperature 0] [--threads 2]
//!
//! Each run processes the prompt and then generates, as `peft generate` does. The last line is one JSON document:
//! the medians over the runs of prompt and decoding tokens/s, the tokens of the last run, bytes of weights read per second
//! of decoding, and the rate at which this machine reads a buffer of that size, which is what decoding is bound by.

#![expect(clippy::print_stdout, reason = "a program that tells what it measures")]

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device};
use clap::Parser;
use mimalloc::MiMalloc;
use peft::Result;
use peft::generate::{Limits, Sampling, Session};
use peft::model::{Decoder, Pretrained};
use peft::ops::{KeepBuffers, Kernels, Op, Weight};
use peft::run::ChosenKernels;
use peft::train::peak_rss_bytes;
use rayon::prelude::*;
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
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Sample at this temperature from the tokens that have 0.95 of the probability; 0 takes the most probable one
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    #[arg(long, default_value_t = 3)]
    runs: usize,
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build_global().ok();
    let dtype = if arguments.dtype == "bf16" { DType::BF16 } else { DType::F32 };
    let base = Pretrained::open(&arguments.model)?;
    println!("{}", ChosenKernels::of(base.config())?);
    let model = Decoder::open(&base, dtype, &Device::Cpu)?;
    let prompt = random_tokens(arguments.prompt, model.config().vocab_size.min(8000));
    let sampling = Sampling { temperature: arguments.temperature, top_p: 0.95, ..Sampling::default() };
    let limits = Limits { max_new_tokens: arguments.tokens, stop: Vec::new() };

    // The first one brings weights into memory.
    Session::new(&model).generate(&prompt, &limits, sampling, |_| Ok(false))?;
    let (mut prompt_rates, mut rates, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    let mut seconds_of_ops = Op::ALL.map(|_| 0.0);
    for _ in 0..arguments.runs {
        tokens.clear();
        let (start, mut first, mut before) = (Instant::now(), None, [0.0; Op::ALL.len()]);
        Session::new(&model).generate(&prompt, &limits, sampling, |token| {
            tokens.push(token);
            first.get_or_insert_with(|| {
                before = Op::ALL.map(Op::seconds);
                start.elapsed().as_secs_f64()
            });
            Ok(true)
        })?;
        let first = first.unwrap_or_default();
        let decoding = start.elapsed().as_secs_f64() - first;
        for ((sum, op), before) in seconds_of_ops.iter_mut().zip(Op::ALL).zip(before) {
            *sum += 100.0 * (op.seconds() - before) / decoding / arguments.runs as f64;
        }
        prompt_rates.push(prompt.len() as f64 / first);
        rates.push((tokens.len() - 1) as f64 / decoding);
        println!(
            "prompt {:.0} tokens/s, decoding {:.1} tokens/s",
            prompt.len() as f64 / first,
            rates[rates.len() - 1]
        );
    }
    for (op, share) in Op::ALL.into_iter().zip(seconds_of_ops).filter(|(_, share)| *share > 0.0) {
        println!("{:>16} {share:5.1}% of decoding", format!("{op:?}"));
    }
    let weights = model.linears().map(|linear| &linear.weight).chain([model.head()]);
    let bytes: usize = weights.map(bytes_of).sum();
    let decoding = median(&mut rates);
    let peak = peak_rss_bytes();
    let report = json!({
        "kernels": Kernels::current().to_string(),
        "prompt_tokens_per_second": median(&mut prompt_rates),
        "decode_tokens_per_second": decoding,
        "weight_bytes": bytes,
        "gb_per_second": bytes as f64 * decoding * 1e-9,
        "memory_gb_per_second": reading_rate(bytes) * 1e-9,
        "peak_rss_mb": peak as f64 * 1e-6,
        "tokens": tokens,
    });
    println!("{report}");
    Ok(())
}

/// Tokens that look random; those of `compare_generation.py` are the same.
fn random_tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 42u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// What is read of a weight for each token.
fn bytes_of(weight: &Weight) -> usize {
    match weight {
        Weight::Dense(parameter) => {
            parameter.tensor().elem_count() * parameter.tensor().dtype().size_in_bytes()
        }
        Weight::Quantized(quantized) => {
            let (rows, columns) = quantized.dims();
            rows * columns / quantized.stored().block_size() * quantized.stored().type_size()
        }
    }
}

/// Bytes per second at which all threads together read a buffer of `bytes`, the best of some passes.
fn reading_rate(bytes: usize) -> f64 {
    let buffer = vec![1u64; bytes / 8];
    let share = buffer.len().div_ceil(rayon::current_num_threads());
    let pass = |_| {
        let start = Instant::now();
        let sums = buffer.par_chunks(share).map(|part| {
            let mut sums = [0u64; 32];
            for values in part.as_chunks::<32>().0 {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = sum.wrapping_add(*value);
                }
            }
            sums.iter().fold(0u64, |all, sum| all.wrapping_add(*sum))
        });
        black_box(sums.reduce(|| 0, u64::wrapping_add));
        bytes as f64 / start.elapsed().as_secs_f64()
    };
    (0..12).map(pass).fold(0.0, f64::max)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
