//! The toy outputs that the NJU course on large language models publishes for its assignment 3 (modules
//! `DenseMLPWithLoRA` and `SparseMLPWithLoRA`, PyTorch on CPU, bf16 in and out), from the seeds alone: the same random
//! numbers, first values, feed-forward network and low-rank term as in training.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use peft::adapter::init::nju_pair;
use peft::adapter::torch_random::Generator;
use peft::model::{FeedForward, Linear};
use peft::ops::{Activation, Documents, Dropout, Groups, LowRank, Parameter, Pass, Weight, groups};

use crate::fixture::difference;

const SEED: u64 = 42;
const RANK: usize = 2;
const HIDDEN: usize = 4;

/// A linear layer whose transposed weight `[in, out]` is drawn value by value, with the deviation of a Kaiming normal.
fn kaiming_normal(inputs: usize, outputs: usize, seed: u64) -> Linear {
    let mut stored = vec![0.0; inputs * outputs];
    Generator::new(seed).normal_one_by_one(&mut stored, 0.0, (2.0 / inputs as f64).sqrt());
    linear(
        Tensor::from_vec(stored, (inputs, outputs), &Device::Cpu).unwrap().t().unwrap().contiguous().unwrap(),
    )
}

fn linear(weight: Tensor) -> Linear {
    Linear {
        path: String::new(),
        weight: Weight::Dense(Parameter::new("weight", &weight)),
        bias: None,
        low_rank: None,
    }
}

/// The course puts one term beside the whole network: here beside a linear layer of zeros.
fn term(seed: u64) -> Linear {
    let (a, b) = nju_pair(Activation::Silu, HIDDEN, HIDDEN, RANK, seed);
    let parameter = |values, shape: (usize, usize)| {
        Parameter::new("low_rank", &Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    let low_rank = LowRank {
        a: parameter(a, (RANK, HIDDEN)),
        b: parameter(b, (HIDDEN, RANK)),
        bias: None,
        scale: 1.0,
        dropout: Dropout::NONE,
    };
    let zeros = Tensor::zeros((HIDDEN, HIDDEN), DType::F32, &Device::Cpu).unwrap();
    Linear { low_rank: Some(low_rank), ..linear(zeros) }
}

/// `[tokens, hidden]` through the network of `width` neurons and its term.
fn network(x: &Tensor, width: usize, seed: u64) -> Tensor {
    let network = FeedForward {
        up: kaiming_normal(HIDDEN, width, seed + 1),
        gate: kaiming_normal(HIDDEN, width, seed + 2),
        down: kaiming_normal(width, HIDDEN, seed + 3),
        activation: Activation::Silu,
    };
    let documents = Documents::new(vec![0, x.dims()[0]], vec![0]);
    let pass = Pass::inference(&documents);
    let (y, _) = network.forward(x, &pass).unwrap();
    let (added, _) = term(seed).forward(x, &pass).unwrap();
    (y + added).unwrap()
}

fn rounded(values: &Tensor) -> Vec<f32> {
    let values: Vec<bf16> = values.to_dtype(DType::BF16).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(bf16::to_f32).collect()
}

/// Equal as printed with four decimals.
fn assert_printed(found: &[f32], expected: &[[f32; HIDDEN]]) {
    let expected = expected.as_flattened();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 0.51e-4, "{found} and {expected}");
    }
}

/// What `normal_` draws for a contiguous bf16 tensor: bytes as uniform values, blocks of sixteen, every operation
/// rounded.
fn normal_bf16(seed: u64, count: usize) -> Vec<f32> {
    fn block(values: &mut [f32]) {
        let round = |value: f64| bf16::from_f64(value).to_f64();
        for i in 0..8 {
            let (u1, u2) = (round(1.0 - f64::from(values[i])), f64::from(values[i + 8]));
            let radius = round(round(-2.0 * round(u1.ln())).sqrt());
            let angle = round(round(2.0 * std::f64::consts::PI) * u2);
            values[i] = round(radius * round(angle.cos())) as f32;
            values[i + 8] = round(radius * round(angle.sin())) as f32;
        }
    }
    let mut generator = Generator::new(seed);
    let mut uniform = || (generator.next_u32() & 0xff) as f32 / 256.0;
    let mut values: Vec<f32> = (0..count).map(|_| uniform()).collect();
    values.chunks_exact_mut(16).for_each(block);
    let last = &mut values[count - 16..];
    last.iter_mut().for_each(|value| *value = uniform());
    block(last);
    values
}

#[test]
fn the_dense_toy_output() {
    let mut x = vec![0.0; 2 * HIDDEN];
    Generator::new(SEED).normal(&mut x, 0.0, 1.0);
    let x = Tensor::from_vec(x, (2, HIDDEN), &Device::Cpu).unwrap();
    let x = x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    assert_printed(
        &rounded(&network(&x, 8, SEED)),
        &[[-0.6133, -0.7031, 0.4023, 0.8086], [-4.4375, 0.8555, -2.1875, 4.4688]],
    );
}

/// A sparse network as the course has it: `experts` of `width` neurons, a router drawn with `mean` and `deviation`.
struct Sparse {
    experts: usize,
    active: usize,
    width: usize,
    router: (f64, f64),
}

impl Sparse {
    /// What the experts in `held`, those of one rank, give for `x [tokens, hidden]`; the others count nothing.
    fn slice(&self, x: &Tensor, held: Range<usize>) -> Tensor {
        let Self { experts, active, width, router: (mean, deviation) } = *self;
        let mut gate = vec![0.0; HIDDEN * experts];
        Generator::new(SEED).normal(&mut gate, mean, deviation);
        let gate = Tensor::from_vec(gate, (HIDDEN, experts), &Device::Cpu).unwrap();
        let logits: Vec<Vec<f32>> = x.matmul(&gate).unwrap().to_vec2().unwrap();
        let (mut chosen, mut weights) = (Vec::new(), Vec::new());
        for logits in &logits {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|i, j| logits[*j].total_cmp(&logits[*i]));
            let most = logits[order[0]];
            let sum: f32 = order[..active].iter().map(|expert| (logits[*expert] - most).exp()).sum();
            weights.extend(order[..active].iter().map(|expert| (logits[*expert] - most).exp() / sum));
            let is_held = |expert: &usize| held.contains(expert);
            chosen
                .extend(order[..active].iter().map(|e| if is_held(e) { *e as u32 } else { Groups::NO_ROW }));
        }
        let groups = Groups::new(&chosen, active, experts);
        let rows = groups::gather(x, &groups, 0..groups.num_rows()).unwrap();
        let of_each: Vec<Tensor> = held
            .filter(|expert| !groups.range(*expert).is_empty())
            .map(|expert| {
                let range = groups.range(expert);
                network(&rows.narrow(0, range.start, range.len()).unwrap(), width, SEED + expert as u64)
            })
            .collect();
        match of_each.is_empty() {
            true => x.zeros_like().unwrap(),
            false => groups::combine(&of_each, &weights, &groups, &[]).unwrap(),
        }
    }
}

#[test]
fn the_sparse_toy_output() {
    let x = Tensor::from_vec(normal_bf16(SEED + 1, 6 * HIDDEN), (6, HIDDEN), &Device::Cpu).unwrap();
    // Four experts of two neurons; this rank of two holds the experts 2 and 3.
    let sparse = Sparse { experts: 4, active: 2, width: 2, router: (0.1, 1.1) };
    assert_printed(
        &rounded(&sparse.slice(&x, 2..4)),
        &[
            [2.7031, 1.7812, -0.7773, -1.5469],
            [0.3027, 1.7734, 1.3516, -1.0938],
            [1.8125, 0.0498, -0.8945, -1.3047],
            [0.1475, 0.3730, -0.0525, -0.2012],
            [0.8672, 0.6602, -0.5625, -0.4121],
            [5.4688, 4.1250, -0.0255, -3.8594],
        ],
    );
}

/// Experts, active ones, ranks, and the router's numbers of the course's second task.
#[test]
fn the_slices_of_all_ranks_sum_to_the_whole() {
    let x = Tensor::from_vec(normal_bf16(SEED + 1, 20 * HIDDEN), (20, HIDDEN), &Device::Cpu).unwrap();
    for (experts, active, ranks, mean, deviation) in [
        (4, 2, 2, 0.1, 1.1),
        (8, 4, 2, 0.2, 1.2),
        (4, 2, 4, 0.3, 1.3),
        (16, 1, 4, 0.4, 1.4),
        (16, 1, 8, 0.5, 1.5),
        (16, 2, 16, 0.6, 1.6),
    ] {
        let sparse = Sparse { experts, active, width: 2, router: (mean, deviation) };
        let own = experts / ranks;
        let slices: Vec<Tensor> =
            (0..ranks).map(|rank| sparse.slice(&x, rank * own..(rank + 1) * own)).collect();
        let sum = slices.iter().skip(1).fold(slices[0].clone(), |sum, slice| (sum + slice).unwrap());
        let whole = sparse.slice(&x, 0..experts);
        assert!(difference(&sum, &whole) <= 1e-5, "{experts} experts on {ranks} ranks");
        assert!(difference(&slices[0], &whole) > 0.1, "one rank is not the whole");
    }
}
