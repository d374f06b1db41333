//! Mixtures of experts against transformers: choices, layouts on disk, the balance loss and its gradients.

use std::collections::BTreeMap;
use std::fs;

use candle_core::{DType, Device, Tensor};
use peft::adapter::torch_random::Generator;
use peft::adapter::{attach, hf};
use peft::merge::merge;
use peft::model::config::{Overflow, RouterNoise, RoutingKind, RoutingVariant};
use peft::model::{Decoder, Pretrained, Recompute, RouterLosses};
use peft::train::{StepGradients, balanced_step_gradients, step_gradients};
use serde_json::{Value, json};

use crate::fixture::{Fixture, SPARSE, difference, logits, relative, values};
use crate::place::{Place, refusal};

#[test]
fn choices_are_those_of_transformers() {
    let mut layers = 0;
    for name in SPARSE {
        let fixture = Fixture::open(name);
        let (model, _) = fixture.with_adapter();
        let batch = fixture.batch();
        let documents = peft::ops::Documents::new(batch.offsets.clone(), batch.documents.clone());
        for routing in model.forward(&batch.tokens, &documents).unwrap().routing {
            let mut found: Vec<Vec<i64>> = routing
                .chosen
                .chunks(routing.active)
                .map(|row| row.iter().map(|e| i64::from(*e)).collect())
                .collect();
            found.iter_mut().for_each(|row| row.sort_unstable());
            let expected = fixture.tensors[&format!("chosen.{}", routing.layer)].to_vec2::<i64>().unwrap();
            assert_eq!(found, expected, "{name}, layer {}", routing.layer);
            layers += 1;
        }
    }
    assert_eq!(layers, 12);
}

#[test]
fn every_layout_gives_the_same_weights() {
    let mut layouts = 0;
    for name in SPARSE {
        let fixture = Fixture::open(name);
        let folder = fixture.folder.join("fused");
        if !folder.exists() {
            continue;
        }
        layouts += 1;
        let fused = Pretrained::open(&folder.to_string_lossy()).unwrap();
        let model = Decoder::open(&fused, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            difference(&logits(&model, &fixture.batch()), &logits(&fixture.model(), &fixture.batch())),
            0.0
        );
        let own = fixture.pretrained();
        assert_eq!(own.config(), fused.config(), "{name}");
        for (tensor, _) in own.config().tensors() {
            let read = |from: &Pretrained| from.read(&tensor, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(difference(&read(&own), &read(&fused)), 0.0, "{name}: {tensor}");
        }
    }
    assert_eq!(layouts, 4);
}

/// The bias of `glm4_moe` keeps expert 3 from being chosen.
#[test]
fn an_expert_without_tokens_has_a_gradient_of_zero() {
    let fixture = Fixture::open("glm4_moe");
    let (model, trainables) = fixture.with_adapter();
    let step = step_gradients(&model, &trainables, &[fixture.batch()], None, Recompute::None).unwrap();
    let largest =
        |name: &str| values(step.gradients.of_name(name).unwrap()).iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let by_expert: BTreeMap<usize, f32> = (0..5)
        .map(|expert| {
            (expert, largest(&format!("model.layers.1.mlp.experts.{expert}.up_proj.lora_B.weight")))
        })
        .collect();
    assert_eq!(by_expert[&3], 0.0);
    assert!((0..5).filter(|expert| *expert != 3).all(|expert| by_expert[&expert] > 0.0), "{by_expert:?}");
}

/// In bf16 products are rounded, but what decides on experts is not.
#[test]
fn logits_in_bf16_stay_near_those_in_f32() {
    for name in SPARSE {
        let fixture = Fixture::open(name);
        let model = Decoder::open(&fixture.pretrained(), DType::BF16, &Device::Cpu).unwrap();
        let found = logits(&model, &fixture.batch());
        let expected = &fixture.tensors["logits"];
        let norm = |x: &Tensor| values(x).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let error = norm(&(found.to_dtype(DType::F32).unwrap() - expected).unwrap()) / norm(expected);
        assert!(error < 0.05, "{name}: {error}");
    }
}

/// A router's input is kept as it is computed, and its gradients are taken in f32 all the same. A token near a tie may go to
/// another expert in bf16.
#[test]
fn gradients_of_routers_in_bf16_stay_near_those_in_f32() {
    for name in SPARSE {
        let fixture = Fixture::open(name);
        let gradients = |dtype, recompute| {
            let mut model = Decoder::open(&fixture.pretrained(), dtype, &Device::Cpu).unwrap();
            let trainables = model.make_routers_trainable().unwrap();
            let step = step_gradients(&model, &trainables, &[fixture.batch()], None, recompute).unwrap();
            let all = trainables.keys().map(|name| step.gradients.of_name(name).unwrap());
            all.flat_map(values).map(f64::from).collect::<Vec<_>>()
        };
        let expected = gradients(DType::F32, Recompute::None);
        let found = gradients(DType::BF16, Recompute::None);
        assert_eq!(found, gradients(DType::BF16, Recompute::Block), "{name}");
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let cosine = dot(&found, &expected) / (dot(&found, &found) * dot(&expected, &expected)).sqrt();
        assert!(cosine > 0.9, "{name}: {cosine}");
    }
}

const BALANCED: RouterLosses =
    RouterLosses { switch: 0.1, importance: 0.0, load: 0.0, load_std: 0.0, z: 0.0, pooled: true };

/// Transformers takes a softmax of the logits, also where scores are sigmoids; ours are these, divided by their sum.
#[test]
fn the_balance_loss_and_its_gradients_are_those_of_transformers() {
    let mut compared = 0;
    for name in SPARSE.into_iter().filter(|name| *name != "glm4_moe") {
        let fixture = Fixture::open(name);
        let (mut model, mut trainables) = fixture.with_adapter();
        trainables.extend(model.make_routers_trainable().unwrap());
        for recompute in [Recompute::None, Recompute::Block] {
            let batches = [fixture.batch()];
            let step =
                balanced_step_gradients(&model, &trainables, &batches, None, recompute, &BALANCED).unwrap();
            assert!((step.loss - fixture.number("loss")).abs() <= 1e-5, "{name}");
            let found = step.router.values["switch"];
            assert!((found - fixture.number("router_loss")).abs() <= 1e-5, "{name}: {found}");
            for tensor in trainables.keys() {
                let expected = &fixture.tensors[&format!("balanced_grad.{tensor}")];
                let found = step.gradients.of_name(tensor).unwrap_or_else(|| panic!("{name}: no {tensor}"));
                if difference(found, expected) > 2e-6 {
                    let relative = relative(found, expected);
                    assert!(relative <= 1e-4, "{name}: {tensor}: {relative}");
                }
                compared += 1;
            }
        }
    }
    assert!(compared > 500, "{compared}");
}

fn varied(fixture: &Fixture, active: Option<usize>, variant: RoutingVariant) -> Decoder {
    let mut pretrained = fixture.pretrained();
    pretrained.config_mut().reroute(active, variant).unwrap();
    let mut model = Decoder::open(&pretrained, DType::F32, &Device::Cpu).unwrap();
    let adapter = hf::Adapter::read(&fixture.folder.join("adapter"), &Device::Cpu).unwrap();
    let placements = adapter.placements(model.config()).unwrap().placements;
    attach(model.linears_mut(), &placements, &adapter.tensors, 0.3, 5).unwrap();
    model
}

/// Noise, chance, capacity and dropout are pure functions, so that a forward that is run again sees the same.
#[test]
fn recomputation_sees_the_same_routing() {
    let plain = RoutingVariant { seed: 3, ..RoutingVariant::default() };
    let variants = [
        plain,
        RoutingVariant { noise: RouterNoise::Gaussian, ..plain },
        RoutingVariant { kind: RoutingKind::Random, ..plain },
        RoutingVariant { kind: RoutingKind::Hash, ..plain },
        RoutingVariant { capacity_factor: Some(0.7), ..plain },
        RoutingVariant { capacity_factor: Some(1.3), overflow: Overflow::Reroute, ..plain },
    ];
    let mut losses = Vec::new();
    for name in ["qwen2_moe", "glm4_moe"] {
        let fixture = Fixture::open(name);
        for variant in variants {
            let model = varied(&fixture, None, variant);
            let (_, trainables) = fixture.with_adapter();
            let run = |recompute| -> StepGradients {
                let all = RouterLosses { importance: 0.1, z: 0.1, ..BALANCED };
                balanced_step_gradients(&model, &trainables, &[fixture.batch()], Some(4), recompute, &all)
                    .unwrap()
            };
            let (kept, again) = (run(Recompute::None), run(Recompute::Block));
            assert_eq!(kept.loss.to_bits(), again.loss.to_bits());
            for (tensor, gradient) in kept.gradients.iter() {
                let found = again.gradients.of_name(tensor).unwrap();
                assert_eq!(difference(found, gradient.unwrap()), 0.0, "{name} {variant:?}: {tensor}");
            }
            let dropped: f64 = kept.tally.spreads().iter().map(|spread| spread.dropped).sum();
            assert_eq!(
                dropped > 0.0,
                variant.capacity_factor.is_some() && variant.overflow == Overflow::Drop,
                "{variant:?}"
            );
            losses.push(kept.loss);
        }
    }
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(losses.len(), 12, "every variant computes something else");
}

/// With a capacity, gradients of dropped choices vanish; the slope of the loss says the same.
#[test]
fn gradients_are_slopes_with_noise_and_capacity() {
    let gaussian = RoutingVariant {
        noise: RouterNoise::Gaussian,
        capacity_factor: Some(0.8),
        seed: 3,
        ..RoutingVariant::default()
    };
    let learned = RoutingVariant { noise: RouterNoise::Learned, ..gaussian };
    let families = ["mixtral", "glm4_moe", "olmoe", "granitemoeshared"];
    for (name, variant) in families.into_iter().flat_map(|name| [(name, gaussian), (name, learned)]) {
        let fixture = Fixture::open(name);
        let mut model = varied(&fixture, None, variant);
        let trainables = match variant.noise {
            RouterNoise::Learned => model.make_noise_trainable().unwrap(),
            _ => model.make_routers_trainable().unwrap(),
        };
        let losses = RouterLosses { importance: 0.1, load_std: 0.1, z: 0.05, ..BALANCED };
        let total = |model: &Decoder| {
            let batches = [fixture.batch()];
            let step =
                balanced_step_gradients(model, &trainables, &batches, Some(1), Recompute::None, &losses)
                    .unwrap();
            (step.loss + step.router.total, step.gradients)
        };
        let (_, gradients) = total(&model);
        let (tensor, variable) = trainables.iter().next().unwrap();
        let gradient = gradients.of_name(tensor).unwrap();
        let start = variable.as_tensor().copy().unwrap();
        let norm = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let at = |step: f64| {
            variable.set(&(&start + (gradient * (step / f64::from(norm))).unwrap()).unwrap()).unwrap();
            total(&model).0
        };
        let slope = (at(1e-3) - at(-1e-3)) / 2e-3;
        variable.set(&start).unwrap();
        assert!((slope / f64::from(norm) - 1.0).abs() < 0.03, "{name}: slope {slope}, gradient {norm}");
    }
}

#[test]
fn a_capacity_is_reached_step_by_step() {
    let variant =
        RoutingVariant { capacity_factor: Some(1.0), capacity_warmup: 4, ..RoutingVariant::default() };
    let factors = [0, 1, 2, 3, 4, 5].map(|step| variant.capacity_factor_at(step, 8, 2).unwrap());
    assert_eq!(factors, [4.0, 3.25, 2.5, 1.75, 1.0, 1.0]);
}

#[test]
fn all_experts_active_and_one() {
    let fixture = Fixture::open("mixtral");
    let model = varied(&fixture, Some(1), RoutingVariant::default());
    let batch = fixture.batch();
    let documents = peft::ops::Documents::new(batch.offsets.clone(), batch.documents.clone());
    for routing in model.forward(&batch.tokens, &documents).unwrap().routing {
        assert_eq!(routing.chosen.len(), batch.tokens.len());
        // The only weight of a token is all of it.
        assert!(routing.weights.iter().all(|weight| *weight == 1.0));
    }
    let error = fixture.pretrained().config_mut().reroute(Some(6), RoutingVariant::default()).unwrap_err();
    assert_eq!(error.to_string(), "`routing.active` is 6, and the model has 5 experts");
}

/// Whatever the layout of the base, the merged model has it too, and computes what the adapter computes.
#[test]
fn adapters_are_merged_into_the_layout_that_is_there() {
    for name in ["mixtral", "qwen2_moe", "glm4_moe", "granitemoeshared"] {
        let fixture = Fixture::open(name);
        let folder = tempfile::tempdir().unwrap();
        let base = Pretrained::open(&fixture.folder.join("fused").to_string_lossy()).unwrap();
        let adapter = hf::Adapter::read(&fixture.folder.join("adapter"), &Device::Cpu).unwrap();
        let output = folder.path().join("merged");
        merge(&base, &[adapter], &output, None, &mut |_| true).unwrap();
        let merged = Pretrained::open(&output.to_string_lossy()).unwrap();
        let names = |of: &Pretrained| of.checkpoint().tensors().keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&merged), names(&base), "{name}");
        let found = logits(&Decoder::open(&merged, DType::F32, &Device::Cpu).unwrap(), &fixture.batch());
        let difference = difference(&found, &fixture.tensors["logits_adapter"]);
        assert!(difference <= 1e-4, "{name}: {difference}");
    }
}

pub(crate) fn sparse_place() -> Place {
    sparse_place_of("qwen2_moe", "Qwen2MoeForCausalLM")
}

/// A tiny sparse model in place of the dense one, its first layer dense.
pub(crate) fn sparse_place_of(family: &str, class: &str) -> Place {
    let place = Place::new();
    let path = place.path("model");
    let mut config: Value = serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("architectures", json!([class])),
        ("model_type", json!(family)),
        ("hidden_size", json!(32)),
        ("num_hidden_layers", json!(2)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", Value::Null),
        ("moe_intermediate_size", json!(16)),
        ("shared_expert_intermediate_size", json!(16)),
        ("intermediate_size", json!(32)),
        ("num_experts", json!(4)),
        ("n_routed_experts", json!(4)),
        ("num_experts_per_tok", json!(2)),
        ("mlp_only_layers", json!([0])),
    ] {
        config[key] = value;
    }
    let mut generator = Generator::new(11);
    let tensors: std::collections::HashMap<String, Tensor> = peft::model::family::read(&config)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let mut values = vec![0.0; shape.iter().product()];
            let mean = if name.contains("norm") { 1.0 } else { 0.0 };
            generator.normal(&mut values, mean, if mean > 0.0 { 0.0 } else { 0.15 });
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect();
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(&tensors, path.join("model.safetensors")).unwrap();
    place
}

fn lines(place: &Place, run: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_mixture_is_trained_measured_and_merged() {
    let place = sparse_place();
    let (_, told) = place.run(&[
        "finetune",
        "recipe.toml",
        "--set",
        "train.router=full",
        "--set",
        "losses.switch=0.01",
        "--set",
        "losses.z=0.001",
        "--set",
        "losses.pooled=true",
        "--set",
        "routing.noise=gaussian",
        "--set",
        "routing.capacity_factor=1.0",
    ]);
    assert!(told.contains("layer  entropy  max/mean  dead  load of each expert, %\n    1 "), "{told}");
    let steps = lines(&place, "run").into_iter().filter(|line| line.get("loss").is_some());
    let mut seen = 0;
    for line in steps {
        let terms = line["router_losses"].as_object().unwrap();
        assert_eq!(terms.keys().collect::<Vec<_>>(), ["switch", "z"]);
        assert!(terms["switch"].as_f64().unwrap() > 1.5, "two of four are active: 2 when all is even");
        let spreads = line["routing"].as_array().unwrap();
        assert_eq!((spreads.len(), &spreads[0]["layer"]), (1, &json!(1)));
        let load: f64 =
            spreads[0]["load"].as_array().unwrap().iter().map(|share| share.as_f64().unwrap()).sum();
        assert!((load - 1.0).abs() < 1e-9);
        assert!(spreads[0]["dropped"].as_f64().unwrap() > 0.0);
        seen += 1;
    }
    assert_eq!(seen, 6);
    let config: Value =
        serde_json::from_slice(&fs::read(place.path("run/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["modules_to_save"], json!(["mlp.gate"]));
    assert_eq!(config["target_parameters"], json!(["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]));
    assert_eq!(config["rank_pattern"], json!({ r".*\.gate_up_proj": 8 }));
    assert_eq!(config["lora_dropout"], json!(0));

    place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "merged"]);
    let evaluate = |arguments: &[&str]| -> f64 {
        let all = [&["eval", "perplexity", "--data", "data.jsonl", "--json", "--model"], arguments].concat();
        let result: Value = serde_json::from_str(&place.run(&all).0).unwrap();
        result["nll"].as_f64().unwrap()
    };
    let (beside, merged) = (evaluate(&["model", "--adapter", "run"]), evaluate(&["merged"]));
    assert!((beside - merged).abs() < 1e-4, "{beside} beside the weights, {merged} in them");
    assert!((beside - evaluate(&["model"])).abs() > 1e-3);
}

#[test]
fn a_mixture_goes_on_to_the_same_bits() {
    let place = sparse_place();
    let keys =
        ["--set", "train.router=full", "--set", "losses.importance=0.01", "--set", "routing.noise=learned"];
    place.run(&[&["finetune", "recipe.toml"], &keys[..]].concat());
    let whole = fs::read(place.path("run/adapter_model.safetensors")).unwrap();
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    place.run(&[&["finetune", "recipe.toml", "--resume"], &keys[..]].concat());
    assert_eq!(fs::read(place.path("run/adapter_model.safetensors")).unwrap(), whole);
}

#[test]
fn experts_and_routers_are_targets() {
    let place = sparse_place();
    let adapted = |extra: &[&str]| -> Vec<String> {
        let report = place.run(&[&["check", "recipe.toml", "--json"], extra].concat()).0;
        let report: Value = serde_json::from_str(&report).unwrap();
        report["targets"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| format!("{} {}", t["target"], t["layers"]))
            .collect()
    };
    // One dense layer; in the other four experts and a shared one.
    let all = ["\"gate_proj\" 6", "\"up_proj\" 6", "\"down_proj\" 6"];
    assert_eq!(adapted(&[]), all);
    assert_eq!(adapted(&["--set", "adapter.experts=false"])[0], "\"gate_proj\" 2");
    assert_eq!(
        adapted(&["--set", "adapter.experts=[1, 3]", "--set", "adapter.shared_experts=false"])[0],
        "\"gate_proj\" 3"
    );
    assert_eq!(adapted(&["--set", "train.router=lora"])[3], "\"mlp.gate\" 1");
    assert_eq!(adapted(&["--set", "adapter.targets=all-linear"]), ["\"all-linear\" 26"]);
}

#[test]
fn a_dense_model_has_no_experts() {
    let place = Place::new();
    for (key, value) in [
        ("losses.switch", "0.1"),
        ("train.router", "full"),
        ("routing.active", "1"),
        ("adapter.experts", "false"),
    ] {
        let output =
            place.command(&["finetune", "recipe.toml", "--set", &format!("{key}={value}")]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains(&format!("`{key}` is for mixtures of experts, and `model` is dense")),
            "{text}"
        );
    }
}

/// Experts that get less than their share are lifted, step by step, and the biases are part of the adapter.
#[test]
fn selection_biases_follow_the_load() {
    let place = sparse_place_of("glm4_moe", "Glm4MoeForCausalLM");
    let keys = ["--set", "losses.bias_update=0.125"];
    place.run(&[&["finetune", "recipe.toml"], &keys[..]].concat());
    let name = "base_model.model.model.layers.1.mlp.gate.e_score_correction_bias";
    let read = |file: &str| candle_core::safetensors::load(place.path(file), &Device::Cpu).unwrap();
    let first = values(&read("model/model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]);
    let found = values(&read("run/adapter_model.safetensors")[name]);
    let mut expected: Vec<f32> = first;
    for line in lines(&place, "run").iter().filter(|line| line.get("loss").is_some()) {
        let load: Vec<f64> =
            line["routing"][0]["load"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        expected = peft::model::balanced(&expected, &load, 0.125);
    }
    assert_eq!(found, expected);
    let whole = fs::read(place.path("run/adapter_model.safetensors")).unwrap();
    fs::remove_dir_all(place.path("run/checkpoint-6")).unwrap();
    place.run(&[&["finetune", "recipe.toml", "--resume"], &keys[..]].concat());
    assert_eq!(fs::read(place.path("run/adapter_model.safetensors")).unwrap(), whole);
    place.run(&["merge", "--model", "model", "--adapter", "run", "--output", "merged"]);
    let merged = values(&read("merged/model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]);
    let far = merged.iter().zip(&found).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(far < 1e-6, "{far}");

    let place = sparse_place();
    let output = place.command(&[&["finetune", "recipe.toml"], &keys[..]].concat()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("moves a bias of the choice of experts, and `model` has none"), "{text}");
}

/// `adapter_fused` is what PEFT 0.21.2 saves when it has loaded `adapter`.
#[test]
fn adapters_on_fused_parameters_are_those_on_experts() {
    let fixture = Fixture::open("mixtral");
    let mut model = fixture.model();
    let adapter = hf::Adapter::read(&fixture.folder.join("adapter_fused"), &Device::Cpu).unwrap();
    let adapter = adapter.for_model(model.config()).unwrap();
    let placements = adapter.placements(model.config()).unwrap();
    attach(model.linears_mut(), &placements.placements, &adapter.tensors, 0.0, 0).unwrap();
    let found = logits(&model, &fixture.batch());
    let far = difference(&found, &fixture.tensors["logits_adapter"]);
    assert!(far <= 1e-4, "{far}");

    let folder = tempfile::tempdir().unwrap();
    let tensors = adapter.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    hf::write(folder.path(), &adapter.config, &placements, tensors, &hf::Provenance::default()).unwrap();
    let again = hf::Adapter::read(folder.path(), &Device::Cpu).unwrap().for_model(model.config()).unwrap();
    assert_eq!(again.placements(model.config()).unwrap().placements, placements.placements);
}

#[test]
fn routing_is_measured_on_any_text() {
    let place = sparse_place();
    let arguments = ["eval", "routing", "--model", "model", "--data", "data.jsonl"];
    let (table, _) = place.run(&arguments);
    insta::assert_snapshot!(table, @"
    layer  entropy  max/mean  dead  load of each expert, %
        1    0.819      1.98     0   49.5   3.0  24.6  22.9
    ");
    let svg = ["--svg", "routing.svg", "--json"];
    let document = place.json(&[&arguments[..], &svg].concat());
    let layers = document["layers"].as_array().unwrap();
    assert_eq!((layers.len(), &layers[0]["layer"]), (1, &json!(1)));
    // Every token counts, not only those with a label.
    let text = fs::read_to_string(place.path("data.jsonl")).unwrap();
    assert!(document["tokens"].as_u64().unwrap() > 6 * text.lines().count() as u64);
    let picture = fs::read_to_string(place.path("routing.svg")).unwrap();
    for (expert, share) in layers[0]["load"].as_array().unwrap().iter().enumerate() {
        let title = format!("layer 1, expert {expert}: {:.2}%", 100.0 * share.as_f64().unwrap());
        assert!(picture.contains(&title), "no `{title}` in {picture}");
    }

    // A picture is drawn anew; what is none is left alone.
    place.run(&[&arguments[..], &svg].concat());
    for other in ["data.jsonl", "model/config.json"] {
        let before = fs::read(place.path(other)).unwrap();
        let told = refusal(&place, &[&arguments[..], &["--svg", other]].concat());
        assert!(
            told.starts_with(&format!("exit 2\nerror: `{other}` is there and is no SVG picture")),
            "{told}"
        );
        assert_eq!(fs::read(place.path(other)).unwrap(), before);
    }

    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "train.router=full"]);
    let (adapted, _) = place.run(&[&arguments[..], &["--adapter", "run"]].concat());
    assert_ne!(adapted, table, "a trained router chooses otherwise");

    let dense = Place::new();
    insta::assert_snapshot!(refusal(&dense, &arguments), @"
    exit 2
    error: the model is dense: it has no experts, and no router that chooses
    ");
    let perplexity = ["eval", "perplexity", "--model", "model", "--data", "data.jsonl", "--svg", "x.svg"];
    insta::assert_snapshot!(refusal(&dense, &perplexity), @"
    exit 2
    error: `--svg` is a picture of routing
    hint: `peft eval routing` draws it
    ");
}
