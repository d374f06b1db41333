//! Checkpoints: what transformers saved is read to the last bit, what is broken is refused by name, and what is written
//! is there as a whole or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as Entry};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use peft::Error;
use peft::model::Pretrained;
use peft::model::config::{Activation, FeedForwardConfig, RotaryScaling};
use peft::weights::{
    Checkpoint, HubSettings, ShardedWriter, Staged, StoredType, TensorSpec, write_atomic, write_safetensors,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;

const FAMILIES: [&str; 6] = ["llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn open(path: &Path) -> peft::Result<Pretrained> {
    Pretrained::open(path.to_str().unwrap())
}

/// A copy of a fixture's configuration and weights that a test may spoil.
fn copy_of(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if file.starts_with("model") || file == "config.json" {
            fs::copy(&path, folder.path().join(file)).unwrap();
        }
    }
    folder
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// The message and the hint, as a user sees them, without the folder's own name.
fn shown(error: &Error, folder: &Path) -> String {
    let hint = error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
    format!("{error}{hint}").replace(folder.to_str().unwrap(), "[folder]")
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A tensor of irregular values.
fn irregular(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 333.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

#[test]
fn every_family_opens_and_reads_what_its_files_hold() {
    for family in FAMILIES {
        let model = open(&fixture(family)).unwrap();
        model.check().unwrap();
        assert_eq!(model.names().count(), model.config().tensors().len(), "{family}");
        let mut read = 0;
        for entry in fs::read_dir(fixture(family)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            if !(name.starts_with("model") && name.ends_with(".safetensors")) {
                continue;
            }
            let stored = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
            for (name, expected) in stored {
                let found = model.read(&name, expected.dtype(), &Device::Cpu).unwrap();
                assert_eq!(found.dims(), expected.dims());
                assert_eq!(values(&found), values(&expected), "{family} {name}");
                read += 1;
            }
        }
        assert_eq!(read, model.config().tensors().len(), "{family}");
    }
}

#[test]
fn oddities_of_families_are_resolved() {
    let config = |family: &str| open(&fixture(family)).unwrap().config().clone();
    let window = |family: &str| -> Vec<Option<usize>> {
        config(family).layers.iter().map(|layer| layer.attention.window).collect()
    };
    let attention = |family: &str| config(family).layers[0].attention.clone();
    assert_eq!(window("llama"), [None, None]);
    assert_eq!(window("mistral"), [Some(4), Some(4)]);
    assert_eq!(window("qwen2"), [None, Some(6)]);
    assert_eq!(attention("mistral").head_dim, 12);
    assert_eq!(attention("qwen3").head_dim, 16);
    assert!(attention("qwen3").qk_norm.is_some() && !attention("qwen3").qkv_bias);
    assert!(attention("qwen2").qkv_bias && !attention("qwen2").output_bias);
    assert!(attention("llama_bias").qkv_bias && attention("llama_bias").output_bias);
    assert_eq!(
        config("llama_bias").layers[1].feed_forward,
        FeedForwardConfig::Dense { width: 56, bias: true, activation: Activation::Silu }
    );
    assert_eq!(config("llama_bias").rotary.scaling, RotaryScaling::Linear { factor: 4.0 });
    assert_eq!(
        config("llama3").rotary.scaling,
        RotaryScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_length: 32.0
        }
    );
    assert_eq!(config("llama3").rotary.theta, 100.0);
}

#[test]
fn computes_in_the_type_most_weights_have() {
    for (family, dtype) in
        [("llama", DType::F32), ("llama3", DType::BF16), ("mistral", DType::F32), ("qwen2", DType::F32)]
    {
        assert_eq!(open(&fixture(family)).unwrap().compute_dtype(), dtype, "{family}");
    }
    let stored = open(&fixture("mistral")).unwrap().stored_dtype("model.norm.weight").unwrap();
    assert_eq!(stored, StoredType::Float(DType::F16));
}

/// The same model, configured as transformers 4 writes it and as transformers 5 does.
#[test]
fn both_ways_to_write_rotary_embedding_mean_the_same() {
    let folder = copy_of("llama3");
    edit(&folder.path().join("config.json"), |config| {
        let map = config.as_object_mut().unwrap();
        let mut parameters = map.remove("rope_parameters").unwrap();
        map.insert("rope_theta".into(), parameters.as_object_mut().unwrap().remove("rope_theta").unwrap());
        map.insert("rope_scaling".into(), parameters);
    });
    assert_eq!(open(folder.path()).unwrap().config(), open(&fixture("llama3")).unwrap().config());
    edit(&folder.path().join("config.json"), |config| {
        let scaling = config["rope_scaling"].as_object_mut().unwrap();
        let kind = scaling.remove("rope_type").unwrap();
        scaling.insert("type".into(), kind);
    });
    assert_eq!(open(folder.path()).unwrap().config(), open(&fixture("llama3")).unwrap().config());
}

#[test]
fn configurations_that_compute_otherwise_are_refused_by_name() {
    let cases: [(&str, Value, &str); 12] = [
        (
            "model_type",
            json!("gemma2"),
            "`model_type` is `gemma2`, which is not supported; supported are `llama`, `mistral`, `qwen2`, `qwen3`",
        ),
        ("model_type", json!("llama4"), "hint: nearest is `llama`"),
        ("hidden_act", json!("quick_gelu"), "`hidden_act` is `quick_gelu`, which is not supported"),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "`rope_parameters.rope_type` is `yarn`, which is not supported; supported are `default`, `linear`, `llama3`",
        ),
        ("rope_parameters", json!({"rope_type": "linear"}), "`rope_parameters.factor` is missing"),
        (
            "rope_parameters",
            json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
            "`partial_rotary_factor` must be 1",
        ),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "`quantization_config` (gptq) is not supported",
        ),
        (
            "num_hidden_layers",
            json!("two"),
            "`num_hidden_layers` must be a positive integer, found `\"two\"`",
        ),
        (
            "num_key_value_heads",
            json!(3),
            "`num_key_value_heads` must divide `num_attention_heads`, found 3 and 4",
        ),
        ("rms_norm_eps", json!(-1.0), "`rms_norm_eps` must be a positive number, found `-1.0`"),
        ("tie_word_embeddings", json!("yes"), "`tie_word_embeddings` must be true or false"),
        ("vocab_size", Value::Null, "`vocab_size` is missing; a `llama` model needs it"),
    ];
    for (field, value, message) in cases {
        let folder = copy_of("llama");
        edit(&folder.path().join("config.json"), |config| config[field] = value);
        let error = shown(&open(folder.path()).unwrap_err(), folder.path());
        assert!(error.starts_with("[folder]/config.json: "), "{error}");
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn all_that_does_not_fit_is_named_at_once() {
    let folder = copy_of("llama");
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    tensors.remove("model.norm.weight").unwrap();
    tensors.insert("model.layers.0.mlp.up_proj.weight".into(), irregular(&[3, 5]));
    tensors.insert("model.layers.0.mystery.weight".into(), irregular(&[2]));
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), irregular(&[4]));
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let error = shown(&open(folder.path()).unwrap().check().unwrap_err(), folder.path());
    assert_eq!(
        error,
        "[folder]: 1 tensor is missing: `model.norm.weight`; 1 tensor is of another shape than the configuration \
         says: `model.layers.0.mlp.up_proj.weight` should be [56, 32] and is [3, 5]; 1 tensor is unknown to the \
         configuration: `model.layers.0.mystery.weight`\nhint: the weights and the configuration are of different \
         models"
    );
}

#[test]
fn a_broken_value_is_found_when_it_is_read_and_not_before() {
    let folder = copy_of("llama");
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    tensors.insert("model.norm.weight".into(), Tensor::new(&[f32::NAN; 32], &Device::Cpu).unwrap());
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let model = open(folder.path()).unwrap();
    model.check().unwrap();
    let error = model.read("model.norm.weight", DType::F32, &Device::Cpu).unwrap_err();
    assert_eq!(
        shown(&error, folder.path()),
        "[folder]/model.safetensors: tensor `model.norm.weight`: holds NaN or infinity; these weights are broken\n\
         hint: fetch the model again, or look for a repaired copy"
    );
}

#[test]
fn broken_folders_are_refused_by_what_is_wrong_with_them() {
    let first = "model-00001-of-00002.safetensors";
    let second = "model-00002-of-00002.safetensors";
    let index = "model.safetensors.index.json";
    type Spoil<'a> = Box<dyn Fn(&Path) + 'a>;
    let cases: Vec<(&str, Spoil<'_>, &str)> = vec![
        (
            "llama3",
            Box::new(|f| fs::remove_file(f.join(second)).unwrap()),
            "model.safetensors.index.json: shard `model-00002-of-00002.safetensors`, which holds tensor `",
        ),
        (
            "llama3",
            Box::new(|f| edit(&f.join(index), |i| i["weight_map"]["model.extra.weight"] = json!(first))),
            "tensor `model.extra.weight` should be in `model-00001-of-00002.safetensors`, but is not there",
        ),
        (
            "llama3",
            Box::new(|f| assert!(fs::copy(f.join(first), f.join(second)).is_ok())),
            "/model-00002-of-00002.safetensors: tensor `",
        ),
        (
            "llama3",
            Box::new(|f| {
                edit(&f.join(index), |i| i["weight_map"]["model.norm.weight"] = json!("../x.safetensors"))
            }),
            "`weight_map` names `../x.safetensors`, expected a file in the same folder",
        ),
        ("llama3", Box::new(|f| fs::write(f.join(index), "{}").unwrap()), "`weight_map` must be a table"),
        ("llama3", Box::new(|f| fs::write(f.join(index), "{").unwrap()), "index.json: not valid JSON"),
        ("llama", Box::new(|f| cut(&f.join("model.safetensors"), 100)), "bytes, its header promises"),
        (
            "llama",
            Box::new(|f| cut_to(&f.join("model.safetensors"), 5)),
            "model.safetensors: not a readable safetensors file",
        ),
        (
            "llama",
            Box::new(|f| cut_to(&f.join("model.safetensors"), 0)),
            "model.safetensors: not a readable safetensors file",
        ),
        (
            "llama",
            Box::new(|f| fs::write(f.join("model.safetensors"), u64::MAX.to_le_bytes()).unwrap()),
            "header too large",
        ),
        (
            "llama",
            Box::new(|f| {
                fs::write(
                    f.join("model.safetensors"),
                    header(
                        r#"{"a":{"dtype":"F32","shape":[18446744073709551615,4],"data_offsets":[0,16]}}"#,
                        16,
                    ),
                )
                .unwrap()
            }),
            "not a readable safetensors file",
        ),
        (
            "llama",
            Box::new(|f| {
                fs::write(
                    f.join("model.safetensors"),
                    header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16),
                )
                .unwrap()
            }),
            "invalid offset for tensor `a`",
        ),
        (
            "llama",
            Box::new(|f| fs::remove_file(f.join("config.json")).unwrap()),
            "[folder]/config.json: there is no such file",
        ),
        (
            "llama",
            Box::new(|f| {
                fs::rename(f.join("model.safetensors"), f.join("pytorch_model.bin")).unwrap();
            }),
            "only pickled weights, which can run code when they are read\nhint: save the model with transformers as safetensors",
        ),
        (
            "llama",
            Box::new(|f| {
                fs::rename(f.join("model.safetensors"), f.join("adapter_config.json")).unwrap();
            }),
            "it is an adapter\nhint: give the model",
        ),
        (
            "llama",
            Box::new(|f| {
                fs::rename(f.join("model.safetensors"), f.join("m.gguf")).unwrap();
            }),
            "but a .gguf file\nhint:",
        ),
        (
            "llama",
            Box::new(|f| {
                fs::remove_file(f.join("model.safetensors")).unwrap();
            }),
            "[folder]: holds neither `model.safetensors` nor",
        ),
    ];
    for (family, spoil, message) in cases {
        let folder = copy_of(family);
        spoil(folder.path());
        let error = shown(&open(folder.path()).expect_err(message), folder.path());
        assert!(error.contains(message), "expected {message:?} in {error:?}");
    }
}

fn cut(path: &Path, bytes: u64) {
    cut_to(path, fs::metadata(path).unwrap().len() - bytes);
}

fn cut_to(path: &Path, bytes: u64) {
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

fn header(json: &str, data: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.as_bytes());
    bytes.extend(vec![0; data]);
    bytes
}

#[test]
fn a_path_that_is_not_there_is_told_in_both_readings() {
    let cache = tempfile::tempdir().unwrap();
    let mut settings = HubSettings::from_variables(|_| None);
    settings.cache = cache.path().to_path_buf();
    settings.offline = true;
    let error = Checkpoint::open_with("nobody/absent", &settings).unwrap_err();
    assert_eq!(
        shown(&error, cache.path()),
        "`nobody/absent` is neither a folder nor a .gguf file, nor could it be fetched from the Hub: `nobody/absent` \
         at `main` is not in the cache, and HF_HUB_OFFLINE is set\nhint: unset HF_HUB_OFFLINE to fetch it, or give a \
         local folder"
    );
    let error = open(&fixture("llama/model.safetensors")).unwrap_err();
    assert!(error.hint().unwrap().starts_with("give the folder it is in"), "{error}");
    let error = Checkpoint::open_with("/absent/folder/of/mine", &settings).unwrap_err();
    assert_eq!(error.hint(), Some("a model on the Hub is written `org/name`"));
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn what_is_not_a_float_is_listed_and_copied_but_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let positions = Tensor::new(&[1u32, 2, 3], &Device::Cpu).unwrap();
    write_safetensors(&path, &BTreeMap::from([("positions".into(), positions)]), &BTreeMap::new()).unwrap();
    let checkpoint = Checkpoint::open(folder.path().to_str().unwrap()).unwrap();
    assert_eq!(checkpoint.info("positions").unwrap().dtype, StoredType::Other(safetensors::Dtype::U32));
    assert_eq!(checkpoint.bytes("positions").unwrap(), [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
    let error = checkpoint.read("positions", DType::F32, &Device::Cpu).unwrap_err();
    assert!(
        error.to_string().ends_with("tensor `positions`: is stored as u32; weights are f32, f16 or bf16")
    );
    let error = checkpoint.read("position", DType::F32, &Device::Cpu).unwrap_err();
    assert_eq!(error.hint(), Some("nearest is `positions`"));
}

mod text {
    use super::*;

    /// A tokenizer of single letters, with the special tokens `<s>`, `</s>` and `<turn>`.
    fn tokenizer(begins: bool) -> Value {
        let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        if begins {
            single.insert(0, json!({"SpecialToken": {"id": "<s>", "type_id": 0}}));
        }
        let added = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "normalizer": null, "decoder": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": false},
            "added_tokens": [added(0, "<s>"), added(1, "</s>"), added(2, "<turn>")],
            "post_processor": {"type": "TemplateProcessing", "single": single, "pair": single,
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "<turn>": 2, "a": 3, "b": 4}, "unk_token": "b"},
        })
    }

    fn folder(begins: bool, settings: Value, generation: Value) -> TempDir {
        let folder = copy_of("llama");
        let write =
            |name: &str, value: &Value| fs::write(folder.path().join(name), value.to_string()).unwrap();
        write("tokenizer.json", &tokenizer(begins));
        write("tokenizer_config.json", &settings);
        write("generation_config.json", &generation);
        edit(&folder.path().join("config.json"), |config| config["eos_token_id"] = json!(2));
        folder
    }

    #[test]
    fn special_tokens_come_from_every_file_that_has_them() {
        let settings = json!({
            "bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>", "pad_token": null,
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        });
        let folder = folder(true, settings, json!({"eos_token_id": [1, 4]}));
        let text = open(folder.path()).unwrap().text().unwrap();
        assert_eq!(text.bos_token.as_deref(), Some("<s>"));
        assert_eq!(text.eos_token.as_deref(), Some("</s>"));
        assert_eq!(text.pad_token, None);
        assert_eq!(text.eos_token_ids, [1, 2, 4]);
        assert!(text.add_bos_token);
        assert_eq!(text.chat_template.as_deref(), Some("D"));
        // The file's truncation to two tokens is for somebody else.
        assert_eq!(text.tokenizer.encode("abab", true).unwrap().get_ids(), [0, 3, 4, 3, 4]);

        fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
        assert_eq!(open(folder.path()).unwrap().text().unwrap().chat_template.as_deref(), Some("J"));
    }

    #[test]
    fn a_tokenizer_that_adds_nothing_says_so() {
        let folder = folder(false, json!({"bos_token": "<s>", "chat_template": "S"}), json!({}));
        let text = open(folder.path()).unwrap().text().unwrap();
        assert!(!text.add_bos_token);
        assert_eq!(text.chat_template.as_deref(), Some("S"));
        assert_eq!(text.eos_token_ids, [2]);
    }

    #[test]
    fn a_list_of_templates_needs_a_default() {
        let folder = folder(true, json!({"chat_template": [{"name": "rag", "template": "R"}]}), json!({}));
        let error = open(folder.path()).unwrap().text().unwrap_err();
        assert!(error.to_string().contains("without one named `default`"), "{error}");
    }

    #[test]
    fn templates_in_files_take_the_place_of_others_as_in_transformers() {
        let folder = folder(true, json!({"chat_template": "S"}), json!({}));
        let further = folder.path().join("additional_chat_templates");
        let read = || {
            open(folder.path()).unwrap().text().map(|text| (text.chat_template.unwrap(), text.tool_template))
        };
        assert_eq!(read().unwrap(), ("S".to_string(), None));
        fs::create_dir(&further).unwrap();
        assert_eq!(read().unwrap(), ("S".to_string(), None));
        fs::write(further.join("tool_use.jinja"), "T").unwrap();
        let error = read().unwrap_err().to_string();
        assert!(error.ends_with("holds templates without one named `default`: it has `tool_use`"), "{error}");
        fs::write(further.join("default.jinja"), "D").unwrap();
        assert_eq!(read().unwrap(), ("D".to_string(), Some("T".to_string())));
        // It is read after the file beside the tokenizer.
        fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
        assert_eq!(read().unwrap(), ("D".to_string(), Some("T".to_string())));
        fs::remove_file(further.join("default.jinja")).unwrap();
        assert_eq!(read().unwrap(), ("J".to_string(), Some("T".to_string())));
    }

    #[test]
    fn special_tokens_that_are_no_text_are_refused() {
        for (name, value) in [
            ("eos_token", json!(5)),
            ("eos_token", json!(["</s>"])),
            ("bos_token", json!({"text": "<s>"})),
            ("pad_token", json!(true)),
        ] {
            let folder = folder(true, json!({name: value}), json!({}));
            let refused = |file: &str| {
                let error = open(folder.path()).unwrap().text().unwrap_err().to_string();
                let start = format!("{file}: `{name}` is {value}, expected the text of a token");
                assert!(error.contains(&start), "{error}");
            };
            refused("tokenizer_config.json");
            let path = folder.path().join("tokenizer_config.json");
            fs::rename(path, folder.path().join("special_tokens_map.json")).unwrap();
            refused("special_tokens_map.json");
        }
    }

    #[test]
    fn a_folder_without_a_tokenizer_can_be_opened_but_not_written_with() {
        let error = open(&fixture("llama")).unwrap().text().unwrap_err();
        assert!(error.to_string().ends_with("holds no `tokenizer.json`"), "{error}");
    }

    #[test]
    fn a_copy_carries_the_text_files_and_nothing_else() {
        let folder = folder(true, json!({}), json!({}));
        for name in
            ["README.md", "chat_template.jinja", "pytorch_model.bin", "merges.txt", "training_args.json"]
        {
            fs::write(folder.path().join(name), name).unwrap();
        }
        let target = tempfile::tempdir().unwrap();
        let model = open(folder.path()).unwrap();
        model.write_companions(target.path()).unwrap();
        model.write_config(target.path(), DType::BF16).unwrap();
        let mut names: Vec<String> = fs::read_dir(target.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "chat_template.jinja",
                "config.json",
                "generation_config.json",
                "merges.txt",
                "tokenizer.json",
                "tokenizer_config.json"
            ]
        );
        let config: Value =
            serde_json::from_slice(&fs::read(target.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["dtype"], "bfloat16");
        assert_eq!(config.get("torch_dtype"), None);
        assert_eq!(config["hidden_size"], model.config_json()["hidden_size"]);
    }
}

mod writing {
    use super::*;

    fn specs(tensors: &BTreeMap<String, Tensor>) -> Vec<TensorSpec> {
        tensors.iter().map(|(name, tensor)| TensorSpec::of(name, tensor).unwrap()).collect()
    }

    fn some_tensors() -> BTreeMap<String, Tensor> {
        BTreeMap::from([
            ("a".to_string(), irregular(&[7, 3])),
            ("b".to_string(), irregular(&[5]).to_dtype(DType::BF16).unwrap()),
            ("c".to_string(), irregular(&[4, 6]).to_dtype(DType::F16).unwrap().t().unwrap()),
            ("d".to_string(), irregular(&[1000]).narrow(0, 10, 300).unwrap()),
            ("e".to_string(), Tensor::new(&[1u32, 2], &Device::Cpu).unwrap()),
            ("f".to_string(), Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap()),
        ])
    }

    #[test]
    fn one_file_is_what_the_safetensors_crate_writes() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = some_tensors();
        let metadata = BTreeMap::from([("made_by".to_string(), "a test".to_string())]);
        let mut writer =
            ShardedWriter::create(folder.path(), &specs(&tensors), &metadata, usize::MAX).unwrap();
        for (name, tensor) in tensors.iter().rev() {
            writer.write(name, tensor).unwrap();
        }
        writer.finish().unwrap();
        let ours = fs::read(folder.path().join("model.safetensors")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        // The crate's own layout, but for the order of the metadata, which is a hash map's there.
        let (header, read) = SafeTensors::read_metadata(&ours).unwrap();
        assert_eq!(header % 8, 0);
        let metadata = read.metadata().clone().unwrap();
        assert_eq!(metadata["format"], "pt");
        assert_eq!(metadata["made_by"], "a test");
        let theirs = safetensors::serialize(&tensors, None).unwrap();
        let (their_header, their_metadata) = SafeTensors::read_metadata(&theirs).unwrap();
        assert_eq!(read.offset_keys(), their_metadata.offset_keys());
        assert_eq!(ours[8 + header..], theirs[8 + their_header..]);

        let small = folder.path().join("small.safetensors");
        write_safetensors(&small, &tensors, &BTreeMap::from([("made_by".into(), "a test".into())])).unwrap();
        assert_eq!(fs::read(small).unwrap(), ours);
    }

    #[test]
    fn shards_are_kept_under_their_size_and_found_through_the_index() {
        let folder = tempfile::tempdir().unwrap();
        let tensors: BTreeMap<String, Tensor> =
            (0..5).map(|i| (format!("t{i}"), irregular(&[10 + i, 10]))).collect();
        let mut writer =
            ShardedWriter::create(folder.path(), &specs(&tensors), &BTreeMap::new(), 1000).unwrap();
        for (name, tensor) in &tensors {
            writer.write(name, tensor).unwrap();
        }
        writer.finish().unwrap();
        let index: Value =
            serde_json::from_slice(&fs::read(folder.path().join("model.safetensors.index.json")).unwrap())
                .unwrap();
        assert_eq!(
            index,
            json!({
                "metadata": {"total_size": 4 * 10 * (10 + 11 + 12 + 13 + 14)},
                "weight_map": {
                    "t0": "model-00001-of-00003.safetensors", "t1": "model-00001-of-00003.safetensors",
                    "t2": "model-00002-of-00003.safetensors", "t3": "model-00002-of-00003.safetensors",
                    "t4": "model-00003-of-00003.safetensors",
                },
            })
        );
        let checkpoint = Checkpoint::open(folder.path().to_str().unwrap()).unwrap();
        assert_eq!(checkpoint.largest_tensor(), 4 * 140);
        for (name, tensor) in &tensors {
            let read = checkpoint.read(name, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(values(&read), values(tensor));
        }
    }

    #[test]
    fn bytes_pass_through_unchanged() {
        let source = Checkpoint::open(fixture("llama3").to_str().unwrap()).unwrap();
        let specs: Vec<TensorSpec> = source
            .tensors()
            .values()
            .map(|info| TensorSpec {
                name: info.name.clone(),
                dtype: info.dtype.safetensors().unwrap(),
                shape: info.shape.clone(),
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let mut writer = ShardedWriter::create(folder.path(), &specs, &BTreeMap::new(), usize::MAX).unwrap();
        for name in source.tensors().keys() {
            writer.write_bytes(name, source.bytes(name).unwrap()).unwrap();
            source.release(name);
        }
        writer.finish().unwrap();
        let copy = Checkpoint::open(folder.path().to_str().unwrap()).unwrap();
        assert_eq!(copy.tensors(), source.tensors());
        for name in source.tensors().keys() {
            assert_eq!(copy.bytes(name).unwrap(), source.bytes(name).unwrap());
        }
    }

    #[test]
    fn what_was_not_announced_or_is_left_out_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = some_tensors();
        let create =
            || ShardedWriter::create(folder.path(), &specs(&tensors), &BTreeMap::new(), usize::MAX).unwrap();
        let mut writer = create();
        let message = |result: peft::Result<()>| result.unwrap_err().to_string();
        assert_eq!(
            message(writer.write("z", &tensors["a"])),
            "tensor `z`: was not announced, so there is no room for it"
        );
        assert_eq!(
            message(writer.write("a", &tensors["b"])),
            "tensor `a`: announced as f32 [7, 3], found bf16 [5]"
        );
        assert_eq!(message(writer.write_bytes("a", &[0; 3])), "tensor `a`: expected 84 bytes, found 3");
        writer.write("a", &tensors["a"]).unwrap();
        assert_eq!(message(writer.finish()), "tensor `b`: was announced but not written");
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("deep/model");
        let staged = Staged::folder(&target).unwrap();
        fs::write(staged.path().join("file"), "half").unwrap();
        assert!(!target.exists());
        drop(staged);
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 0);

        let staged = Staged::folder(&target).unwrap();
        fs::create_dir(staged.path().join("inner")).unwrap();
        fs::write(staged.path().join("inner/file"), "whole").unwrap();
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(target.join("inner/file")).unwrap(), "whole");
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);

        let error = Staged::folder(&target).unwrap_err();
        assert_eq!(
            shown(&error, parent.path()),
            "`[folder]/deep/model` exists and is not empty\nhint: choose another folder with `--output`, or remove \
             this one"
        );
        assert_eq!(error.exit_code(), 2);

        let staged = Staged::replacing(&target).unwrap();
        fs::write(staged.path().join("new"), "new").unwrap();
        assert!(target.join("inner/file").exists());
        staged.commit().unwrap();
        assert!(!target.join("inner").exists());
        assert_eq!(fs::read_to_string(target.join("new")).unwrap(), "new");
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_folder_is_a_fine_target_and_a_file_is_not() {
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir(parent.path().join("empty")).unwrap();
        let staged = Staged::folder(parent.path().join("empty")).unwrap();
        fs::write(staged.path().join("file"), "").unwrap();
        staged.commit().unwrap();
        assert!(parent.path().join("empty/file").exists());
        let error = Staged::folder(parent.path().join("empty/file")).unwrap_err();
        assert!(error.to_string().contains("exists and is not a folder"), "{error}");
    }

    #[test]
    fn somebody_else_filling_the_target_meanwhile_is_not_overwritten() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("model");
        let staged = Staged::folder(&target).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("theirs"), "theirs").unwrap();
        let error = staged.commit().unwrap_err();
        assert!(error.to_string().contains("exists and is not empty"), "{error}");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_is_written_as_the_mask_allows() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(parent.path().join("plain"), "").unwrap();
        fs::create_dir(parent.path().join("folder")).unwrap();
        write_atomic(parent.path().join("atomic"), b"").unwrap();
        let staged = Staged::folder(parent.path().join("staged")).unwrap();
        staged.commit().unwrap();
        assert_eq!(mode(&parent.path().join("atomic")), mode(&parent.path().join("plain")));
        assert_eq!(mode(&parent.path().join("staged")), mode(&parent.path().join("folder")));
    }

    #[test]
    fn a_file_is_replaced_by_renaming() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("new/file.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    /// The limit on file sizes stands in for a full disk; it holds for a whole process, hence the second one.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_and_leaves_nothing() {
        const CHILD: &str = "PEFT_TEST_FULL_DISK";
        if let Ok(folder) = std::env::var(CHILD) {
            full_disk(Path::new(&folder));
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "weights::writing::a_full_disk_is_an_error_and_leaves_nothing"])
            .env(CHILD, parent.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert!(parent.path().join("checked").exists(), "the second process checked nothing");
    }

    #[cfg(target_os = "linux")]
    fn full_disk(parent: &Path) {
        let limit = libc::rlimit { rlim_cur: 4096, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: both calls only change settings of this process, which runs this one test.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
        }
        let tensors = BTreeMap::from([("large".to_string(), irregular(&[2000]))]);
        let file = parent.join("folder/large.safetensors");
        let error = write_safetensors(&file, &tensors, &BTreeMap::new()).unwrap_err();
        assert!(error.to_string().contains("large.safetensors: File too large"), "{error}");
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 0);

        let staged = Staged::folder(parent.join("model")).unwrap();
        let error =
            ShardedWriter::create(staged.path(), &specs(&tensors), &BTreeMap::new(), usize::MAX).unwrap_err();
        assert!(error.to_string().contains("model.safetensors: File too large"), "{error}");
        drop(staged);
        let left: Vec<_> = fs::read_dir(parent).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["folder"]);
        fs::write(parent.join("checked"), "").unwrap();
    }
}

pub(crate) mod gguf {
    use super::*;

    fn metadata(config: &Value, architecture: &str) -> BTreeMap<String, Entry> {
        let count = |field: &str| Entry::U32(u32::try_from(config[field].as_u64().unwrap()).unwrap());
        let number = |value: &Value| Entry::F32(value.as_f64().unwrap() as f32);
        let mut metadata = BTreeMap::from([
            ("general.architecture".to_string(), Entry::String(architecture.to_string())),
            ("tokenizer.ggml.bos_token_id".to_string(), Entry::U32(1)),
            ("tokenizer.ggml.eos_token_id".to_string(), Entry::U32(2)),
        ]);
        let mut set = |key: &str, entry| metadata.insert(format!("{architecture}.{key}"), entry);
        set("block_count", count("num_hidden_layers"));
        set("context_length", count("max_position_embeddings"));
        set("embedding_length", count("hidden_size"));
        set("feed_forward_length", count("intermediate_size"));
        set("attention.head_count", count("num_attention_heads"));
        set("attention.head_count_kv", count("num_key_value_heads"));
        if config.get("head_dim").is_some() {
            set("attention.key_length", count("head_dim"));
        }
        set("attention.layer_norm_rms_epsilon", number(&config["rms_norm_eps"]));
        set("rope.freq_base", number(&config["rope_parameters"]["rope_theta"]));
        if config["rope_parameters"]["rope_type"] == "linear" {
            set("rope.scaling.type", Entry::String("linear".into()));
            set("rope.scaling.factor", number(&config["rope_parameters"]["factor"]));
        }
        metadata
    }

    /// As llama.cpp's converter orders the rows of q and k.
    fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
        let dims = tensor.dims();
        let split = tensor.reshape((heads, 2, dims[0] / heads / 2, tensor.elem_count() / dims[0])).unwrap();
        split.transpose(1, 2).unwrap().contiguous().unwrap().reshape(dims).unwrap()
    }

    fn gguf_name(name: &str) -> String {
        let mut name = name.to_string();
        for (hf, gguf) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("model.layers", "blk"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ] {
            name = name.replace(hf, gguf);
        }
        name
    }

    pub(crate) fn write(
        path: &Path,
        metadata: &BTreeMap<String, Entry>,
        tensors: &BTreeMap<String, QTensor>,
    ) {
        let metadata: Vec<(&str, &Entry)> =
            metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut file = fs::File::create(path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }

    /// A fixture as llama.cpp's converter would write it, in f32.
    pub(crate) fn converted(
        family: &str,
        architecture: &str,
    ) -> (BTreeMap<String, Entry>, BTreeMap<String, QTensor>) {
        let model = open(&fixture(family)).unwrap();
        let attention = model.config().layers[0].attention.clone();
        let tensors = model
            .config()
            .tensors()
            .iter()
            .map(|(name, _)| {
                let mut tensor = model.read(name, DType::F32, &Device::Cpu).unwrap();
                if architecture == "llama" && name.contains("q_proj") {
                    tensor = interleave(&tensor, attention.num_heads);
                }
                if architecture == "llama" && name.contains("k_proj") {
                    tensor = interleave(&tensor, attention.num_kv_heads);
                }
                (gguf_name(name), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
            })
            .collect();
        (metadata(model.config_json(), architecture), tensors)
    }

    #[test]
    fn a_converted_model_reads_as_the_model_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        for (family, architecture) in
            [("llama", "llama"), ("llama_bias", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
        {
            let original = open(&fixture(family)).unwrap();
            let (metadata, tensors) = converted(family, architecture);
            write(&path, &metadata, &tensors);
            let model = open(&path).unwrap();
            model.check().unwrap();
            assert!(model.checkpoint().is_gguf());
            assert!(model.names().eq(original.names()), "{family}");
            let mut expected = original.config().clone();
            if family == "qwen2" {
                // The converter leaves windows out, and with them the model is another one.
                expected.layers[1].attention.window = None;
            }
            assert_eq!(model.config(), &expected, "{family}");
            for name in original.names() {
                let found = model.read(name, DType::F32, &Device::Cpu).unwrap();
                let wanted = original.read(name, DType::F32, &Device::Cpu).unwrap();
                assert_eq!(values(&found), values(&wanted), "{family} {name}");
            }
            // The configuration is one that a folder may have.
            let copy = copy_of(family);
            model.write_config(copy.path(), DType::F32).unwrap();
            assert_eq!(open(copy.path()).unwrap().config(), model.config());
        }
    }

    #[test]
    fn every_quantized_type_reads_as_candle_dequantizes_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let types = [
            GgmlDType::F32,
            GgmlDType::F16,
            GgmlDType::BF16,
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
        // More than one piece, and a last one that is not full.
        let source = irregular(&[70, 256]);
        let tensors: BTreeMap<String, QTensor> = types
            .iter()
            .map(|dtype| (format!("{dtype:?}"), QTensor::quantize(&source, *dtype).unwrap()))
            .collect();
        write(&path, &BTreeMap::new(), &tensors);
        let checkpoint = Checkpoint::open(path.to_str().unwrap()).unwrap();
        for (name, tensor) in &tensors {
            let expected = tensor.dequantize(&Device::Cpu).unwrap();
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let found = checkpoint.read(name, dtype, &Device::Cpu).unwrap();
                assert_eq!(found.dims(), [70, 256]);
                assert_eq!(values(&found), values(&expected.to_dtype(dtype).unwrap()), "{name} as {dtype:?}");
            }
            match checkpoint.info(name).unwrap().dtype {
                StoredType::Quantized(dtype) => {
                    assert_eq!(dtype, tensor.dtype());
                    let blocks = checkpoint.read_blocks(name).unwrap();
                    assert_eq!(blocks.as_ref(), tensor.data().unwrap().as_ref());
                }
                stored => assert!(checkpoint.read_blocks(name).is_err(), "{stored}"),
            }
            assert_eq!(checkpoint.info(name).unwrap().size_in_bytes(), tensor.storage_size_in_bytes());
        }
    }

    #[test]
    fn the_stretching_of_llama_3_is_recognised_by_its_divisors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let (mut metadata, mut tensors) = converted("llama", "llama");
        metadata.insert("llama.rope.freq_base".into(), Entry::F32(500_000.0));
        // Head width 8, base 500000, factor 32, trained with 8192: unstretched frequencies by those of transformers
        // 5.23's `ROPE_INIT_FUNCTIONS["llama3"]`.
        let divisors: [f32; 4] = [1.0, 1.0, 3.292_262, 32.0];
        let mut with = |divisors: &[f32]| {
            let tensor = Tensor::new(divisors, &Device::Cpu).unwrap();
            tensors.insert("rope_freqs.weight".into(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap());
            write(&path, &metadata, &tensors);
            open(&path)
        };
        let model = with(&divisors).unwrap();
        model.check().unwrap();
        assert_eq!(
            model.config().rotary.scaling,
            RotaryScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_length: 8192.0
            }
        );
        assert_eq!(with(&[1.0; 4]).unwrap().config().rotary.scaling, RotaryScaling::None);
        let error = with(&[1.0, 2.0, 3.0, 4.0]).unwrap_err();
        assert!(error.to_string().contains("`rope_freqs.weight` is not the stretching of a Llama 3 model"));
    }

    #[test]
    fn what_is_not_supported_or_broken_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let fails = |change: &dyn Fn(&mut BTreeMap<String, Entry>)| {
            let (mut metadata, tensors) = converted("llama", "llama");
            change(&mut metadata);
            write(&path, &metadata, &tensors);
            shown(&open(&path).and_then(|model| model.check()).unwrap_err(), folder.path())
        };
        let text = |value: &str| Entry::String(value.to_string());
        let error = fails(&|m| drop(m.insert("general.architecture".into(), text("phi3"))));
        assert!(
            error.contains("`general.architecture` is `phi3`, which is not supported; supported are `llama`")
        );
        let error = fails(&|m| drop(m.insert("llama.rope.scaling.type".into(), text("yarn"))));
        assert!(error.contains("`llama.rope.scaling.type` is `yarn`"), "{error}");
        let error = fails(&|m| drop(m.insert("llama.expert_count".into(), Entry::U32(8))));
        assert!(error.contains("sparse GGUF files are not supported"), "{error}");
        let error = fails(&|m| drop(m.insert("llama.rope.dimension_count".into(), Entry::U32(4))));
        assert!(error.contains("`llama.rope.dimension_count` is 4, expected the head's width 8"), "{error}");
        let error = fails(&|m| drop(m.remove("llama.block_count")));
        assert!(error.contains("`llama.block_count` is missing"), "{error}");
        let error = fails(&|m| drop(m.insert("llama.block_count".into(), Entry::U32(3))));
        assert!(error.contains("9 tensors are missing: `blk.2."), "{error}");
        let error = fails(&|m| drop(m.insert("general.alignment".into(), Entry::U32(0))));
        assert!(error.contains("impossible alignment"), "{error}");

        let error = fails(&|m| drop(m.insert("split.count".into(), Entry::U16(3))));
        assert!(error.contains("is one of 3 parts of a model"), "{error}");

        let (metadata, tensors) = converted("llama", "llama");
        write(&path, &metadata, &tensors);
        let whole = fs::read(&path).unwrap();
        cut(&path, 200);
        let error = shown(&open(&path).unwrap_err(), folder.path());
        assert!(error.contains("reaches beyond the end of the file"), "{error}");
        fs::write(&path, &whole[..300]).unwrap();
        let error = shown(&open(&path).unwrap_err(), folder.path());
        assert!(error.contains("not a readable GGUF file"), "{error}");
        fs::write(&path, "not a model").unwrap();
        let error = shown(&open(&path).unwrap_err(), folder.path());
        assert!(error.contains("does not begin with `GGUF`"), "{error}");

        // The type is the number after the name, the count of dimensions and the dimensions.
        let mut later = whole;
        let name = b"output_norm.weight";
        let at = later.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 8;
        later[at..at + 4].copy_from_slice(&23u32.to_le_bytes());
        fs::write(&path, later).unwrap();
        let error = shown(&open(&path).unwrap_err(), folder.path());
        assert!(
            error.contains("quantized type IQ4_XS, which is not supported; supported are F32"),
            "{error}"
        );
    }

    pub(crate) mod tokenizers {
        use super::*;

        fn strings(values: &[&str]) -> Entry {
            Entry::Array(values.iter().map(|value| Entry::String((*value).to_string())).collect())
        }

        fn text(metadata: &BTreeMap<String, Entry>) -> peft::Result<peft::weights::TextFiles> {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.gguf");
            write(&path, metadata, &BTreeMap::new());
            Checkpoint::open(path.to_str().unwrap()).unwrap().text()
        }

        pub(crate) fn byte_level(pre: &str) -> BTreeMap<String, Entry> {
            let tokens =
                ["<s>", "</s>", "<turn>", "a", "b", "1", "2", "Ġ", "Ċ", "ab", "12", "ĠĠ", "Ġa", "ĊĊ"];
            let kinds = [3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
            BTreeMap::from([
                ("tokenizer.ggml.model".to_string(), Entry::String("gpt2".into())),
                ("tokenizer.ggml.pre".to_string(), Entry::String(pre.into())),
                ("tokenizer.ggml.tokens".to_string(), strings(&tokens)),
                ("tokenizer.ggml.token_type".to_string(), Entry::Array(kinds.map(Entry::I32).to_vec())),
                ("tokenizer.ggml.merges".to_string(), strings(&["a b", "1 2", "Ġ Ġ", "Ġ a", "Ċ Ċ"])),
                ("tokenizer.ggml.bos_token_id".to_string(), Entry::U32(0)),
                ("tokenizer.ggml.eos_token_id".to_string(), Entry::U32(1)),
                ("tokenizer.chat_template".to_string(), Entry::String("T".into())),
            ])
        }

        /// Each kind splits before it merges: digits alone or together, line breaks with or without what follows.
        #[test]
        fn the_split_is_the_one_the_file_names() {
            let split = |pre: &str, source: &str| -> Vec<String> {
                let text = text(&byte_level(pre)).unwrap();
                text.tokenizer.encode(source, true).unwrap().get_tokens().to_vec()
            };
            assert_eq!(split("gpt-2", "ab 12\n\n1"), ["ab", "Ġ", "12", "Ċ", "Ċ", "1"]);
            assert_eq!(split("smollm", "ab 12\n\n1"), ["ab", "Ġ", "1", "2", "ĊĊ", "1"]);
            assert_eq!(split("qwen2", "ab 12\n\n1"), ["ab", "Ġ", "1", "2", "ĊĊ", "1"]);
            assert_eq!(split("llama-bpe", "ab 12\n\n1"), ["<s>", "ab", "Ġ", "12", "ĊĊ", "1"]);
            assert_eq!(split("gpt-2", "  a</s>a<turn>"), ["Ġ", "Ġa", "</s>", "a", "<turn>"]);
        }

        #[test]
        fn special_tokens_and_template_are_found() {
            let found = text(&byte_level("smollm")).unwrap();
            assert_eq!(found.bos_token.as_deref(), Some("<s>"));
            assert_eq!(found.eos_token_ids, [1]);
            assert_eq!(found.chat_template.as_deref(), Some("T"));
            assert!(!found.add_bos_token);
            let decoded = |special| found.tokenizer.decode(&[0, 12, 2, 1], special).unwrap();
            assert_eq!(decoded(false), "<s> a<turn></s>");
            assert_eq!(decoded(true), " a<turn>");

            let mut metadata = byte_level("smollm");
            metadata.insert("tokenizer.ggml.add_bos_token".into(), Entry::Bool(true));
            metadata.insert("tokenizer.ggml.eot_token_id".into(), Entry::U32(2));
            let found = text(&metadata).unwrap();
            assert!(found.add_bos_token);
            assert_eq!(found.eos_token_ids, [1, 2]);
        }

        #[test]
        fn a_split_nobody_knows_is_refused() {
            let error = text(&byte_level("chameleon")).unwrap_err();
            assert!(
                error.to_string().contains("`tokenizer.ggml.pre` is `chameleon`, which is not supported")
            );
            let mut metadata = byte_level("gpt-2");
            metadata.insert("tokenizer.ggml.model".into(), Entry::String("t5".into()));
            assert!(text(&metadata).unwrap_err().to_string().contains("`tokenizer.ggml.model` is `t5`"));
        }

        #[test]
        fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
            let tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "ab", "▁ab"];
            let kinds = [2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1];
            let scores = [0.0, 0.0, 0.0, 0.0, 0.0, -10.0, -11.0, -12.0, -2.0, -1.0, -3.0];
            let metadata = BTreeMap::from([
                ("tokenizer.ggml.model".to_string(), Entry::String("llama".into())),
                ("tokenizer.ggml.tokens".to_string(), strings(&tokens)),
                ("tokenizer.ggml.token_type".to_string(), Entry::Array(kinds.map(Entry::I32).to_vec())),
                ("tokenizer.ggml.scores".to_string(), Entry::Array(scores.map(Entry::F32).to_vec())),
                ("tokenizer.ggml.bos_token_id".to_string(), Entry::U32(1)),
                ("tokenizer.ggml.unknown_token_id".to_string(), Entry::U32(0)),
            ]);
            let text = text(&metadata).unwrap();
            assert!(text.add_bos_token);
            let encoding = text.tokenizer.encode("ab aé", true).unwrap();
            assert_eq!(encoding.get_tokens(), ["<s>", "▁ab", "▁a", "<0xC3>", "<0xA9>"]);
            assert_eq!(text.tokenizer.decode(encoding.get_ids(), true).unwrap(), "ab aé");
        }
    }
}
