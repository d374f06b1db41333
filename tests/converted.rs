use std::fs;
use std::path::Path;

use peft::recipe::other_tools::{Converted, convert};

use crate::place::Place;

const AXOLOTL: &str = r#"base_model: HuggingFaceTB/SmolLM2-135M-Instruct
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true

datasets:
  - path: someone/some-answers
    type: alpaca
  - path: data/chats.jsonl
    type: chat_template
    field_messages: conversations
    roles_to_train: ["assistant"]
dataset_prepared_path: last_run
val_set_size: 0.1
output_dir: ./outputs/lora-out

adapter: qlora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 4096
sample_packing: true

wandb_project:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
deepspeed: zero3.json
weight_decay: 0.0
frobnicate: 3
"#;

const LLAMA_FACTORY: &str = r#"### model
model_name_or_path: models/tiny
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
dataset: identity,wanted
template: qwen3
cutoff_len: 1024
output_dir: saves/tiny
overwrite_output_dir: true
logging_steps: 10
save_steps: 500
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
eval_strategy: "no"
"#;

const DATASET_INFO: &str = r#"{
    "identity": { "file_name": "identity.json" },
    "other": { "file_name": "other.json", "formatting": "sharegpt", "columns": { "messages": "turns" } }
}"#;

const MLX_LM: &str = r#"model: "models/tiny"
train: true
fine_tune_type: lora
optimizer: adamw
data: "data/kites/"
seed: 7
num_layers: 16
batch_size: 2
iters: 600
learning_rate: 1e-5
steps_per_eval: 100
adapter_path: "adapters"
max_seq_length: 512
grad_checkpoint: true
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 60
  arguments: [1e-5, 600, 1e-7]
"#;

fn converted(text: &str) -> Converted {
    let nearby =
        |path: &Path| (path == Path::new("data/dataset_info.json")).then(|| DATASET_INFO.to_string());
    convert(Path::new("other.yml"), text, &nearby).unwrap()
}

/// The recipe, and what is remarked of it.
fn told(text: &str) -> String {
    let Converted { tool, recipe, remarks, off } = converted(text);
    let line = |line: Option<usize>| line.map_or(String::new(), |line| format!("{line}: "));
    let remarks: String = remarks.iter().map(|r| format!("{}{}\n", line(r.line), r.text)).collect();
    format!("{}\n{recipe}-----\n{remarks}off: {}", tool.name(), off.join(", "))
}

fn refusal(text: &str) -> String {
    let error = convert(Path::new("other.yml"), text, &|_| None).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    format!("{error}\nhint: {}", error.hint().unwrap_or_default())
}

#[test]
fn a_configuration_of_axolotl_becomes_a_recipe() {
    insta::assert_snapshot!(told(AXOLOTL), @r#"
    axolotl
    # From the axolotl configuration `other.yml`.
    #
    # To do before it runs:
    # - line 7: `someone/some-answers` is a dataset of the Hub: download it, and save it as `some-answers.jsonl`

    task = "finetune"
    output = "./outputs/lora-out"

    [model]
    source = "HuggingFaceTB/SmolLM2-135M-Instruct"

    [adapter]
    rank = 16
    alpha = 32
    dropout = 0.05
    targets = "all-linear"

    [data]
    train = [
        { path = "some-answers.jsonl", format = "alpaca" },
        { path = "data/chats.jsonl", format = "messages" },
    ]
    eval_share = 0.1
    max_length = 4096
    pack = true
    train_on = "completion"

    [train]
    accumulate = 2
    batch_size = 2
    epochs = 1
    schedule = "cosine"
    learning_rate = 0.0002
    recompute = "block"
    warmup = 10
    weight_decay = 0.0
    -----
    2: `model_type: LlamaForCausalLM`: architecture, tokenizer and its tokens are those of the model's folder
    4: `load_in_4bit: true`: weights keep the form of their files, so a quantized GGUF file in `model.source` stays quantized
    7: `someone/some-answers` is a dataset of the Hub: download it, and save it as `some-answers.jsonl`
    12: `roles_to_train: [..]`: all answers are learned, unless a turn has `"train": false`
    13: `dataset_prepared_path: last_run`: data is read and tokenized on all cores when a run begins
    29: `optimizer: adamw_8bit`: the optimizer is AdamW with betas of 0.9 and 0.999, an epsilon of 1e-8 and a state in f32
    36: `flash_attention: true`: attention has one implementation, which needs no switch
    38: `evals_per_epoch: 4`: `train.eval_every` is a number of steps
    39: `deepspeed: zero3.json`: a run uses one process on one machine
    41: `frobnicate: 3`: recipes have no such key, and this program does not know what it does
    off: load_in_8bit, wandb_project, tf32
    "#);
}

#[test]
fn a_configuration_of_llama_factory_becomes_a_recipe() {
    insta::assert_snapshot!(told(LLAMA_FACTORY), @r#"
    LLaMA-Factory
    # From the LLaMA-Factory configuration `other.yml`.
    #
    # To do before it runs:
    # - line 8: `wanted` is explained in `data/dataset_info.json`, which cannot be read from here or has no such name: put the path of its `file_name` in the place of `data/wanted.json`

    task = "finetune"
    output = "saves/tiny"

    [model]
    source = "models/tiny"

    [adapter]
    rank = 8
    targets = ["q_proj", "v_proj"]
    alpha = 16.0

    [data]
    train = [
        { path = "data/identity.json", format = "alpaca" },
        { path = "data/wanted.json" },
    ]
    max_length = 1024
    pack = false
    eval = false

    [train]
    save_every = 500
    batch_size = 1
    accumulate = 8
    learning_rate = 0.0001
    epochs = 3.0
    schedule = "cosine"
    warmup = 0.1
    eval_every = 0
    -----
    8: `wanted` is explained in `data/dataset_info.json`, which cannot be read from here or has no such name: put the path of its `file_name` in the place of `data/wanted.json`
    9: `template: qwen3`: the chat template of the model is used, and `data.template` sets its variables
    12: `overwrite_output_dir: true`: files that a run did not write are never written over; choose another `output`
    13: `logging_steps: 10`: every step is a line of `metrics.jsonl` in the run directory
    left out, and written as LLaMA-Factory would do it: `data.pack = false`, `adapter.alpha = 16.0`
    off:
    "#);
}

#[test]
fn a_configuration_of_mlx_lm_becomes_a_recipe() {
    insta::assert_snapshot!(told(MLX_LM), @r#"
    mlx-lm
    # From the mlx-lm configuration `other.yml`.
    #
    # To do before it runs:
    # - line 5: `data/kites` is taken for a folder: if it is a dataset of the Hub, download it, and save it as `data/kites/train.jsonl` and `data/kites/valid.jsonl`

    task = "finetune"
    seed = 7
    output = "adapters"

    [model]
    source = "models/tiny"

    [adapter]
    targets = ["self_attn.q_proj", "self_attn.v_proj"]
    rank = 4
    alpha = 80.0
    dropout = 0.0

    [data]
    train = [
        { path = "data/kites/train.jsonl" },
    ]
    eval = [
        { path = "data/kites/valid.jsonl" },
    ]
    max_length = 512
    train_on = "completion"
    pack = false

    [train]
    batch_size = 2
    steps = 600
    learning_rate = 0.00001
    eval_every = 100
    recompute = "block"
    schedule = "cosine"
    warmup = 60
    weight_decay = 0.01
    max_grad_norm = 0.0
    save_every = 100
    -----
    5: `data/kites` is taken for a folder: if it is a dataset of the Hub, download it, and save it as `data/kites/train.jsonl` and `data/kites/valid.jsonl`
    7: `num_layers: 16`: adapters go to every layer, unless a regular expression in `adapter.targets` chooses by the path
    24: `arguments: [..]`: the rate rises to `train.learning_rate`, and falls to zero at the end
    left out, and written as mlx-lm would do it: `train.weight_decay = 0.01`, `data.pack = false`, `train.max_grad_norm = 0.0`, `train.save_every = 100`
    off:
    "#);
}

/// Every key is in the recipe, among the remarks, or off: of each, either its value or its line is told.
#[test]
fn values_that_no_recipe_takes_are_told_with_their_line() {
    let said = told(&AXOLOTL.replace("lora_dropout: 0.05", "lora_dropout: 2").replace("0.1", "40"));
    for line in [
        "14: `val_set_size: 40`: `data.eval_share` is a share of the documents, and no number of them",
        "20: `lora_dropout: 2`: `adapter.dropout`: expected a number of at least 0 and below 1, found `2`",
    ] {
        assert!(said.contains(line), "{said}");
    }
    let twice = told(&format!("{AXOLOTL}lora_r: 8\nsequence_length: 5\nlearning_rate: '3e-4'\n"));
    assert!(twice.contains("rank = 8\n") && twice.contains("learning_rate = 0.0003\n"), "{twice}");
    assert!(twice.contains("18: `lora_r: 16`: the key stands in the file again"), "{twice}");
    let full = told(&AXOLOTL.replace("adapter: qlora", "adapter:"));
    assert!(full.contains("full = true") && !full.contains("[adapter]"), "{full}");
    let both = told(&MLX_LM.replace("iters: 600", "iters: 600\nnum_epochs: 2\nwarmup_steps: 5"));
    assert!(both.contains("the number of epochs is left out"), "{both}");
    assert!(both.contains("`warmup: 60`: `train.warmup` is `5` already, by another key"), "{both}");
    let constant = told(&LLAMA_FACTORY.replace("cosine", "constant"));
    assert!(constant.contains("warmup = 0.0\n") && constant.contains("never warms up"), "{constant}");
}

#[test]
fn what_no_recipe_trains_is_refused() {
    insta::assert_snapshot!(refusal(&LLAMA_FACTORY.replace("stage: sft", "stage: dpo")), @"
    other.yml:3: `stage: dpo` is not built
    hint: recipes train low-rank adapters, or all weights, on texts and answers
    ");
    insta::assert_snapshot!(refusal(&MLX_LM.replace("fine_tune_type: lora", "train_mode: orpo")), @"
    other.yml:3: `train_mode: orpo` is not built
    hint: recipes train low-rank adapters, or all weights, on texts and answers
    ");
    insta::assert_snapshot!(refusal(&format!("{AXOLOTL}rl: kto\n")), @"
    other.yml:42: `rl: kto` is not built
    hint: recipes train low-rank adapters, or all weights, on texts and answers
    ");
    insta::assert_snapshot!(refusal("tokenizer: x\nepochs: 3\n"), @"
    other.yml: its keys are those of no tool whose configurations are converted
    hint: axolotl is told by keys such as `base_model` and `datasets`, LLaMA-Factory by `finetuning_type` and `cutoff_len`, mlx-lm by `iters` and `lora_parameters`
    ");
    insta::assert_snapshot!(refusal("base_model: [x\n"), @"
    other.yml:2: not valid YAML at column 1: while parsing a flow sequence, expected ',' or ']'
    hint:
    ");
}

/// Everything that is named is made up for, so that what is converted can be read.
#[test]
fn what_is_missing_is_to_do() {
    let said = told("sequence_len: 512\nmicro_batch_size: 2\nadapter: lora\n");
    assert!(said.contains("source = \"MODEL\"") && said.contains("path = \"data.jsonl\""), "{said}");
    assert!(said.contains("# To do before it runs:\n# - line 1: no model is named"), "{said}");
    let lines =
        "sequence_len: 512\nmicro_batch_size: 2\nadapter: lora\ndatasets: [{path: \"a/b\\nseed = 3\"}]\n";
    let said = converted(lines).recipe;
    assert!(said.contains("# - line 4: `a/b seed = 3` is a dataset of the Hub"), "{said}");
}

#[test]
fn the_command_writes_a_recipe_and_tells_what_it_leaves_out() {
    let place = Place::new();
    fs::write(place.path("other.yml"), MLX_LM.replace("models/tiny", "model")).unwrap();
    let (recipe, said) = place.run(&["recipes", "convert", "other.yml"]);
    assert!(recipe.starts_with("# From the mlx-lm configuration `other.yml`.\n"), "{recipe}");
    assert!(said.starts_with("`other.yml` is a configuration of mlx-lm\nwarning: other.yml:"), "{said}");
    let convert = ["recipes", "convert", "other.yml", "--output", "new.toml"];
    let (stdout, said) = place.run(&convert);
    assert_eq!((stdout.as_str(), fs::read_to_string(place.path("new.toml")).unwrap()), ("", recipe));
    assert!(said.ends_with("wrote new.toml; `peft check new.toml` says what it will do\n"), "{said}");
    let again = place.command(&convert).output().unwrap();
    assert_eq!(again.status.code(), Some(2));
    let again = String::from_utf8(again.stderr).unwrap();
    assert!(again.contains("error: new.toml: exists already\nhint: choose another `--output`"), "{again}");

    fs::create_dir_all(place.path("data/kites")).unwrap();
    for name in ["train", "valid"] {
        fs::copy(place.path("data.jsonl"), place.path(&format!("data/kites/{name}.jsonl"))).unwrap();
    }
    let short = ["--set", "data.max_length=32"];
    let (checked, _) = place.run(&["check", "new.toml", short[0], short[1]]);
    assert!(checked.contains("data/kites/train.jsonl"), "{checked}");
}

/// Each command that takes a recipe sends a configuration of another tool to `peft recipes convert`.
#[test]
fn recipes_that_are_yaml_or_json_are_sent_to_the_conversion() {
    let place = Place::new();
    let files = [
        ("other.yml", AXOLOTL, "a configuration of axolotl"),
        ("OTHER.YAML", "a: 1\n", "by its ending YAML or JSON"),
        ("adapter_config.json", "{\"r\": 8}", "by its ending YAML or JSON"),
        ("other.txt", LLAMA_FACTORY, "a configuration of LLaMA-Factory"),
    ];
    for (name, text, found) in files {
        fs::write(place.path(name), text).unwrap();
        for command in ["finetune", "check", "upcycle"] {
            let output = place.command(&[command, name]).output().unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            let stem = Path::new(name).with_extension("toml").display().to_string();
            let expected = format!(
                "error: {name}: {found}, expected a recipe in TOML\nhint: `peft recipes convert {name} --output {stem}` \
                 makes a recipe of a configuration of axolotl, LLaMA-Factory or mlx-lm\n"
            );
            assert_eq!((output.status.code(), stderr), (Some(2), expected));
        }
    }
    let output = place.command(&["recipes", "convert", "othr.yml"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr, "error: othr.yml: there is no such file\nhint: did you mean `other.yml`?\n");
}
