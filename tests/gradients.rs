//! Each op's forward and backward against its reference, which candle's autograd differentiates, and against finite
//! differences along a random direction.

use candle_core::{DType, Device, Tensor, Var};
use peft::ops::attention::{self, Heads};
use peft::ops::experts::{self, Expert};
use peft::ops::rotary::{self, Angles};
use peft::ops::{
    Activation, Documents, Dropout, Gradients, Groups, LowRank, Parameter, Pass, Trainables, Weight, add,
    add_to_rows, cross_entropy, differentiate, distillation, dropout, embedding, glu, groups, linear,
    rms_norm, rows,
};

const CPU: Device = Device::Cpu;

/// Seeded, so that a failure can be seen again.
fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn distance(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (found, expected) = (flat(found), flat(expected));
    let scale = expected.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
    found.iter().zip(&expected).map(|(x, y)| (x - y).abs() / scale).fold(0.0, |most, x| {
        assert!(!x.is_nan());
        most.max(x)
    })
}

#[track_caller]
fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    let distance = distance(found, expected);
    assert!(distance <= tolerance, "{what}: {distance} from the expected, {tolerance} allowed");
}

fn parameter(name: &str, tensor: &Tensor, trainables: &mut Trainables) -> Parameter {
    let variable = Var::from_tensor(tensor).unwrap();
    let parameter = Parameter::new(name, variable.as_tensor());
    trainables.insert(name.into(), variable);
    parameter
}

fn dot(x: &Tensor, y: &Tensor) -> f64 {
    let product = (x.to_dtype(DType::F64).unwrap() * y.to_dtype(DType::F64).unwrap()).unwrap();
    product.sum_all().unwrap().to_scalar::<f64>().unwrap()
}

/// The change of `<f(x), dy>` along `direction` equals `<dx, direction>`.
#[track_caller]
fn assert_slope(what: &str, x: &Tensor, dx: &Tensor, dy: &Tensor, f: impl Fn(&Tensor) -> Tensor) {
    let direction = random(x.dims(), 99);
    let step = 1e-2;
    let at = |h: f64| dot(&f(&(x + (&direction * h).unwrap()).unwrap()), dy);
    let found = (at(step) - at(-step)) / (2.0 * step);
    let expected = dot(dx, &direction);
    let scale = expected.abs().max(dot(dy, dy).sqrt());
    assert!((found - expected).abs() <= 5e-3 * scale, "{what}: slope {found}, gradient says {expected}");
}

#[test]
fn rms_norm_agrees() {
    for (rows, d) in [(1, 1), (3, 7), (130, 64), (5, 33)] {
        let (x, w, dy) = (random(&[rows, d], 1), random(&[d], 2), random(&[rows, d], 3));
        let mut trainables = Trainables::new();
        let weight = parameter("w", &w, &mut trainables);
        let mut gradients = Gradients::of(&trainables);
        let (y, saved) = rms_norm::forward(&x, &weight, 1e-5).unwrap();
        assert_close("y", &y, &rms_norm::reference(&x, &w, 1e-5).unwrap(), 1e-5);
        let dx = rms_norm::backward(&saved, &weight, 1e-5, &dy, None, &mut gradients).unwrap();
        let expected = differentiate(&[&x, &w], &dy, |v| rms_norm::reference(&v[0], &v[1], 1e-5)).unwrap();
        assert_close("dx", &dx, &expected[0], 1e-4);
        assert_close("dw", gradients.of_name("w").unwrap(), &expected[1], 1e-4);
        let through = rms_norm::backward(&saved, &weight, 1e-5, &dy, Some(&x), &mut gradients).unwrap();
        assert_close("x + dx", &through, &(&x + &dx).unwrap(), 1e-6);
        let delta = random(&[rows, d], 4);
        let (sum, of_sum, _) = rms_norm::forward_of_sum(&x, &delta, &weight, 1e-5).unwrap();
        assert_close("sum", &sum, &(&x + &delta).unwrap(), 1e-7);
        assert_close("y of the sum", &of_sum, &rms_norm::reference(&sum, &w, 1e-5).unwrap(), 1e-5);
        if d > 1 {
            assert_slope("dx", &x, &dx, &dy, |x| rms_norm::forward(x, &weight, 1e-5).unwrap().0);
        }
    }
}

#[test]
fn rotary_agrees_and_turns_back() {
    let (tokens, heads, d) = (67, 3, 10);
    let x = random(&[tokens, heads * d], 4);
    let angle = random(&[tokens, d / 2], 5);
    let angles = Angles { cos: angle.cos().unwrap(), sin: angle.sin().unwrap(), head_dim: d };
    let y = rotary::forward(&x, &angles).unwrap();
    assert_close("y", &y, &rotary::reference(&x, &angles).unwrap(), 1e-6);
    assert_close("back", &rotary::backward(&y, &angles).unwrap(), &x, 1e-6);
    let dy = random(&[tokens, heads * d], 6);
    let expected = differentiate(&[&x], &dy, |v| rotary::reference(&v[0], &angles)).unwrap();
    assert_close("dx", &rotary::backward(&dy, &angles).unwrap(), &expected[0], 1e-5);
}

#[test]
fn gated_units_agree() {
    use Activation::{Gelu, GeluTanh, Identity, Relu, Sigmoid, Silu};
    for activation in [Silu, Gelu, GeluTanh, Relu, Sigmoid, Identity] {
        for shape in [[1, 1], [70, 19]] {
            let (gate, up, dy) = (random(&shape, 7), random(&shape, 8), random(&shape, 9));
            let (y, saved) = glu::forward(gate.clone(), up.clone(), activation).unwrap();
            assert_close("y", &y, &glu::reference(&gate, &up, activation).unwrap(), 1e-5);
            let (again, d_gate, d_up) = glu::backward(&saved, activation, &dy, None).unwrap();
            assert_eq!(again.to_vec2::<f32>().unwrap(), y.to_vec2::<f32>().unwrap());
            let reference = |v: &[Tensor]| glu::reference(&v[0], &v[1], activation);
            let expected = differentiate(&[&gate, &up], &dy, reference).unwrap();
            // candle's derivative of the tanh form is good to about 1e-4.
            assert_close("d_gate", &d_gate, &expected[0], 1e-3);
            assert_close("d_up", &d_up, &expected[1], 1e-4);
            if !matches!(activation, Relu) {
                let forward = |g: &Tensor| glu::forward(g.clone(), up.clone(), activation).unwrap().0;
                assert_slope("d_gate", &gate, &d_gate, &dy, forward);
            }
        }
    }
}

#[test]
fn linear_with_low_rank_and_dropout_agrees() {
    for (tokens, input, output, rank) in [(1, 1, 1, 1), (9, 33, 17, 5), (70, 64, 48, 16)] {
        for probability in [0.0, 0.3] {
            let documents = Documents::new(vec![0, tokens], vec![3]);
            let pass = Pass::training(&documents, Some(4));
            let dropout = Dropout { probability, seed: 1, module: 2 };
            let mut trainables = Trainables::new();
            let x = random(&[tokens, input], 10);
            let w = parameter("w", &random(&[output, input], 11), &mut trainables);
            let bias = parameter("bias", &random(&[output], 12), &mut trainables);
            let low_rank = LowRank {
                a: parameter("a", &random(&[rank, input], 13), &mut trainables),
                b: parameter("b", &random(&[output, rank], 14), &mut trainables),
                bias: None,
                scale: 1.7,
                dropout,
            };
            let weight = Weight::Dense(w.clone());
            let layer = linear::Layer { weight: &weight, bias: Some(&bias), low_rank: Some(&low_rank) };
            let dy = random(&[tokens, output], 15);
            let mut gradients = Gradients::of(&trainables);
            let (y, saved) = linear::forward(&x, &layer, &pass).unwrap();
            let dx = linear::backward_of_all(&[(layer, &saved, &dy)], &pass, true, &mut gradients)
                .unwrap()
                .unwrap();

            let mask = dropout::mask(input, &dropout, 4, &pass).unwrap();
            let inputs = [&x, w.tensor(), bias.tensor(), low_rank.a.tensor(), low_rank.b.tensor()];
            let reference = |v: &[Tensor]| {
                linear::reference(&v[0], &v[1], Some(&v[2]), Some((&v[3], &v[4], 1.7)), Some(&mask))
            };
            let tensors: Vec<Tensor> = inputs.iter().map(|t| (*t).clone()).collect();
            assert_close("y", &y, &reference(&tensors).unwrap(), 1e-5);
            let expected = differentiate(&inputs, &dy, reference).unwrap();
            assert_close("dx", &dx, &expected[0], 1e-4);
            for (name, expected) in ["w", "bias", "a", "b"].iter().zip(&expected[1..]) {
                assert_close(name, gradients.of_name(name).unwrap(), expected, 1e-4);
            }
            assert_slope("dx", &x, &dx, &dy, |x| linear::forward(x, &layer, &pass).unwrap().0);
        }
    }
}

#[test]
fn layers_with_one_input_add_their_dx_up() {
    let documents = Documents::new(vec![0, 7], vec![3]);
    let x = random(&[7, 12], 10);
    for probability in [0.0, 0.4] {
        let pass = Pass::training(&documents, Some(1));
        let dropout = |module| Dropout { probability, seed: 1, module };
        let low_rank = |module: u64| LowRank {
            a: Parameter::new("a", &random(&[3, 12], 80 + module)),
            b: Parameter::new("b", &random(&[5, 3], 90 + module)),
            bias: None,
            scale: 0.5,
            dropout: dropout(module),
        };
        let (first, second) = (low_rank(1), low_rank(2));
        let weights = [11, 12].map(|seed| Weight::Dense(Parameter::new("w", &random(&[5, 12], seed))));
        let layers = [&first, &second].map(Some).into_iter().zip(&weights);
        let layers: Vec<_> =
            layers.map(|(low_rank, weight)| linear::Layer { weight, bias: None, low_rank }).collect();
        let dys = [random(&[7, 5], 20), random(&[7, 5], 21)];
        let mut gradients = Gradients::of(&Trainables::new());
        let saved = [0, 1].map(|i| linear::forward(&x, &layers[i], &pass).unwrap().1);
        let mut dx = |which: &[usize]| {
            let layers: Vec<_> = which.iter().map(|&i| (layers[i], &saved[i], &dys[i])).collect();
            linear::backward_of_all(&layers, &pass, true, &mut gradients).unwrap().unwrap()
        };
        let (both, one, other) = (dx(&[0, 1]), dx(&[0]), dx(&[1]));
        assert_close("dx", &both, &(one + other).unwrap(), 1e-5);
    }
}

#[test]
fn sums_agree() {
    let (x, y, row) = (random(&[70, 9], 1), random(&[70, 9], 2), random(&[9], 3));
    assert_close("x + y", &add(&x, &y).unwrap(), &(&x + &y).unwrap(), 1e-7);
    assert_close("rows", &add_to_rows(&x, &row).unwrap(), &x.broadcast_add(&row).unwrap(), 1e-7);
    let narrow = x.to_dtype(DType::BF16).unwrap();
    let sum = add(&narrow, &y).unwrap();
    assert_eq!(sum.dtype(), DType::BF16);
    let expected = (narrow.to_dtype(DType::F32).unwrap() + &y).unwrap();
    assert_close("bf16 + f32", &sum, &expected, 4e-3);
}

#[test]
fn a_gradient_that_is_not_wanted_is_not_computed() {
    let documents = Documents::new(vec![0, 2], vec![0]);
    let pass = Pass::inference(&documents);
    let weight = Weight::Dense(Parameter::new("w", &random(&[3, 4], 1)));
    let layer = linear::Layer { weight: &weight, bias: None, low_rank: None };
    let mut gradients = Gradients::of(&Trainables::new());
    let (y, saved) = linear::forward(&random(&[2, 4], 2), &layer, &pass).unwrap();
    let nothing = linear::backward_of_all(&[(layer, &saved, &y)], &pass, false, &mut gradients).unwrap();
    assert!(nothing.is_none());
    assert_eq!(gradients.iter().count(), 0);
}

fn attention_agrees(heads: Heads, offsets: Vec<usize>) {
    let tokens = *offsets.last().unwrap();
    let ids = (0..offsets.len() as u64 - 1).collect();
    let documents = Documents::new(offsets, ids);
    let (h, kv, d) = (heads.num_heads, heads.num_kv_heads, heads.head_dim);
    let (q, k, v) =
        (random(&[tokens, h * d], 20), random(&[tokens, kv * d], 21), random(&[tokens, kv * d], 22));
    let d_o = random(&[tokens, h * d], 23);
    let (o, saved) = attention::forward(q.clone(), k.clone(), v.clone(), &heads, &documents).unwrap();
    assert_close("o", &o, &attention::reference(&q, &k, &v, &heads, &documents).unwrap(), 1e-5);
    let (dq, dk, dv) = attention::backward(&saved, &heads, &documents, &d_o).unwrap();
    let reference = |x: &[Tensor]| attention::reference(&x[0], &x[1], &x[2], &heads, &documents);
    let expected = differentiate(&[&q, &k, &v], &d_o, reference).unwrap();
    assert_close("dq", &dq, &expected[0], 1e-4);
    assert_close("dk", &dk, &expected[1], 1e-4);
    assert_close("dv", &dv, &expected[2], 1e-4);
    assert_slope("dk", &k, &dk, &d_o, |k| {
        attention::forward(q.clone(), k.clone(), v.clone(), &heads, &documents).unwrap().0
    });
}

#[test]
fn attention_agrees_within_documents() {
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 8, window: None, scale: 0.35 };
    attention_agrees(heads, vec![0, 1]);
    attention_agrees(heads, vec![0, 5, 6, 75, 405]);
    attention_agrees(Heads { num_kv_heads: 1, num_heads: 1, head_dim: 3, ..heads }, vec![0, 63, 127]);
    attention_agrees(Heads { window: Some(4), ..heads }, vec![0, 3, 80]);
    attention_agrees(Heads { window: Some(70), num_kv_heads: 4, ..heads }, vec![0, 150]);
}

#[test]
fn attention_refuses_what_does_not_belong_together() {
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 4, window: None, scale: 0.5 };
    let (documents, fewer) = (Documents::new(vec![0, 64], vec![0]), Documents::new(vec![0, 2], vec![0]));
    let (q, k, v) = (random(&[64, 16], 1), random(&[64, 8], 2), random(&[64, 8], 3));
    let forward = |q: &Tensor, k: &Tensor, v: &Tensor, heads: &Heads, documents: &Documents| {
        attention::forward(q.clone(), k.clone(), v.clone(), heads, documents)
    };
    let (o, saved) = forward(&q, &k, &v, &heads, &documents).unwrap();
    let short = q.narrow(0, 0, 63).unwrap();
    let wrapping = usize::MAX / 4 + 5; // times the four heads it is 16
    let other_heads = [
        Heads { num_heads: 2, ..heads },
        Heads { num_heads: 3, ..heads },
        Heads { num_kv_heads: 0, ..heads },
        Heads { head_dim: 0, ..heads },
        Heads { head_dim: wrapping, ..heads },
        Heads { window: Some(0), ..heads },
    ];
    let refused = |result: peft::Result<()>| assert_eq!(result.unwrap_err().exit_code(), 1);
    for other in &other_heads {
        refused(forward(&q, &k, &v, other, &documents).map(drop));
        refused(attention::backward(&saved, other, &documents, &o).map(drop));
    }
    for documents in [&fewer, &Documents::single(64, 1), &Documents::single(64, usize::MAX)] {
        refused(forward(&q, &k, &v, &heads, documents).map(drop));
        refused(attention::backward(&saved, &heads, documents, &o).map(drop));
    }
    for (q, k, v) in [(&short, &k, &v), (&q, &q, &v), (&q, &k, &v.narrow(0, 0, 63).unwrap())] {
        refused(forward(q, k, v, &heads, &documents).map(drop));
    }
    refused(attention::backward(&saved, &heads, &documents, &short).map(drop));
    // A query behind a cache keeps nothing for a backward.
    let one = Documents::single(1, 63);
    let (_, saved) = forward(&q.narrow(0, 0, 1).unwrap(), &k, &v, &heads, &one).unwrap();
    refused(attention::backward(&saved, &heads, &one, &q.narrow(0, 0, 1).unwrap()).map(drop));
}

#[test]
fn rotary_and_scores_refuse_other_shapes_and_leave_their_input() {
    let angle = random(&[5, 2], 5);
    let angles = Angles { cos: angle.cos().unwrap(), sin: angle.sin().unwrap(), head_dim: 4 };
    let x = random(&[5, 8], 4);
    let shared = x.clone();
    rotary::forward(&x, &angles).unwrap();
    rotary::backward(&x, &angles).unwrap();
    assert_eq!(shared.sum_all().unwrap().to_vec0::<f32>().unwrap(), {
        let rows = random(&[5, 8], 4);
        rows.sum_all().unwrap().to_vec0::<f32>().unwrap()
    });
    let other = |head_dim| Angles { head_dim, ..angles.clone() };
    for (x, angles) in [
        (random(&[4, 8], 1), other(4)),
        (random(&[5, 6], 1), other(4)),
        (x.clone(), other(0)),
        (x.clone(), other(2)),
        (random(&[40], 1), other(4)),
    ] {
        assert!(rotary::forward(&x, &angles).is_err(), "{:?} in heads of {}", x.dims(), angles.head_dim);
    }
    assert!(peft::ops::scores(&random(&[4, 8], 1), &random(&[3, 16], 2)).is_err());
}

#[test]
fn attention_with_a_cache_continues_a_document() {
    for window in [None, Some(5)] {
        let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 4, window, scale: 0.5 };
        let (q, k, v) = (random(&[90, 8], 30), random(&[90, 4], 31), random(&[90, 4], 32));
        let all = Documents::single(90, 0);
        let whole = attention::forward(q.clone(), k.clone(), v.clone(), &heads, &all).unwrap().0;
        let late = q.narrow(0, 80, 10).unwrap();
        let part = attention::forward(late, k, v, &heads, &Documents::single(10, 80)).unwrap().0;
        assert_close("o", &part, &whole.narrow(0, 80, 10).unwrap(), 1e-6);
    }
}

#[test]
fn attention_of_one_query_behind_a_cache_agrees() {
    for (num_heads, num_kv_heads, head_dim) in
        [(9, 3, 64), (4, 4, 80), (2, 1, 24), (3, 1, 128), (1, 1, 7), (1, 1, 16), (6, 2, 17), (5, 5, 65)]
    {
        for (keys, window) in [(2, None), (257, None), (1500, None), (900, Some(300)), (40, Some(1))] {
            let scale = 1.0 / (head_dim as f64).sqrt();
            let heads = Heads { num_heads, num_kv_heads, head_dim, window, scale };
            let rows = |rows: usize, heads: usize, seed| random(&[rows, heads * head_dim], seed);
            let (q, k, v) =
                (rows(1, num_heads, 33), rows(keys, num_kv_heads, 34), rows(keys, num_kv_heads, 35));
            let documents = Documents::single(1, keys - 1);
            for (dtype, most) in [(DType::F32, 1e-5), (DType::BF16, 1e-2)] {
                let [q, k, v] = [&q, &k, &v].map(|x| x.to_dtype(dtype).unwrap());
                let wide = |x: Tensor| x.to_dtype(DType::F32).unwrap();
                let expected = wide(attention::reference(&q, &k, &v, &heads, &documents).unwrap());
                let found = wide(attention::forward(q, k, v, &heads, &documents).unwrap().0);
                assert_close(&format!("{heads:?}, {keys} keys, {dtype:?}"), &found, &expected, most);
            }
        }
    }
}

#[test]
fn cross_entropy_agrees() {
    // The last one takes two chunks.
    for (rows, d, vocab) in [(1, 3, 2), (40, 16, 50), (1500, 2, 3)] {
        let (hidden, weight) = (random(&[rows, d], 40), random(&[vocab, d], 41));
        let targets: Vec<u32> = (0..rows as u32).map(|i| i * 7 % vocab as u32).collect();
        let mut trainables = Trainables::new();
        let head = Weight::Dense(parameter("head", &weight, &mut trainables));
        let mut gradients = Gradients::of(&trainables);
        let (nll, saved) = cross_entropy::forward(&hidden, &head, &targets, 0.25, &mut gradients).unwrap();
        assert_eq!(nll, cross_entropy::evaluate(&hidden, &head, &targets).unwrap());
        let nll = Tensor::new(nll, &CPU).unwrap();
        assert_close("nll", &nll, &cross_entropy::reference(&hidden, &weight, &targets).unwrap(), 1e-6);
        let dy = (Tensor::ones(rows, DType::F32, &CPU).unwrap() * 0.25).unwrap();
        let reference = |v: &[Tensor]| cross_entropy::reference(&v[0], &v[1], &targets);
        let expected = differentiate(&[&hidden, &weight], &dy, reference).unwrap();
        assert_close("d_hidden", &cross_entropy::backward(saved), &expected[0], 1e-5);
        assert_close("d_weight", gradients.of_name("head").unwrap(), &expected[1], 1e-5);
    }
}

#[test]
fn distillation_agrees() {
    // The last one takes two chunks; teachers of another width have no hidden states to compare.
    for (rows, d, teachers_d, vocab, temperature, of_hidden) in [
        (1, 3, 3, 2, 1.0, 0.3),
        (40, 16, 16, 50, 2.0, 0.5),
        (7, 5, 9, 1500, 0.5, 0.0),
        (1500, 2, 2, 3, 1.5, 0.1),
    ] {
        let (hidden, weight) = (random(&[rows, d], 40), random(&[vocab, d], 41));
        let (of_teacher, teachers_head) = (random(&[rows, teachers_d], 42), random(&[vocab, teachers_d], 43));
        let targets: Vec<u32> = (0..rows as u32).map(|i| i * 7 % vocab as u32).collect();
        let terms = distillation::Terms { kl: 0.7, temperature, hidden: of_hidden };
        let own = Weight::Dense(Parameter::new("teacher", &teachers_head));
        let teacher = distillation::Teacher { hidden: &of_teacher, head: &own, terms };
        let mut trainables = Trainables::new();
        let head = Weight::Dense(parameter("head", &weight, &mut trainables));
        let mut gradients = Gradients::of(&trainables);
        let (losses, saved) =
            distillation::forward(&hidden, &head, &targets, &teacher, 0.25, &mut gradients).unwrap();
        let reference = |hidden: &Tensor, weight: &Tensor, terms: distillation::Terms| {
            if terms.hidden > 0.0 || d == teachers_d {
                return distillation::reference(
                    (hidden, weight),
                    &targets,
                    (&of_teacher, &teachers_head),
                    terms,
                );
            }
            let teacher = of_teacher.matmul(&teachers_head.t()?)?;
            let logits = hidden.matmul(&weight.t()?)?;
            // Logits as hidden states of a head that changes nothing.
            let (same, all) = (Tensor::eye(vocab, DType::F32, &CPU)?, terms);
            distillation::reference((&logits, &same), &targets, (&teacher, &same), all)
        };
        assert_eq!(losses.nll, cross_entropy::evaluate(&hidden, &head, &targets).unwrap());
        assert_eq!(losses.hidden.is_empty(), of_hidden == 0.0);
        let all = |losses: &distillation::Losses| {
            let of_rows = losses.hidden.iter().copied().chain(std::iter::repeat(0.0));
            let rows = losses.nll.iter().zip(&losses.kl).zip(of_rows);
            let all = rows.map(|((nll, kl), hidden)| {
                f64::from(*nll) + 0.7 * f64::from(*kl) + of_hidden * f64::from(hidden)
            });
            Tensor::new(all.collect::<Vec<f64>>(), &CPU).unwrap()
        };
        assert_close("losses", &all(&losses), &reference(&hidden, &weight, terms).unwrap(), 3e-6);
        let dy = (Tensor::ones(rows, DType::F32, &CPU).unwrap() * 0.25).unwrap();
        let expected = differentiate(&[&hidden, &weight], &dy, |v| reference(&v[0], &v[1], terms)).unwrap();
        let d_hidden = cross_entropy::backward(saved);
        assert_close("d_hidden", &d_hidden, &expected[0], 2e-5);
        assert_close("d_weight", gradients.of_name("head").unwrap(), &expected[1], 2e-5);
        assert_slope("d_hidden", &hidden, &d_hidden, &dy, |x| {
            let none = &mut Gradients::of(&Trainables::new());
            let (losses, _) = distillation::forward(x, &head, &targets, &teacher, 0.25, none).unwrap();
            all(&losses)
        });
    }
}

/// In bf16 only the logits of both and what is written are rounded.
#[test]
fn distillation_in_bf16_follows_f32() {
    let to = |t: &Tensor| t.to_dtype(DType::BF16).unwrap();
    let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    // Values of bf16, so that both begin with the same.
    let [hidden, weight, of_teacher, teachers_head] =
        [(30, 40), (300, 41), (30, 42), (300, 43)].map(|(rows, seed)| wide(&to(&random(&[rows, 16], seed))));
    let targets: Vec<u32> = (0..30).map(|i| i * 7).collect();
    let losses = |as_type: &dyn Fn(&Tensor) -> Tensor| {
        let weight_of = |name: &str, t: &Tensor| Weight::Dense(Parameter::new(name, &as_type(t)));
        let (head, own) = (weight_of("head", &weight), weight_of("teacher", &teachers_head));
        let terms = distillation::Terms { kl: 1.0, temperature: 2.0, hidden: 0.5 };
        let of_teacher = as_type(&of_teacher);
        let teacher = distillation::Teacher { hidden: &of_teacher, head: &own, terms };
        let none = &mut Gradients::of(&Trainables::new());
        let (losses, saved) =
            distillation::forward(&as_type(&hidden), &head, &targets, &teacher, 1.0, none).unwrap();
        let rows = [losses.nll, losses.kl, losses.hidden].map(|rows| Tensor::new(rows, &CPU).unwrap());
        (rows, cross_entropy::backward(saved))
    };
    let ((found, d_hidden), (expected, of_f32)) = (losses(&to), losses(&|t| t.clone()));
    assert_eq!(d_hidden.dtype(), DType::BF16);
    for (found, expected) in found.iter().zip(&expected) {
        assert_close("loss", found, expected, 1e-2);
    }
    assert_close("d_hidden", &d_hidden, &of_f32, 2e-2);
}

/// What a student has learned whole costs nothing more.
#[test]
fn a_student_like_its_teacher_is_not_pulled() {
    let (hidden, weight) = (random(&[20, 8], 40), random(&[100, 8], 41));
    let targets: Vec<u32> = (0..20).collect();
    let head = Weight::Dense(Parameter::new("head", &weight));
    let none = &mut Gradients::of(&Trainables::new());
    let terms = distillation::Terms { kl: 1.0, temperature: 2.0, hidden: 1.0 };
    let teacher = distillation::Teacher { hidden: &hidden, head: &head, terms };
    let (losses, saved) = distillation::forward(&hidden, &head, &targets, &teacher, 1.0, none).unwrap();
    assert!(losses.kl.iter().chain(&losses.hidden).all(|loss| loss.abs() < 1e-6), "{losses:?}");
    let (_, plain) = cross_entropy::forward(&hidden, &head, &targets, 1.0, none).unwrap();
    assert_close("d_hidden", &cross_entropy::backward(saved), &cross_entropy::backward(plain), 1e-6);
    let short = hidden.narrow(0, 0, 19).unwrap();
    let teacher = distillation::Teacher { hidden: &short, ..teacher };
    assert!(distillation::forward(&hidden, &head, &targets, &teacher, 1.0, none).is_err());
}

#[test]
fn rows_are_picked_out_and_put_back() {
    let (x, dy, picked) = (random(&[5, 3], 1), random(&[2, 3], 2), [3, 0]);
    let expected = differentiate(&[&x], &dy, |v| rows::gather(&v[0], &picked)).unwrap();
    assert_close("dx", &rows::scatter(&dy, &picked, 5).unwrap(), &expected[0], 0.0);
}

#[test]
fn embedding_adds_up_rows_that_are_looked_up_twice() {
    let mut trainables = Trainables::new();
    let weight = Weight::Dense(parameter("e", &random(&[6, 4], 50), &mut trainables));
    let mut gradients = Gradients::of(&trainables);
    let ids = Tensor::new(&[2u32, 0, 2, 5], &CPU).unwrap();
    let dy = random(&[4, 4], 51);
    embedding::backward(&ids, &weight, &dy, &mut gradients).unwrap();
    let expected = differentiate(&[weight.parameter().unwrap().tensor()], &dy, |v| {
        Ok(v[0].index_select(&ids, 0).unwrap())
    })
    .unwrap();
    assert_close("de", gradients.of_name("e").unwrap(), &expected[0], 1e-6);
}

#[test]
fn nan_and_infinity_pass_through() {
    let mut x = random(&[2, 8], 60).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    x[3] = f32::NAN;
    let x = Tensor::from_vec(x, (2, 8), &CPU).unwrap();
    let poisoned = |t: &Tensor| t.narrow(0, 0, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let weight = Parameter::new("w", &random(&[8], 61));
    assert!(poisoned(&rms_norm::forward(&x, &weight, 1e-5).unwrap().0).iter().any(|v| v.is_nan()));
    for activation in [Activation::Silu, Activation::Relu, Activation::Gelu, Activation::GeluTanh] {
        let y = glu::forward(x.clone(), random(&[2, 8], 62), activation).unwrap().0;
        assert!(poisoned(&y)[3].is_nan(), "{activation:?}");
    }
    let heads = Heads { num_heads: 2, num_kv_heads: 2, head_dim: 4, window: None, scale: 0.5 };
    let documents = Documents::new(vec![0, 2], vec![0]);
    let o = attention::forward(x.clone(), x.clone(), x.clone(), &heads, &documents).unwrap().0;
    assert!(poisoned(&o)[0].is_nan());
    let head = Weight::Dense(Parameter::new("h", &random(&[5, 8], 63)));
    let nll = cross_entropy::evaluate(&x, &head, &[1, 2]).unwrap();
    assert!(nll[0].is_nan() && nll[1].is_finite());
}

#[test]
fn bf16_follows_f32() {
    let to = |t: &Tensor| t.to_dtype(DType::BF16).unwrap();
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 8, window: None, scale: 0.35 };
    let documents = Documents::new(vec![0, 30, 90], vec![0, 1]);
    let (q, k, v) = (random(&[90, 32], 70), random(&[90, 16], 71), random(&[90, 16], 72));
    let wide = attention::forward(q.clone(), k.clone(), v.clone(), &heads, &documents).unwrap();
    let narrow = attention::forward(to(&q), to(&k), to(&v), &heads, &documents).unwrap();
    assert_close("o", &narrow.0, &wide.0, 1e-2);
    let d_o = random(&[90, 32], 73);
    let (dq, ..) = attention::backward(&wide.1, &heads, &documents, &d_o).unwrap();
    let (narrow_dq, ..) = attention::backward(&narrow.1, &heads, &documents, &to(&d_o)).unwrap();
    assert_close("dq", &narrow_dq, &dq, 3e-2);
    let weight = random(&[32], 74);
    let norm = |x: &Tensor, w: &Tensor| rms_norm::forward(x, &Parameter::new("w", w), 1e-5).unwrap().0;
    assert_close("norm", &norm(&to(&q), &to(&weight)), &norm(&q, &weight), 1e-2);
}

/// Experts of seven tokens, the last of which has none, and one choice that was dropped.
fn some_groups() -> Groups {
    Groups::new(&[0, 2, 2, 1, 0, 1, 2, 0, Groups::NO_ROW, 1, 0, 1, 2, 1], 2, 4)
}

#[test]
fn rows_of_experts_are_those_of_their_tokens() {
    let groups = some_groups();
    assert_eq!(groups.tokens(), [0, 2, 3, 5, 1, 2, 4, 5, 6, 0, 1, 3, 6]);
    assert_eq!(groups.counts().collect::<Vec<_>>(), [4, 5, 4, 0]);
    let x = random(&[7, 5], 1);
    let y = groups::gather(&x, &groups, 0..groups.num_rows()).unwrap();
    assert_eq!(
        y.narrow(0, 8, 1).unwrap().to_vec2::<f32>().unwrap(),
        x.narrow(0, 6, 1).unwrap().to_vec2::<f32>().unwrap()
    );
    // Gathering and summing are each other's transposes.
    let dy = random(&[13, 5], 2);
    let summed = groups::sum(std::slice::from_ref(&dy), &groups, &[]).unwrap();
    assert!((dot(&y, &dy) - dot(&x, &summed)).abs() < 1e-4);
}

#[test]
fn weighed_sums_of_experts_agree() {
    let groups = some_groups();
    let (x, dy) = (random(&[13, 33], 3), random(&[7, 33], 4));
    let weights = random(&[14], 5);
    let list: Vec<f32> = weights.to_vec1().unwrap();
    // Rows may lie in several parts.
    let parts = [x.narrow(0, 0, 5).unwrap(), x.narrow(0, 5, 8).unwrap()];
    let y = groups::combine(&parts, &list, &groups, &[]).unwrap();
    assert_close("y", &y, &groups::reference(&x, &weights, &groups).unwrap(), 1e-5);
    let expected = differentiate(&[&x, &weights], &dy, |v| groups::reference(&v[0], &v[1], &groups)).unwrap();
    let of_tokens = groups::gather(&dy, &groups, 0..groups.num_rows()).unwrap();
    let dx = groups::scale_rows(&of_tokens, &groups.weights_of_rows(&list)).unwrap();
    assert_close("dx", &dx, &expected[0], 1e-5);
    let d_weights = groups.of_choices(&groups::row_products(&x, &of_tokens).unwrap());
    assert_eq!(d_weights[8], 0.0);
    assert_close("d_weights", &Tensor::new(d_weights, &CPU).unwrap(), &expected[1], 1e-5);
    // On top of what is there already, rounded once.
    let others = [random(&[7, 33], 6), random(&[7, 33], 7)];
    let sum = groups::sum(&parts, &groups, &[&others[0], &others[1]]).unwrap();
    let expected = ((groups::sum(&parts, &groups, &[]).unwrap() + &others[0]).unwrap() + &others[1]).unwrap();
    assert_close("sum", &sum, &expected, 1e-5);
    let narrow = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
    let rounded = groups::sum(&[narrow(&x)], &groups, &[&narrow(&others[0]), &narrow(&others[1])]).unwrap();
    assert_close("rounded", &rounded.to_dtype(DType::F32).unwrap(), &sum, 1e-2);
    let missing = groups::sum(&parts[..1], &groups, &[]).unwrap_err().to_string();
    assert!(missing.contains("5 rows of 13"), "{missing}");
}

/// One layer of each of four experts, with their trainables: by chance or, `uneven`, with another scale in each.
struct Kind {
    layers: Vec<(Weight, Parameter, LowRank)>,
    trainables: Trainables,
}

impl Kind {
    fn new(kind: u64, (input, output): (usize, usize), uneven: bool, dropout: Dropout) -> Self {
        let (rank, mut trainables) = (3, Trainables::new());
        let layer = |e: u64| {
            let mut new = |name: &str, shape: &[usize], seed: u64| {
                parameter(
                    &format!("{name}{kind}.{e}"),
                    &random(shape, 100 * kind + seed + e),
                    &mut trainables,
                )
            };
            let weight = Weight::Dense(new("w", &[output, input], 30));
            let (a, b) = (new("a", &[rank, input], 40), new("b", &[output, rank], 50));
            let (bias, of_adapter) = (new("bias", &[output], 60), new("lora_bias", &[output], 70));
            let scale = if uneven { 0.7 + e as f64 } else { 0.7 };
            (weight, bias, LowRank { a, b, bias: Some(of_adapter), scale, dropout })
        };
        Self { layers: (0..4).map(layer).collect(), trainables }
    }

    fn layers(&self) -> Vec<linear::Layer<'_>> {
        let layer =
            |(weight, bias, low_rank)| linear::Layer { weight, bias: Some(bias), low_rank: Some(low_rank) };
        self.layers.iter().map(|(w, bias, l)| layer((w, bias, l))).collect()
    }

    /// Weight, bias, `A`, `B` and the bias of the adapter of each expert.
    fn values(&self) -> Vec<Tensor> {
        let of = |(w, bias, l): &(Weight, Parameter, LowRank)| {
            let own = [w.parameter().unwrap(), bias, &l.a, &l.b, l.bias.as_ref().unwrap()];
            own.map(|parameter| parameter.tensor().clone())
        };
        self.layers.iter().flat_map(of).collect()
    }

    /// What rows come to, by candle.
    fn reference(&self, x: &Tensor, values: &[Tensor], groups: &Groups) -> Tensor {
        let mut parts = Vec::new();
        for (expert, (v, (_, _, l))) in values.chunks(5).zip(&self.layers).enumerate() {
            let range = groups.range(expert);
            if range.is_empty() {
                continue;
            }
            let x = x.narrow(0, range.start, range.len()).unwrap();
            let low_rank = Some((&v[2], &v[3], l.scale));
            let y = linear::reference(&x, &v[0], Some(&v[1]), low_rank, None).unwrap();
            parts.push(y.broadcast_add(&(&v[4] * l.scale).unwrap()).unwrap());
        }
        Tensor::cat(&parts, 0).unwrap()
    }

    /// Holds gradients against those of `values`, in their order; an idle expert's are there, and zero.
    fn assert_gradients(&self, kind: u64, gradients: &Gradients, expected: &[Tensor]) {
        for (expert, expected) in expected.chunks(5).enumerate() {
            for (name, expected) in ["w", "bias", "a", "b", "lora_bias"].iter().zip(expected) {
                let name = format!("{name}{kind}.{expert}");
                assert_close(&name, gradients.of_name(&name).unwrap(), expected, 1e-4);
            }
        }
    }
}

/// Gate, up and down.
struct Networks([Kind; 3]);

impl Networks {
    fn new(uneven: bool, dropout: Dropout) -> Self {
        let (hidden, width) = (17, 11);
        let kind = |(kind, shape)| Kind::new(kind, shape, uneven, dropout);
        Self([(0, (hidden, width)), (1, (hidden, width)), (2, (width, hidden))].map(kind))
    }

    fn experts(&self) -> Vec<Expert<'_>> {
        let [gates, ups, downs] = self.0.each_ref().map(Kind::layers);
        let layers = gates.into_iter().zip(ups).zip(downs);
        layers.map(|((gate, up), down)| Expert { gate, up, down }).collect()
    }

    fn trainables(&self) -> Trainables {
        self.0.iter().flat_map(|kind| kind.trainables.clone()).collect()
    }

    /// Of `x`, weights and what [`Networks::values`] gives.
    fn reference(&self, v: &[Tensor], groups: &Groups) -> peft::Result<Tensor> {
        let tokens = Tensor::new(groups.tokens(), &CPU)?;
        let (of_rows, values) = (v[0].index_select(&tokens, 0)?, &v[2..]);
        let kind = |kind: usize, x: &Tensor| self.0[kind].reference(x, &values[20 * kind..][..20], groups);
        let product = glu::reference(&kind(0, &of_rows), &kind(1, &of_rows), Activation::Silu)?;
        groups::reference(&kind(2, &product), &v[1], groups)
    }

    fn values(&self) -> Vec<Tensor> {
        self.0.iter().flat_map(Kind::values).collect()
    }
}

/// What a forward and a backward through experts give: `y`, `dx` and the gradient of the weights.
fn through_experts(
    experts: &[Expert<'_>],
    (x, weights, dy): (&Tensor, &[f32], &Tensor),
    groups: &Groups,
    gradients: &mut Gradients,
) -> [Tensor; 3] {
    let documents = Documents::new(vec![0, x.dim(0).unwrap()], vec![5]);
    let pass = Pass::training(&documents, Some(2));
    let (given, saved) = experts::forward(x, experts, Activation::Silu, groups, &pass).unwrap();
    let networks = (experts, Activation::Silu);
    let routed = (weights, groups);
    let back = experts::backward(saved, networks, routed, &pass, dy, (true, true), gradients).unwrap();
    let of_tokens: Vec<Tensor> = back.of_tokens.iter().map(|(a, b)| a.matmul(b).unwrap()).collect();
    let of_tokens: Vec<&Tensor> = of_tokens.iter().collect();
    [
        groups::combine(&given, weights, groups, &[]).unwrap(),
        groups::sum(&back.of_rows.unwrap(), groups, &of_tokens).unwrap(),
        Tensor::new(back.d_weights.unwrap(), &CPU).unwrap(),
    ]
}

/// Both ways to compute low-rank terms: all at once where experts are alike, one after the other where they are not. Of few
/// tokens with all threads for each expert, of many with one.
#[test]
fn experts_agree() {
    let few: Vec<u32> = vec![0, 2, 2, 1, 0, 1, 2, 0, Groups::NO_ROW, 1, 0, 1, 2, 1];
    // Three experts with rows are enough for one thread, not for two or more.
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (uneven, repeated) in [(false, 1), (true, 1), (false, 20), (true, 20)] {
        let groups = Groups::new(&few.repeat(repeated), 2, 4);
        let tokens = 7 * repeated;
        let networks = Networks::new(uneven, Dropout::NONE);
        let (x, dy) = (random(&[tokens, 17], 20), random(&[tokens, 17], 21));
        let weights = random(&[2 * tokens], 22);
        let list: Vec<f32> = weights.to_vec1().unwrap();
        let all = [vec![x.clone(), weights.clone()], networks.values()].concat();
        let inputs: Vec<&Tensor> = all.iter().collect();
        let expected = differentiate(&inputs, &dy, |v| networks.reference(v, &groups)).unwrap();
        let mut gradients = Gradients::of(&networks.trainables());
        let experts = networks.experts();
        let [y, dx, d_weights] = through_experts(&experts, (&x, &list, &dy), &groups, &mut gradients);
        let mut again = Gradients::of(&networks.trainables());
        let found = alone.install(|| through_experts(&experts, (&x, &list, &dy), &groups, &mut again));
        for (name, found, expected) in [("y", &found[0], &y), ("dx", &found[1], &dx)] {
            assert_close(name, found, expected, 0.0);
        }
        for name in networks.trainables().keys() {
            assert_close(name, again.of_name(name).unwrap(), gradients.of_name(name).unwrap(), 0.0);
        }
        assert_close("y", &y, &networks.reference(&all, &groups).unwrap(), 1e-5);
        assert_close("dx", &dx, &expected[0], 1e-4);
        assert_close("d_weights", &d_weights, &expected[1], 1e-4);
        for (kind, experts) in networks.0.iter().enumerate() {
            experts.assert_gradients(kind as u64, &gradients, &expected[2 + 20 * kind..][..20]);
        }
    }
}

/// What is not wanted is not computed, and changes nothing in what is.
#[test]
fn gradients_of_experts_do_not_depend_on_what_else_is_wanted() {
    let groups = some_groups();
    let documents = Documents::new(vec![0, 7], vec![5]);
    let pass = Pass::training(&documents, Some(2));
    for uneven in [false, true] {
        let networks = Networks::new(uneven, Dropout::NONE);
        let (x, dy, weights) = (random(&[7, 17], 20), random(&[7, 17], 21), vec![0.5; 14]);
        let experts = networks.experts();
        let mut all = Gradients::of(&networks.trainables());
        through_experts(&experts, (&x, &weights, &dy), &groups, &mut all);
        for (name, variable) in networks.trainables() {
            let mut one = Gradients::of(&[(name.clone(), variable)].into());
            let (_, saved) = experts::forward(&x, &experts, Activation::Silu, &groups, &pass).unwrap();
            let (networks, routed) = ((experts.as_slice(), Activation::Silu), (weights.as_slice(), &groups));
            let back =
                experts::backward(saved, networks, routed, &pass, &dy, (false, false), &mut one).unwrap();
            assert!(back.of_rows.is_none() && back.of_tokens.is_none() && back.d_weights.is_none());
            assert_close(&name, one.of_name(&name).unwrap(), all.of_name(&name).unwrap(), 1e-6);
        }
    }
}

#[test]
fn experts_with_dropout_have_their_slopes() {
    let groups = some_groups();
    let networks = Networks::new(false, Dropout { probability: 0.4, seed: 8, module: 9 });
    let experts = networks.experts();
    let (x, dy, weights) = (random(&[7, 17], 20), random(&[7, 17], 21), random(&[14], 22));
    let run = |x: &Tensor, weights: &Tensor| {
        let weights: Vec<f32> = weights.to_vec1().unwrap();
        let mut gradients = Gradients::of(&networks.trainables());
        through_experts(&experts, (x, &weights, &dy), &groups, &mut gradients)
    };
    let [_, dx, d_weights] = run(&x, &weights);
    assert_slope("dx", &x, &dx, &dy, |x| run(x, &weights)[0].clone());
    assert_slope("d_weights", &weights, &d_weights, &dy, |weights| run(&x, weights)[0].clone());
}

/// The mask of a row is that of its token, whichever expert it is at.
#[test]
fn dropout_of_grouped_rows_is_that_of_their_tokens() {
    let groups = some_groups();
    let documents = Documents::new(vec![0, 3, 7], vec![5, 6]);
    let pass = Pass::training(&documents, Some(2));
    let drop = Dropout { probability: 0.4, seed: 8, module: 9 };
    let all = dropout::mask(12, &drop, 2, &pass).unwrap();
    let of_rows = dropout::mask(12, &drop, 2, &pass.of_rows(groups.tokens())).unwrap();
    assert_close("mask", &of_rows, &groups::gather(&all, &groups, 0..groups.num_rows()).unwrap(), 0.0);
}

/// Where part of a head is rotated, the rest stays.
#[test]
fn rotary_of_part_of_a_head_agrees() {
    let (tokens, heads, d, rotated) = (5, 3, 10, 4);
    let (x, angle) = (random(&[tokens, heads * d], 4), random(&[tokens, rotated / 2], 5));
    let angles = Angles { cos: angle.cos().unwrap(), sin: angle.sin().unwrap(), head_dim: d };
    let y = rotary::forward(&x, &angles).unwrap();
    assert_close("y", &y, &rotary::reference(&x, &angles).unwrap(), 1e-6);
    let rest = |t: &Tensor| t.reshape((tokens, heads, d)).unwrap().narrow(2, rotated, d - rotated).unwrap();
    assert_close("rest", &rest(&y).contiguous().unwrap(), &rest(&x).contiguous().unwrap(), 0.0);
    assert_close("back", &rotary::backward(&y, &angles).unwrap(), &x, 1e-6);
}
