use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;

use candle_core::{Device, Tensor};

use crate::place::{Place, Tree, assert_same, told, tree};

/// What `peft` says to a bad request. Fails when the request is not refused, or anything changes in the folder.
fn refused(place: &Place, arguments: &[&str]) -> String {
    let before = tree(&place.path(""));
    let said = told_of(place, &place.command(arguments).output().unwrap());
    assert_same(&tree(&place.path("")), &before);
    said
}

fn told_of(place: &Place, output: &Output) -> String {
    assert!(matches!(output.status.code(), Some(1 | 2)), "not refused: {}", output.status);
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    told(place, output).replace(fixtures.to_str().unwrap(), "[fixtures]")
}

/// [`refused`], of the place's recipe with one value changed.
fn refused_with(place: &Place, set: &str) -> String {
    refused(place, &["finetune", "recipe.toml", "--log", "silent", "--set", set])
}

/// Of training data that is `text`.
fn refused_data(text: &str) -> String {
    let place = Place::new();
    fs::write(place.path("data.jsonl"), text).unwrap();
    refused(&place, &["finetune", "recipe.toml", "--log", "silent"])
}

/// Of the place's recipe with some text in it changed.
fn refused_recipe(from: &str, to: &str) -> String {
    let place = Place::new();
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    assert!(recipe.contains(from));
    fs::write(place.path("recipe.toml"), recipe.replace(from, to)).unwrap();
    refused(&place, &["finetune", "recipe.toml"])
}

/// Of a model whose `config.json` says something else.
fn refused_config(from: &str, to: &str) -> String {
    let place = Place::new();
    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    assert!(config.contains(from));
    fs::write(place.path("model/config.json"), config.replace(from, to)).unwrap();
    refused(&place, &["finetune", "recipe.toml", "--log", "silent"])
}

fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Of an adapter, wherever one can be named; all commands say the same of its files.
fn refused_adapter(adapter: &str) -> String {
    let place = Place::new();
    let merge = ["merge", "--model", "model", "--adapter", adapter, "--output", "merged"];
    let generate = ["generate", "--model", "model", "--adapter", adapter, "--prompt", "x"];
    let eval = ["eval", "perplexity", "--model", "model", "--adapter", adapter, "--data", "data.jsonl"];
    let set = format!("adapter.from={adapter}");
    let said = refused(&place, &merge);
    assert_eq!(refused(&place, &generate), said);
    assert_eq!(refused(&place, &eval), said);
    assert_eq!(refused_with(&place, &set), said);
    said
}

/// 2 where the request has to be another one, 1 where the request was right and what it names is not.
#[test]
fn exit_statuses_are_even() {
    let place = Place::new();
    fs::write(place.path("broken.jsonl"), "{").unwrap();
    let perplexity = ["eval", "perplexity", "--model"];
    let generate = ["generate", "--prompt", "x", "--model"];
    let merge = ["merge", "--output", "merged", "--model"];
    let broken = "data.train=[{ path = \"broken.jsonl\" }]";
    for (status, command, more) in [
        (2, &perplexity[..], &["model", "--data", "elsewhere.jsonl"][..]),
        (2, &perplexity, &["nothing", "--data", "data.jsonl"]),
        (2, &perplexity, &["model", "--data", "model"]),
        (1, &perplexity, &["model", "--data", "broken.jsonl"]),
        (2, &["eval", "choices", "--model"], &["model", "--data", "data.jsonl"]),
        (2, &generate, &["nothing"]),
        (2, &generate, &["data.jsonl/model"]),
        (2, &generate, &["model", "--adapter", "nowhere"]),
        (2, &generate, &["model", "--adapter", "model"]),
        (2, &generate, &["model", "--dtype", "f64"]),
        (2, &["chat", "--model"], &["nothing"]),
        (2, &merge, &["nothing", "--adapter", "model"]),
        (2, &merge, &["model", "--adapter", "nowhere"]),
        (2, &["inspect"], &["nothing"]),
        (2, &["inspect"], &["."]),
        (2, &["inspect"], &["elsewhere.jsonl"]),
        (1, &["inspect"], &["broken.jsonl"]),
        (2, &["recipes", "show"], &["nothing"]),
        (2, &["check"], &["nothing.toml"]),
        (2, &["check", "recipe.toml", "--set"], &["adapter.from=nowhere"]),
        (2, &["check", "recipe.toml", "--set"], &["data.max_length=2"]),
        (1, &["check", "recipe.toml", "--set"], &[broken]),
        (2, &["upcycle"], &["recipe.toml"]),
    ] {
        let arguments = [command, more].concat();
        let said = refused(&place, &arguments);
        assert!(said.starts_with(&format!("exit {status}\n")), "{arguments:?}: {said}");
    }
    let asks = |name: &str, value: &str| {
        let mut command = place.command(&[&generate[..], &["org/name"]].concat());
        command.env("HF_HOME", place.path("home")).env(name, value).output().unwrap().status.code()
    };
    // Nobody listens there; and what was forbidden cannot be asked for.
    assert_eq!(asks("HF_ENDPOINT", "http://127.0.0.1:9"), Some(1));
    assert_eq!(asks("HF_HUB_OFFLINE", "1"), Some(2));
}

// Recipes. What is wrong within one, key by key: `recipes.rs`. Arguments: `cli.rs`.

#[test]
fn no_recipe() {
    insta::assert_snapshot!(refused(&Place::new(), &["finetune", "other.toml"]), @"
    exit 2
    error: there is no file and no built-in recipe `other.toml`
    hint: `peft recipes` lists the built-in recipes
    ");
}

#[test]
fn unknown_key() {
    insta::assert_snapshot!(refused_recipe("learning_rate", "learnign_rate"), @"
    exit 2
    error: recipe.toml:7: unknown key `train.learnign_rate`
    hint: did you mean `learning_rate`?
    ");
}

#[test]
fn wrong_type() {
    insta::assert_snapshot!(refused_recipe("batch_size = 1", "batch_size = \"one\""), @r#"
    exit 2
    error: recipe.toml:7: `train.batch_size`: expected a whole number, found the string "one"
    "#);
}

#[test]
fn broken_toml() {
    insta::assert_snapshot!(refused_recipe("rank = 4,", "rank = ,"), @"
    exit 2
    error: recipe.toml:5: not valid TOML at column 20: extra comma in inline table, expected value
    ");
}

#[test]
fn a_recipe_that_is_not_text() {
    let place = Place::new();
    fs::write(place.path("recipe.toml"), b"task = \"\xff\"").unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"
    exit 2
    error: recipe.toml: not valid UTF-8, expected a recipe in TOML
    ");
}

#[test]
fn nonsense_laid_over() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "nonsense"), @"
    exit 2
    error: `--set nonsense`: expected a key and a value
    hint: write it as `--set train.steps=100`
    ");
    insta::assert_snapshot!(refused_with(&place, "=3"), @"
    exit 2
    error: `--set =3`: expected a key such as `train.steps`, found ``
    ");
    insta::assert_snapshot!(refused_with(&place, "a.b.c=3"), @"
    exit 2
    error: `--set a.b.c=3`: unknown key `a`
    hint: did you mean `data`?
    ");
    insta::assert_snapshot!(refused_with(&place, "train=1"), @"
    exit 2
    error: `--set train=1`: `train`: expected a table, found `1`
    ");
    insta::assert_snapshot!(refused_with(&place, "train.steps=[[["), @"
    exit 2
    error: `--set train.steps=[[[`: not a TOML value: unclosed array, expected `]`
    ");
    insta::assert_snapshot!(refused_recipe("steps = 6", "epochs = 1e300"), @"
    exit 2
    error: recipe.toml:7: `train.epochs`: expected a number of at most 10000, found `1e300`
    ");
}

// Models.

#[test]
fn no_model() {
    insta::assert_snapshot!(refused_with(&Place::new(), "model.source=nothing"), @"
    exit 2
    error: `nothing` is neither a folder nor a .gguf file
    hint: a model on the Hub is written `org/name`
    ");
}

/// Without a server that could answer: the Hub must not be asked.
#[test]
fn a_path_with_a_slip_in_it() {
    let place = Place::new();
    fs::create_dir_all(place.path("models/tiny-llama")).unwrap();
    let generate = |model: &str| {
        let mut command = place.command(&["generate", "--model", model, "--prompt", "x"]);
        told_of(&place, &command.env("HF_ENDPOINT", "http://127.0.0.1:9").output().unwrap())
    };
    insta::assert_snapshot!(generate("models/tiny-lama"), @"
    exit 2
    error: `models/tiny-lama` is neither a folder nor a .gguf file
    hint: did you mean `models/tiny-llama`? a model on the Hub is written `models/tiny-lama@main`
    ");
    insta::assert_snapshot!(generate("./model/tiny-llama"), @"
    exit 2
    error: `./model/tiny-llama` is neither a folder nor a .gguf file
    hint: a model on the Hub is written `org/name`
    ");
    insta::assert_snapshot!(generate("./modles/tiny-llama"), @"
    exit 2
    error: `./modles/tiny-llama` is neither a folder nor a .gguf file
    hint: did you mean `./models/tiny-llama`?
    ");
    insta::assert_snapshot!(generate("models/other/tiny.gguf"), @"
    exit 2
    error: `models/other/tiny.gguf` is neither a folder nor a .gguf file
    hint: a model on the Hub is written `org/name`
    ");
    assert!(generate("models/tiny-lama@main").contains("cannot be reached"));
    insta::assert_snapshot!(refused_with(&place, "adapter.from=modle"), @"
    exit 2
    error: there is no adapter folder `modle`
    hint: did you mean `model`?
    ");
    insta::assert_snapshot!(refused(&place, &["inspect", "dota.jsonl"]), @"
    exit 2
    error: dota.jsonl: there is no such file
    hint: did you mean `data.jsonl`?
    ");
}

/// A built-in recipe runs anywhere; the files that it names are in the repository.
#[test]
fn files_that_a_recipe_of_ours_names_and_that_are_not_here() {
    let place = Place::new();
    insta::assert_snapshot!(refused(&place, &["finetune", "quickstart"]), @"
    exit 2
    error: `examples/tiny-llama`, `datasets/quickstart.jsonl`, `datasets/quickstart-eval.jsonl` are not here
    hint: they belong to peft's repository: run in a clone of it, or name your own with `--set model.source=…`, `--set data.train=…`, `--set data.eval=…`
    ");
    let shown = place.run(&["recipes", "show", "tiny-llama-pretrain"]).0;
    fs::write(place.path("mine.toml"), shown).unwrap();
    let data = ["--set", "data.train=[{ path = \"data.jsonl\" }]", "--set", "data.eval_share=0.1"];
    insta::assert_snapshot!(refused(&place, &[&["check", "mine.toml"], &data[..]].concat()), @"
    exit 2
    `--set data.eval_share=0.1` takes the place of `data.eval`
    error: `datasets/generated/tiny-llama` is not here
    hint: it belongs to peft's repository: run in a clone of it, or name your own with `--set model.source=…`; `peft recipes show tiny-llama-pretrain` begins with the commands that make what is generated
    ");
}

#[test]
fn a_model_without_its_configuration() {
    let place = Place::new();
    fs::remove_file(place.path("model/config.json")).unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"
    exit 2
    error: model/config.json: there is no such file
    hint: give the folder of a model as transformers saves it, with all its files
    ");
}

#[test]
fn truncated_weights() {
    let place = Place::new();
    let path = place.path("model/model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..100_000]).unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"
    exit 1
    error: model/model.safetensors: the file has 100000 bytes, its header promises 4467048
    hint: a download or copy was cut short; fetch the file again
    ");
    fs::write(&path, &whole[..1000]).unwrap();
    insta::assert_snapshot!(refused(&place, &["finetune", "recipe.toml"]), @"
    exit 1
    error: model/model.safetensors: the file has 1000 bytes, and ends within its header
    hint: a download or copy was cut short; fetch the file again
    ");
}

#[test]
fn weights_of_another_shape() {
    insta::assert_snapshot!(refused_config("\"vocab_size\": 1024", "\"vocab_size\": 1000"), @"
    exit 1
    error: model: 1 tensor is of another shape than the configuration says: `model.embed_tokens.weight` should be [1000, 128] and is [1024, 128]
    hint: the weights and the configuration are of different models
    ");
}

#[test]
fn unknown_family() {
    insta::assert_snapshot!(refused_config("\"model_type\": \"llama\"", "\"model_type\": \"llame\""), @"
    exit 1
    error: model/config.json: `model_type` is `llame`, which is not supported; supported are `llama`, `mistral`, `qwen2`, `qwen3`, `mixtral`, `qwen2_moe`, `qwen3_moe`, `olmoe`, `glm4_moe`, `granitemoe`, `granitemoeshared`
    hint: nearest is `llama`
    ");
}

#[test]
fn ending_tokens_that_are_no_numbers() {
    insta::assert_snapshot!(refused_config("\"eos_token_id\": 2", "\"eos_token_id\": \"x\""), @r#"
    exit 1
    error: model/config.json: `eos_token_id` has "x", expected the number of a token or a list of such numbers
    hint: write the number that `tokenizer.json` gives to the token that ends a text
    "#);
    let place = Place::new();
    let settings = place.path("model/generation_config.json");
    fs::write(settings, "{\"eos_token_id\": [2, 2.5]}").unwrap();
    insta::assert_snapshot!(refused(&place, &["generate", "--model", "model", "--prompt", "x"]), @"
    exit 1
    error: model/generation_config.json: `eos_token_id` has 2.5, expected the number of a token or a list of such numbers
    hint: write the number that `tokenizer.json` gives to the token that ends a text
    ");
}

/// As in transformers, they are read and end nothing; it is said.
#[test]
fn ending_tokens_that_are_not_in_the_vocabulary_are_warned_of() {
    let place = Place::new();
    let settings = place.path("model/generation_config.json");
    for (ids, first) in [("-1", "-1"), ("[2, 1024, -7]", "1024"), ("1099511627776", "1099511627776")] {
        fs::write(&settings, format!("{{\"eos_token_id\": {ids}}}")).unwrap();
        let warning = format!(
            "`eos_token_id` in `generation_config.json` has {first}, which is no token of the vocabulary of 1024"
        );
        let (told, _) = place.run(&["inspect", "model"]);
        assert_eq!(told.matches("warning").count(), 1, "{told}");
        assert!(told.contains(&warning), "{told}");
        let (_, told) =
            place.run(&["generate", "--model", "model", "--prompt", "x", "--max-new-tokens", "1"]);
        assert!(told.contains(&warning), "{told}");
    }
    fs::write(&settings, "{\"eos_token_id\": [2, 1023]}").unwrap();
    assert!(!place.run(&["inspect", "model"]).0.contains("warning"));
}

#[test]
fn a_model_that_sees_one_token() {
    insta::assert_snapshot!(refused_config("\"max_position_embeddings\": 512", "\"max_position_embeddings\": 1"), @"
    exit 2
    error: `data.max_length` is 32, and the model sees 1 tokens
    hint: a model that sees one token learns nothing: look whether `max_position_embeddings` in its `config.json` is right
    ");
    insta::assert_snapshot!(refused_config("\"max_position_embeddings\": 512", "\"max_position_embeddings\": 0"), @"
    exit 1
    error: model/config.json: `max_position_embeddings` must be a positive integer, found `0`
    ");
}

#[test]
fn of_many_keys_that_are_not_used_a_few_are_named() {
    let place = Place::new();
    let path = place.path("model/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["rope_scaling"] = (0..50_000).map(|n| (format!("key_{n}"), serde_json::Value::from(1))).collect();
    config["rope_scaling"]["rope_type"] = "default".into();
    fs::write(&path, config.to_string()).unwrap();
    let (told, _) = place.run(&["inspect", "model"]);
    assert_eq!(told.matches("which this type of rotary embedding does not use").count(), 10, "{told}");
    assert!(told.contains("and 49990 more keys of `rope_scaling` that are not used"), "{told}");
}

#[test]
fn weights_that_are_no_numbers() {
    let place = Place::new();
    let path = place.path("model/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    let broken = (tensors[name].clone() * f64::NAN).unwrap();
    tensors.insert(name.to_string(), broken);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let said = refused(&place, &["finetune", "recipe.toml", "--log", "silent"]);
    insta::assert_snapshot!(said, @"
    exit 1
    error: model/model.safetensors: tensor `model.layers.1.mlp.up_proj.weight`: holds NaN or infinity; these weights are broken
    hint: fetch the model again, or look for a repaired copy
    ");
    assert_eq!(refused(&place, &["generate", "--model", "model", "--prompt", "x"]), said);
}

// Adapters.

#[test]
fn targets_that_match_nothing() {
    insta::assert_snapshot!(refused_with(&Place::new(), "adapter.targets=[\"c_attn\"]"), @"
    exit 2
    error: `c_attn` in `targets` matches no linear layer of the model
    hint: the model has `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`
    ");
}

#[test]
fn ranks_that_cannot_be() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "adapter.rank=0"), @"
    exit 2
    error: `adapter.rank` is 0, so nothing would be trained
    hint: give a rank such as 16, or train all weights with `train.full = true`
    ");
    insta::assert_snapshot!(refused_with(&place, "adapter.rank=129"), @"
    exit 2
    error: rank larger than a dimension of the weight: `model.layers.0.mlp.gate_proj` is [384, 128] and its rank 129; `model.layers.0.mlp.up_proj` is [384, 128] and its rank 129; `model.layers.0.mlp.down_proj` is [128, 384] and its rank 129; `model.layers.1.mlp.gate_proj` is [384, 128] and its rank 129; `model.layers.1.mlp.up_proj` is [384, 128] and its rank 129; `model.layers.1.mlp.down_proj` is [128, 384] and its rank 129; `model.layers.2.mlp.gate_proj` is [384, 128] and its rank 129; `model.layers.2.mlp.up_proj` is [384, 128] and its rank 129; and 7 more
    hint: choose a smaller `adapter.rank`, or leave these layers out of `adapter.targets`
    ");
}

#[test]
fn kinds_of_adapters_that_are_not_built() {
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/dora")), @"
    exit 1
    error: [fixtures]/adapters/dora/adapter_config.json: `use_dora` is true: DoRA, not built yet
    hint: PEFT can put it into the weights: `model.merge_and_unload()`, save that model, and give it without the adapter
    ");
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/modules_to_save")), @r#"
    exit 1
    error: [fixtures]/adapters/modules_to_save/adapter_config.json: `modules_to_save` is ["lm_head"]: whole trained modules, not built yet
    hint: PEFT can put it into the weights: `model.merge_and_unload()`, save that model, and give it without the adapter
    "#);
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/pissa")), @r#"
    exit 1
    error: [fixtures]/adapters/pissa/adapter_config.json: `init_lora_weights` is "pissa": the adapter belongs to base weights that were changed
    hint: save it again from PEFT with `save_pretrained(.., path_initial_model_for_weight_conversion=..)`, which makes a plain LoRA of it
    "#);
    insta::assert_snapshot!(refused_adapter(&fixture("adapters/pickle")), @"
    exit 1
    error: [fixtures]/adapters/pickle: has `adapter_model.bin`, a pickle, and no `adapter_model.safetensors`
    hint: pickles can run code and are not read; load the adapter with PEFT and `save_pretrained` it again
    ");
}

#[test]
fn an_adapter_of_rank_0() {
    let place = Place::new();
    let folder = place.path("adapter");
    fs::create_dir(&folder).unwrap();
    let config = fs::read_to_string(fixture("llama/adapter/adapter_config.json")).unwrap();
    assert!(config.contains("\"r\": 4"));
    fs::write(folder.join("adapter_config.json"), config.replace("\"r\": 4", "\"r\": 0")).unwrap();
    let tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    safetensors::serialize_to_file(&tensors, None, &folder.join("adapter_model.safetensors")).unwrap();
    insta::assert_snapshot!(refused_with(&place, "adapter.from=adapter"), @"
    exit 1
    error: adapter/adapter_config.json: `r` is 0, expected a whole number above 0
    ");
}

#[test]
fn an_adapter_for_another_base() {
    let place = Place::new();
    let adapter = fixture("llama/adapter");
    let merge = ["merge", "--model", "model", "--adapter", &adapter, "--output", "merged"];
    insta::assert_snapshot!(refused(&place, &merge), @"
    exit 1
    error: [fixtures]/llama/adapter: the adapter does not fit the model: `model.layers.0.mlp.down_proj.lora_A.weight` has shape [4, 56], expected [4, 384]; `model.layers.0.mlp.down_proj.lora_B.weight` has shape [32, 4], expected [128, 4]; `model.layers.0.mlp.gate_proj.lora_A.weight` has shape [4, 32], expected [4, 128]; `model.layers.0.mlp.gate_proj.lora_B.weight` has shape [56, 4], expected [384, 4]; `model.layers.0.mlp.up_proj.lora_A.weight` has shape [4, 32], expected [4, 128]; `model.layers.0.mlp.up_proj.lora_B.weight` has shape [56, 4], expected [384, 4]; `model.layers.0.self_attn.k_proj.lora_A.weight` has shape [4, 32], expected [4, 128]; `model.layers.0.self_attn.k_proj.lora_B.weight` has shape [16, 4], expected [64, 4]; and 62 more
    hint: the adapter was made for `tests/fixtures/llama`
    ");
    let more = refused_with(&place, &format!("adapter.from={adapter}"));
    assert!(more.contains("[fixtures]/llama/adapter: the adapter does not fit the model: "), "{more}");
}

#[test]
fn no_adapter() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "adapter.from=nowhere"), @"
    exit 2
    error: there is no adapter folder `nowhere`
    ");
}

// Data. Every way in which a record can be wrong: `data/source.rs`.

#[test]
fn no_data() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "data.train=[{ path = \"elsewhere/none.jsonl\" }]"), @"
    exit 2
    error: elsewhere/none.jsonl: there is no such file
    hint: relative paths are relative to the folder that the command runs in
    ");
    fs::create_dir(place.path("texts")).unwrap();
    insta::assert_snapshot!(refused_with(&place, "data.train=texts"), @"
    exit 2
    error: texts: a folder without a `.jsonl` or `.json` file, expected one at least
    ");
    insta::assert_snapshot!(refused_with(&place, "data.train=texts/*.jsonl"), @"
    exit 2
    error: texts/*.jsonl: no file has a path of this pattern
    hint: `*` stands for any part of a name, and `**` for any folders; paths begin in the folder that the command runs in
    ");
    insta::assert_snapshot!(refused_data(""), @"
    exit 1
    error: data.jsonl: no records
    hint: write one per line, with `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`
    ");
}

#[test]
fn a_broken_line() {
    let lines = "{\"prompt\": \"a\", \"completion\": \"b\"}\n\n{\"prompt\": \"a\", \"completion\": }\n";
    insta::assert_snapshot!(refused_data(lines), @"
    exit 1
    error: data.jsonl:3: not valid JSON at column 31: expected value
    ");
}

#[test]
fn wrong_roles() {
    let message = |role: &str| format!("{{\"role\": \"{role}\", \"content\": \"c\"}}");
    let line = |roles: &[&str]| {
        let messages: Vec<String> = roles.iter().map(|role| message(role)).collect();
        format!("{{\"messages\": [{}]}}\n", messages.join(", "))
    };
    let right = line(&["user", "assistant"]);
    insta::assert_snapshot!(refused_data(&(right.clone() + &line(&["user", "critic"]))), @"
    exit 1
    error: data.jsonl:2: message 2 of 2: unknown role `critic`, expected `system`, `developer`, `user`, `assistant` or `tool`
    hint: these names are read: `system`, `developer`, `user`, `human`, `prompter`, `assistant`, `gpt`, `chatgpt`, `bot`, `chatbot`, `model`, `ai`, `tool`, `observation`, `function`, `ipython`, `tool_response`, `tool_result`, `function_response`, `function_result`, `function_call`, `tool_call`
    ");
    insta::assert_snapshot!(refused_data(&(right + &line(&["user", "system", "user"]))), @r#"
    exit 1
    error: data.jsonl:2: the conversation has no `assistant` message to learn from
    hint: set `data.train_on` = "all" to learn every token
    "#);
}

#[test]
fn documents_of_which_nothing_is_left() {
    let place = Place::new();
    insta::assert_snapshot!(refused_with(&place, "data.max_length=2"), @"
    exit 2
    error: data.jsonl: none of the 24 documents has a token to learn within `data.max_length` = 2 tokens: 24 have their first one later
    hint: raise `data.max_length`: the longest document has 17 tokens, 95 of 100 have at most 17
    ");
    insta::assert_snapshot!(refused_with(&place, "data.max_length=513"), @"
    exit 2
    error: `data.max_length` is 513, and the model sees 512 tokens
    hint: set `data.max_length` to 512 or less
    ");
}

// Outputs.

#[test]
fn outputs_that_cannot_be() {
    let place = Place::new();
    let to =
        |output: &str| refused(&place, &["finetune", "recipe.toml", "--log", "silent", "--output", output]);
    insta::assert_snapshot!(to("data.jsonl"), @"
    exit 2
    error: data.jsonl: is a file, where the run directory would be
    hint: choose another folder with `--output`
    ");
    insta::assert_snapshot!(to("data.jsonl/run"), @"
    exit 2
    error: data.jsonl: is a file, so there can be no folder in it
    hint: choose another folder with `--output`
    ");
    insta::assert_snapshot!(to("model"), @"
    exit 2
    error: model: holds `config.json` and no run, and the run would write over it
    hint: choose another folder with `--output`
    ");
    insta::assert_snapshot!(to(""), @"
    exit 2
    error: `output` is empty or blank
    hint: name a folder, such as `runs/first`
    ");
    let (model, adapter) = (fixture("llama"), fixture("llama/adapter"));
    let merge = |output: &str| {
        refused(&place, &["merge", "--model", &model, "--adapter", &adapter, "--output", output])
    };
    insta::assert_snapshot!(merge("data.jsonl"), @"
    exit 2
    error: `data.jsonl` exists and is not a folder
    hint: choose another folder with `--output`
    ");
    insta::assert_snapshot!(merge("data.jsonl/merged"), @"
    exit 2
    error: data.jsonl: is a file, so there can be no folder in it
    hint: choose another folder with `--output`
    ");
    insta::assert_snapshot!(merge("model"), @"
    exit 2
    error: `model` exists and is not empty
    hint: choose another folder with `--output`, or remove this one
    ");
}

/// Root may write everywhere, so this test has something to see for others only.
#[cfg(unix)]
#[test]
fn a_folder_that_may_not_be_written() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let closed = place.path("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, PermissionsExt::from_mode(0o555)).unwrap();
    if fs::create_dir(closed.join("try")).is_ok() {
        return;
    }
    let arguments = ["finetune", "recipe.toml", "--log", "silent", "--output", "closed/run"];
    insta::assert_snapshot!(refused(&place, &arguments), @"
    exit 1
    error: closed/run: Permission denied (os error 13)
    hint: change the permissions, or choose an output folder that can be written with `--output`
    ");
}

/// A limit on the size of files stands in for a full disk.
#[cfg(target_os = "linux")]
mod full_disk {
    use std::os::unix::process::CommandExt;

    use super::*;

    /// What a command says when no file can grow beyond `bytes`.
    fn limited(place: &Place, bytes: u64, arguments: &[&str]) -> String {
        let mut command = place.command(arguments);
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        let set = move || {
            // SAFETY: both calls are safe between fork and exec; they change settings of the new process only.
            let done = unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit)
            };
            if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: the closure allocates nothing and takes no locks.
        unsafe { command.pre_exec(set) };
        told_of(place, &command.output().unwrap())
    }

    #[test]
    fn a_run_that_cannot_begin_leaves_nothing() {
        let place = Place::new();
        let before = tree(&place.path(""));
        let run = ["finetune", "recipe.toml", "--log", "silent", "--output", "new/run"];
        insta::assert_snapshot!(limited(&place, 100, &run), @"
        exit 1
        error: new/run/recipe.toml: File too large (os error 27)
        hint: free some space, or choose another output folder with `--output`
        ");
        assert_same(&tree(&place.path("")), &before);
    }

    /// The first checkpoint does not fit; the second attempt, with room, ends as a run that always had it.
    #[test]
    fn a_checkpoint_is_there_whole_or_not() {
        let place = Place::new();
        let run = ["finetune", "recipe.toml", "--log", "silent"];
        // An adapter fits, and the optimizer's state, of twice the size, does not.
        insta::with_settings!({ filters => vec![(r"\.checkpoint-2\.\w{6}\.", ".checkpoint-2.[RANDOM].")] }, {
            insta::assert_snapshot!(limited(&place, 200_000, &run), @"
            exit 1
            error: [place]/run/.checkpoint-2.[RANDOM].partial/optimizer.safetensors: File too large (os error 27)
            hint: free some space, or choose another output folder with `--output`
            ");
        });
        let left: Vec<String> = place.names_in("run");
        assert_eq!(left, ["metrics.jsonl", "recipe.toml"]);
        place.run(&[&run[..], &["--resume"]].concat());
        place.run(&[&run[..], &["--output", "whole"]].concat());
        let weights = |run: &str| fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
        assert!(weights("run") == weights("whole"));
    }

    #[test]
    fn a_merge_leaves_nothing() {
        let place = Place::new();
        let before = tree(&place.path(""));
        let (model, adapter) = (fixture("llama"), fixture("llama/adapter"));
        let merge = ["merge", "--model", &model, "--adapter", &adapter, "--output", "new/merged"];
        insta::with_settings!({ filters => vec![(r"\.merged\.\w{6}\.", ".merged.[RANDOM].")] }, {
            insta::assert_snapshot!(limited(&place, 10_000, &merge), @"
            exit 1
            error: [place]/new/.merged.[RANDOM].partial/model.safetensors: File too large (os error 27)
            hint: free some space, or choose another output folder with `--output`
            ");
        });
        // The folder above it is made before anything is written.
        let mut expected: Tree = before;
        expected.insert("new".to_string(), None);
        assert_same(&tree(&place.path("")), &expected);
    }

    #[test]
    fn a_conversion_leaves_nothing() {
        let place = crate::upcycle::place();
        let before = tree(&place.path(""));
        let upcycle = ["upcycle", "upcycle.toml", "--log", "silent"];
        insta::with_settings!({ filters => vec![(r"\.mixture\.\w{6}\.", ".mixture.[RANDOM].")] }, {
            insta::assert_snapshot!(limited(&place, 100_000, &upcycle), @"
    exit 1
    warning: 512 calibration tokens give each of 4 experts about 256, and 512 are the least to tell experts apart by; raise `calibration.tokens` to 1024 or more
    warning: `calibration.data` names one file and `calibration.eval` none: held-out text is like what is fitted, and only the built-in text tells what other text costs; name files of several kinds
    error: [place]/./.mixture.[RANDOM].partial/model.safetensors: File too large (os error 27)
    hint: free some space, or choose another output folder with `--output`
    ");
        });
        assert_same(&tree(&place.path("")), &before);
    }
}

// What looks odd and is right.

#[test]
fn recipes_from_windows() {
    let place = Place::new();
    place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    let recipe = fs::read_to_string(place.path("recipe.toml")).unwrap();
    fs::write(place.path("windows.toml"), format!("\u{feff}{}", recipe.replace('\n', "\r\n"))).unwrap();
    place.run(&["finetune", "windows.toml", "--output", "windows", "--log", "silent"]);
    let weights = |run: &str| fs::read(place.path(run).join("adapter_model.safetensors")).unwrap();
    assert!(weights("run") == weights("windows"));
}

#[test]
fn paths_with_spaces() {
    let place = Place::new();
    fs::create_dir(place.path("a b")).unwrap();
    for name in ["model", "data.jsonl", "recipe.toml"] {
        fs::rename(place.path(name), place.path("a b").join(name)).unwrap();
    }
    let sets = ["--set", "model.source=a b/model", "--set", "data.train=[{ path = \"a b/data.jsonl\" }]"];
    let run = ["finetune", "a b/recipe.toml", "--output", "a b/run ö", "--log", "silent"];
    place.run(&[&run[..], &sets[..]].concat());
    let merge = ["merge", "--model", "a b/model", "--adapter", "a b/run ö", "--output", "a b/merged"];
    place.run(&merge);
    assert!(place.path("a b/merged/model.safetensors").exists());
}

#[test]
fn one_document_is_trained_on_and_not_held_out() {
    let place = Place::new();
    let data = fs::read_to_string(place.path("data.jsonl")).unwrap();
    fs::write(place.path("data.jsonl"), data.lines().next().unwrap()).unwrap();
    let (_, said) = place.run(&["finetune", "recipe.toml", "--log", "silent"]);
    insta::assert_snapshot!(said, @"
    warning: there is only one distinct document, so none was held out for evaluation
    ");
    assert!(place.path("run/adapter_model.safetensors").exists());
    assert!(!place.path("run/best").exists(), "nothing was evaluated");
}

#[test]
fn two_tokens_are_a_document() {
    let place = Place::new();
    fs::write(place.path("data.jsonl"), "{\"text\": \"one two three\"}\n{\"text\": \"four five six\"}\n")
        .unwrap();
    let (_, said) = place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "data.max_length=2"]);
    insta::assert_snapshot!(said, @"
    warning: no document has an end-of-sequence token to learn, so the model will not learn to stop
    ");
    assert!(place.path("run/adapter_model.safetensors").exists());
}

/// What other tools write is led to what this one reads, and numbers are shown as they were written.
#[test]
fn near_misses_are_led_to_the_key() {
    let place = Place::new();
    for (set, expected) in [
        ("adapter.lora_alpha=32", "hint: `lora_alpha` of other tools is `adapter.alpha` here"),
        ("lora_r=16", "hint: `lora_r` of other tools is `adapter.rank` here"),
        ("adapter.my_alpha=32", "did you mean `alpha`?"),
        ("train.steps=150.0", "`train.steps`: expected a whole number, found `150.0`"),
    ] {
        let told = refused(&place, &["check", "recipe.toml", "--set", set]);
        assert!(told.starts_with("exit 2\n") && told.contains(expected), "{told}");
    }
    for output in ["", " ", "\t"] {
        let told = refused(&place, &["finetune", "recipe.toml", "--output", output]);
        assert!(told.starts_with("exit 2\nerror: `output` is empty or blank"), "{told}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_stdout_that_is_full_is_named() {
    let place = Place::new();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = place.command(&["recipes"]).stdout(full).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr.starts_with("error: stdout cannot be written: ") && !stderr.contains("--output"),
        "{stderr}"
    );
}
