//! Generation with keys and values kept.

use std::fs;

use candle_core::{DType, Device, Tensor};
use peft::generate::{Completion, Ended, Limits, Sampling, Session, generate_all};
use peft::model::{Cache, Decoder, Pretrained};
use peft::ops::Documents;

use crate::fixture::{ALL, Fixture, relative};

/// The most probable tokens after `prompt`, each from a forward over everything before it.
pub(crate) fn without_cache(model: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let hidden = model.forward(&tokens, &Documents::single(tokens.len(), 0)).unwrap().hidden;
        let last = hidden.narrow(0, tokens.len() - 1, 1).unwrap();
        let logits = model.logits(&last).unwrap().squeeze(0).unwrap();
        tokens.push(logits.argmax(0).unwrap().to_scalar::<u32>().unwrap());
    }
    tokens.split_off(prompt.len())
}

pub(crate) fn generated(session: &mut Session<'_>, prompt: &[u32], count: usize) -> Vec<u32> {
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

/// Of the models two see a window of 4 and 6 tokens, which the cache outgrows, and two have biases.
#[test]
fn greedy_tokens_are_those_of_a_forward_over_everything() {
    for name in ALL {
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
        // A prompt that parts from it in the middle, and one that is its beginning.
        for other in [[&longer[..14], &[5, 6, 7]].concat(), prompt] {
            let again = generated(&mut session, &other, 8);
            assert_eq!(again, without_cache(&model, &other, 8), "{name}");
        }
    }
}

/// It is computed in pieces, the last of which follow a cache.
#[test]
fn greedy_tokens_after_a_long_prompt_are_those_of_a_forward_over_everything() {
    for name in ["llama", "mistral"] {
        let fixture = Fixture::open(name);
        let folder = tempfile::tempdir().unwrap();
        fs::copy(fixture.folder.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        let config = fs::read_to_string(fixture.folder.join("config.json")).unwrap();
        let longer = config.replace("\"max_position_embeddings\": 64", "\"max_position_embeddings\": 4096");
        fs::write(folder.path().join("config.json"), longer).unwrap();
        let pretrained = Pretrained::open(&folder.path().to_string_lossy()).unwrap();
        let model = Decoder::open(&pretrained, DType::F32, &Device::Cpu).unwrap();
        for len in [1024, 1025, 2200] {
            let prompt: Vec<u32> = (0..len).map(|i| (7 * i * i + i / 5) % 64).collect();
            let found = generated(&mut Session::new(&model), &prompt, 3);
            assert_eq!(found, without_cache(&model, &prompt, 3), "{name}, {len} tokens");
        }
    }
}

#[test]
fn a_prompt_that_fills_what_the_model_sees_is_refused_and_an_answer_ends_there() {
    let model = Fixture::open("mistral").model();
    let generate = |len: usize| {
        let (mut count, prompt) = (0, vec![3; len]);
        let limits = Limits { max_new_tokens: 5, stop: Vec::new() };
        let mut session = Session::new(&model);
        let outcome = session.generate(&prompt, &limits, Sampling::default(), |_| {
            count += 1;
            Ok(true)
        });
        outcome.map(|outcome| (outcome.ended, count)).map_err(|error| error.to_string())
    };
    let refused = |len| Err(format!("the prompt has {len} tokens, and the model sees 64"));
    assert_eq!(generate(65), refused(65));
    assert_eq!(generate(64), refused(64));
    assert_eq!(generate(63), Ok((Ended::Context, 1)));
    assert_eq!(generate(60), Ok((Ended::Context, 4)));
    assert_eq!(generate(58), Ok((Ended::Limit, 5)));
}

#[test]
fn sampled_tokens_follow_the_seed() {
    let model = Fixture::open("qwen2").model();
    let sample = |seed| {
        let mut tokens = Vec::new();
        let limits = Limits { max_new_tokens: 30, stop: Vec::new() };
        let sampling =
            Sampling { temperature: 0.9, top_k: Some(40), top_p: 0.9, repetition_penalty: 1.1, seed };
        let mut session = Session::new(&model);
        session
            .generate(&[1, 2, 3], &limits, sampling, |token| {
                tokens.push(token);
                Ok(true)
            })
            .unwrap();
        tokens
    };
    assert_eq!(sample(7), sample(7));
    assert_ne!(sample(7), sample(8));
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

/// Prompts of all lengths, more of them than are computed together, that end at different steps.
pub(crate) fn assert_alike_together_and_alone(model: &Decoder, what: &str) {
    let vocab = model.config().vocab_size as u32;
    let prompt =
        |number: u32| (0..1 + 5 * number % 17).map(|i| (7 * i * i + 11 * number + 3) % vocab).collect();
    let prompts: Vec<Vec<u32>> = (0..11).map(prompt).collect();
    let limits = Limits { max_new_tokens: 14, stop: (0..vocab).step_by(9).collect() };
    let hot = Sampling { temperature: 1.5, repetition_penalty: 1.2, ..Sampling::default() };
    for sampling in [Sampling::default(), hot] {
        let mut found = Vec::new();
        let (_, decoding) = generate_all(model, &prompts, &limits, sampling, |number, answer| {
            assert_eq!(number, found.len(), "{what}: answers come in the order of their prompts");
            found.push(answer);
            Ok(())
        })
        .unwrap();
        let mut decoded = 0;
        for (prompt, found) in prompts.iter().zip(&found) {
            let mut tokens = Vec::new();
            let mut session = Session::new(model);
            let outcome = session
                .generate(prompt, &limits, sampling, |token| {
                    tokens.push(token);
                    Ok(true)
                })
                .unwrap();
            decoded += outcome.decoding.tokens;
            assert_eq!(found, &Completion { tokens, ended: outcome.ended }, "{what}");
        }
        assert_eq!(decoding.tokens, decoded, "{what}");
    }

    // Tokens may agree where sums do not: the bits of the logits, of as many as are computed together.
    let bits = |logits: &Tensor| -> Vec<Vec<u32>> {
        let rows = logits.to_vec2::<f32>().unwrap();
        rows.into_iter().map(|row| row.into_iter().map(f32::to_bits).collect()).collect()
    };
    let cached = |prompt: &Vec<u32>| {
        let mut cache = model.new_cache();
        model.forward_cached(prompt, &mut cache).unwrap();
        cache
    };
    let prompts = &prompts[..model.rows_alike().min(prompts.len())];
    let (mut together, mut alone): (Vec<Cache>, Vec<Cache>) =
        prompts.iter().map(|prompt| (cached(prompt), cached(prompt))).unzip();
    for step in 0..4 {
        let tokens: Vec<u32> = (0..prompts.len() as u32).map(|i| (13 * i + step) % vocab).collect();
        let mut caches: Vec<&mut Cache> = together.iter_mut().collect();
        let output = model.forward_next(&tokens, &mut caches).unwrap();
        let found = bits(&model.logits(&output.hidden).unwrap());
        for ((token, cache), found) in tokens.iter().zip(&mut alone).zip(found) {
            let output = model.forward_cached(&[*token], cache).unwrap();
            assert!(vec![found] == bits(&model.logits(&output.hidden).unwrap()), "{what}, step {step}");
        }
    }
}

#[test]
fn answers_generated_together_have_the_bits_of_each_alone() {
    for name in ALL {
        let fixture = Fixture::open(name);
        for dtype in [DType::F32, DType::BF16] {
            let model = Decoder::open(&fixture.pretrained(), dtype, &Device::Cpu).unwrap();
            assert_alike_together_and_alone(&model, &format!("{name} in {dtype:?}"));
        }
        if fixture.folder.join("adapter").exists() {
            assert_alike_together_and_alone(&fixture.with_adapter().0, &format!("{name} with its adapter"));
        }
    }
}

#[test]
fn many_prompts_are_refused_as_one_is() {
    let model = Fixture::open("mistral").model();
    let limits = Limits { max_new_tokens: 3, stop: Vec::new() };
    let answer = |prompts: &[Vec<u32>]| {
        let mut answers = Vec::new();
        let all = generate_all(&model, prompts, &limits, Sampling::default(), |_, answer| {
            answers.push((answer.ended, answer.tokens.len()));
            Ok(())
        });
        all.map(|_| answers).map_err(|error| error.to_string())
    };
    assert_eq!(answer(&[vec![1], vec![]]), Err("the prompt has no tokens".into()));
    assert_eq!(
        answer(&[vec![1], vec![3; 64]]),
        Err("the prompt has 64 tokens, and the model sees 64".into())
    );
    assert_eq!(
        answer(&[vec![3; 63], vec![3; 62], vec![3; 5]]),
        Ok(vec![(Ended::Context, 1), (Ended::Context, 2), (Ended::Limit, 3)])
    );
    assert_eq!(answer(&[]), Ok(Vec::new()));
}
