use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft::adapter::hf::Adapter;
use peft::model::config::RotaryScaling;
use peft::model::{Decoder, Pretrained};
use serde_json::{Value, json};

use crate::place::{Place, refusal};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn edit_config(place: &Place, change: impl FnOnce(&mut Value)) {
    edit(&place.path("model/config.json"), change);
}

fn edit_weights(place: &Place, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = place.path("model/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, &path).unwrap();
}

fn open(place: &Place, folder: &str) -> Pretrained {
    Pretrained::open(place.path(folder).to_str().unwrap()).unwrap()
}

fn nll(place: &Place, model: &str) -> f64 {
    let eval = ["eval", "perplexity", "--model", model, "--data", "data.jsonl", "--dtype", "f32", "--json"];
    place.json(&eval)["nll"].as_f64().unwrap()
}

fn other_head(tensors: &mut HashMap<String, Tensor>) {
    let head = (&tensors[EMBEDDING] * 1.5).unwrap();
    tensors.insert(HEAD.into(), head);
}

/// transformers 5 ties two weights of a checkpoint only where they are equal.
#[test]
fn a_tied_head_of_other_values_is_the_head() {
    let place = Place::new();
    let tied = nll(&place, "model");
    edit_weights(&place, other_head);
    let model = open(&place, "model");
    model.check().unwrap();
    assert!(!model.config().tie_word_embeddings);
    assert_eq!(model.config_json()["tie_word_embeddings"], false);
    assert_eq!(
        model.warnings(),
        [
            "`tie_word_embeddings` is true, and `lm_head.weight` has other values than the embedding: the model computes with \
          `lm_head.weight`, as in transformers 5"
        ]
    );
    let found = nll(&place, "model");
    assert!((found - tied).abs() > 1e-3, "{found} {tied}");
    edit_config(&place, |config| config["tie_word_embeddings"] = json!(false));
    assert_eq!(nll(&place, "model"), found);
    assert!(open(&place, "model").warnings().is_empty());
    edit_config(&place, |config| config["tie_word_embeddings"] = json!(true));

    // Every command says it, and what it makes is the same model.
    let (_, said) = place.run(&["check", "recipe.toml"]);
    assert!(
        said.contains("warning: `tie_word_embeddings` is true, and `lm_head.weight` has other"),
        "{said}"
    );
    place.run(&["finetune", "recipe.toml", "--set", "train.steps=2"]);
    let with_adapter =
        ["eval", "perplexity", "--model", "model", "--adapter", "run", "--data", "data.jsonl", "--json"];
    let unmerged = place.json(&[&with_adapter[..], &["--dtype", "f32"]].concat())["nll"].as_f64().unwrap();
    for dtype in ["f32", "f16"] {
        let merge = ["merge", "--model", "model", "--adapter", "run", "--output", dtype, "--dtype", dtype];
        let (_, said) = place.run(&merge);
        assert!(said.contains("`tie_word_embeddings` is true"), "{said}");
        assert!((nll(&place, dtype) - unmerged).abs() < 2e-3);
    }
    let config: Value = serde_json::from_slice(&fs::read(place.path("f16/config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
}

#[test]
fn a_tied_head_stored_twice_is_tied() {
    let place = Place::new();
    let tied = nll(&place, "model");
    edit_weights(&place, |tensors| drop(tensors.insert(HEAD.into(), tensors[EMBEDDING].clone())));
    let model = open(&place, "model");
    model.check().unwrap();
    assert!(model.config().tie_word_embeddings && model.warnings().is_empty());
    assert_eq!(nll(&place, "model"), tied);
    // In another type with the same values, it is the same.
    edit_weights(&place, |tensors| {
        let half = tensors[EMBEDDING].to_dtype(DType::BF16).unwrap();
        tensors.insert(EMBEDDING.into(), half.to_dtype(DType::F32).unwrap());
        tensors.insert(HEAD.into(), half);
    });
    assert!(open(&place, "model").config().tie_word_embeddings);
    // And so it is where the file has the head's name alone.
    let both = nll(&place, "model");
    edit_weights(&place, |tensors| drop(tensors.remove(EMBEDDING)));
    assert_eq!(nll(&place, "model"), both);
}

#[test]
fn a_missing_head_is_named_with_the_key_that_decides() {
    let place = Place::new();
    edit_config(&place, |config| drop(config.as_object_mut().unwrap().remove("tie_word_embeddings")));
    insta::assert_snapshot!(refusal(&place, &["generate", "--model", "model", "--prompt", "x"]), @r#"
    exit 1
    error: model: 1 tensor is missing: `lm_head.weight`
    hint: set `"tie_word_embeddings": true` in `config.json` if the embedding is the head too (false is what counts where it is left out); else fetch the model again with its head
    "#);
}

/// The values that transformers 5.23 computes with, as its `AutoConfig` gives them.
#[test]
fn of_two_sayings_of_rotary_embedding_the_one_that_transformers_takes_counts() {
    let place = Place::new();
    let rotary = |change: Value| {
        edit_config(&place, |config| {
            let map = config.as_object_mut().unwrap();
            map.retain(|key, _| !key.starts_with("rope"));
            map.extend(change.as_object().unwrap().clone());
        });
        let model = open(&place, "model");
        let rotary = model.config().rotary.clone();
        (rotary.theta, rotary.scaling, model.warnings().join("\n"))
    };
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    let stretched = RotaryScaling::Linear { factor: 4.0 };
    let plain = json!({"rope_type": "default", "rope_theta": 5e5});
    let found = rotary(json!({"rope_parameters": plain, "rope_scaling": linear}));
    assert_eq!((found.0, found.1), (10_000.0, stretched.clone()));
    assert!(found.2.contains("has `rope_scaling` `{") && found.2.contains("the first counts"), "{}", found.2);
    let found = rotary(json!({"rope_parameters": plain, "rope_scaling": linear, "rope_theta": 7e5}));
    assert_eq!((found.0, found.1), (7e5, stretched));
    for nothing in [json!({}), Value::Null] {
        let found = rotary(json!({"rope_parameters": plain, "rope_scaling": nothing}));
        assert_eq!(found, (5e5, RotaryScaling::None, String::new()));
    }
    let found = rotary(json!({"rope_parameters": plain, "rope_theta": 10_000}));
    assert_eq!((found.0, found.1), (5e5, RotaryScaling::None));
    assert_eq!(
        found.2,
        "`rope_parameters.rope_theta` is 500000.0 and `rope_theta` 10000: the first counts, as in transformers 5"
    );
    let found = rotary(json!({"rope_parameters": plain, "rope_theta": 5e5}));
    assert_eq!(found.2, "");
    let found = rotary(json!({"rope_parameters": {"rope_type": "default", "factor": 4.0}}));
    assert_eq!(found.2, "`rope_parameters.factor` is 4.0, which this type of rotary embedding does not use");
    let found = rotary(json!({"rope_scaling": {"rope_type": "default", "type": "linear"}}));
    assert!(found.2.contains("`rope_scaling.rope_type` is \"default\" and `rope_scaling.type` \"linear\""));

    for kind in ["yarn", "dynamic"] {
        edit_config(&place, |config| {
            config["rope_parameters"] = plain.clone();
            config["rope_scaling"] = json!({"rope_type": kind, "factor": 4.0});
        });
        let said = refusal(&place, &["inspect", "model"]);
        assert!(
            said.contains(&format!("`rope_scaling.rope_type` is `{kind}`, which is not supported")),
            "{said}"
        );
    }
}

/// Puts some tensors of the model into a shard of their own beside all of them, and all names into an index.
fn overlay(place: &Place, shard: &str, named: &str, norm: f64) {
    let path = place.path("model/model.safetensors");
    let all = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let norm = Tensor::full(norm as f32, 128, &Device::Cpu).unwrap();
    let mut map: BTreeMap<&str, &str> = all.keys().map(|name| (name.as_str(), "m.safetensors")).collect();
    map.insert("model.norm.weight", named);
    map.insert("extra", shard);
    let index = json!({ "weight_map": map });
    fs::write(place.path("model/model.safetensors.index.json"), index.to_string()).unwrap();
    let extra = Tensor::new(&[1i64], &Device::Cpu).unwrap();
    let few = HashMap::from([("model.norm.weight".to_string(), norm), ("extra".to_string(), extra)]);
    candle_core::safetensors::save(&few, place.path("model").join(shard)).unwrap();
    fs::rename(&path, place.path("model/m.safetensors")).unwrap();
}

#[test]
fn a_shard_laid_over_another_counts_where_the_index_names_it() {
    let place = Place::new();
    let plain = nll(&place, "model");
    overlay(&place, "z.safetensors", "z.safetensors", 0.5);
    let model = open(&place, "model");
    model.check().unwrap();
    let norm = model.read("model.norm.weight", DType::F32, &Device::Cpu).unwrap();
    assert_eq!(norm.to_vec1::<f32>().unwrap(), [0.5; 128]);
    assert_eq!(
        model.warnings(),
        [
            "tensor `model.norm.weight` is in several files and is read from `z.safetensors`, the last by name, as in transformers",
            "1 tensor is of whole numbers, which weights never are, and left aside: `extra`"
        ]
    );
    assert_ne!(nll(&place, "model"), plain);

    // transformers reads the last file's, whatever the index says: with one value both are right.
    let place = Place::new();
    overlay(&place, "z.safetensors", "m.safetensors", 1.0);
    assert_eq!(nll(&place, "model"), plain);
    let place = Place::new();
    overlay(&place, "z.safetensors", "m.safetensors", 0.5);
    insta::assert_snapshot!(refusal(&place, &["inspect", "model"]), @"
    exit 1
    error: model/model.safetensors.index.json: tensor `model.norm.weight` should be in `m.safetensors`, and `z.safetensors` has another one of that name, which transformers reads
    hint: name `z.safetensors` for it in the index, or take it out of `z.safetensors`
    ");
}

#[test]
fn buffers_are_passed_over_and_merged_as_they_are() {
    let place = Place::new();
    let plain = nll(&place, "model");
    let positions = Tensor::arange(0i64, 512, &Device::Cpu).unwrap();
    let mask = Tensor::ones((1, 1, 4, 4), DType::U8, &Device::Cpu).unwrap();
    edit_weights(&place, |tensors| {
        tensors.insert("model.position_ids".into(), positions.clone());
        tensors.insert("model.layers.0.attn.bias".into(), mask);
        tensors
            .insert("model.layers.0.attn.masked_bias".into(), Tensor::new(&[-1e4f32], &Device::Cpu).unwrap());
        let frequencies = Tensor::ones(16, DType::F32, &Device::Cpu).unwrap();
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
    });
    assert_eq!(nll(&place, "model"), plain);
    assert!(open(&place, "model").warnings().is_empty());
    place.run(&["finetune", "recipe.toml", "--set", "train.steps=2"]);
    place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "merged"]);
    let of = |folder: &str| {
        candle_core::safetensors::load(place.path(folder).join("model.safetensors"), &Device::Cpu).unwrap()
    };
    let (before, after) = (of("model"), of("merged"));
    assert_eq!(before.len(), after.len());
    let kept = after["model.position_ids"].to_vec1::<i64>().unwrap();
    assert_eq!(kept, positions.to_vec1::<i64>().unwrap());
    // A tensor of floats that no part of the model has is no buffer.
    edit_weights(&place, |tensors| {
        tensors.insert(
            "model.layers.0.self_attn.c_attn.bias".into(),
            Tensor::new(&[1f32], &Device::Cpu).unwrap(),
        );
    });
    assert!(open(&place, "model").check().is_err());
}

#[test]
fn types_that_weights_cannot_have_are_the_cause_that_is_told() {
    let place = Place::new();
    edit_weights(&place, |tensors| {
        let norm = tensors["model.norm.weight"].to_dtype(DType::F64).unwrap();
        tensors.insert("model.norm.weight".into(), norm);
    });
    insta::assert_snapshot!(refusal(&place, &["check", "recipe.toml"]), @"
    exit 1
    error: model: 1 tensor is stored in a type that weights cannot have: `model.norm.weight` is f64
    hint: weights are read as f32, f16 or bf16: save the model in one of these (f8 values need scales that are applied first), or give a .gguf file
    ");
}

/// Adds an empty tensor of a name that the file has already.
fn name_twice(path: &Path, name: &str) {
    let whole = fs::read(path).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&whole[8..8 + length]).unwrap().trim_end();
    let entry = format!(r#""{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    let header = format!("{{{entry},{}", &header[1..]);
    let twice = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &whole[8 + length..]].concat();
    fs::write(path, twice).unwrap();
}

/// JSON readers keep the last of two entries of one name.
#[test]
fn a_tensor_named_twice_is_refused() {
    let place = Place::new();
    let path = place.path("model/model.safetensors");
    name_twice(&path, "model.norm.weight");
    insta::assert_snapshot!(refusal(&place, &["inspect", "model"]), @"
    exit 1
    error: model/model.safetensors: the header names tensor `model.norm.weight` twice
    hint: one of the two would be ignored; write the file again with each tensor once
    ");
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama/adapter");
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(adapter.join(file), place.path(file)).unwrap();
    }
    let name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
    name_twice(&place.path("adapter_model.safetensors"), name);
    let error = Adapter::read(&place.path(""), &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains(&format!("the header names tensor `{name}` twice")), "{error}");
    let nested = format!("{{\"a\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    fs::write(&path, [&(nested.len() as u64).to_le_bytes()[..], nested.as_bytes()].concat()).unwrap();
    assert!(refusal(&place, &["inspect", "model"]).contains("not a readable safetensors file"));
}

#[test]
fn a_decoder_refuses_weights_of_other_shapes_than_its_configuration() {
    let place = Place::new();
    let model = open(&place, "model");
    let error = Decoder::load(model.config(), &Device::Cpu, |name| {
        let name = if name.ends_with("k_proj.weight") { &name.replace("k_proj", "q_proj") } else { name };
        model.weight(name, DType::F32, &Device::Cpu)
    });
    let error = error.unwrap_err().to_string();
    assert_eq!(
        error,
        "tensor `model.layers.0.self_attn.k_proj.weight`: has shape [128, 128], expected [64, 128]"
    );
}
