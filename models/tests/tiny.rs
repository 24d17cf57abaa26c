//! Tiny random BERT and MPNet against transformers (`trainer/tests/golden/make.py`), fp32, rtol = atol = 1e-4: all hidden states,
//! outputs and gradients, with padding.

use std::{collections::BTreeMap, path::PathBuf};

use athanor_models::{
    Initializer, Model, Options, Packing, Shape, Task,
    config::{HeadActivation, HiddenHead},
    tokenizer::pad,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<u32>>,
    /// Of each layer the second token's state of each row.
    hidden: Vec<Vec<Vec<f32>>>,
    logits: Vec<Vec<f32>>,
    loss: f64,
    /// The norm, and some elements.
    gradients: BTreeMap<String, Vec<f64>>,
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden").join(name)
}

fn assert_close(what: &str, ours: &[f64], theirs: &[f64]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (a, b) in ours.iter().zip(theirs) {
        // FP32, products summed in another order; the project's bound for parity.
        assert!((a - b).abs() <= 1e-4 + 1e-4 * b.abs(), "{what}: {a} is not {b}");
    }
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).reshape([-1])).unwrap()
}

#[test]
fn states_outputs_and_gradients_are_those_of_transformers() {
    let golden = std::fs::read_to_string(folder("forward.json")).unwrap();
    let golden: BTreeMap<String, Golden> = serde_json::from_str(&golden).unwrap();
    assert_eq!(golden.len(), 4);
    // The CUDA build measures the GPU.
    let device = Device::cuda_if_available();
    for (name, golden) in golden {
        let mut model = Model::load_trained(&folder(&name), device).unwrap();
        assert_eq!(model.fresh_layers(), [""; 0], "{name}");
        model.set_trainable();
        let rows: Vec<&[u32]> = golden.rows.iter().map(Vec::as_slice).collect();
        let (ids, mask) = pad(&rows, model.config().pad_token_id);
        let (ids, mask) = (ids.to_device(device), mask.to_device(device));
        let states = model.hidden_states(&ids, Some(&mask), false, true);
        assert_eq!(states.len(), golden.hidden.len(), "{name}");
        for (layer, (ours, theirs)) in states.iter().zip(&golden.hidden).enumerate() {
            let theirs: Vec<f64> = theirs.iter().flatten().map(|&value| f64::from(value)).collect();
            assert_close(&format!("{name}, state {layer}"), &numbers(&ours.select(1, 1)), &theirs);
        }
        let last = &states[states.len() - 1];
        let theirs: Vec<f64> = golden.logits.iter().flatten().map(|&value| f64::from(value)).collect();
        let loss = if *model.task() == Task::MaskedLanguageModel {
            assert_close(&name, &numbers(&model.vocabulary_logits(&last.select(1, 1))), &theirs);
            let every = model.vocabulary_logits(&last.reshape([-1, model.config().hidden_size]));
            let is_asked = mask.eq(1).logical_and(&ids.remainder(3).eq(0));
            let labels = ids.masked_fill(&is_asked.logical_not(), -100);
            every.cross_entropy_loss::<Tensor>(&labels.reshape([-1]), None, tch::Reduction::Mean, -100, 0.0)
        } else {
            assert_close(&name, &numbers(&model.outputs(last, false)), &theirs);
            // Of the last layer only what the head reads.
            let logits = model.forward(&ids, Some(&mask), false);
            assert_close(&name, &numbers(&logits), &theirs);
            if device == Device::Cpu {
                model.pack(Packing::Float).unwrap();
            }
            let packed = tch::no_grad(|| model.forward(&ids, Some(&mask), false));
            assert_close(&format!("{name}, packed"), &numbers(&packed), &theirs);
            let whole = tch::no_grad(|| model.last_hidden_state(&ids, Some(&mask), false));
            assert_close(&format!("{name}, packed"), &numbers(&whole.select(1, 1)), &numbers(&last.select(1, 1)));
            model.unpack();
            logits.cross_entropy_for_logits(&Tensor::from_slice(&[0_i64, 1, 1]).to_device(device))
        };
        assert_close(&format!("{name}, loss"), &numbers(&loss), &[golden.loss]);
        loss.backward();
        let ours: BTreeMap<&str, &Tensor> =
            model.parameters().iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        for (parameter, theirs) in &golden.gradients {
            let gradient = ours.get(parameter.as_str()).unwrap_or_else(|| panic!("{name} has no {parameter}")).grad();
            let flat = numbers(&gradient);
            let mut found = vec![gradient.norm().double_value(&[])];
            found.extend(flat.iter().take(28).step_by(7));
            assert_close(&format!("{name}, gradient of {parameter}"), &found, theirs);
        }
        assert_eq!(ours.len(), golden.gradients.len(), "{name}: {:?}", ours.keys());
    }
}

#[test]
fn students_keep_layers_or_begin_anew() {
    let labels = vec!["a".to_owned(), "b".to_owned()];
    let task = || Task::Classification(labels.clone());
    for name in ["tiny-bert", "tiny-mpnet"] {
        let whole = Model::load(&folder(name), task(), &Options::default(), Device::Cpu).unwrap();
        let kept = Options { keep_layers: Some(vec![1]), ..Options::default() };
        let student = Model::load(&folder(name), task(), &kept, Device::Cpu).unwrap();
        assert_eq!(student.config().num_hidden_layers, 1);
        let find = |model: &Model, part: &str| {
            let found = model.parameters().iter().find(|(name, _)| name.ends_with(part));
            found.unwrap_or_else(|| panic!("no {part}")).1.shallow_clone()
        };
        let part = |layer: usize| format!("encoder.layer.{layer}.output.dense.weight");
        assert_eq!(find(&student, &part(0)), find(&whole, &part(1)), "{name}");
        // It is a model like any other: written, read, the same outputs.
        let to = tempfile::tempdir().unwrap();
        student.save(to.path()).unwrap();
        let again = Model::load_trained(to.path(), Device::Cpu).unwrap();
        let ids = Tensor::from_slice(&[0_i64, 9, 8, 2]).unsqueeze(0);
        assert_eq!(again.forward(&ids, None, false), student.forward(&ids, None, false), "{name}");

        let shape = Shape { layers: 3, hidden_size: 16, heads: 2, intermediate_size: 24 };
        let fresh = Options { fresh: Some(shape), seed: 1, ..Options::default() };
        let model = Model::load(&folder(name), task(), &fresh, Device::Cpu).unwrap();
        assert_eq!(model.last_hidden_state(&ids, None, false).size(), [1, 4, 16]);
        assert!(model.fresh_layers().len() > 10, "{:?}", model.fresh_layers());
        let same = Model::load(&folder(name), task(), &fresh, Device::Cpu).unwrap();
        assert_eq!(same.forward(&ids, None, false), model.forward(&ids, None, false));

        let error = Model::load(&folder(name), task(), &Options { keep_layers: Some(vec![2]), ..kept }, Device::Cpu);
        let error = error.err().unwrap().to_string();
        assert!(error.contains("the student keeps layer 2, but the model has 2"), "{error}");
    }
}

#[test]
fn eight_bits_are_close_and_read_back() {
    for name in ["tiny-bert", "tiny-mpnet"] {
        let model = Model::load_trained(&folder(name), Device::Cpu).unwrap();
        let ids = Tensor::from_slice(&[0_i64, 9, 8, 33, 71, 2]).unsqueeze(0);
        let exact = model.forward(&ids, None, false);
        for activations in [false, true] {
            let to = tempfile::tempdir().unwrap();
            model.save_quantized(to.path(), activations).unwrap();
            let classifier = athanor_models::Classifier::load(to.path(), Device::Cpu).unwrap();
            let found = classifier.forward(&ids, &ids.ones_like());
            // Eight bits a weight and activation, on random weights that no rounding was chosen for.
            assert!(found.allclose(&exact, 0.1, 0.15, false), "{name} {activations}: {found} {exact}");
            assert!(!found.equal(&exact));
        }
    }
}

/// A parameter of a head by its whole name.
fn parameter(model: &Model, name: &str) -> Tensor {
    let found = model.parameters().iter().find(|(other, _)| other == name);
    found.unwrap_or_else(|| panic!("no {name}")).1.shallow_clone()
}

fn labels() -> Task {
    Task::Classification(vec!["x".to_owned(), "y".to_owned(), "z".to_owned()])
}

#[test]
fn a_hidden_head_computes_what_it_says_and_reads_back() {
    let ids = Tensor::from_slice(&[0_i64, 9, 8, 33, 2]).unsqueeze(0);
    for name in ["tiny-bert", "tiny-mpnet"] {
        for activation in [HeadActivation::Tanh, HeadActivation::Gelu, HeadActivation::Relu] {
            // Weights large enough for the activations to differ.
            let options = Options {
                hidden_head: Some(HiddenHead { units: 12, activation }),
                initializer: Initializer::KaimingUniform,
                head_dropout: Some(0.5),
                ..Options::default()
            };
            let model = Model::load(&folder(name), labels(), &options, Device::Cpu).unwrap();
            let layer = |x: &Tensor, name: &str| {
                let part = |part: &str| parameter(&model, &format!("{name}.{part}"));
                x.matmul(&part("weight").tr()) + part("bias")
            };
            let mut x = model.last_hidden_state(&ids, None, false).select(1, 0);
            if name == "tiny-bert" {
                x = layer(&x, "bert.pooler.dense").tanh();
            }
            let x = layer(&x, "classifier.hidden");
            let x = match activation {
                HeadActivation::Tanh => x.tanh(),
                HeadActivation::Gelu => &x * 0.5 * ((&x / 2_f64.sqrt()).erf() + 1.0),
                HeadActivation::Relu => x.clamp_min(0.0),
            };
            let expected = numbers(&layer(&x, "classifier.output"));
            let what = format!("{name} {activation:?}");
            let exact = model.forward(&ids, None, false);
            assert_close(&what, &numbers(&exact), &expected);

            let to = tempfile::tempdir().unwrap();
            model.save(to.path()).unwrap();
            let again = Model::load_trained(to.path(), Device::Cpu).unwrap();
            assert_eq!(again.forward(&ids, None, false), exact, "{what}");
            assert_eq!(again.config().head_dropout(), 0.5, "{what}");
            // The same head is kept, another begins anew.
            let kept = Model::load(to.path(), labels(), &options, Device::Cpu).unwrap();
            assert_eq!(kept.forward(&ids, None, false), exact, "{what}");
            let other = Options { hidden_head: Some(HiddenHead { units: 13, activation }), seed: 1, ..options };
            let other = Model::load(to.path(), labels(), &other, Device::Cpu).unwrap();
            assert_eq!(parameter(&other, "classifier.hidden.weight").size(), [13, 32], "{what}");
        }
    }
}

#[test]
fn dropout_of_the_head_is_its_own() {
    let ids = Tensor::from_slice(&[0_i64, 9, 8, 33, 2]).unsqueeze(0);
    for name in ["tiny-bert", "tiny-mpnet"] {
        let outputs = |head: Option<f64>, encoder: Option<f64>, train: bool| {
            let options = Options {
                hidden_head: Some(HiddenHead { units: 64, activation: HeadActivation::Tanh }),
                head_dropout: head,
                dropout: encoder,
                ..Options::default()
            };
            let model = Model::load(&folder(name), labels(), &options, Device::Cpu).unwrap();
            let states = model.last_hidden_state(&ids, None, false);
            numbers(&model.outputs(&states, train))
        };
        let exact = outputs(None, None, false);
        assert_eq!(outputs(Some(0.5), None, false), exact, "{name}: none of it in inference");
        assert_ne!(outputs(Some(0.5), None, true), exact, "{name}");
        assert_close(name, &outputs(Some(0.0), Some(0.5), true), &exact);
        assert_ne!(outputs(None, Some(0.5), true), exact, "{name}: the encoder's where the head has none");
    }
}

#[test]
fn heads_begin_within_their_bounds() {
    for name in ["tiny-bert", "tiny-mpnet"] {
        for initializer in [Initializer::XavierUniform, Initializer::KaimingUniform, Initializer::Normal] {
            let options = Options {
                hidden_head: Some(HiddenHead { units: 256, activation: HeadActivation::Relu }),
                initializer,
                ..Options::default()
            };
            let model = Model::load(&folder(name), labels(), &options, Device::Cpu).unwrap();
            for (layer, inputs, outputs) in [("classifier.hidden", 32.0, 256.0), ("classifier.output", 256.0, 3.0)] {
                let what = format!("{name} {initializer:?} {layer}");
                let weight = numbers(&parameter(&model, &format!("{layer}.weight")));
                assert_eq!(weight.len() as f64, inputs * outputs, "{what}");
                let count = weight.len() as f64;
                let mean = weight.iter().sum::<f64>() / count;
                let deviation = (weight.iter().map(|value| value * value).sum::<f64>() / count).sqrt();
                let largest = weight.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
                let expected = match initializer {
                    Initializer::XavierUniform => (6.0 / (inputs + outputs)).sqrt() / 3_f64.sqrt(),
                    Initializer::KaimingUniform => (6.0 / inputs).sqrt() / 3_f64.sqrt(),
                    // As config.json has it.
                    _ => 0.2,
                };
                // At least 768 draws: a deviation's own error is 2.6 % and less. The mean's bound is four standard errors.
                assert!((deviation / expected - 1.0).abs() < 0.1, "{what}: {deviation} is not {expected}");
                assert!(mean.abs() < 4.0 * expected / count.sqrt(), "{what}: the mean is {mean}");
                let reach = largest / expected;
                match initializer {
                    Initializer::Normal => assert!((2.5..6.0).contains(&reach), "{what}: {reach}"),
                    _ => assert!((0.97 * 3_f64.sqrt()..1.000_01 * 3_f64.sqrt()).contains(&reach), "{what}: {reach}"),
                }
                assert!(numbers(&parameter(&model, &format!("{layer}.bias"))).iter().all(|bias| *bias == 0.0));
            }
        }
    }
}
