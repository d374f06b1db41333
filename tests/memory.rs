use std::collections::{BTreeMap, HashMap};
use std::fs;

use candle_core::{DType, Device, Tensor};
use peft::model::config::Projection;
use peft::model::footprint::{Piece, TrainedParts};
use peft::model::{DecoderConfig, Recompute, family};
use peft::recipe::RecomputeChoice;
use peft::run::{Memory, Needs};
use serde_json::{Value, json};

use super::place::Place;

const MIB: u64 = 1 << 20;

/// Llama-3.2-1B's shape.
fn one_billion() -> DecoderConfig {
    family::read(&json!({
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": true,
        "max_position_embeddings": 131_072, "hidden_act": "silu"
    }))
    .unwrap()
}

/// Mistral-7B's shape.
fn seven_billion() -> DecoderConfig {
    family::read(&json!({
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_768, "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0, "tie_word_embeddings": false, "max_position_embeddings": 32_768,
        "hidden_act": "silu", "sliding_window": null
    }))
    .unwrap()
}

/// Rank 16 on the feed-forward layers, documents of 512 tokens that are all learned, two threads.
fn needs(config: DecoderConfig, quantized: bool, documents: usize) -> Needs {
    let targets = [Projection::Gate, Projection::Up, Projection::Down];
    let ranks: BTreeMap<_, _> = (0..config.layers.len())
        .flat_map(|layer| targets.map(|projection| ((layer, projection), 16)))
        .collect();
    let widths = config.linears().into_iter().filter(|linear| targets.contains(&linear.projection));
    let trainable = widths.map(|linear| 16 * (linear.in_features + linear.out_features) as u64).sum();
    let bytes = |shape: &[usize]| {
        let values = shape.iter().product::<usize>() as u64;
        // Q4_0: 18 bytes for 32 values.
        if quantized && shape.len() == 2 { values / 32 * 18 } else { 2 * values }
    };
    let tensors: Vec<u64> = config.tensors().iter().map(|(_, shape)| bytes(shape)).collect();
    Needs {
        dtype: DType::BF16,
        trained: TrainedParts::LowRank { ranks, dropout: false, routers: false },
        trainable,
        masters: false,
        weights: tensors.iter().sum(),
        teacher: None,
        largest_read: if quantized { 0 } else { tensors.into_iter().max().unwrap() },
        batches: vec![vec![(512, 511); documents]],
        accumulate: 1,
        evaluation: Piece { tokens: 512, longest: 512, learned: 511 },
        threads: 2,
        process: 64 * MIB,
        config,
    }
}

fn chosen(needs: &Needs, choice: RecomputeChoice, mib: u64) -> String {
    let memory = Memory::choose(needs, choice, mib * MIB, true);
    let fits = if memory.fits() { "fits" } else { "does not fit" };
    let peak = memory.peak_bytes / MIB;
    format!("{mib} MiB: {:?}, {} tokens, {peak} MiB, {fits}", memory.recompute, memory.piece_tokens)
}

#[test]
fn auto_keeps_all_in_smaller_pieces_before_it_computes_twice() {
    let mut needs = needs(one_billion(), true, 4);
    needs.batches = vec![vec![(256, 255); 16]];
    let lines = [4000, 1800, 1400, 1150, 1050, 500].map(|mib| chosen(&needs, RecomputeChoice::Auto, mib));
    insta::assert_snapshot!(lines.join("\n"), @r"
    4000 MiB: None, 1024 tokens, 1739 MiB, fits
    1800 MiB: None, 1024 tokens, 1739 MiB, fits
    1400 MiB: None, 512 tokens, 1320 MiB, fits
    1150 MiB: None, 256 tokens, 1111 MiB, fits
    1050 MiB: Block, 512 tokens, 952 MiB, fits
    500 MiB: Block, 256 tokens, 923 MiB, does not fit
    ");
}

#[test]
fn a_document_is_never_cut() {
    let mut needs = needs(one_billion(), true, 1);
    needs.batches = vec![vec![(300, 299), (3000, 2999), (20, 19)]];
    let memory = Memory::choose(&needs, RecomputeChoice::Auto, u64::MAX, false);
    assert_eq!((memory.recompute, memory.piece_tokens), (Recompute::None, 3000));
    assert_eq!(Memory::choose(&needs, RecomputeChoice::Auto, MIB, false).piece_tokens, 3000);
    // A batch that is smaller than a piece is computed as one.
    needs.batches = vec![vec![(30, 29), (40, 39)]];
    assert_eq!(Memory::choose(&needs, RecomputeChoice::Auto, u64::MAX, false).piece_tokens, 70);
}

/// These are the numbers of the table of memory in `examples/MEASUREMENTS.md`.
#[test]
fn what_models_of_one_and_of_seven_billion_parameters_take() {
    let mut lines = Vec::new();
    for (name, config) in [("1B", one_billion()), ("7B", seven_billion())] {
        for (format, quantized) in [("bf16", false), ("Q4_0", true)] {
            for documents in [1, 4] {
                let needs = needs(config.clone(), quantized, documents);
                let gib = |choice: RecomputeChoice| {
                    let memory = Memory::choose(&needs, choice, u64::MAX, false);
                    memory.peak_bytes as f64 / f64::from(1 << 30)
                };
                let (none, block) = (gib(RecomputeChoice::None), gib(RecomputeChoice::Block));
                lines.push(format!("{name} {format} {documents} x 512: {none:.2} GiB, {block:.2} GiB"));
            }
        }
    }
    insta::assert_snapshot!(lines.join("\n"), @r"
    1B bf16 1 x 512: 2.91 GiB, 2.89 GiB
    1B bf16 4 x 512: 3.35 GiB, 2.89 GiB
    1B Q4_0 1 x 512: 1.26 GiB, 0.90 GiB
    1B Q4_0 4 x 512: 1.70 GiB, 1.03 GiB
    7B bf16 1 x 512: 15.41 GiB, 14.13 GiB
    7B bf16 4 x 512: 17.04 GiB, 14.48 GiB
    7B Q4_0 1 x 512: 5.71 GiB, 4.43 GiB
    7B Q4_0 4 x 512: 7.34 GiB, 4.78 GiB
    ");
}

#[test]
fn the_components_are_a_table() {
    let memory = Memory::choose(&needs(seven_billion(), true, 4), RecomputeChoice::Auto, u64::MAX, false);
    assert_eq!(memory.components.total(), memory.peak_bytes);
    let table = memory.table();
    assert!(table.lines().all(|line| line.len() <= 80), "{table}");
    insta::assert_snapshot!(table, @r"
    memory at the peak, in forward and backward:
      weights                      3.8 GiB
      adapter                    108.0 MiB
      optimizer                  216.0 MiB
      gradients                  109.8 MiB
      activations                  2.9 GiB
      layer at work              100.0 MiB
      loss                         8.0 MiB
      packed factors               5.0 MiB
      gaps between buffers        61.1 MiB
      program, tokenizer, data    64.0 MiB
      in all                       7.3 GiB
    ");
}

/// An adapter on all projections.
const ON_ALL: &str = "adapter = { rank = 8, targets = \"all-linear\" }\n";

/// A recipe with batches of 1024 tokens, all learned.
fn large_place(model: &str, train: &str) -> Place {
    large_place_with(model, train, if train.contains("full = true") { "" } else { ON_ALL })
}

fn large_place_with(model: &str, train: &str, adapter: &str) -> Place {
    let place = Place::new();
    let stories: String = (0..96)
        .map(|n| {
            let text: String = (0..80).map(|i| format!("Kite {} is in box {}. ", n + i, n * i)).collect();
            format!("{}\n", json!({ "text": text }))
        })
        .collect();
    fs::write(place.path("stories.jsonl"), stories).unwrap();
    let recipe = format!(
        "task = \"finetune\"\noutput = \"run\"\nmodel = {{ source = \"model\", dtype = \"{model}\" }}\n\
         data = {{ train = [{{ path = \"stories.jsonl\" }}], eval_share = 0.1, max_length = 512, train_on = \"all\" }}\n\
         train = {{ steps = 2, batch_size = 4, {train} }}\n"
    );
    fs::write(place.path("recipe.toml"), recipe + adapter).unwrap();
    place
}

/// Exit status and stdout or stderr of `peft` on two threads.
fn peft(place: &Place, arguments: &[&str]) -> (i32, String, String) {
    let output = place.command(arguments).env("RAYON_NUM_THREADS", "2").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The feed-forward networks of a model.
#[derive(Debug, Clone, Copy)]
enum Networks {
    Dense,
    /// So many experts, a quarter of them active.
    Experts(usize),
    /// Half of the neurons in one that every token goes to, through a gate, the others in so many experts.
    Shared(usize),
}

/// A model of 14 million parameters in `model`, which is more than what a process takes by itself.
fn larger_model(place: &Place, networks: Networks) {
    let path = place.path("model/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", 512),
        ("intermediate_size", 1536),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 64),
    ] {
        config[key] = json!(value);
    }
    match networks {
        Networks::Dense => {}
        Networks::Experts(experts) => {
            config["model_type"] = json!("mixtral");
            config["intermediate_size"] = json!(1536 / experts);
            config["num_local_experts"] = json!(experts);
            config["num_experts_per_tok"] = json!(experts / 4);
        }
        Networks::Shared(experts) => {
            config["model_type"] = json!("qwen2_moe");
            config["shared_expert_intermediate_size"] = json!(768);
            config["moe_intermediate_size"] = json!(768 / experts);
            config["num_experts"] = json!(experts);
            config["num_experts_per_tok"] = json!(experts / 4);
        }
    }
    fs::write(&path, config.to_string()).unwrap();
    let tensors: HashMap<String, Tensor> = family::read(&config)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, shape)| (name, Tensor::rand(-0.05f32, 0.05, shape, &Device::Cpu).unwrap()))
        .collect();
    candle_core::safetensors::save(&tensors, place.path("model/model.safetensors")).unwrap();
}

#[test]
fn a_run_takes_what_was_predicted() {
    const ON_ATTENTION: &str = "adapters on attention alone";
    let on_attention = "adapter = { rank = 8, targets = [\"q_proj\", \"v_proj\"] }\n";
    let mut lines = Vec::new();
    for (dtype, train, networks) in [
        ("f32", "recompute = \"none\"", Networks::Dense),
        ("f32", "recompute = \"block\"", Networks::Dense),
        ("bf16", "recompute = \"none\"", Networks::Dense),
        ("f32", "full = true", Networks::Dense),
        ("f32", "recompute = \"none\"", Networks::Experts(8)),
        ("bf16", "recompute = \"none\"", Networks::Experts(32)),
        ("f32", "recompute = \"block\"", Networks::Experts(16)),
        ("f32", "recompute = \"none\", router = \"full\"", Networks::Experts(8)),
        ("f32", "full = true", Networks::Experts(8)),
        ("f32", ON_ATTENTION, Networks::Experts(8)),
        ("f32", "recompute = \"none\"", Networks::Shared(8)),
        ("bf16", "recompute = \"block\"", Networks::Shared(8)),
    ] {
        let place = match train {
            ON_ATTENTION => large_place_with(dtype, "recompute = \"none\"", on_attention),
            _ => large_place(dtype, train),
        };
        larger_model(&place, networks);
        let (exit, report, said) = peft(&place, &["check", "recipe.toml", "--json"]);
        assert_eq!(exit, 0, "{said}");
        let report: Value = serde_json::from_str(&report).unwrap();
        let predicted = report["memory"]["peak_bytes"].as_u64().unwrap();
        let (exit, _, said) = peft(&place, &["finetune", "recipe.toml", "--log", "silent"]);
        assert_eq!(exit, 0, "{said}");
        let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
        let lines_of_run = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let shown = lines_of_run.filter_map(|line| line["peak_rss_bytes"].as_u64()).max().unwrap();
        let share = predicted as f64 / shown as f64;
        let what = format!("{dtype}, {train}, {networks:?}");
        lines.push((share, format!("{what}: {} of {} MiB", predicted / MIB, shown / MIB)));
    }
    assert!(lines.iter().all(|(share, _)| (0.9..1.1).contains(share)), "{lines:#?}");
}

/// A trained router has a backward through all layers above it, whether these have adapters or not.
#[test]
fn routers_reach_down_to_the_first_sparse_layer() {
    let config = family::read(&json!({
        "model_type": "mixtral", "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096
    }))
    .unwrap();
    let components = |routers| {
        let mut needs = needs(config.clone(), false, 1);
        let ranks = BTreeMap::from([((3, Projection::Q), 16)]);
        needs.trained = TrainedParts::LowRank { ranks, dropout: false, routers };
        Memory::choose(&needs, RecomputeChoice::None, u64::MAX, false).components
    };
    let (without, with) = (components(false), components(true));
    assert!(with.activations > 3 * without.activations, "{with:?} {without:?}");
}

/// One that has nothing in common with the model but its shape, so that all of it is held.
#[test]
fn a_run_with_a_teacher_takes_what_was_predicted() {
    let place = large_place("f32", "recompute = \"none\"");
    fs::create_dir(place.path("teacher")).unwrap();
    larger_model(&place, Networks::Dense);
    for name in place.names_in("model") {
        fs::copy(place.path("model").join(&name), place.path("teacher").join(&name)).unwrap();
    }
    let weights = fs::metadata(place.path("model/model.safetensors")).unwrap().len();
    let peak = |arguments: &[&str]| {
        let (exit, report, said) = peft(&place, &[&["check", "recipe.toml", "--json"], arguments].concat());
        assert_eq!(exit, 0, "{said}");
        let report: Value = serde_json::from_str(&report).unwrap();
        (report["memory"]["peak_bytes"].as_u64().unwrap(), report["memory"]["components"]["teacher"].as_u64())
    };
    let teacher = ["--set", "distill.teacher=teacher"];
    assert_eq!(peak(&teacher).1, None, "the same weights are in memory once");
    larger_model(&place, Networks::Dense);
    let (predicted, of_teacher) = peak(&teacher);
    assert!(of_teacher.unwrap().abs_diff(weights) < MIB, "{of_teacher:?} of {weights}");
    let (exit, _, said) =
        peft(&place, &[&["finetune", "recipe.toml", "--log", "silent"], &teacher[..]].concat());
    assert_eq!(exit, 0, "{said}");
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let shown = lines.filter_map(|line| line["peak_rss_bytes"].as_u64()).max().unwrap();
    let share = predicted as f64 / shown as f64;
    assert!((0.9..1.1).contains(&share), "{} of {} MiB", predicted / MIB, shown / MIB);
}

#[test]
fn a_budget_that_cannot_be_kept_is_refused_with_what_helps() {
    let place = large_place("f32", "memory_budget = \"16MiB\"");
    let (exit, _, refused) = peft(&place, &["check", "recipe.toml"]);
    assert_eq!(exit, 2);
    assert!(refused.contains("16.0 MiB") && refused.contains("hint: "), "{refused}");
    let (exit, _, said) = peft(&place, &["finetune", "recipe.toml"]);
    assert_eq!(exit, 2);
    assert_eq!(said, refused, "what the run says, check has said");
    assert!(!place.path("run").exists());
    let budget = ["--set", "train.memory_budget=1GiB"];
    let (_, _, warning) = peft(&place, &[&["check", "recipe.toml"], &budget[..]].concat());
    assert!(!warning.contains("MiB"), "{warning}");
}
