//! Generation with keys and values kept.

use candle_core::{DType, Device, Tensor};
use peft::generate::{Ended, Limits, Sampling, Session};
use peft::model::Decoder;
use peft::ops::Documents;

use crate::fixture::{Fixture, MODELS, relative};

/// The most probable tokens after `prompt`, each from a forward over everything before it.
fn without_cache(model: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let hidden = model.forward(&tokens, &Documents::single(tokens.len(), 0)).unwrap().hidden;
        let last = hidden.narrow(0, tokens.len() - 1, 1).unwrap();
        let logits = model.logits(&last).unwrap().squeeze(0).unwrap();
        tokens.push(logits.argmax(0).unwrap().to_scalar::<u32>().unwrap());
    }
    tokens.split_off(prompt.len())
}

fn generated(session: &mut Session<'_>, prompt: &[u32], count: usize) -> Vec<u32> {
    let (mut tokens, before) = (Vec::new(), prompt.len());
    let limits = Limits { max_new_tokens: count, stop: Vec::new() };
    let outcome = session
        .generate(prompt, &limits, Sampling::default(), |token| {
            tokens.push(token);
            Ok(true)
        })
        .unwrap();
    assert_eq!(outcome.ended, Ended::Limit);
    assert!((1..=before).contains(&outcome.prompt.tokens));
    assert_eq!(outcome.decoding.tokens, count - 1);
    tokens
}

#[test]
fn greedy_tokens_are_those_of_a_forward_over_everything() {
    for name in MODELS {
        let model = Fixture::open(name).model();
        let vocab = model.config().vocab_size as u32;
        let prompt: Vec<u32> = (0..9).map(|i| (7 * i + 3) % vocab).collect();
        let mut session = Session::new(&model);
        let found = generated(&mut session, &prompt, 12);
        assert_eq!(found, without_cache(&model, &prompt, 12), "{name}");
        // What the session has seen is not computed again, and what follows is the same as from the beginning.
        let longer = [&prompt[..], &found, &[1, 2]].concat();
        let again = generated(&mut session, &longer, 8);
        assert_eq!(again, generated(&mut Session::new(&model), &longer, 8), "{name}");
    }
}

/// Long enough for the buffers to grow, and in the types that models are run in.
#[test]
fn hidden_states_behind_a_cache_are_those_of_a_forward_over_everything() {
    for (dtype, most) in [(DType::F32, 1e-5), (DType::BF16, 0.02)] {
        let model = Decoder::open(&Fixture::open("llama").pretrained(), dtype, &Device::Cpu).unwrap();
        let vocab = model.config().vocab_size as u32;
        let tokens: Vec<u32> = (0..150).map(|i| (7 * i * i + 3) % vocab).collect();
        let whole = model.forward(&tokens, &Documents::single(tokens.len(), 0)).unwrap().hidden;
        let mut cache = model.new_cache();
        let (first, rest) = tokens.split_at(60);
        let mut rows = vec![model.forward_cached(first, &mut cache).unwrap().hidden];
        for part in rest[..30].chunks(1).chain(rest[30..33].chunks(3)).chain(rest[33..].chunks(1)) {
            rows.push(model.forward_cached(part, &mut cache).unwrap().hidden);
        }
        assert_eq!(cache.len(), tokens.len());
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let relative = relative(&wide(&Tensor::cat(&rows, 0).unwrap()), &wide(&whole));
        assert!(relative <= most, "{dtype:?}: {relative}");
    }
}
