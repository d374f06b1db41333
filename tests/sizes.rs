use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file::Value as Entry;
use candle_core::{DType, Device, Tensor};
use peft::Error;
use peft::model::{Pretrained, family};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::place::{Place, refusal};

/// A copy of a fixture's configuration and weights with other values in `config.json`.
fn with(name: &str, values: Value) -> TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if file.starts_with("model") || file == "config.json" {
            fs::copy(&path, folder.path().join(file)).unwrap();
        }
    }
    lay_over(folder.path(), values);
    folder
}

fn lay_over(folder: &Path, values: Value) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in values.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
}

fn open(path: &Path) -> peft::Result<Pretrained> {
    let model = Pretrained::open(path.to_str().unwrap())?;
    model.check()?;
    Ok(model)
}

fn shown(error: &Error) -> String {
    format!("{error}{}", error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default())
}

fn refused(name: &str, values: Value) -> String {
    let folder = with(name, values);
    let said = shown(&open(folder.path()).unwrap_err());
    said.replace(folder.path().to_str().unwrap(), "[folder]")
}

/// The product of these two counts is that of the file, were it computed in 64 bits.
#[test]
fn widths_that_wrap_to_those_of_the_file_are_refused_everywhere() {
    let place = Place::new();
    let heads = json!({"num_attention_heads": (1u64 << 61) + 16, "num_key_value_heads": 8, "head_dim": 8});
    lay_over(&place.path("model"), heads);
    let expected = "exit 1\nerror: model/config.json: `num_attention_heads` must be at most 2147483648, found \
                    `2305843009213693968`";
    for command in [
        &["generate", "--raw", "--model", "model", "--prompt", "abcdefgh"][..],
        &["check", "recipe.toml"],
        &["inspect", "model"],
        &["merge", "--model", "model", "--adapter", "run", "--output", "merged"],
    ] {
        assert_eq!(refusal(&place, command), expected, "{command:?}");
    }
    let error = refused("llama", json!({"head_dim": 1u64 << 31, "num_attention_heads": 1u64 << 31}));
    assert!(error.contains("the sizes come to a model of"), "{error}");
    let error = refused("llama", json!({"head_dim": 16}));
    assert!(error.contains("q_proj.weight` should be [64, 32] and is [32, 32]"), "{error}");
}

#[test]
fn layers_and_experts_are_held_against_the_tensors_before_anything_is_made_of_them() {
    let begun = Instant::now();
    for count in [65_536u64, 1 << 20, 1 << 31] {
        let error = refused("llama", json!({"num_hidden_layers": count}));
        assert_eq!(
            error,
            format!(
                "[folder]/config.json: `num_hidden_layers` is {count}, and the files have 21 tensors, of layers 0 to 1\n\
                 hint: the weights and the configuration are of different models"
            )
        );
        for (name, key) in
            [("mixtral", "num_local_experts"), ("qwen2_moe", "num_experts"), ("glm4_moe", "n_routed_experts")]
        {
            let error = refused(name, json!({key: count}));
            assert!(
                error.contains(&format!("`{key}` is {count}, and the files have tensors of ")),
                "{error}"
            );
        }
    }
    for (name, key) in [("llama", "num_hidden_layers"), ("mixtral", "num_local_experts")] {
        let error = refused(name, json!({key: 1u64 << 62}));
        assert!(error.contains(&format!("`{key}` must be at most 2147483648")), "{error}");
    }
    let error = refused("llama", json!({"num_hidden_layers": 20}));
    assert!(error.contains("the configuration has 20 layers, and the files have layers 0 to 1; "), "{error}");
    let error = refused("llama", json!({"num_hidden_layers": 1}));
    assert!(error.contains("the configuration has 1 layers, and the files have layers 0 to 1; "), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

/// A single tensor of many tiny experts does not give every layer as many.
#[test]
fn experts_of_all_layers_together_need_a_value_each() {
    let folder = with("mixtral", json!({"num_local_experts": 100_000}));
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let many = Tensor::zeros((100_000, 1, 1), DType::F32, &Device::Cpu).unwrap();
    tensors.insert("model.layers.0.mlp.experts.gate_up_proj".into(), many);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let error = shown(&open(folder.path()).unwrap_err());
    assert!(error.contains("the layers have 200000 experts in all, expected at most"), "{error}");
}

#[test]
fn a_configuration_without_files_is_bounded_too() {
    let folder = with("mixtral", json!({}));
    let config = fs::read(folder.path().join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert!(family::read(&config).is_ok());
    for (key, count) in [("num_hidden_layers", 1u64 << 15), ("num_local_experts", 1 << 21)] {
        let mut config = config.clone();
        config[key] = json!(count);
        let error = family::read(&config).unwrap_err().to_string();
        assert!(error.starts_with(&format!("`{key}` is {count}, expected at most ")), "{error}");
    }
}

#[test]
fn gguf_counts_are_refused_by_the_names_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let said = |key: &str, value: u64| {
        let (mut metadata, tensors) = crate::weights::gguf::converted("qwen2", "qwen2");
        metadata.insert(format!("qwen2.{key}"), Entry::U64(value));
        crate::weights::gguf::write(&path, &metadata, &tensors);
        open(&path).unwrap_err().to_string()
    };
    let found = said("attention.head_count", (1 << 61) + 4);
    assert!(
        found.ends_with(
            "`qwen2.attention.head_count` must be at most 2147483648, found `2305843009213693956`"
        )
    );
    for count in [65_536, 1 << 31] {
        let found = said("block_count", count);
        let expected = format!("`qwen2.block_count` is {count}, and the files have ");
        assert!(found.contains(&expected) && found.ends_with("of layers 0 to 1"), "{found}");
    }
}

#[test]
fn values_that_no_model_can_have_are_refused_with_their_bounds() {
    let llama3 = |key: &str, value: Value| {
        let mut rope = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 100.0});
        rope[key] = value;
        json!({"rope_parameters": rope})
    };
    for (name, values, expected) in [
        ("llama", json!({"rms_norm_eps": 65536}), "`rms_norm_eps` must be from 1e-12 to 0.1, found `65536`"),
        ("llama", json!({"rms_norm_eps": 1e308}), "`rms_norm_eps` must be from 1e-12 to 0.1, found `1e+308`"),
        (
            "llama",
            json!({"rms_norm_eps": 1e-300}),
            "`rms_norm_eps` must be from 1e-12 to 0.1, found `1e-300`",
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_theta": 0.5}}),
            "`rope_theta` must be from 1 to 1e15, found `0.5`",
        ),
        ("llama", json!({"rope_parameters": {"rope_theta": 1}}), "`rope_theta` is 1, expected more"),
        ("llama", json!({"rope_parameters": {"rope_theta": 1e300}}), "`rope_theta` must be from 1 to 1e15"),
        (
            "llama3",
            llama3("factor", json!(1e308)),
            "`rope_parameters.factor` must be from 1e-6 to 1e6, found `1e+308`",
        ),
        (
            "llama3",
            llama3("low_freq_factor", json!(4.0)),
            "`rope_parameters.low_freq_factor` is 4 and `rope_parameters.high_freq_factor` 4, expected the second to be larger",
        ),
        (
            "granitemoe",
            json!({"residual_multiplier": 1e300}),
            "`residual_multiplier` must be from 1e-6 to 1e6",
        ),
        ("granitemoe", json!({"logits_scaling": 1e-300}), "`logits_scaling` must be from 1e-6 to 1e6"),
        (
            "glm4_moe",
            json!({"routed_scaling_factor": 1e300}),
            "`routed_scaling_factor` must be from 1e-6 to 1e6",
        ),
        (
            "glm4_moe",
            json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1e-9}}),
            "`partial_rotary_factor` must be at most 1, and at least two of the ",
        ),
    ] {
        let error = refused(name, values);
        assert!(
            error.starts_with("[folder]/config.json: ") && error.contains(expected),
            "{expected}: {error}"
        );
    }
}
