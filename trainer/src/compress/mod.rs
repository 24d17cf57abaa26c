//! Smaller forms of a trained model. Each is measured on the validation rows and kept only if it is still good enough.
//! The form that results is measured on the test rows once, after all choices: what is reported and what gates decide
//! by is no better than on new texts.

mod prune;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use athanor_contract::train::{CompressStep, Gate, PruneMethod, PruneSpec, QuantizeMethod};
use athanor_models::{EncoderConfig, Model, load, quantize};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::{
    TrainError,
    data::{
        Encoded,
        batches::{evaluation_batches, inputs},
    },
    evaluate::{self, Evaluation, HeldOut, How, Others},
    network::Network,
    train::named,
};

/// Training rows whose inputs Wanda looks at, and rows of one pass.
const CALIBRATION_ROWS: usize = 512;
const BATCH: usize = 32;
/// Texts answered one at a time for a latency, after as many that warm up.
const TIMED: usize = 40;

/// One form of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Form {
    /// "trained", or the step in words.
    pub name: String,
    /// Size of the weights' file.
    pub bytes: u64,
    /// Share of zeros in the encoder's matrices.
    pub sparsity: f64,
    /// Name of the main metric.
    pub metric: String,
    /// The main metric on the validation rows, by which a form is kept or left out.
    pub validation: f64,
    /// The main metric on the test rows: of the trained model and of the form that results. Absent for other forms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<f64>,
    /// Median time of one text on the CPU, milliseconds.
    pub milliseconds: f64,
    /// Why the form was left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

/// What compression needs to know and to measure with.
pub struct Compression<'a> {
    pub steps: &'a [CompressStep],
    pub gates: &'a [Gate],
    pub sources: &'a [String],
    pub train: &'a Encoded,
    pub validation: &'a Encoded,
    pub test: &'a Encoded,
    /// Other models on the validation rows, for gates that compare.
    pub others: Others<'a>,
    /// Scratch folder.
    pub work: &'a Path,
    pub beat: &'a dyn Fn(),
}

/// How the last form that was kept is written.
pub struct Compressed {
    pub forms: Vec<Form>,
    /// Absent: in FP32. Else whether inputs are rounded too.
    pub quantized: Option<bool>,
    /// On the test rows.
    pub evaluation: Evaluation,
}

impl Compression<'_> {
    /// Applies the steps to the model's weights one after the other. A step that costs too much on the validation rows
    /// is undone. `trained` is the trained model on the test rows.
    pub fn apply(&self, network: &Network, trained: Evaluation) -> Result<Compressed, TrainError> {
        if self.steps.is_empty() {
            return Ok(Compressed { forms: Vec::new(), quantized: None, evaluation: trained });
        }
        let model = network.encoder()?;
        let (mut forms, quantized) = self.choose(model)?;
        forms[0].test = Some(trained.main().1);
        let kept = forms.iter().rposition(|form| form.left_out.is_none()).unwrap_or_default();
        if kept == 0 {
            return Ok(Compressed { forms, quantized, evaluation: trained });
        }
        let evaluation = self.measured(&served(&self.written(model, quantized)?)?, self.test)?;
        let (metric, value) = evaluation.main();
        forms[kept].test = Some(value);
        tracing::info!(form = forms[kept].name, metric, value, "the compressed model on the test rows");
        Ok(Compressed { forms, quantized, evaluation })
    }

    /// The trained model and the form after each step, and how the last one that was kept is quantized. The model has
    /// the weights of that form.
    fn choose(&self, model: &Model) -> Result<(Vec<Form>, Option<bool>), TrainError> {
        let mut quantized = None;
        let folder = self.written(model, None)?;
        let packed = served(&folder)?;
        let found = self.measured(&packed, self.validation)?;
        let mut before = self.form("trained".into(), model, (&folder, &packed), &found)?;
        let mut forms = vec![before.clone()];
        for step in self.steps {
            let backup = named::copy_to_host(&model.matrices())?;
            let mut how = quantized;
            let name = match (&step.prune, &step.quantize) {
                (Some(spec), _) => {
                    prune::prune(&model.matrices(), spec, &self.norms(model, spec));
                    in_words(spec)
                }
                (None, spec) => {
                    let method = spec.unwrap_or_default().method;
                    how = Some(method == QuantizeMethod::Int8Dynamic);
                    match method {
                        QuantizeMethod::Int8Dynamic => "int8 weights and inputs".to_owned(),
                        QuantizeMethod::Int8WeightOnly => "int8 weights".to_owned(),
                    }
                }
            };
            let folder = self.written(model, how)?;
            let packed = served(&folder)?;
            let found = self.measured(&packed, self.validation)?;
            let mut form = self.form(name, model, (&folder, &packed), &found)?;
            form.left_out = self.too_much(step, &before, &form, &found);
            if form.left_out.is_some() {
                restore(&model.matrices(), &backup);
            } else {
                (quantized, before) = (how, form.clone());
            }
            tracing::info!(
                form = form.name,
                bytes = form.bytes,
                metric = form.metric,
                validation = form.validation,
                milliseconds = form.milliseconds,
                left_out = form.left_out,
                "compressed"
            );
            forms.push(form);
        }
        Ok((forms, quantized))
    }

    /// A form on some rows, computed as a server does.
    fn measured(&self, served: &Model, rows: &Encoded) -> Result<Evaluation, TrainError> {
        let how = How { group: None, device: Device::Cpu, bf16: false, generates: false };
        evaluate::evaluate(served, rows, how, || (self.beat)())
    }

    fn norms(&self, model: &Model, spec: &PruneSpec) -> std::collections::BTreeMap<String, Tensor> {
        if spec.method != PruneMethod::Wanda {
            return Default::default();
        }
        let rows: Vec<usize> = (0..self.train.len().min(CALIBRATION_ROWS)).collect();
        let lengths: Vec<usize> = rows.iter().map(|&row| self.train.ids[row].len()).collect();
        let batches = evaluation_batches(&lengths, BATCH, 0, 1);
        model.input_norms(batches.iter().map(|batch| {
            (self.beat)();
            let texts: Vec<&[u32]> = batch.iter().map(|&row| &self.train.ids[row]).collect();
            let device = model.parameters().first().map_or(Device::Cpu, |(_, tensor)| tensor.device());
            inputs(&texts, model.config().pad_token_id, device)
        }))
    }

    /// Writes the form's weights as its artifact will have them.
    fn written(&self, model: &Model, quantized: Option<bool>) -> Result<PathBuf, TrainError> {
        let folder = self.work.join("form");
        std::fs::create_dir_all(&folder).map_err(TrainError::at(&folder))?;
        let saved = match quantized {
            None => model.save(&folder),
            Some(activations) => model.save_quantized(&folder, activations),
        };
        // A local disk's trouble is not the user's error.
        saved.map_err(TrainError::other)?;
        Ok(folder)
    }

    /// What a form is worth: the model, and the same as it is written and served.
    fn form(
        &self,
        name: String,
        model: &Model,
        (folder, served): (&Path, &Model),
        found: &Evaluation,
    ) -> Result<Form, TrainError> {
        let bytes = std::fs::metadata(folder.join(load::WEIGHTS)).map_err(TrainError::other)?.len();
        let (metric, validation) = found.main();
        let milliseconds = self.latency(served);
        let sparsity = prune::sparsity(&model.matrices());
        Ok(Form { name, bytes, sparsity, metric: metric.into(), validation, test: None, milliseconds, left_out: None })
    }

    /// Median milliseconds of single texts.
    fn latency(&self, model: &Model) -> f64 {
        let mut times: Vec<f64> = (0..2 * TIMED)
            .filter_map(|index| {
                let ids = &self.validation.ids[index % self.validation.len()];
                (self.beat)();
                let begun = Instant::now();
                let (ids, mask) = inputs(&[ids], model.config().pad_token_id, Device::Cpu);
                let _ = tch::no_grad(|| model.head_states(&ids, mask.as_ref(), false));
                (index >= TIMED).then(|| begun.elapsed().as_secs_f64() * 1000.0)
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(0.0)
    }

    fn too_much(&self, step: &CompressStep, before: &Form, after: &Form, found: &Evaluation) -> Option<String> {
        let failed = evaluate::failed_gates(self.gates, self.sources, HeldOut::Validation, found, self.others);
        if let Some(gate) = failed.into_iter().next() {
            return Some(gate);
        }
        let allowed = step.maximum_loss?.get();
        let loss = before.validation - after.validation;
        (loss > allowed + 1e-9).then(|| format!("it costs {loss:.4} {}, {allowed} is allowed", after.metric))
    }
}

/// The model as a server computes with it.
fn served(folder: &Path) -> Result<Model, TrainError> {
    let how = quantize::packing(&EncoderConfig::load(folder)?);
    let mut model = Model::load_trained(folder, Device::Cpu)?;
    model.pack_for_good(how)?;
    Ok(model)
}

fn restore(matrices: &[(String, Tensor)], backup: &[(String, Tensor)]) {
    tch::no_grad(|| {
        for ((_, weight), (_, saved)) in matrices.iter().zip(backup) {
            weight.shallow_clone().copy_(saved);
        }
    });
}

fn in_words(spec: &PruneSpec) -> String {
    let method = match spec.method {
        PruneMethod::Magnitude => "magnitude",
        PruneMethod::Wanda => "Wanda",
    };
    match spec.sparsity_percent {
        Some(percent) if !spec.two_of_four => format!("{percent} % pruned by {method}"),
        _ => format!("2:4 pruned by {method}"),
    }
}
