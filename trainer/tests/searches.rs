//! TPE and ASHA on a laptop: trials as processes of the real binary, on MiniLM's first layer and a few real rows.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use athanor_contract::train::TrainResult;
use place::{Place, report};
use serde_json::{Value, json};

fn spec(place: &Place, algorithm: &str, steps: u32) -> Value {
    let mut spec = json!({
        "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"fresh": {"layers": 1, "hiddenSize": 32, "attentionHeads": 2, "intermediateSize": 64}}},
        "hyperparameters": {
            "maxSteps": steps, "batchSize": 8, "maxSequenceLength": 16,
            "search": {
                "algorithm": algorithm, "maxTrials": 4,
                "parameters": [
                    {"name": "learningRate", "range": {"min": 1e-5, "max": 1e-3, "scale": "Log"}},
                    {"name": "weightDecay", "range": {"min": 0.0, "max": 0.1}},
                ],
            },
        },
    });
    if algorithm == "ASHA" {
        spec["hyperparameters"]["search"]["asha"] = json!({"reductionFactor": 2, "minimumSteps": steps / 2});
    }
    spec
}

fn log(place: &Place, out: &str) -> String {
    std::fs::read_to_string(place.folder.path().join(out).join("log")).unwrap_or_default()
}

/// Of each time that a trial was told: its name, values and metric.
fn told(place: &Place, out: &str) -> Vec<[String; 3]> {
    let log = log(place, out);
    let lines = log.lines().filter(|line| line.contains("a trial is done"));
    lines
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            ["trial", "values", "value"].map(|name| match &line["fields"][name] {
                Value::Null => line[name].to_string(),
                value => value.to_string(),
            })
        })
        .collect()
}

/// Trainings that took a step: of trials, and of the job.
fn trainings(place: &Place, out: &str) -> usize {
    log(place, out).matches("\"milestone\":\"firstStep\"").count()
}

/// Artifacts of trials and of the job, and when they were finished.
fn artifacts(place: &Place, out: &str) -> Vec<(PathBuf, SystemTime)> {
    let found = place.find(out, "/artifact/manifest.json").into_iter();
    found.map(|path| (path.clone(), std::fs::metadata(path).unwrap().modified().unwrap())).collect()
}

/// Kills the search, and with it the trial that runs, once so many trials are done.
fn kill_after(place: &Place, out: &str, spec: &Value, trials: usize) {
    let mut child = place.start(out, spec);
    let deadline = Instant::now() + Duration::from_secs(120);
    while told(place, out).len() < trials {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{}", log(place, out));
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A search that is killed and started again ends as one that ran through, and trains nothing twice that was finished.
/// Also returns the folder of the search that ran through.
fn goes_on_as_if_nothing_had_been(place: &Place, algorithm: &str, spec: &Value, at_least: usize) -> String {
    let [whole, parts] = ["whole", "parts"].map(|name| format!("{algorithm}-{name}"));
    let child = place.start(&whole, spec);
    place.finish(&whole, child, 0);
    let told_whole = told(place, &whole);
    assert_eq!(trainings(place, &whole), told_whole.len() + 1, "trials and the job: {}", log(place, &whole));

    kill_after(place, &parts, spec, 2);
    let before = artifacts(place, &parts);
    assert!(before.len() >= 2 && told(place, &parts).len() < at_least, "the kill came too late to prove anything");
    let done = told(place, &parts).len();
    let child = place.start(&parts, spec);
    place.finish(&parts, child, 0);
    assert_eq!(told(place, &parts)[done..], told_whole, "told again, and then as it would have been");
    assert!(!log(place, &parts).contains("a trial failed"), "{}", log(place, &parts));
    let after = artifacts(place, &parts);
    assert!(before.iter().all(|one| after.contains(one)), "finished trials were not trained again");
    // One more at most than of a search that ran through: the trial that was killed.
    assert!(trainings(place, &parts) <= told_whole.len() + 2, "{}", log(place, &parts));
    assert_eq!(place.summary(&whole).model_digest, place.summary(&parts).model_digest);
    for out in [&whole, &parts] {
        let report = Path::new(place.summary(out).artifact.strip_prefix("file://").unwrap()).join("report.json");
        let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
        let trials = report["trials"].as_array().unwrap();
        assert_eq!((trials.len(), trials.iter().filter(|trial| trial["best"] == true).count()), (4, 1));
    }
    whole
}

#[test]
fn tpe_goes_by_the_trials_before_and_survives_a_kill() {
    let place = Place::new(0.1);
    let whole = goes_on_as_if_nothing_had_been(&place, "TPE", &spec(&place, "TPE", 3), 4);
    let told = told(&place, &whole);
    assert_eq!(told.len(), 4);
    let mut values: Vec<&String> = told.iter().map(|[_, values, _]| values).collect();
    values.sort();
    values.dedup();
    assert_eq!(values.len(), 4, "no values are tried twice");
    let random = place.start("random", &spec(&place, "Random", 3));
    place.finish("random", random, 0);
    let random = self::told(&place, "random");
    assert_eq!(told[..2], random[..2], "begins with random trials");
    assert_ne!(told[2..], random[2..], "and goes by their results");
}

#[test]
fn asha_ends_the_worse_half_early_and_survives_a_kill() {
    let place = Place::new(0.1);
    let spec = spec(&place, "ASHA", 8);
    let whole = goes_on_as_if_nothing_had_been(&place, "ASHA", &spec, 6);
    let told = told(&place, &whole);
    let count = |name: &String| told.iter().filter(|[other, _, _]| other == name).count();
    let mut names: Vec<&String> = told.iter().map(|[name, _, _]| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 4);
    let promoted = names.iter().filter(|name| count(name) == 2).count();
    assert!((1..=3).contains(&promoted), "some end early: {told:?}");
    // Trained with the budget of their rung.
    let of_steps = |steps: u64| {
        let losses = place.find(&whole, "/report.json").into_iter().filter(|path| {
            let report: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            report["history"]["points"].as_array().unwrap().last().unwrap()["step"] == steps
        });
        losses.count()
    };
    assert_eq!((of_steps(4), of_steps(8)), (4, promoted + 1), "the job has the whole budget too");
    // The best is one that came to the end.
    let log = log(&place, &whole);
    let best = log.lines().find(|line| line.contains("the best of 4 trials")).unwrap();
    let line: Value = serde_json::from_str(best).unwrap();
    let name =
        if line["fields"]["trial"].is_null() { line["trial"].to_string() } else { line["fields"]["trial"].to_string() };
    assert_eq!(count(&name), 2, "{best}");
}

#[test]
fn a_search_on_a_laptop_trains_with_the_best_and_goes_on_where_it_was() {
    let place = Place::new(0.1);
    let spec = json!({
        "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
        "hyperparameters": {
            "maxSteps": 3, "batchSize": 8, "maxSequenceLength": 16,
            "search": {
                "algorithm": "Random", "maxTrials": 3, "parallelism": 2,
                // Not the score that chooses a trial's weights.
                "objective": {"metric": "MacroF1"},
                "parameters": [{"name": "learningRate", "range": {"min": 1e-5, "max": 1e-3, "scale": "Log"}}],
            },
        },
    });
    let child = place.start("search", &spec);
    place.finish("search", child, 0);
    let log = || std::fs::read_to_string(place.folder.path().join("search/log")).unwrap();
    assert_eq!(log().matches("a trial is done").count(), 3, "{}", log());
    let best = log().lines().find(|line| line.contains("the best of 3 trials")).unwrap().to_owned();
    let summary = place.summary("search");
    let found = report(&summary.artifact);
    let rate = found["hyperparameters"]["learningRate"].as_f64().unwrap();
    assert!(best.contains(&format!("learningRate={rate}")), "{best}: {rate}");
    let steps = || log().matches("\"milestone\":\"firstStep\"").count();
    assert_eq!(steps(), 4, "three trials and the job");

    let child = place.start("search", &spec);
    place.finish("search", child, 0);
    assert_eq!(log().matches("a trial is done").count(), 6, "told again");
    assert!(steps() <= 5, "no trial was trained again");

    // Other rows behind the same URI: the scores of before say nothing about them.
    let rows = place.folder.path().join("rows.jsonl");
    let text = std::fs::read_to_string(&rows).unwrap();
    let fewer: Vec<&str> = text.lines().skip(1).collect();
    std::fs::write(&rows, fewer.join("\n") + "\n").unwrap();
    let before = steps();
    let child = place.start("search", &spec);
    place.finish("search", child, 0);
    assert_eq!(log().matches("the data have changed since the trial").count(), 3, "{}", log());
    assert_eq!(steps(), before + 4, "three trials and the job");
    std::fs::write(&rows, text).unwrap();

    let mut wrong = spec.clone();
    wrong["hyperparameters"]["search"]["parameters"][0]["range"]["min"] = json!(2.0);
    let child = place.start("wrong", &wrong);
    place.finish("wrong", child, 3);

    let mut missing = spec.clone();
    missing["model"]["from"] = json!(place.uri("nowhere"));
    let child = place.start("missing", &missing);
    place.finish("missing", child, 3);
    let TrainResult::Failed { message } = place.result("missing") else { panic!("{:?}", place.result("missing")) };
    assert!(message.starts_with("hyperparameters.search: trial ") && message.contains("nowhere"), "{message}");
}
