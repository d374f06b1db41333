//! Logits, losses and every gradient against transformers and HF PEFT, for each family.

use peft::eval::evaluate;
use peft::model::Recompute;
use peft::ops::Trainables;
use peft::train::{StepGradients, step_gradients};

use crate::fixture::{ALL, Fixture, difference, logits, relative};

#[test]
fn logits_are_those_of_transformers() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let found = logits(&fixture.model(), &fixture.batch());
        let difference = difference(&found, &fixture.tensors["logits"]);
        assert!(difference <= 1e-4, "{name}: {difference}");
    }
}

#[test]
fn logits_with_an_adapter_are_those_of_peft() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let found = logits(&fixture.with_adapter().0, &fixture.batch());
        let adapted = difference(&found, &fixture.tensors["logits_adapter"]);
        assert!(adapted <= 1e-4, "{name}: {adapted}");
        assert!(difference(&found, &fixture.tensors["logits"]) > 1e-2, "{name}: the adapter does nothing");
    }
}

#[test]
fn losses_are_those_of_peft() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let batch = fixture.batch();
        assert_eq!(batch.num_supervised() as u64, fixture.golden["supervised"].as_u64().unwrap(), "{name}");
        let base = evaluate(&fixture.model(), std::slice::from_ref(&batch)).unwrap();
        assert!((base.nll() - fixture.number("base_loss")).abs() <= 1e-5, "{name}");
        let adapted = evaluate(&fixture.with_adapter().0, &batch.pieces(1)).unwrap();
        assert!((adapted.nll() - fixture.number("loss")).abs() <= 1e-5, "{name}");
    }
}

fn gradients(fixture: &Fixture, recompute: Recompute) -> (Trainables, StepGradients) {
    let (model, trainables) = fixture.with_adapter();
    let step = step_gradients(&model, &trainables, &[fixture.batch()], Some(0), recompute).unwrap();
    (trainables, step)
}

#[test]
fn every_gradient_of_an_adapter_is_that_of_peft() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let (trainables, step) = gradients(&fixture, Recompute::None);
        let golden = fixture.tensors.keys().filter(|key| key.starts_with("grad.")).count();
        assert_eq!(trainables.len(), golden, "{name}");
        for tensor in trainables.keys() {
            let found = step.gradients.of_name(tensor).unwrap_or_else(|| panic!("{name}: no {tensor}"));
            let expected = &fixture.tensors[&format!("grad.base_model.model.{tensor}")];
            // The bias of k has next to no gradient, for softmax does not see it: there rounding is all there is.
            if difference(found, expected) > 2e-6 {
                let relative = relative(found, expected);
                assert!(relative <= 1e-4, "{name}: {tensor}: {relative}");
            }
        }
    }
}

#[test]
fn every_gradient_of_full_training_is_that_of_torch() {
    let mut models = 0;
    for name in ALL {
        let fixture = Fixture::open(name);
        if !fixture.tensors.keys().any(|key| key.starts_with("full_grad.")) {
            continue;
        }
        models += 1;
        let mut model = fixture.model();
        let trainables = model.make_trainable().unwrap();
        let batch = fixture.batch();
        let step = step_gradients(&model, &trainables, &[batch], None, Recompute::None).unwrap();
        let golden = fixture.tensors.keys().filter(|key| key.starts_with("full_grad.")).count();
        assert_eq!(trainables.len(), golden, "{name}");
        for tensor in trainables.keys() {
            let expected = &fixture.tensors[&format!("full_grad.{tensor}")];
            let found = step.gradients.of_name(tensor).unwrap();
            if difference(found, expected) > 2e-6 {
                let relative = relative(found, expected);
                assert!(relative <= 1e-4, "{name}: {tensor}: {relative}");
            }
        }
    }
    assert_eq!(models, 11);
}

#[test]
fn recomputation_gives_the_same_gradients_to_the_bit() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let (_, kept) = gradients(&fixture, Recompute::None);
        let (_, again) = gradients(&fixture, Recompute::Block);
        assert_eq!(kept.loss.to_bits(), again.loss.to_bits());
        for (tensor, gradient) in kept.gradients.iter() {
            let (found, expected) = (again.gradients.of_name(tensor).unwrap(), gradient.unwrap());
            assert_eq!(difference(found, expected), 0.0, "{name}: {tensor}");
        }
    }
}

#[test]
fn a_packed_batch_gives_the_gradients_of_its_documents_alone() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let (model, trainables) = fixture.with_adapter();
        let packed = fixture.batch();
        let alone = packed.pieces(1);
        assert_eq!(alone.len(), 3);
        let step =
            |batches: &[_]| step_gradients(&model, &trainables, batches, None, Recompute::None).unwrap();
        let (packed, alone) = (step(std::slice::from_ref(&packed)), step(&alone));
        assert!((packed.loss - alone.loss).abs() <= 1e-6, "{name}");
        for (tensor, gradient) in packed.gradients.iter() {
            let (found, expected) = (alone.gradients.of_name(tensor).unwrap(), gradient.unwrap());
            let relative = relative(found, expected);
            assert!(relative <= 1e-5 || difference(found, expected) <= 2e-6, "{name}: {tensor}: {relative}");
        }
    }
}
