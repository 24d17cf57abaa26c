//! A folder in which the real binary runs on MiniLM and a few real rows.
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use athanor_contract::train::{TrainResult, TrainSummary};
use serde_json::{Value, json};

/// A folder with a model, rows, and what runs leave behind.
pub struct Place {
    pub folder: tempfile::TempDir,
}

impl Place {
    /// `dropout` replaces the model's own.
    pub fn new(dropout: f64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let variable =
            |name: &str| PathBuf::from(std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by scripts/env")));
        let (from, to) = (variable("ATHANOR_MODELS").join("minilm-l6"), folder.path().join("model"));
        std::fs::create_dir(&to).unwrap();
        for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(from.join(name), to.join(name)).unwrap();
        }
        let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        config["hidden_dropout_prob"] = json!(dropout);
        config["attention_probs_dropout_prob"] = json!(dropout);
        std::fs::write(to.join("config.json"), config.to_string()).unwrap();

        let texts = std::fs::read_to_string(variable("ATHANOR_DATA").join("sentiment/amazon.txt")).unwrap();
        let rows: String = texts
            .lines()
            .filter_map(|line| {
                let mut fields = line.splitn(3, '\t').skip(1);
                let (rating, text): (f64, _) = (fields.next()?.parse().ok()?, fields.next()?);
                let label = if rating > 0.0 { "positive" } else { "negative" };
                (!text.trim().is_empty()).then(|| format!("{}\n", json!({"text": text, "label": label})))
            })
            .take(300)
            .collect();
        std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
        Self { folder }
    }

    pub fn uri(&self, name: &str) -> String {
        format!("file://{}", self.folder.path().join(name).display())
    }

    /// Writes a job's manifest into the folder `out`.
    pub fn manifest(&self, out: &str, spec: &Value) -> PathBuf {
        let mut whole = json!({
            "model": {"from": self.uri("model"), "task": "TextClassification"},
            "data": {"sources": [{"name": "reviews", "uri": self.uri("rows.jsonl")}]},
            "output": {"to": self.uri(out)},
        });
        whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let manifest = json!({
            "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "test"}, "spec": whole,
        });
        let folder = self.folder.path().join(out);
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("job.yaml");
        std::fs::write(&file, manifest.to_string()).unwrap();
        file
    }

    /// Starts a job that writes below the folder `out`.
    pub fn start(&self, out: &str, spec: &Value) -> Child {
        self.start_by(&[], out, spec)
    }

    /// The same by another program, such as a shell, that runs what follows its arguments.
    pub fn start_by(&self, program: &[&str], out: &str, spec: &Value) -> Child {
        let file = self.manifest(out, spec);
        let folder = self.folder.path().join(out);
        let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
        let words: Vec<&str> = [program, &[env!("CARGO_BIN_EXE_athanor-trainer"), "run", "-f"]].concat();
        Command::new(words[0])
            .args(&words[1..])
            .arg(&file)
            .env("ATHANOR_LOSS_LOG", folder.join("losses"))
            .env("ATHANOR_TERMINATION_LOG", folder.join("termination"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// What `athanor-trainer check` says; its mistakes, with the exit code of a user's error.
    pub fn check(&self, out: &str, spec: &Value) -> Result<String, String> {
        let file = self.manifest(out, spec);
        let program = Command::new(env!("CARGO_BIN_EXE_athanor-trainer")).args(["check", "-f"]).arg(&file).output();
        let output = program.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.code() {
            Some(0) => Ok(text(&output.stdout)),
            code => {
                assert_eq!(code, Some(3), "{}", text(&output.stderr));
                Err(text(&output.stderr))
            }
        }
    }

    pub fn finish(&self, out: &str, child: Child, code: i32) {
        self.finish_all(out, vec![child], code);
    }

    /// Waits until processes of one job have ended, each with this exit code. The first that ends with another one fails the test at
    /// once: the others, which would wait for it, are killed.
    pub fn finish_all(&self, out: &str, mut children: Vec<Child>, code: i32) {
        while !children.is_empty() {
            let ended = children.iter_mut().position(|child| child.try_wait().unwrap().is_some());
            let Some(index) = ended else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            let status = children.swap_remove(index).wait().unwrap();
            if status.code() != Some(code) {
                for child in &mut children {
                    child.kill().unwrap();
                    child.wait().unwrap();
                }
                let log = std::fs::read_to_string(self.folder.path().join(out).join("log")).unwrap();
                panic!("{status} instead of the exit code {code}: {log}");
            }
        }
    }

    pub fn losses(&self, out: &str) -> Vec<(u64, f64)> {
        let text = std::fs::read_to_string(self.folder.path().join(out).join("losses")).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .map(|line| (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap()))
            .collect()
    }

    pub fn result(&self, out: &str) -> TrainResult {
        serde_json::from_slice(&std::fs::read(self.folder.path().join(out).join("termination")).unwrap()).unwrap()
    }

    pub fn summary(&self, out: &str) -> TrainSummary {
        match self.result(out) {
            TrainResult::Succeeded(summary) => summary,
            other => panic!("{other:?}"),
        }
    }

    /// Steps of the complete checkpoints.
    pub fn checkpoints(&self, out: &str) -> Vec<u64> {
        let mut steps = Vec::new();
        find(&self.folder.path().join(out), &mut |path| {
            if path.ends_with("manifest.json")
                && let Some(step) = path.parent().and_then(|folder| folder.file_name()?.to_str()?.strip_prefix("step-"))
            {
                steps.push(step.parse().unwrap());
            }
        });
        steps.sort_unstable();
        steps
    }

    /// Files below the folder `out` whose path has this part, sorted.
    pub fn find(&self, out: &str, part: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        find(&self.folder.path().join(out), &mut |path| {
            if path.to_string_lossy().contains(part) {
                found.push(path.to_owned());
            }
        });
        found.sort();
        found
    }

    /// Waits until the run has taken this step.
    pub fn wait_for_step(&self, out: &str, child: &mut Child, step: u64) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !self.losses(out).iter().any(|(taken, _)| *taken >= step) {
            assert!(Instant::now() < deadline, "step {step} was not reached");
            assert!(child.try_wait().unwrap().is_none(), "the run ended before step {step}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn find(folder: &Path, visit: &mut impl FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { find(&path, visit) } else { visit(&path) }
    }
}

/// The local folder of an artifact.
pub fn folder(artifact: &str) -> PathBuf {
    PathBuf::from(artifact.trim_start_matches("file://"))
}

/// The page of an artifact.
pub fn page(artifact: &str) -> String {
    std::fs::read_to_string(folder(artifact).join("report.html")).unwrap()
}

/// The report of an artifact.
pub fn report(artifact: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(artifact).join("report.json")).unwrap()).unwrap()
}

/// Rows with a number and a second text for each of the place's texts.
pub fn richer_rows(place: &Place) {
    let text = std::fs::read_to_string(place.folder.path().join("rows.jsonl")).unwrap();
    let rows: String = text
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let text = row["text"].as_str().unwrap();
            let half: Vec<&str> = text.split_whitespace().step_by(2).collect();
            format!("{}\n", json!({"text": text, "label": text.len() as f64 / 100.0, "pair": half.join(" ")}))
        })
        .collect();
    std::fs::write(place.folder.path().join("richer.jsonl"), rows).unwrap();
}
