//! GGUF models whose matrices stay quantized.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as Entry;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use peft::adapter::torch_random::Generator;
use peft::adapter::{LoraConfig, Targets, attach, resolve, tensor_names};
use peft::data::Batch;
use peft::generate::Session;
use peft::model::{Decoder, Pretrained, Recompute};
use peft::ops::{Parameter, Quantized, Trainables, Weight};
use peft::train::{StepGradients, step_gradients};

use crate::fixture::{difference, logits, relative, values};
use crate::generate::{assert_alike_together_and_alone, generated, without_cache};
use crate::place::{Place, refusal};
use crate::weights::gguf::tokenizers::byte_level;
use crate::weights::gguf::write;

const CPU: Device = Device::Cpu;

const FORMATS: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

const HIDDEN: usize = 256;
const WIDTH: usize = 512;
const KV: usize = 128;
const VOCAB: usize = 64;
const LAYERS: usize = 2;

/// A model with two layers of random weights, every matrix in `format`, as llama.cpp would write it.
fn model(path: &Path, format: GgmlDType, tied: bool) {
    let mut generator = Generator::new(11);
    let mut random = |rows: usize, columns: usize| {
        let mut values = vec![0.0; rows * columns];
        generator.normal(&mut values, 0.0, 0.06);
        QTensor::quantize(&Tensor::from_vec(values, (rows, columns), &CPU).unwrap(), format).unwrap()
    };
    let norm =
        || QTensor::quantize(&Tensor::ones(HIDDEN, DType::F32, &CPU).unwrap(), GgmlDType::F32).unwrap();
    let mut tensors = BTreeMap::from([
        ("token_embd.weight".to_string(), random(VOCAB, HIDDEN)),
        ("output_norm.weight".to_string(), norm()),
    ]);
    if !tied {
        tensors.insert("output.weight".to_string(), random(VOCAB, HIDDEN));
    }
    for layer in 0..LAYERS {
        for (name, rows, columns) in [
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", KV, HIDDEN),
            ("attn_v", KV, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", WIDTH, HIDDEN),
            ("ffn_up", WIDTH, HIDDEN),
            ("ffn_down", HIDDEN, WIDTH),
        ] {
            tensors.insert(format!("blk.{layer}.{name}.weight"), random(rows, columns));
        }
        tensors.insert(format!("blk.{layer}.attn_norm.weight"), norm());
        tensors.insert(format!("blk.{layer}.ffn_norm.weight"), norm());
    }
    let mut metadata = byte_level("smollm");
    metadata.insert("general.architecture".to_string(), Entry::String("llama".into()));
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 128),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", WIDTH),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        metadata.insert(format!("llama.{key}"), Entry::U32(u32::try_from(value).unwrap()));
    }
    write(path, &metadata, &tensors);
}

fn open(path: &Path) -> Pretrained {
    Pretrained::open(path.to_str().unwrap()).unwrap()
}

/// The model with the same values in plain tensors.
fn dense(pretrained: &Pretrained, dtype: DType) -> Decoder {
    let plain = |name: &str| Ok(Weight::Dense(Parameter::new(name, &pretrained.read(name, dtype, &CPU)?)));
    Decoder::load(pretrained.config(), &CPU, plain).unwrap()
}

/// Adapters of chance on all linear layers.
fn adapted(model: &mut Decoder) -> Trainables {
    let config =
        LoraConfig { rank: 4, alpha: Some(8.0), targets: Targets::AllLinear, ..LoraConfig::default() };
    let placements = resolve(&config, model.config()).unwrap().placements;
    let mut generator = Generator::new(3);
    let mut tensors = BTreeMap::new();
    for placement in &placements {
        let names = tensor_names(&placement.linear.path);
        let shapes = [
            (names.a, [placement.rank, placement.linear.in_features]),
            (names.b, [placement.linear.out_features, placement.rank]),
        ];
        for (name, [rows, columns]) in shapes {
            let mut values = vec![0.0; rows * columns];
            generator.normal(&mut values, 0.0, 0.05);
            tensors.insert(name, Tensor::from_vec(values, (rows, columns), &CPU).unwrap());
        }
    }
    attach(model.linears_mut(), &placements, &tensors, 0.0, 0).unwrap()
}

/// Two documents, every token but the first of each predicted.
fn batch() -> Batch {
    let tokens: Vec<u32> = (0..75).map(|i| i * 37 % VOCAB as u32).collect();
    let supervised = (0..75).map(|i| i != 0 && i != 43).collect();
    Batch { tokens, supervised, offsets: vec![0, 43, 75], documents: vec![0, 1] }
}

fn step(model: &mut Decoder, recompute: Recompute) -> (Trainables, StepGradients) {
    let trainables = adapted(model);
    let step = step_gradients(model, &trainables, &[batch()], Some(0), recompute).unwrap();
    (trainables, step)
}

#[test]
fn a_quantized_model_computes_what_its_dequantized_values_compute() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (number, format) in FORMATS.into_iter().enumerate() {
        model(&path, format, number % 2 == 0);
        let pretrained = open(&path);
        assert_eq!(pretrained.compute_dtype(), DType::BF16);
        // bf16: the same products of the same rounded values. f32: summed in another order where they are packed.
        for (dtype, most) in [(DType::F32, 1e-5), (DType::BF16, 0.0)] {
            let mut model = Decoder::open(&pretrained, dtype, &CPU).unwrap();
            let mut plain = dense(&pretrained, dtype);
            assert!(matches!(model.head(), Weight::Quantized(head) if head.stored() == format));
            assert!(model.linears().all(|linear| matches!(linear.weight, Weight::Quantized(_))));
            assert_eq!(model.dtype(), dtype);
            let what = format!("{format:?} in {dtype:?}");
            let (found, expected) = (logits(&model, &batch()), logits(&plain, &batch()));
            let relative_error = relative(&found, &expected);
            assert!(relative_error <= most, "{what}: logits differ by {relative_error}");
            let (trainables, found) = step(&mut model, Recompute::None);
            let (_, expected) = step(&mut plain, Recompute::None);
            assert!((found.loss - expected.loss).abs() <= f64::from(most), "{what}");
            for tensor in trainables.keys() {
                let [found, expected] =
                    [&found, &expected].map(|step| step.gradients.of_name(tensor).unwrap());
                assert!(values(expected).iter().any(|value| *value != 0.0), "{what}: {tensor}");
                let relative = relative(found, expected);
                assert!(relative <= most, "{what}: {tensor} differs by {relative}");
            }
        }
    }
}

/// Token by token, products take another way, which sums in another order.
#[test]
fn generating_from_quantized_weights_gives_the_logits_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for format in FORMATS {
        model(&path, format, true);
        for (dtype, most) in [(DType::F32, 1e-5), (DType::BF16, 0.02)] {
            let mut model = Decoder::open(&open(&path), dtype, &CPU).unwrap();
            adapted(&mut model);
            let mut document = batch();
            document.tokens.truncate(43);
            document.offsets.pop();
            document.documents.pop();
            let whole = logits(&model, &document);
            let mut cache = model.new_cache();
            let mut found = Vec::new();
            for tokens in document
                .tokens
                .chunks(3)
                .take(3)
                .chain(document.tokens[9..15].chunks(2))
                .chain(document.tokens[15..].chunks(1))
            {
                let output = model.forward_cached(tokens, &mut cache).unwrap();
                found.push(model.logits(&output.hidden).unwrap());
            }
            let relative = relative(&Tensor::cat(&found, 0).unwrap(), &whole);
            assert!(relative <= most, "{format:?} in {dtype:?}: {relative}");
        }
    }
}

#[test]
fn answers_from_quantized_weights_generated_together_have_the_bits_of_each_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for format in FORMATS {
        model(&path, format, true);
        for dtype in [DType::F32, DType::BF16] {
            let mut model = Decoder::open(&open(&path), dtype, &CPU).unwrap();
            adapted(&mut model);
            assert_alike_together_and_alone(&model, &format!("{format:?} in {dtype:?}"));
        }
    }
}

#[test]
fn greedy_tokens_from_quantized_weights_are_those_of_a_forward_over_everything() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for format in FORMATS {
        model(&path, format, false);
        let model = Decoder::open(&open(&path), DType::F32, &CPU).unwrap();
        let prompt = &batch().tokens[..20];
        let expected = without_cache(&model, prompt, 30);
        assert_eq!(generated(&mut Session::new(&model), prompt, 30), expected, "{format:?}");
        assert_eq!(without_cache(&dense(&open(&path), DType::F32), prompt, 30), expected, "{format:?}");
    }
}

#[test]
fn recomputation_of_quantized_layers_gives_the_same_gradients_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    model(&path, GgmlDType::Q4K, true);
    let [kept, again] = [Recompute::None, Recompute::Block]
        .map(|recompute| step(&mut Decoder::open(&open(&path), DType::BF16, &CPU).unwrap(), recompute).1);
    for (tensor, gradient) in kept.gradients.iter() {
        assert_eq!(difference(again.gradients.of_name(tensor).unwrap(), gradient.unwrap()), 0.0, "{tensor}");
    }
}

#[test]
fn broken_scales_are_found_when_the_model_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (format, scales) in FORMATS.into_iter().zip([0, 2, 0, 2, 0, 82, 108, 2, 2, 208]) {
        model(&path, format, true);
        let mut bytes = fs::read(&path).unwrap();
        let pretrained = open(&path);
        let name = "model.layers.1.mlp.down_proj.weight";
        let stored = pretrained.checkpoint().read_blocks("blk.1.ffn_down.weight").unwrap();
        let stored = stored.as_ref();
        let at = bytes.windows(stored.len()).position(|window| window == stored).unwrap();
        let block = at + stored.len() - format.type_size() + scales;
        bytes[block..block + 2].copy_from_slice(&[0x00, 0x7e]); // NaN
        drop(pretrained);
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let error = open(&path).weight(name, DType::F32, &CPU).unwrap_err();
        assert!(
            error.to_string().contains("tensor `blk.1.ffn_down.weight`: holds NaN or infinity"),
            "{error}"
        );
    }
}

#[test]
fn weights_that_are_no_whole_number_of_blocks_are_refused() {
    let new = |shape, format, dtype, bytes: usize| {
        Quantized::new("w", shape, format, dtype, std::sync::Arc::new(vec![0u8; bytes]))
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        new((2, 288), GgmlDType::Q4K, DType::F32, 288),
        "tensor `w`: rows of 288 values are no whole number of Q4K blocks, which have 256"
    );
    assert_eq!(
        new((2, 64), GgmlDType::Q4_0, DType::F32, 71),
        "tensor `w`: has 71 bytes of Q4_0, expected 72 for 2 rows of 64 values"
    );
    // 2^62 rows of two blocks of 18 bytes are 0 bytes, modulo 2^64.
    assert_eq!(
        new((1 << 62, 64), GgmlDType::Q4_0, DType::F32, 0),
        "tensor `w`: has 0 bytes of Q4_0, expected more than there can be for 4611686018427387904 rows of 64 values"
    );
    assert_eq!(
        new((2, 64), GgmlDType::Q4_0, DType::F16, 72),
        "tensor `w`: is to be computed with in f16; expected f32 or bf16"
    );
    assert_eq!(new((2, 64), GgmlDType::Q8_1, DType::F32, 72), "tensor `w`: cannot be computed with as Q8_1");
}

const RECIPE: &str = r#"
task = "finetune"
output = "run"
model = { source = "model.gguf" }
adapter = { rank = 4, dropout = 0.1 }
data = { train = [{ path = "texts.jsonl" }], eval_share = 0.2, max_length = 32 }
train = { steps = 6, batch_size = 1, eval_every = 3, save_every = 2, keep = 2, learning_rate = 1e-2 }
"#;

/// A place with a quantized model, texts in its few tokens, and a recipe.
pub(crate) fn place() -> Place {
    let place = Place::new();
    model(&place.path("model.gguf"), GgmlDType::Q4_0, true);
    let texts: String =
        (0..24).map(|i| format!("{{\"text\": \"{}ab 12 a b\"}}\n", "b a12 ".repeat(1 + i % 5))).collect();
    fs::write(place.path("texts.jsonl"), texts).unwrap();
    fs::write(place.path("recipe.toml"), RECIPE).unwrap();
    place
}

#[test]
fn an_adapter_is_trained_resumed_used_and_merged() {
    let place = place();
    let (_, told) = place.run(&["finetune", "recipe.toml"]);
    assert!(told.contains("computing in bf16"), "{told}");
    assert!(told.contains("weights stay q4_0"), "{told}");
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let losses: Vec<f64> = metrics
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64())
        .collect();
    assert!(losses.len() == 6 && losses[5] < 0.8 * losses[0], "{losses:?}");
    let adapter = fs::read(place.path("run/adapter_model.safetensors")).unwrap();

    // As if it had been killed after its fourth step.
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    fs::remove_file(place.path("run/adapter_model.safetensors")).unwrap();
    place.run(&["finetune", "recipe.toml", "--resume"]);
    assert_eq!(fs::read(place.path("run/adapter_model.safetensors")).unwrap(), adapter);

    let generate = |adapter: &[&str]| {
        let arguments =
            ["generate", "--model", "model.gguf", "--raw", "--prompt", "b a12 ", "--max-new-tokens", "8"];
        place.run(&[&arguments[..], &["--temperature", "0"], adapter].concat()).0
    };
    assert_eq!(generate(&["--adapter", "run"]), generate(&["--adapter", "run"]));
    let perplexity = |model: &[&str]| {
        let arguments = ["eval", "perplexity", "--data", "texts.jsonl", "--json"];
        place.json(&[&arguments[..], model].concat())["nll"].as_f64().unwrap()
    };
    let before = perplexity(&["--model", "model.gguf"]);
    let after = perplexity(&["--model", "model.gguf", "--adapter", "run"]);
    assert!(after < 0.8 * before, "{before} {after}");

    let merge = ["merge", "--model", "model.gguf", "--adapter", "run", "--output", "merged"];
    let (_, told) = place.run(&merge);
    assert!(!told.contains("tokenizer files"), "a copy of the model's tokenizer is no other: {told}");
    let merged = perplexity(&["--model", "merged"]);
    let wide = perplexity(&["--model", "model.gguf", "--adapter", "run", "--dtype", "f32"]);
    assert!((merged - wide).abs() <= 1e-5, "{merged} {wide}");
    assert!((after - wide).abs() <= 0.02, "{after} {wide}");
    let inspected = place.json(&["inspect", "model.gguf", "--json"]);
    assert_eq!(inspected["stored"]["q4_0"].as_u64(), Some(q4_bytes()));
}

/// Bytes of all matrices in q4_0: 18 for each 32 values.
fn q4_bytes() -> u64 {
    let layer = 2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * WIDTH * HIDDEN;
    ((VOCAB * HIDDEN + LAYERS * layer) / 32 * 18) as u64
}

#[test]
fn quantized_weights_are_not_trained() {
    let place = place();
    let recipe = RECIPE
        .replace("adapter = { rank = 4, dropout = 0.1 }\n", "")
        .replace("train = { ", "train = { full = true, ");
    fs::write(place.path("recipe.toml"), recipe).unwrap();
    let said = refusal(&place, &["finetune", "recipe.toml"]);
    insta::assert_snapshot!(said, @"
    exit 2
    error: `train.full` trains all weights, and 15 of those in `model.gguf` are quantized (`model.embed_tokens.weight` is q4_0): the steps of training are smaller than the gaps between such values
    hint: train an adapter, with a table `[adapter]` instead of `train.full`; or give the model in f32, bf16 or f16
    ");
    assert_eq!(refusal(&place, &["check", "recipe.toml"]), said);
    assert!(!place.path("run").exists());
}
