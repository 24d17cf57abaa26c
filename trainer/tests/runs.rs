//! Whole runs of the real binary on MiniLM and a few real rows: what must hold whatever happens to processes.
//! Needs `$ATHANOR_MODELS/minilm-l6` and `$ATHANOR_DATA/sentiment` (`scripts/fetch`), seconds each.

mod place;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use athanor_contract::train::{TrainResult, TrainSummary};
use athanor_trainer::job::config::load_manifest;
use place::Place;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

#[test]
fn two_and_four_ranks_have_the_losses_of_one() {
    // Dropout draws other numbers on two ranks: it is off. 15 rows a batch do not divide evenly.
    let place = Place::new(0.0);
    let spec = |ranks: u32| {
        json!({
            "hyperparameters": {"maxSteps": 8, "batchSize": 15, "precision": "FP32", "maxSequenceLength": 32, "learningRate": 1e-4},
            "distributed": {"processesPerNode": ranks, "backend": "Gloo"},
        })
    };
    for (out, ranks) in [("one", 1), ("two", 2), ("four", 4)] {
        let child = place.start(out, &spec(ranks));
        place.finish(out, child, 0);
    }
    // As two pods, which are not started by one launcher.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let pods = ["0", "1"].map(|pod| {
        let variables = [
            "ATHANOR_NUM_NODES=2",
            &format!("ATHANOR_NODE_RANK={pod}"),
            "ATHANOR_MASTER_ADDR=127.0.0.1",
            &format!("ATHANOR_MASTER_PORT={port}"),
            "ATHANOR_POD_IP=127.0.0.1",
        ];
        place.start_by(&[&["env"], &variables[..]].concat(), "pods", &spec(1))
    });
    place.finish_all("pods", pods.into(), 0);
    let one = place.losses("one");
    for (out, ranks) in [("two", "2"), ("four", "4"), ("pods", "2")] {
        let more = place.losses(out);
        assert_eq!((one.len(), more.len()), (8, 8));
        for ((step, a), (_, b)) in std::iter::zip(&one, &more) {
            // Only the order of sums differs; it moves a loss near 0.7 by some 1e-6 in the first step.
            assert!((a - b).abs() < 2e-4, "step {step}: {a} is not {b}");
        }
        // Before any update: rounding of one forward pass alone.
        assert!((one[0].1 - more[0].1).abs() < 1e-5, "{one:?} {more:?}");
        let (one, more) = (place.summary("one"), place.summary(out));
        assert_eq!((one.data_digest, one.rows), (more.data_digest, more.rows));
        assert_eq!(more.chosen["ranks"], ranks);
    }
}

#[test]
fn a_step_in_parts_is_the_same_step() {
    let place = Place::new(0.0);
    let spec = |parts: u32, ranks: u32| {
        json!({
            "hyperparameters": {
                // RMSprop divides gradients by their size: where one is near zero, the order of sums decides its
                // direction, and a large rate makes much of it.
                "maxSteps": 6, "batchSize": 8, "precision": "FP32", "maxSequenceLength": 32, "learningRate": 1e-4,
                "accumulateSteps": parts, "optimizer": "RMSprop", "momentum": 0.5, "beta2": 0.99, "l1": 1e-5, "l2": 1e-3,
            },
            "distributed": {"processesPerNode": ranks, "backend": "Gloo"},
        })
    };
    for (out, parts, ranks) in [("whole", 1, 1), ("eight", 8, 1), ("shared", 3, 4)] {
        let child = place.start(out, &spec(parts, ranks));
        place.finish(out, child, 0);
    }
    let whole = place.losses("whole");
    for out in ["eight", "shared"] {
        assert_eq!((whole.len(), place.losses(out).len()), (6, 6));
        for ((step, a), (_, b)) in std::iter::zip(&whole, &place.losses(out)) {
            // Sums in another order, made larger by RMSprop's division.
            assert!((a - b).abs() < 2e-4, "{out}, step {step}: {a} is not {b}");
        }
    }
}

/// Which files and weights of two artifacts differ, and by how much.
fn differences(one: &TrainSummary, other: &TrainSummary) -> String {
    let folders = [one, other].map(|summary| PathBuf::from(summary.artifact.trim_start_matches("file://")));
    let files = ["config.json", "model.safetensors", "reference.json"].into_iter();
    let [first, second] = folders.each_ref();
    let is_different =
        |name: &&str| std::fs::read(first.join(name)).unwrap() != std::fs::read(second.join(name)).unwrap();
    let mut lines: Vec<String> = files.filter(is_different).map(|name| format!("{name} differs")).collect();
    let [first, second] =
        folders.map(|folder| tch::Tensor::read_safetensors(folder.join("model.safetensors")).unwrap());
    for ((name, one), (_, other)) in std::iter::zip(first, second).filter(|(one, other)| one != other) {
        let changed = one.ne_tensor(&other).to_kind(tch::Kind::Int64).sum(tch::Kind::Int64).int64_value(&[]);
        let most = (&one - &other).abs().max().double_value(&[]);
        lines.push(format!("{name}: {changed} of {} numbers differ, by up to {most:e}", one.numel()));
    }
    lines.join("\n")
}

#[test]
fn killed_stopped_and_resumed_is_uninterrupted_bit_for_bit() {
    let place = Place::new(0.1);
    let spec = json!({
        "hyperparameters": {"maxSteps": 30, "batchSize": 16, "maxSequenceLength": 32, "learningRate": 1e-4},
        "checkpoint": {"everySteps": 4},
    });
    let child = place.start("whole", &spec);
    place.finish("whole", child, 0);

    let mut child = place.start("parts", &spec);
    place.wait_for_step("parts", &mut child, 10);
    child.kill().unwrap();
    child.wait().unwrap();
    let events = || place.find("parts", "/tensorboard/events.out.tfevents");
    let [file] = events().try_into().unwrap();
    // Loss, learning rate and norm of a step are 100 bytes and more.
    assert!(std::fs::metadata(&file).unwrap().len() > 10 * 100, "curves grow with each step: {}", file.display());
    let killed_at = place.losses("parts").last().unwrap().0;
    assert!(killed_at < 30, "the kill came too late to prove anything");

    let mut child = place.start("parts", &spec);
    place.wait_for_step("parts", &mut child, killed_at + 3);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    place.finish("parts", child, 45);
    let stopped_at = place.losses("parts").last().unwrap().0;
    assert!(place.checkpoints("parts").contains(&stopped_at), "no checkpoint at the stop");
    assert!(place.checkpoints("parts").len() <= 2, "old checkpoints are deleted");

    let child = place.start("parts", &spec);
    place.finish("parts", child, 0);
    let whole: BTreeMap<u64, f64> = place.losses("whole").into_iter().collect();
    let parts = place.losses("parts");
    assert_eq!(parts.last().unwrap().0, 30);
    for (step, loss) in parts {
        assert_eq!(loss, whole[&step], "step {step}");
    }
    let (whole, parts) = (place.summary("whole"), place.summary("parts"));
    assert_eq!(whole.model_digest, parts.model_digest, "{}", differences(&whole, &parts));
    assert_eq!(whole.metrics, parts.metrics);
    // The report's curves have no hole either.
    let read = |summary: &TrainSummary, name: &str| {
        std::fs::read_to_string(Path::new(summary.artifact.trim_start_matches("file://")).join(name)).unwrap()
    };
    let [first, second] = [&whole, &parts]
        .map(|summary| serde_json::from_str::<Value>(&read(summary, "report.json")).unwrap()["history"].take());
    assert_eq!(first["points"].as_array().unwrap().len(), 30);
    // But for the clock.
    let without_times = |mut history: Value| {
        for list in ["points", "validations"] {
            history[list].as_array_mut().unwrap().iter_mut().for_each(|point| point["time"] = Value::Null);
        }
        history
    };
    assert_eq!(without_times(first), without_times(second));
    let page = read(&parts, "report.html");
    assert!(page.contains("Validation") && page.contains(&parts.model_digest) && page.contains(&parts.data_digest));
    assert_eq!(events().len(), 4, "of three processes, and of the artifact");
}

#[test]
fn a_sharded_optimizer_changes_nothing_and_its_checkpoints_fit_any_ranks() {
    let place = Place::new(0.0);
    let spec = |ranks: u32, shard: bool, every: u32| {
        json!({
            "hyperparameters": {"maxSteps": 16, "batchSize": 15, "precision": "FP32", "maxSequenceLength": 32, "learningRate": 1e-4},
            "distributed": {"processesPerNode": ranks, "backend": "Gloo", "shardOptimizer": shard},
            "checkpoint": {"everySteps": every},
        })
    };
    let child = place.start("whole", &spec(2, false, 0));
    place.finish("whole", child, 0);
    let whole: BTreeMap<u64, f64> = place.losses("whole").into_iter().collect();

    // Each goes on where the one before was stopped. Another manifest has another folder on a laptop: it gets the one
    // before's.
    let folder = |spec: &Value| {
        let config = load_manifest(&place.manifest("parts", spec)).unwrap();
        PathBuf::from(config.checkpoint_to.trim_start_matches("file://")).parent().unwrap().to_owned()
    };
    let specs = [spec(2, true, 0), spec(2, false, 0), spec(2, true, 0), spec(3, true, 1)];
    let mut done = 0;
    for (now, next) in std::iter::zip(&specs, &specs[1..]) {
        let mut child = place.start("parts", now);
        place.wait_for_step("parts", &mut child, done + 2);
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        place.finish("parts", child, 45);
        done = place.losses("parts").last().unwrap().0;
        assert!(place.checkpoints("parts").contains(&done), "no checkpoint at the stop");
        std::fs::rename(folder(now), folder(next)).unwrap();
    }
    assert!(done < 16, "nothing is left for other ranks");
    let child = place.start("parts", &specs[3]);
    place.finish("parts", child, 0);

    let parts = place.losses("parts");
    assert_eq!(parts.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=16).collect::<Vec<_>>());
    for (step, loss) in parts {
        // Word embeddings are updated by another kernel where shards are none, and three ranks sum in another order.
        let allowed = if step <= done { 1e-5 } else { 2e-4 };
        assert!((loss - whole[&step]).abs() < allowed, "step {step}: {loss} is not {}", whole[&step]);
    }
}

#[test]
fn a_check_says_what_would_happen_and_all_that_is_wrong() {
    let place = Place::new(0.1);
    let spec = json!({"hyperparameters": {"batchSize": 16, "epochs": 2, "crossValidation": {"folds": 4}}});
    let text = place.check("fine", &spec).unwrap();
    for part in
        ["reviews: 2", "negative", "median", "22.7 M parameters", "steps", "4 trainings before", "rows a second", "GiB"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(place.checkpoints("fine").is_empty(), "nothing was trained");
    let mut searched = spec.clone();
    let parameters = json!([{"name": "learningRate", "values": [1e-5, 5e-5]}]);
    searched["hyperparameters"]["search"] = json!({"maxTrials": 2, "parameters": parameters});
    let text = place.check("searched", &searched).unwrap();
    assert!(text.contains("2 trials before, "), "{text}");

    let missing = json!({
        "evaluate": {"baseline": place.uri("champion")},
        "model": {"from": place.uri("nowhere"), "task": "TextClassification"},
        "data": {"sources": [{"name": "a", "uri": place.uri("a.csv")}, {"name": "b", "uri": place.uri("b.csv")}]},
    });
    let errors = place.check("wrong", &missing).unwrap_err();
    for part in ["nowhere", "a.csv", "b.csv", "evaluate.baseline: "] {
        assert!(errors.contains(part), "{part} is not in {errors}");
    }
}

#[test]
fn a_wrong_row_is_the_users_error_and_a_failed_gate_is_not_an_error() {
    let place = Place::new(0.1);
    let rows = place.folder.path().join("rows.jsonl");
    let good = std::fs::read_to_string(&rows).unwrap();
    let spec = json!({
        "hyperparameters": {"maxSteps": 2, "batchSize": 8, "maxSequenceLength": 16},
        "evaluate": {"gates": [{"metric": "Accuracy", "sources": ["reviews"], "minimum": "1"}]},
    });
    std::fs::write(&rows, format!("{good}{{\"text\": \"no label\"}}\n")).unwrap();
    let child = place.start("wrong", &spec);
    place.finish("wrong", child, 3);
    let TrainResult::Failed { message } = place.result("wrong") else { panic!("{:?}", place.result("wrong")) };
    assert!(message.contains("rows.jsonl row 301: field \"label\" is missing"), "{message}");

    std::fs::write(&rows, good).unwrap();
    let child = place.start("gate", &spec);
    place.finish("gate", child, 0);
    let TrainResult::GateFailed(summary) = place.result("gate") else { panic!("{:?}", place.result("gate")) };
    assert!(summary.failed_gates[0].contains("accuracy on the test rows of reviews is"), "{:?}", summary.failed_gates);
    assert_eq!(summary.rows.train + summary.rows.validation + summary.rows.test, 300);
}

/// One layer: a model of 55 MB, whose optimizer has 110 MB.
fn small(place: &Place, steps: u32) -> Value {
    json!({
        "model": {"from": place.uri("model"), "task": "TextClassification", "student": {"keepLayers": [0]}},
        "hyperparameters": {"maxSteps": steps, "batchSize": 8, "maxSequenceLength": 16},
    })
}

fn failure(place: &Place, out: &str) -> String {
    match place.result(out) {
        TrainResult::Failed { message } => message,
        other => panic!("{other:?}"),
    }
}

/// Fetches an artifact, which checks every file of it.
fn is_whole(summary: &TrainSummary) {
    let to = tempfile::tempdir().unwrap();
    let folder = athanor_store::open(&summary.artifact).unwrap();
    let fetched =
        tokio::runtime::Runtime::new().unwrap().block_on(athanor_store::artifact::download(&folder, to.path()));
    assert_eq!(fetched.unwrap().model_digest, summary.model_digest);
}

#[test]
fn a_second_run_of_the_same_job_is_refused_while_the_first_one_goes_on() {
    let place = Place::new(0.1);
    let spec = small(&place, 200);
    let mut first = place.start("out", &spec);
    place.wait_for_step("out", &mut first, 2);
    let second = place.start("out", &spec);
    place.finish("out", second, 1);
    let message = failure(&place, "out");
    assert!(message.contains("/checkpoints: another process runs this job and writes here"), "{message}");
    assert!(first.try_wait().unwrap().is_none(), "the first was over before the second");
    place.finish("out", first, 0);
    assert_eq!(place.losses("out").len(), 200, "the second took no step");
    is_whole(&place.summary("out"));
    // A run that is over, or was killed, holds nobody back.
    let third = place.start("out", &spec);
    place.finish("out", third, 0);
}

#[test]
fn files_that_cannot_be_written_are_named_and_no_half_is_a_result() {
    let place = Place::new(0.1);
    // In blocks of 512 bytes: 60 MB, less than the model that the run starts from. Without the signal a write fails, as
    // it does on a full disk.
    let limited = |blocks: &str| ["sh", "-c", "trap '' XFSZ; ulimit -f $0; exec \"$@\"", blocks].map(str::to_owned);
    let start = |blocks: &str, out: &str| {
        let words = limited(blocks);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        place.start_by(&words, out, &small(&place, 3))
    };
    let child = start("117000", "parent");
    place.finish("parent", child, 1);
    let message = failure(&place, "parent");
    assert!(message.contains("parent/model.safetensors.part: ") && message.contains("File too large"), "{message}");
    assert!(place.find("parent", "manifest.json").is_empty());

    // 95 MB: the artifact can be written, the checkpoint's optimizer cannot.
    let child = start("185000", "optimizer");
    place.finish("optimizer", child, 0);
    let log = std::fs::read_to_string(place.folder.path().join("optimizer/log")).unwrap();
    assert!(log.contains("a checkpoint could not be written") && log.contains("optimizer.safetensors"), "{log}");
    assert!(place.checkpoints("optimizer").is_empty());
    is_whole(&place.summary("optimizer"));
}

/// A file system in memory of so many megabytes; only root may make one.
struct Disk(std::path::PathBuf);

impl Disk {
    fn mount(path: &Path, options: &str) {
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path).status().unwrap();
        assert!(status.success(), "mount -o {options}");
    }

    fn new(path: &Path, megabytes: u32) -> Self {
        std::fs::create_dir(path).unwrap();
        Self::mount(path, &format!("size={megabytes}m"));
        Self(path.to_owned())
    }

    fn grow(&self, megabytes: u32) {
        Self::mount(&self.0, &format!("remount,size={megabytes}m"));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_costs_a_checkpoint_or_the_run_and_leaves_no_half_behind() {
    if !rustix::process::getuid().is_root() {
        eprintln!("only root may mount a disk that fills up");
        return;
    }
    let place = Place::new(0.1);
    let disk = Disk::new(&place.folder.path().join("disk"), 40);
    let mut spec = small(&place, 4);
    spec["output"] = json!({"to": place.uri("disk")});
    spec["checkpoint"] = json!({"everySteps": 2});

    // Too small for the model.
    let child = place.start("log", &spec);
    place.finish("log", child, 1);
    let message = failure(&place, "log");
    assert!(message.contains("artifact/model.safetensors: ") && message.contains("No space left"), "{message}");
    assert!(place.find("disk", "manifest.json").is_empty());
    assert!(place.find("disk", "safetensors").is_empty(), "{:?}", place.find("disk", "safetensors"));

    // For the model alone: halves of checkpoints do not take its place.
    disk.grow(70);
    let child = place.start("log", &spec);
    place.finish("log", child, 0);
    assert!(place.checkpoints("disk").is_empty());
    is_whole(&place.summary("log"));

    // For all.
    disk.grow(1000);
    spec["hyperparameters"]["maxSteps"] = json!(6);
    let child = place.start("log", &spec);
    place.finish("log", child, 0);
    assert!(!place.checkpoints("disk").is_empty());
    is_whole(&place.summary("log"));
}

#[test]
fn bf16_learns_what_fp32_learns() {
    let place = Place::new(0.0);
    for precision in ["FP32", "BF16"] {
        let mut spec = small(&place, 20);
        spec["hyperparameters"]["precision"] = json!(precision);
        spec["hyperparameters"]["learningRate"] = json!(2e-4);
        let child = place.start(precision, &spec);
        place.finish(precision, child, 0);
        assert_eq!(place.summary(precision).chosen["precision"], precision);
    }
    let [exact, rounded] = ["FP32", "BF16"].map(|out| place.losses(out));
    assert_eq!((exact.len(), rounded.len()), (20, 20));
    for ((step, a), (_, b)) in std::iter::zip(&exact, &rounded) {
        // BF16 has eight bits of mantissa: 0.4 % a rounding, over 20 steps.
        assert!((a - b).abs() < 0.03 * a, "step {step}: {b} is not {a}");
    }
    assert_ne!(exact, rounded, "nothing was rounded");
    let mean = |losses: &[(u64, f64)]| losses.iter().map(|(_, loss)| loss).sum::<f64>() / losses.len() as f64;
    assert!(mean(&rounded[15..]) < mean(&rounded[..5]), "{rounded:?}");
}

/// Processes that a process started, by the rank in their environment.
fn ranks(launcher: u32) -> BTreeMap<String, Pid> {
    let children = std::fs::read_dir(format!("/proc/{launcher}/task")).unwrap().flatten();
    let children = children.map(|thread| std::fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    let children: Vec<i32> = children
        .flat_map(|ids| ids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .map(|id| id.parse().unwrap())
        .collect();
    let rank = |id: i32| {
        let environment = std::fs::read(format!("/proc/{id}/environ")).unwrap();
        let variables = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        let mut found = variables.filter_map(|one| one.strip_prefix("ATHANOR_LOCAL_RANK=").map(str::to_owned));
        found.next().unwrap()
    };
    children.into_iter().map(|id| (rank(id), Pid::from_raw(id).unwrap())).collect()
}

#[test]
fn a_rank_that_waits_for_one_that_stands_still_says_that_it_hangs() {
    let place = Place::new(0.1);
    let mut spec = small(&place, 100_000);
    spec["hyperparameters"]["batchSize"] = json!(2);
    spec["distributed"] = json!({"processesPerNode": 2, "backend": "Gloo"});
    spec["failurePolicy"] = json!({"hangSeconds": 2});
    let mut child = place.start("out", &spec);
    place.wait_for_step("out", &mut child, 3);
    let ranks = ranks(child.id());
    assert_eq!(ranks.len(), 2);
    kill_process(ranks["1"], Signal::STOP).unwrap();
    let log = || std::fs::read_to_string(place.folder.path().join("out/log")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log().contains("a rank ended") {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(log().contains("\"rank\":0,\"code\":43"), "{}", log());
    // What the launcher would do some seconds later.
    kill_process(ranks["1"], Signal::KILL).unwrap();
    place.finish("out", child, 43);
    let message = failure(&place, "out");
    assert!(message.contains("no step ended for 2 s (failurePolicy.hangSeconds)"), "{message}");
}

#[test]
fn a_rank_whose_peer_was_killed_ends_at_once() {
    let place = Place::new(0.1);
    let mut spec = small(&place, 100_000);
    spec["hyperparameters"]["batchSize"] = json!(2);
    spec["distributed"] = json!({"processesPerNode": 2, "backend": "Gloo"});
    let mut child = place.start("out", &spec);
    place.wait_for_step("out", &mut child, 3);
    kill_process(ranks(child.id())["1"], Signal::KILL).unwrap();
    // Well before the launcher would end it.
    let deadline = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "rank 0 goes on without its peer");
        std::thread::sleep(Duration::from_millis(20));
    }
    place.finish("out", child, 1);
    let log = std::fs::read_to_string(place.folder.path().join("out/log")).unwrap();
    assert!(log.contains("lost a peer") && log.contains("\"rank\":0,\"code\":42"), "{log}");
}

fn artifact(summary: &TrainSummary, name: &str) -> String {
    std::fs::read_to_string(Path::new(summary.artifact.trim_start_matches("file://")).join(name)).unwrap()
}

#[test]
fn cleaning_groups_and_exact_shares_are_in_the_report() {
    let place = Place::new(0.1);
    let text = std::fs::read_to_string(place.folder.path().join("rows.jsonl")).unwrap();
    // Thirty authors of ten rows each.
    let mut rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    rows.iter_mut().enumerate().for_each(|(index, row)| row["author"] = json!(format!("author {}", index % 30)));
    let row = |text: &str| json!({"text": text, "label": "positive", "author": "author 0"});
    rows.extend([row("write to someone@example.com, a very good seller"), row("x"), rows[0].clone()]);
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(place.folder.path().join("authors.jsonl"), lines).unwrap();

    let mut spec = small(&place, 2);
    let source = |columns: Value| json!([{"name": "reviews", "uri": place.uri("authors.jsonl"), "columns": columns}]);
    spec["data"] = json!({
        "sources": source(json!({"group": "author"})),
        "clean": {"collapseWhitespace": true, "redact": ["Email"], "minimumLength": 5},
    });
    let child = place.start("clean", &spec);
    place.finish("clean", child, 0);
    let summary = place.summary("clean");
    let page = artifact(&summary, "report.html");
    let report: Value = serde_json::from_str(&artifact(&summary, "report.json")).unwrap();
    let cleaning = &report["cleaning"];
    assert_eq!(cleaning["rows"], 303);
    let kept = cleaning["kept"].as_u64().unwrap();
    let counts = summary.rows;
    assert_eq!(counts.train + counts.validation + counts.test, kept);
    assert!(page.contains(&format!("Cleaning: {kept} of 303 rows stay")), "{page}");
    let steps = cleaning["steps"].as_array().unwrap();
    for (step, field) in [("redactEmail", "changed"), ("minimumLength", "removed"), ("exactDuplicates", "removed")] {
        let found = steps.iter().find(|one| one["step"] == step).unwrap_or_else(|| panic!("no {step} in {cleaning}"));
        assert!(found[field].as_u64().unwrap() >= 1, "{found}");
        assert!(page.contains(&format!("<td>{step}</td>")), "{step} is not in {page}");
    }
    assert!(page.contains("write to [EMAIL], a very good seller") && !page.contains("someone@example.com"), "{page}");

    // An author is in one part: parts are of whole authors.
    let unclean = |out: &str, columns: Value, split: Value| {
        std::fs::write(place.folder.path().join("authors.jsonl"), {
            rows.iter().take(300).map(|row| format!("{row}\n")).collect::<String>()
        })
        .unwrap();
        let mut spec = spec.clone();
        spec["data"] = json!({
            "sources": source(columns), "split": split, "clean": {"exactDuplicates": "Keep"},
        });
        let child = place.start(out, &spec);
        place.finish(out, child, 0);
        place.summary(out)
    };
    let counts = unclean("grouped", json!({"group": "author"}), json!({})).rows;
    assert_eq!([counts.train % 10, counts.validation % 10, counts.test % 10], [0; 3], "{counts:?}");

    // Each label has its exact share of the test rows.
    let summary = unclean("stratified", json!({}), json!({"stratify": true, "testPercent": 20}));
    let report: Value = serde_json::from_str(&artifact(&summary, "report.json")).unwrap();
    for label in ["negative", "positive"] {
        let all = rows.iter().take(300).filter(|row| row["label"] == label).count() as u64;
        let cells = report["confusion"].as_array().unwrap().iter().filter(|cell| cell["label"] == label);
        let tested: u64 = cells.map(|cell| cell["rows"].as_u64().unwrap()).sum();
        assert_eq!(tested, (all * 20 + 50) / 100, "{label}: of {all}");
    }
}
