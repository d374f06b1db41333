//! What holds of every mixture, whatever its weights; and mixtures and adapters that contradict themselves.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft::adapter::{Exclude, attach, hf};
use peft::model::config::{Overflow, RoutingVariant};
use peft::model::{Decoder, Pretrained, Recompute, RouterLosses};
use peft::train::{StepGradients, balanced_step_gradients};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fixture::{Fixture, SPARSE, difference, logits, values};
use crate::moe::{sparse_place, sparse_place_of};
use crate::place::{Place, assert_same, refusal, tree};

/// The same mixture with its experts in another order: expert `e` becomes `order[e]`, and the rows of the router with it.
fn reordered(fixture: &Fixture, order: &[usize], folder: &Path) -> Decoder {
    let base = fixture.pretrained();
    let read = |name: &str| base.read(name, DType::F32, &Device::Cpu).unwrap();
    let mut tensors: HashMap<String, Tensor> =
        base.config().tensors().into_iter().map(|(name, _)| (name.clone(), read(&name))).collect();
    for (layer, moe) in base.config().sparse_layers() {
        for projection in 0..3 {
            for (expert, to) in order.iter().enumerate() {
                let path = |expert| format!("{}.weight", moe.expert_path(layer, expert, projection));
                tensors.insert(path(*to), read(&path(expert)));
            }
        }
        let mut rows = vec![0u32; order.len()];
        order.iter().zip(0..).for_each(|(to, expert)| rows[*to] = expert);
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        let router = format!("{}.weight", moe.router_path(layer));
        for name in [router, moe.selection_bias_path(layer)] {
            if let Some(values) = tensors.get_mut(&name) {
                *values = values.index_select(&rows, 0).unwrap();
            }
        }
    }
    fs::copy(fixture.folder.join("config.json"), folder.join("config.json")).unwrap();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    let reordered = Pretrained::open(&folder.to_string_lossy()).unwrap();
    Decoder::open(&reordered, DType::F32, &Device::Cpu).unwrap()
}

fn step(fixture: &Fixture, variant: RoutingVariant) -> StepGradients {
    let mut pretrained = fixture.pretrained();
    pretrained.config_mut().reroute(None, variant).unwrap();
    let mut model = Decoder::open(&pretrained, DType::F32, &Device::Cpu).unwrap();
    let adapter = hf::Adapter::read(&fixture.folder.join("adapter"), &Device::Cpu).unwrap();
    let placements = adapter.placements(model.config()).unwrap().placements;
    let trainables = attach(model.linears_mut(), &placements, &adapter.tensors, 0.2, 5).unwrap();
    let none = RouterLosses::default();
    balanced_step_gradients(&model, &trainables, &[fixture.batch()], Some(4), Recompute::None, &none).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_order_of_experts_means_nothing(
        family in proptest::sample::select(&SPARSE[..]),
        order in Just((0..12).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        let fixture = Fixture::open(family);
        let experts = fixture.pretrained().config().sparse_layers().map(|(_, moe)| moe.experts).max().unwrap();
        let order: Vec<usize> = order.into_iter().filter(|expert| *expert < experts).collect();
        let folder = tempfile::tempdir().unwrap();
        let model = reordered(&fixture, &order, folder.path());
        let far = difference(&logits(&model, &fixture.batch()), &logits(&fixture.model(), &fixture.batch()));
        prop_assert!(far <= 1e-5, "{family} {order:?}: {far}");
    }

    /// Room for every token is no limit: the same bits as without one.
    #[test]
    fn enough_capacity_is_no_capacity(
        family in proptest::sample::select(&SPARSE[..]),
        spare in 1.0..9.0f64,
        overflow in prop_oneof![Just(Overflow::Drop), Just(Overflow::Reroute)],
    ) {
        let fixture = Fixture::open(family);
        let config = fixture.pretrained();
        let (_, moe) = config.config().sparse_layers().next().unwrap();
        let enough = spare * moe.experts as f64 / moe.active as f64;
        let limited = step(&fixture, RoutingVariant { capacity_factor: Some(enough), overflow, ..RoutingVariant::default() });
        let free = step(&fixture, RoutingVariant::default());
        prop_assert_eq!(limited.loss.to_bits(), free.loss.to_bits());
        for (name, gradient) in free.gradients.iter() {
            prop_assert_eq!(difference(limited.gradients.of_name(name).unwrap(), gradient.unwrap()), 0.0);
        }
    }
}

/// With a router of zeros all experts are equally good: the first are taken, and the others have no gradient, a number all
/// the same.
#[test]
fn equal_rows_tie_to_the_first_and_idle_experts_learn_nothing() {
    for family in SPARSE {
        let fixture = Fixture::open(family);
        let (mut model, trainables) = fixture.with_adapter();
        let base = fixture.pretrained();
        let routers =
            base.config().tensors().into_iter().filter(|(name, _)| base.config().is_held_in_f32(name));
        let zeros =
            routers.map(|(name, shape)| (name, Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()));
        model.set_routers(&zeros.collect()).unwrap();
        let batch = fixture.batch();
        let documents = peft::ops::Documents::new(batch.offsets.clone(), batch.documents.clone());
        for routing in model.forward(&batch.tokens, &documents).unwrap().routing {
            let first: Vec<u32> = (0..routing.active as u32).collect();
            assert!(routing.chosen.chunks(routing.active).all(|chosen| chosen == first), "{family}");
        }
        let none = RouterLosses::default();
        let step =
            balanced_step_gradients(&model, &trainables, &[batch], None, Recompute::None, &none).unwrap();
        let (mut idle, mut busy) = (0, 0);
        for (layer, moe) in base.config().sparse_layers() {
            for expert in 0..moe.experts {
                let path = moe.expert_path(layer, expert, 1);
                let Some(gradient) = step.gradients.of_name(&format!("{path}.lora_B.weight")) else {
                    continue;
                };
                let largest = values(gradient).iter().fold(0.0f32, |most, x| most.max(x.abs()));
                assert!(largest.is_finite());
                assert_eq!(largest == 0.0, expert >= moe.active, "{family}: {path}: {largest}");
                if largest == 0.0 { idle += 1 } else { busy += 1 }
            }
        }
        assert!(idle > 0 && busy > 0, "{family}: {idle} idle, {busy} busy");
    }
}

/// What the program says of a request that fails; it leaves the folder as it is.
fn refused(place: &Place, arguments: &[&str]) -> String {
    let before = tree(&place.path("."));
    let text = refusal(place, arguments);
    assert_same(&tree(&place.path(".")), &before);
    text
}

fn edit(place: &Place, key: &str, value: Value) {
    let path = place.path("model/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(path, config.to_string()).unwrap();
}

fn edit_tensors(place: &Place, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = place.path("model/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn a_mixture_that_contradicts_itself_is_refused() {
    let finetune = |place: &Place| refused(place, &["finetune", "recipe.toml"]);
    let place = sparse_place();
    edit(&place, "num_experts_per_tok", json!(5));
    insta::assert_snapshot!(finetune(&place), @"
    exit 1
    error: model/config.json: `num_experts_per_tok` must be at most the 4 experts there are, found 5
    ");
    edit(&place, "num_experts_per_tok", json!(0));
    insta::assert_snapshot!(finetune(&place), @"
    exit 1
    error: model/config.json: `num_experts_per_tok` must be a positive integer, found `0`
    ");
    // More experts than the weights have.
    edit(&place, "num_experts_per_tok", json!(2));
    edit(&place, "num_experts", json!(6));
    insta::assert_snapshot!(finetune(&place), @"
    exit 1
    error: model: 6 tensors are missing: `model.layers.1.mlp.experts.4.gate_proj.weight`, `model.layers.1.mlp.experts.4.up_proj.weight`, `model.layers.1.mlp.experts.4.down_proj.weight`, `model.layers.1.mlp.experts.5.gate_proj.weight`, `model.layers.1.mlp.experts.5.up_proj.weight`, `model.layers.1.mlp.experts.5.down_proj.weight`; 1 tensor is of another shape than the configuration says: `model.layers.1.mlp.gate.weight` should be [6, 32] and is [4, 32]
    hint: the weights and the configuration are of different models
    ");
    // Fewer: weights that nobody would use.
    edit(&place, "num_experts", json!(3));
    insta::assert_snapshot!(finetune(&place), @"
    exit 1
    error: model: 1 tensor is of another shape than the configuration says: `model.layers.1.mlp.gate.weight` should be [3, 32] and is [4, 32]; 3 tensors are unknown to the configuration: `model.layers.1.mlp.experts.3.down_proj.weight`, `model.layers.1.mlp.experts.3.gate_proj.weight`, `model.layers.1.mlp.experts.3.up_proj.weight`
    hint: the weights and the configuration are of different models
    ");

    let place = sparse_place();
    edit_tensors(&place, |tensors| {
        tensors.remove("model.layers.1.mlp.experts.2.up_proj.weight").unwrap();
    });
    insta::assert_snapshot!(finetune(&place), @"
    exit 1
    error: model: 1 tensor is missing: `model.layers.1.mlp.experts.2.up_proj.weight`
    hint: the weights and the configuration are of different models
    ");

    let place = sparse_place();
    edit_tensors(&place, |tensors| {
        let router = tensors.get_mut("model.layers.1.mlp.gate.weight").unwrap();
        *router = router.t().unwrap().contiguous().unwrap();
    });
    insta::assert_snapshot!(finetune(&place), @"
    exit 1
    error: model: 1 tensor is of another shape than the configuration says: `model.layers.1.mlp.gate.weight` should be [4, 32] and is [32, 4]
    hint: the weights and the configuration are of different models
    ");
}

#[test]
fn an_adapter_for_other_experts_is_refused() {
    for router in ["frozen", "full"] {
        let place = sparse_place_of("qwen2_moe", "Qwen2MoeForCausalLM");
        let router = format!("train.router={router}");
        place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", &router]);
        // The same model with a fifth expert.
        edit(&place, "num_experts", json!(5));
        edit_tensors(&place, |tensors| {
            for name in ["gate_proj", "up_proj", "down_proj"] {
                let of = |expert: usize| format!("model.layers.1.mlp.experts.{expert}.{name}.weight");
                tensors.insert(of(4), tensors[&of(3)].clone());
            }
            let router = tensors.get_mut("model.layers.1.mlp.gate.weight").unwrap();
            *router = Tensor::cat(&[&*router, &router.narrow(0, 0, 1).unwrap()], 0).unwrap();
        });
        let merge = ["merge", "--model", "model", "--adapter", "run", "--output", "merged"];
        let text = refused(&place, &merge);
        assert!(text.contains("`model.layers.1.mlp.experts.4.down_proj.lora_A.weight` is missing"), "{text}");
        assert_eq!(text.contains("has shape [4, 32], expected [5, 32]"), router.ends_with("full"), "{text}");
    }
}

/// The tensors of a fixture's adapter on fused parameters, `(A [experts, rank, in], B [experts, out, rank])` by module.
fn fused_pairs(folder: &Path, experts: usize) -> HashMap<String, (Tensor, Tensor)> {
    let tensors =
        candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let mut pairs = HashMap::new();
    for (name, a) in tensors.iter().filter(|(name, _)| name.contains(".experts.")) {
        let Some(module) = name.strip_suffix(".lora_A.weight") else { continue };
        let b = &tensors[&format!("{module}.lora_B.weight")];
        let rank = a.dims()[0] / experts;
        let a = a.reshape((experts, rank, a.dims()[1])).unwrap();
        let b = b.reshape((b.dims()[0], rank, experts)).unwrap().permute((2, 0, 1)).unwrap();
        pairs.insert(module.to_string(), (a, b.contiguous().unwrap()));
    }
    assert!(!pairs.is_empty());
    pairs
}

/// Writes an adapter whose tensors on experts are `of` these pairs, and the others the fixture's.
fn rewritten(
    fixture: &Fixture,
    folder: &Path,
    of: impl Fn(&str, &Tensor, &Tensor) -> [(String, Tensor); 2],
    change: impl FnOnce(&mut Value),
) -> peft::Result<hf::Adapter> {
    let from = fixture.folder.join("adapter_fused");
    let mut tensors =
        candle_core::safetensors::load(from.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    tensors.retain(|name, _| !name.contains(".experts."));
    for (module, (a, b)) in fused_pairs(&from, 5) {
        tensors.extend(of(&module, &a, &b));
    }
    candle_core::safetensors::save(&tensors, folder.join("adapter_model.safetensors")).unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(from.join("adapter_config.json")).unwrap()).unwrap();
    change(&mut config);
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    hf::Adapter::read(folder, &Device::Cpu)?.for_model(fixture.model().config())
}

/// PEFT before 0.19.1 took the outputs of a parameter for its inputs; shapes tell.
#[test]
fn adapters_of_older_peft_are_read_by_their_shapes() {
    let fixture = Fixture::open("mixtral");
    let config = fixture.pretrained();
    let expected = hf::Adapter::read(&fixture.folder.join("adapter_fused"), &Device::Cpu).unwrap();
    let expected = expected.for_model(config.config()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let swapped = |module: &str, a: &Tensor, b: &Tensor| {
        let [experts, rank, inputs] = a.dims() else { panic!("three dimensions") };
        let old_a = b.permute((0, 2, 1)).unwrap().reshape((experts * rank, b.dims()[1])).unwrap();
        let old_b = a.permute((2, 1, 0)).unwrap().reshape((*inputs, rank * experts)).unwrap();
        [(format!("{module}.lora_A.weight"), old_a), (format!("{module}.lora_B.weight"), old_b)]
    };
    let found =
        rewritten(&fixture, folder.path(), swapped, |config| config["peft_version"] = json!("0.18.1"));
    let found = found.unwrap();
    assert_eq!(found.tensors.keys().collect::<Vec<_>>(), expected.tensors.keys().collect::<Vec<_>>());
    for (name, tensor) in &expected.tensors {
        // Gate and up share what was a B, so that it is their A.
        assert_eq!(difference(&found.tensors[name], tensor), 0.0, "{name}");
    }
    assert_eq!(found.placements(config.config()).unwrap(), expected.placements(config.config()).unwrap());
}

#[test]
fn packed_adapters_are_those_on_experts() {
    let fixture = Fixture::open("mixtral");
    let expected = hf::Adapter::read(&fixture.folder.join("adapter_fused"), &Device::Cpu).unwrap();
    let expected = expected.for_model(fixture.pretrained().config()).unwrap();
    for (a_name, b_name) in [("lora_A", "lora_B"), ("lora_A.weight", "lora_B.weight")] {
        let folder = tempfile::tempdir().unwrap();
        let packed = |module: &str, a: &Tensor, b: &Tensor| {
            let path = match module.strip_suffix(".base_layer") {
                Some(path) => format!("{path}.gate_up_proj"),
                None => format!("{module}.down_proj"),
            };
            [(format!("{path}.{a_name}"), a.clone()), (format!("{path}.{b_name}"), b.clone())]
        };
        let found = rewritten(&fixture, folder.path(), packed, |config| {
            config["target_parameters"] = Value::Null;
        });
        let found = found.unwrap();
        assert_eq!(found.tensors.len(), expected.tensors.len());
        for (name, tensor) in &expected.tensors {
            assert_eq!(difference(&found.tensors[name], tensor), 0.0, "{name}");
        }
        // One expert less than the model has.
        let short = |module: &str, a: &Tensor, b: &Tensor| {
            let cut = |tensor: &Tensor| tensor.narrow(0, 0, 4).unwrap().contiguous().unwrap();
            packed(module, &cut(a), &cut(b))
        };
        let error = rewritten(&fixture, folder.path(), short, |_| ()).unwrap_err().to_string();
        assert!(error.contains(", rank, "), "{error}");
    }
}

/// `gate_up_proj` has as many outputs as inputs here: only the version of PEFT says which of them A goes with.
#[test]
fn adapters_that_could_be_read_in_two_ways_are_refused() {
    let place = sparse_place();
    let model = Pretrained::open(place.path("model").to_str().unwrap()).unwrap();
    let folder = place.path("adapter");
    fs::create_dir(&folder).unwrap();
    let values = |shape: (usize, usize)| {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|i| (i as f32).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let module = "base_model.model.model.layers.1.mlp.experts";
    let tensors = HashMap::from([
        (format!("{module}.lora_A.weight"), values((8, 32))),
        (format!("{module}.lora_B.weight"), values((32, 8))),
    ]);
    candle_core::safetensors::save(&tensors, folder.join("adapter_model.safetensors")).unwrap();
    let read = |version: Value| {
        let config = json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": version,
        });
        fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
        hf::Adapter::read(&folder, &Device::Cpu)?.for_model(model.config())
    };
    let a = |version: &str| {
        let adapter = read(json!(version)).unwrap();
        adapter.placements(model.config()).unwrap();
        adapter.tensors["model.layers.1.mlp.experts.0.up_proj.lora_A.weight"].clone()
    };
    assert_eq!(difference(&a("0.19.1"), &a("0.21.2")), 0.0);
    assert_eq!(difference(&a("0.17.0"), &a("0.19.0")), 0.0);
    assert!(difference(&a("0.19.1"), &a("0.19.0")) > 0.1);
    let text = read(Value::Null).unwrap_err();
    insta::assert_snapshot!(text.to_string().replace(folder.to_str().unwrap(), "adapter"), @"adapter: tensor `model.layers.1.mlp.experts.lora_A.weight`: `gate_up_proj` has as many outputs as inputs, and no `peft_version` says which of them A goes with");
}

/// PEFT translates no adapter on single experts of Granite: what it is to load is written on all of them together.
#[test]
fn adapters_of_granite_are_written_as_peft_holds_them() {
    for (family, left_out) in
        [("granitemoe", None), ("granitemoeshared", None), ("granitemoeshared", Some("experts.1."))]
    {
        let fixture = Fixture::open(family);
        let mut adapter = hf::Adapter::read(&fixture.folder.join("adapter"), &Device::Cpu).unwrap();
        let base = fixture.pretrained();
        if let Some(part) = left_out {
            adapter.tensors.retain(|name, _| !name.contains(part));
            adapter.config.exclude = Exclude::Pattern(r".*\.experts\.1\..*".to_string());
        }
        let with = |adapter: &hf::Adapter| {
            let mut model = fixture.model();
            let placements = adapter.placements(model.config()).unwrap().placements;
            attach(model.linears_mut(), &placements, &adapter.tensors, 0.0, 0).unwrap();
            logits(&model, &fixture.batch())
        };
        let placements = adapter.placements(base.config()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let tensors = adapter.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let provenance = hf::Provenance::default();
        hf::write_for_peft(folder.path(), &adapter.config, &placements, tensors, &provenance).unwrap();
        let config: Value =
            serde_json::from_slice(&fs::read(folder.path().join("adapter_config.json")).unwrap()).unwrap();
        let parameters = config["target_parameters"].as_array().unwrap();
        assert!(
            parameters.contains(&json!("model.layers.0.block_sparse_moe.experts.gate_up_proj")),
            "{config}"
        );
        let again = hf::Adapter::read(folder.path(), &Device::Cpu).unwrap().for_model(base.config()).unwrap();
        assert!(again.tensors.keys().all(|name| !name.contains("linear.lora")));
        for (name, tensor) in &adapter.tensors {
            assert_eq!(again.tensors[name].dims(), tensor.dims(), "{family} {left_out:?}: {name}");
        }
        let far = difference(&with(&again), &with(&adapter));
        assert!(far <= 1e-5, "{family} {left_out:?}: {far}");
    }
}
