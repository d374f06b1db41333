use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use peft::adapter::hf::{self, Adapter, Provenance};
use peft::adapter::init::fresh;
use peft::adapter::torch_random::Generator;
use peft::adapter::{Exclude, Init, LoraConfig, Patterns, Targets, attach, detach, resolve};
use peft::model::DecoderConfig;
use peft::model::Linear;
use peft::ops::{Parameter, Weight};
use serde_json::{Value, json};

use crate::fixture::{Fixture, MODELS, values};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn fixture_json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn decoder(name: &str) -> DecoderConfig {
    Fixture::open(name).pretrained().config().clone()
}

fn config(targets: Targets) -> LoraConfig {
    LoraConfig { rank: 4, targets, ..LoraConfig::default() }
}

/// Linears of `decoder` with zero weights.
fn linears(decoder: &DecoderConfig) -> Vec<Linear> {
    let linears = decoder.linears().into_iter();
    linears
        .map(|linear| {
            let shape = (linear.out_features, linear.in_features);
            let weight = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
            let weight = Weight::Dense(Parameter::new(format!("{}.weight", linear.path), &weight));
            Linear { path: linear.path, weight, bias: None, low_rank: None }
        })
        .collect()
}

#[test]
fn scales_and_layers_are_those_of_peft() {
    for name in MODELS {
        let adapter = Adapter::read(&fixture(&format!("{name}/adapter")), &Device::Cpu).unwrap();
        assert_eq!(adapter.base_model.as_deref(), Some(format!("tests/fixtures/{name}").as_str()));
        assert_eq!(adapter.warnings, Vec::<String>::new());
        let resolved = adapter.placements(&decoder(name)).unwrap();
        let ours: BTreeMap<String, f64> =
            resolved.placements.iter().map(|p| (p.linear.path.clone(), p.scale)).collect();
        let theirs: BTreeMap<String, f64> =
            serde_json::from_value(fixture_json(&format!("{name}/golden.json"))["scales"].clone()).unwrap();
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn what_is_written_is_read_again() {
    for name in MODELS {
        let decoder = decoder(name);
        let first = Adapter::read(&fixture(&format!("{name}/adapter")), &Device::Cpu).unwrap();
        let placements = first.placements(&decoder).unwrap();
        let provenance = Provenance { base_model: first.base_model.clone(), ..Provenance::default() };
        let folder = tempfile::tempdir().unwrap();
        let tensors = || first.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        hf::write(folder.path(), &first.config, &placements, tensors(), &provenance).unwrap();
        let second = Adapter::read(folder.path(), &Device::Cpu).unwrap();
        assert_eq!(second.placements(&decoder).unwrap().placements, placements.placements, "{name}");
        assert_eq!(second.base_model, first.base_model);
        assert_eq!(second.config.rank_pattern, first.config.rank_pattern);
        assert!(first.tensors.keys().eq(second.tensors.keys()));
        for (name, tensor) in &first.tensors {
            assert_eq!(values(tensor), values(&second.tensors[name]));
        }
        let bytes = || std::fs::read(folder.path().join(hf::TENSORS_FILE)).unwrap();
        let before = bytes();
        hf::write(folder.path(), &second.config, &placements, tensors(), &provenance).unwrap();
        assert_eq!(before, bytes());
    }
}

#[test]
fn files_of_a_new_adapter() {
    let decoder = decoder("qwen2");
    let config = LoraConfig {
        rank: 4,
        alpha: Some(6.5),
        dropout: 0.05,
        targets: Targets::AllLinear,
        rank_pattern: Patterns::from_iter([(r"layers\.1\.mlp\.up_proj", 0), ("down_proj", 2)]),
        ..LoraConfig::default()
    };
    let resolved = resolve(&config, &decoder).unwrap();
    assert_eq!(resolved.without, ["model.layers.1.mlp.up_proj"]);
    let tensors = fresh(&config, &resolved.placements, &decoder, &Device::Cpu).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let provenance = Provenance {
        base_model: Some("org/model".into()),
        revision: None,
        metadata: BTreeMap::from([("seed".to_string(), "0".to_string())]),
    };
    let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    hf::write(folder.path(), &config, &resolved, named, &provenance).unwrap();
    let text = |file: &str| std::fs::read_to_string(folder.path().join(file)).unwrap();
    insta::assert_snapshot!("adapter_config", text("adapter_config.json"));
    insta::assert_snapshot!("adapter_card", text("README.md"));
    let again = Adapter::read(folder.path(), &Device::Cpu).unwrap();
    assert_eq!(again.placements(&decoder).unwrap().placements, resolved.placements);
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name() {
    for (name, message, hint) in [
        ("dora", "`use_dora` is true: DoRA, not built yet", Some("merge_and_unload")),
        (
            "modules_to_save",
            "`modules_to_save` is [\"lm_head\"]: whole trained modules",
            Some("merge_and_unload"),
        ),
        ("pissa", "`init_lora_weights` is \"pissa\"", Some("path_initial_model_for_weight_conversion")),
        ("pickle", "has `adapter_model.bin`, a pickle", Some("`save_pretrained`")),
    ] {
        let error = Adapter::read(&fixture(&format!("adapters/{name}")), &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains(message), "{name}: {error}");
        assert_eq!(error.hint().is_some(), hint.is_some());
        assert!(hint.is_none_or(|hint| error.hint().unwrap().contains(hint)));
    }
}

/// The fixture `llama` with its adapter's configuration and tensors changed.
fn changed(change: impl Fn(&mut Value, &mut BTreeMap<String, Tensor>)) -> peft::Result<Adapter> {
    let mut config = fixture_json("llama/adapter/adapter_config.json");
    let path = fixture("llama/adapter/adapter_model.safetensors");
    let mut tensors: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect();
    change(&mut config, &mut tensors);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    safetensors::serialize_to_file(&tensors, None, &folder.path().join("adapter_model.safetensors")).unwrap();
    let adapter = Adapter::read(folder.path(), &Device::Cpu)?;
    adapter.placements(&decoder("llama"))?;
    Ok(adapter)
}

const DOWN_A: &str = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
const DOWN_B: &str = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight";

#[test]
fn spellings_in_the_wild_are_read() {
    let plain = changed(|_, _| {}).unwrap();
    for rename in [
        |name: &str| name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        |name: &str| name.strip_prefix("base_model.model.").unwrap().to_string(),
        |name: &str| name.replace("base_model.model.", "base_model.model.model."),
    ] {
        let read = changed(|_, tensors| {
            *tensors = std::mem::take(tensors).into_iter().map(|(name, t)| (rename(&name), t)).collect();
        });
        assert!(read.unwrap().tensors.keys().eq(plain.tensors.keys()));
    }
    let settings: [fn(&mut Value); 7] = [
        |config| config["peft_type"] = json!("lora"),
        |config| config["lora_alpha"] = json!(6.0),
        |config| config["runtime_config"] = json!({ "ephemeral_gpu_offload": false }),
        |config| config["some_new_key"] = json!(null),
        |config| config["target_modules"] = json!("all-linear"),
        |config| config["fan_in_fan_out"] = json!(true),
        |config| {
            let keep = ["peft_type", "target_modules", "r", "lora_alpha"];
            config.as_object_mut().unwrap().retain(|key, _| keep.contains(&key.as_str()));
        },
    ];
    for setting in settings {
        let read = changed(|config, _| setting(config)).unwrap();
        assert_eq!(read.config.scale(4, read.config.alpha()), 1.5);
    }
    let halves = changed(|_, tensors| {
        for (name, tensor) in tensors.iter_mut() {
            *tensor = tensor.to_dtype(if name.contains("_A") { DType::BF16 } else { DType::F16 }).unwrap();
        }
    });
    for tensor in halves.unwrap().tensors.values() {
        assert_eq!(tensor.dtype(), DType::F32);
    }
    let newer = changed(|config, _| config["some_new_number"] = json!(3)).unwrap();
    assert_eq!(newer.warnings.len(), 1);
}

#[test]
fn what_peft_lets_pass_is_refused() {
    type Change = fn(&mut Value, &mut BTreeMap<String, Tensor>);
    let cases: [(Change, &str); 24] = [
        (|config, _| config["peft_type"] = json!("IA3"), "`peft_type` is \"IA3\""),
        (|config, _| config["peft_type"] = json!(null), "has no `peft_type`"),
        (|config, _| config["bias"] = json!("all"), "`bias` is \"all\""),
        (|config, _| config["r"] = json!(0), "`r` is 0, expected a whole number above 0"),
        (|config, _| config["r"] = json!(1_000_000_000), "`r` is 1000000000, expected at most 65536"),
        (|config, _| config["lora_alpha"] = json!(1e300), "`lora_alpha` is 1e+300, expected at most 1e6"),
        (|config, _| config["use_rslora"] = json!("yes"), "`use_rslora` is \"yes\", expected true or false"),
        (|config, _| config["some_variant"] = json!(true), "`some_variant` is true, which is not known here"),
        (|config, _| config["layer_replication"] = json!([[0, 2]]), "replicated layers"),
        (|config, _| config["target_parameters"] = json!(["experts.up"]), "adapters on fused parameters"),
        (
            |config, _| {
                config["use_dora"] = json!(true);
                config["alora_invocation_tokens"] = json!([1]);
            },
            "`use_dora` is true: DoRA, not built yet; `alora_invocation_tokens` is [1]: activated LoRA",
        ),
        (
            |config, _| {
                config["target_modules"] = json!(".*up_proj");
                config["layers_to_transform"] = json!([0]);
            },
            "do not go with a regular expression",
        ),
        (
            |config, _| config["r"] = json!(3),
            "has shape [4, 56], expected [3, 56]; `model.layers.0.mlp.down_proj.lora_B",
        ),
        (
            |config, _| config["target_modules"] = json!(["q_proj"]),
            "on a layer that the configuration does not target",
        ),
        (
            |config, _| config["exclude_modules"] = json!(["q_proj"]),
            "on a layer that the configuration does not target",
        ),
        (
            |_, tensors| drop(tensors.remove(DOWN_A)),
            "`base_model.model.model.layers.0.mlp.down_proj.lora_B.weight` has no `lora_A.weight`",
        ),
        (
            |_, tensors| {
                tensors.remove(DOWN_A);
                tensors.remove(DOWN_B);
            },
            "`model.layers.0.mlp.down_proj.lora_A.weight` is missing",
        ),
        (
            |_, tensors| {
                let tensor = tensors[DOWN_A].clone();
                tensors.insert(DOWN_A.replace("lora_A.", "lora_A.default."), tensor);
            },
            "are the same tensor",
        ),
        (
            |_, tensors| {
                let infinite = (tensors[DOWN_A].ones_like().unwrap() / 0.0).unwrap();
                tensors.insert(DOWN_A.to_string(), infinite);
            },
            "has the value inf",
        ),
        (
            |_, tensors| {
                let tensor = Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap();
                tensors.insert("base_model.model.model.embed_tokens.weight".to_string(), tensor);
            },
            "`model.embed_tokens.weight` is a whole tensor of the model; trained embeddings and heads are not built yet",
        ),
        (
            |_, tensors| {
                let tensor = Tensor::zeros(32, DType::F32, &Device::Cpu).unwrap();
                tensors.insert(DOWN_B.replace("weight", "bias"), tensor);
            },
            "is a bias, though `lora_bias` is false",
        ),
        (
            |_, tensors| {
                let tensor = Tensor::zeros((4, 32), DType::F32, &Device::Cpu).unwrap();
                tensors.insert(DOWN_A.replace("layers.0", "layers.7"), tensor.clone());
                tensors.insert(DOWN_B.replace("layers.0", "layers.7"), tensor);
            },
            "`model.layers.7.mlp.down_proj.lora_A.weight` is on a layer that the model does not have",
        ),
        (
            |_, tensors| {
                drop(
                    tensors.insert(
                        DOWN_A.to_string(),
                        Tensor::zeros((4, 56), DType::I64, &Device::Cpu).unwrap(),
                    ),
                )
            },
            "is of type I64, expected F32, BF16 or F16",
        ),
        (|_, tensors| tensors.clear(), "has no tensors of an adapter"),
    ];
    for (change, message) in cases {
        let error = changed(change).unwrap_err().to_string();
        assert!(error.contains(message), "expected {message}\n   found {error}");
    }
}

/// The file is at fault, by its own keys, and not the request that names it.
#[test]
fn patterns_that_are_none_are_named_by_file_and_key() {
    for (key, value) in [
        ("target_modules", json!("(")),
        ("exclude_modules", json!("[")),
        ("layers_pattern", json!(["a)("])),
        ("rank_pattern", json!({ "*": 4 })),
        ("alpha_pattern", json!({ "(?x) a #": 4 })),
    ] {
        let error = changed(|config, _| config[key] = value.clone()).unwrap_err();
        assert_eq!(error.exit_code(), 1, "{error}");
        let told = error.to_string();
        assert!(told.contains("adapter_config.json: `"), "{told}");
        assert!(told.contains(&format!("`{key}` has the invalid regular expression `")), "{told}");
    }
    let keys = |config: &mut Value, _: &mut BTreeMap<String, Tensor>| {
        (0..50_000).for_each(|n| config[format!("key_{n}")] = json!(n));
    };
    let warnings = changed(keys).unwrap().warnings;
    assert_eq!(warnings.len(), 11, "{warnings:?}");
    assert_eq!(warnings[10], "and 49990 more keys in the adapter's configuration that are ignored");
}

#[test]
fn broken_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    let read = || Adapter::read(folder.path(), &Device::Cpu).unwrap_err().to_string();
    assert!(read().contains("is not an adapter: it has no `adapter_config.json`"));
    let error = Adapter::read(&folder.path().join("absent"), &Device::Cpu).unwrap_err();
    assert!(error.to_string().starts_with("there is no adapter folder") && error.exit_code() == 2);
    copy("adapter_config.json", &std::fs::read(fixture("llama/adapter/adapter_config.json")).unwrap());
    assert!(read().contains("has no `adapter_model.safetensors`"));
    let whole = std::fs::read(fixture("llama/adapter/adapter_model.safetensors")).unwrap();
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        copy("adapter_model.safetensors", &whole[..length]);
        assert!(read().contains("not a readable safetensors file"), "{}", read());
    }
    copy("adapter_config.json", &vec![b' '; (16 << 20) + 1]);
    assert!(read().contains("expected at most 16777216"), "{}", read());
    copy("adapter_config.json", b"[]");
    assert!(read().contains("is not a JSON object"));
}

#[test]
fn an_adapter_for_another_model_says_so() {
    let adapter = Adapter::read(&fixture("llama3/adapter"), &Device::Cpu).unwrap();
    let error = adapter.placements(&decoder("llama")).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("`model.layers.1.mlp.down_proj.lora_A.weight` has shape [4, 48], expected [4, 56]")
    );
    assert_eq!(error.hint(), Some("the adapter was made for `tests/fixtures/llama3`"));
    assert_eq!(adapter.base_mismatch("/elsewhere/llama3/"), None);
    let told = adapter.base_mismatch("org/llama").unwrap();
    let expected = format!("the adapter `{}` was made for `tests/fixtures/llama3`", adapter.source);
    assert!(told.starts_with(&expected), "{told}");
}

#[test]
fn targets_that_lead_nowhere_are_errors() {
    let decoder = decoder("qwen2");
    let refuse = |config: LoraConfig| {
        let error = resolve(&config, &decoder).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        (error.to_string(), error.hint().unwrap_or_default().to_string())
    };
    let names = |names: &[&str]| config(Targets::names(names.iter().copied()));
    let (message, hint) = refuse(names(&["q_proj", "gate_projs"]));
    assert_eq!(message, "`gate_projs` in `targets` matches no linear layer of the model");
    assert_eq!(hint, "nearest are `gate_proj`, `k_proj`, `o_proj`");
    let (message, _) = refuse(names(&["c_attn", "q_proj", "c_proj"]));
    assert_eq!(message, "`c_attn`, `c_proj` in `targets` match no linear layer of the model");
    let (_, hint) = refuse(names(&["c_attn"]));
    assert!(hint.starts_with("the model has `q_proj`, `k_proj`"), "{hint}");
    let (_, hint) = refuse(names(&["model.layers.7.mlp.up_proj"]));
    assert!(hint.contains("`model.layers.0.mlp.up_proj`"), "{hint}");
    let (_, hint) = refuse(config(Targets::Pattern("q_proj".into())));
    assert!(hint.ends_with("names go into a list: [\"q_proj\"]"), "{hint}");
    let (message, _) = refuse(config(Targets::Pattern(".*(q_proj".into())));
    assert_eq!(
        message,
        "`targets` has the invalid regular expression `.*(q_proj`, at position 9: Opening parenthesis without closing parenthesis"
    );
    let (message, _) = refuse(LoraConfig { exclude: Exclude::Names(vec!["q".into()]), ..names(&["q_proj"]) });
    assert_eq!(message, "`q` in `exclude` matches no linear layer of the model");
    let (message, _) =
        refuse(LoraConfig { exclude: Exclude::Names(vec!["q_proj".into()]), ..names(&["q_proj"]) });
    assert!(message.contains("leave no layer"));
    let (message, _) = refuse(LoraConfig { layers_to_transform: Some(vec![0, 2]), ..names(&["q_proj"]) });
    assert_eq!(message, "`layers_to_transform` has 2, and the model has layers 0 to 1");
    let (message, _) =
        refuse(LoraConfig { rank_pattern: Patterns::from_iter([("v_proj", 2)]), ..names(&["q_proj"]) });
    assert!(message.starts_with("`v_proj` in `rank_pattern` matches no target"), "{message}");
    assert_eq!(refuse(names(&["lm_head"])).0, "an adapter on `lm_head` cannot be trained");
    let (message, hint) = refuse(LoraConfig { rank: 17, ..names(&["q_proj", "v_proj"]) });
    assert_eq!(
        message,
        "rank larger than a dimension of the weight: `model.layers.0.self_attn.v_proj` is [16, 32] and its rank 17; \
         `model.layers.1.self_attn.v_proj` is [16, 32] and its rank 17"
    );
    assert_eq!(hint, "choose a smaller `adapter.rank`, or leave these layers out of `adapter.targets`");
}

#[test]
fn layers_and_exclusions() {
    let decoder = decoder("llama3");
    let paths = |config: LoraConfig| -> Vec<String> {
        resolve(&config, &decoder).unwrap().placements.into_iter().map(|p| p.linear.path).collect()
    };
    let all = paths(config(Targets::AllLinear));
    assert_eq!(all.len(), 21);
    let some = paths(LoraConfig {
        layers_to_transform: Some(vec![2, 1]),
        layers_pattern: vec!["h".into(), "layers".into()],
        exclude: Exclude::Pattern(r".*\.self_attn\..*".into()),
        ..config(Targets::AllLinear)
    });
    assert_eq!(
        some,
        [
            "model.layers.1.mlp.gate_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
            "model.layers.2.mlp.gate_proj",
            "model.layers.2.mlp.up_proj",
            "model.layers.2.mlp.down_proj"
        ]
    );
    // Look-arounds of Python's `re`.
    let some = paths(config(Targets::Pattern(r"model\.layers\.(?!0).*(?<!self_attn\.)[qg]\w+_proj".into())));
    assert_eq!(some, ["model.layers.1.mlp.gate_proj", "model.layers.2.mlp.gate_proj"]);
    assert_eq!(paths(LoraConfig { rank: 0, ..config(Targets::AllLinear) }), Vec::<String>::new());
    let counted = LoraConfig {
        layers_to_transform: Some(vec![1]),
        ..config(Targets::names(["v_proj", "self_attn.q_proj"]))
    };
    let counts = resolve(&counted, &decoder).unwrap().counts;
    let counts: Vec<_> = counts.iter().map(|c| (c.target.as_str(), c.matched, c.placed)).collect();
    assert_eq!(counts, [("v_proj", 3, 1), ("self_attn.q_proj", 3, 1)]);
}

#[test]
fn values_do_not_depend_on_other_targets() {
    let decoder = decoder("llama");
    for init in [Init::Peft, Init::Gaussian, Init::Nju] {
        let of = |targets| {
            let config = LoraConfig { init, ..config(targets) };
            let resolved = resolve(&config, &decoder).unwrap();
            let modules: BTreeMap<String, u64> =
                resolved.placements.iter().map(|p| (p.linear.path.clone(), p.module)).collect();
            (fresh(&config, &resolved.placements, &decoder, &Device::Cpu).unwrap(), modules)
        };
        let ((all, all_modules), (few, few_modules)) =
            (of(Targets::AllLinear), of(Targets::names(["v_proj"])));
        assert_eq!((all.len(), few.len()), (28, 4));
        for (name, tensor) in &few {
            assert_eq!(values(tensor), values(&all[name]), "{name}");
            if name.contains("lora_B") {
                assert_eq!(values(tensor).iter().all(|value| *value == 0.0), init != Init::Nju);
            }
        }
        for (path, module) in &few_modules {
            assert_eq!(all_modules[path], *module);
        }
        let distinct: std::collections::BTreeSet<Vec<u32>> = all
            .iter()
            .filter(|(name, _)| name.contains("lora_A"))
            .map(|(_, tensor)| values(tensor).iter().map(|value| value.to_bits()).collect())
            .collect();
        assert_eq!(distinct.len(), 14);
    }
}

#[test]
fn attached_terms_share_storage_with_the_trainables() {
    let decoder = decoder("llama_bias");
    let config =
        LoraConfig { lora_bias: true, alpha: Some(2.0), ..config(Targets::names(["up_proj", "q_proj"])) };
    let resolved = resolve(&config, &decoder).unwrap();
    let tensors = fresh(&config, &resolved.placements, &decoder, &Device::Cpu).unwrap();
    let mut linears = linears(&decoder);
    let trainables = attach(&mut linears, &resolved.placements, &tensors, 0.1, 5).unwrap();
    assert_eq!(trainables.len(), 12);
    let up = linears.iter().find(|linear| linear.path == "model.layers.1.mlp.up_proj").unwrap();
    let low_rank = up.low_rank.as_ref().unwrap();
    assert_eq!((low_rank.scale, low_rank.dropout.probability, low_rank.dropout.seed), (0.5, 0.1, 5));
    assert_eq!(low_rank.a.name(), "model.layers.1.mlp.up_proj.lora_A.weight");
    let ones = Tensor::ones((4, 32), DType::F32, &Device::Cpu).unwrap();
    trainables["model.layers.1.mlp.up_proj.lora_A.weight"].set(&ones).unwrap();
    assert_eq!(values(low_rank.a.tensor()), values(&ones));
    assert!(low_rank.bias.is_some());
    detach(&mut linears);
    assert!(linears.iter().all(|linear| linear.low_rank.is_none()));

    let error = attach(&mut linears[..3], &resolved.placements, &tensors, 0.0, 0).unwrap_err().to_string();
    assert_eq!(error, "the model has no linear layer `model.layers.0.mlp.up_proj`");
}

#[test]
fn random_numbers_are_those_of_torch() {
    let mut drawn = 0;
    for entry in fixture_json("torch_init.json").as_array().unwrap() {
        let mut generator = Generator::new(entry["seed"].as_u64().unwrap());
        for draw in entry["draws"].as_array().unwrap() {
            let (rows, columns) = (draw["shape"][0].as_u64().unwrap(), draw["shape"][1].as_u64().unwrap());
            let theirs: Vec<f32> = serde_json::from_value(draw["values"].clone()).unwrap();
            let mut ours = vec![0.0; (rows * columns) as usize];
            let (fan_in, fan_out) = (columns as f64, rows as f64);
            match draw["draw"].as_str().unwrap() {
                "uniform" => generator.uniform(&mut ours, -0.5, 0.5),
                "normal" => generator.normal(&mut ours, 0.0, 1.0),
                "normal_transposed" => generator.normal_one_by_one(&mut ours, 0.0, 1.0),
                "normal_shifted" => generator.normal(&mut ours, 0.5, 0.02),
                "kaiming_normal" => generator.normal(&mut ours, 0.0, (2.0 / fan_in).sqrt()),
                "xavier_normal" => generator.normal(&mut ours, 0.0, (2.0 / (fan_in + fan_out)).sqrt()),
                "kaiming_uniform_sqrt5" => {
                    let bound = (1.0 / fan_in).sqrt() as f32;
                    generator.uniform(&mut ours, -bound, bound);
                }
                "xavier_uniform" => {
                    let bound = (6.0 / (fan_in + fan_out)).sqrt() as f32;
                    generator.uniform(&mut ours, -bound, bound);
                }
                other => panic!("no such draw: {other}"),
            }
            // Only normal values in blocks differ, by the accuracy of torch's vector logarithm.
            let exact = !draw["draw"].as_str().unwrap().contains("normal")
                || draw["draw"] == "normal_transposed"
                || ours.len() < 16;
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let tolerance = if exact { 0.0 } else { 2e-6 };
                assert!((ours - theirs).abs() <= tolerance, "{}: {ours} and {theirs}", draw["draw"]);
            }
            drawn += 1;
        }
    }
    assert_eq!(drawn, 20);
}

#[test]
fn fresh_values_are_those_of_torch() {
    // Seed 7 of the generator is A of `up_proj` in layer 0 at adapter seed 6; the fixture is [4, 32].
    let decoder = decoder("llama");
    let entries = fixture_json("torch_init.json");
    for (init, draw) in [
        (Init::Peft, "kaiming_uniform_sqrt5"),
        (Init::KaimingNormal, "kaiming_normal"),
        (Init::XavierUniform, "xavier_uniform"),
        (Init::XavierNormal, "xavier_normal"),
    ] {
        let entry =
            entries.as_array().unwrap().iter().find(|entry| entry["draws"][0]["draw"] == draw).unwrap();
        assert_eq!(entry["seed"], 7);
        let theirs: Vec<f32> = serde_json::from_value(entry["draws"][0]["values"].clone()).unwrap();
        let config = LoraConfig { init, seed: 6, ..config(Targets::names(["layers.0.mlp.up_proj"])) };
        let resolved = resolve(&config, &decoder).unwrap();
        let tensors = fresh(&config, &resolved.placements, &decoder, &Device::Cpu).unwrap();
        let ours = values(&tensors["model.layers.0.mlp.up_proj.lora_A.weight"]);
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let tolerance = if draw.contains("uniform") { 0.0 } else { 1e-6 };
            assert!((ours - theirs).abs() <= tolerance, "{draw}: {ours} and {theirs}");
        }
    }
}
