//! Searches from beginning to end, on functions whose best is known.

use std::collections::{BTreeMap, BTreeSet};

use athanor_contract::train::{Hyperparameters, ParameterName, SearchSpec, TrainSpec};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{Assignment, Next, Search, Setting, Trial, Unit, apply, random::Random};

fn spec(value: Value) -> SearchSpec {
    serde_json::from_value(value).unwrap()
}

fn base(value: Value) -> Hyperparameters {
    serde_json::from_value(value).unwrap()
}

fn train_spec() -> TrainSpec {
    serde_json::from_value(json!({
        "model": {"from": "s3://m/minilm", "task": "TextClassification"},
        "data": {"sources": [{"name": "reviews", "uri": "s3://d/reviews.jsonl"}]},
        "output": {"to": "s3://out"},
    }))
    .unwrap()
}

fn number(assignment: &Assignment, name: ParameterName) -> f64 {
    match &assignment.0[&name] {
        Setting::Number(number) => *number,
        Setting::Name(name) => panic!("{name} is no number"),
    }
}

/// Runs a search to its end: trials end in the order in which `pick` chooses among those that run, and the state goes through text
/// whenever `forget` is set, as if the process had been killed. Gives the trials, the best, and the budgets that were trained.
fn drive(
    search: SearchSpec,
    base: &Hyperparameters,
    forget: bool,
    mut pick: impl FnMut(usize) -> usize,
    measure: impl Fn(&Assignment, u64) -> f64,
) -> (Vec<Trial>, Option<usize>, u64) {
    let mut trials: Vec<Trial> = Vec::new();
    let (mut spent, mut current) = (0, Search::new(&search, base).unwrap());
    for _ in 0..10_000 {
        if forget {
            trials = serde_json::from_str(&serde_json::to_string(&trials).unwrap()).unwrap();
            current = Search::new(&search, base).unwrap();
        }
        match current.next(&trials) {
            Next::Start(assignments) => {
                assert!(!assignments.is_empty());
                trials.extend(assignments.into_iter().map(Trial::new));
            }
            Next::Promote { trial, to } => {
                assert_eq!(current.budgets()[trials[trial].rung()], to);
                trials[trial].promote();
            }
            Next::Wait => {
                let running: Vec<usize> = (0..trials.len()).filter(|index| trials[*index].is_running()).collect();
                assert!(running.len() <= search.parallelism as usize);
                let trial = &mut trials[running[pick(running.len())]];
                let budget = current.budgets()[trial.rung()];
                spent += budget;
                let metric = measure(&trial.assignment, budget);
                trial.report(metric);
            }
            Next::Done { best } => return (trials, best, spent),
        }
    }
    panic!("the search does not end");
}

/// Learning rate and dropout; the best is 1, at 1e-4 and 0.3.
fn two_dimensions(assignment: &Assignment, _: u64) -> f64 {
    let rate = (number(assignment, ParameterName::LearningRate).log10() + 4.0) / 2.0;
    let dropout = (number(assignment, ParameterName::Dropout) - 0.3) / 0.4;
    1.0 - rate * rate - dropout * dropout
}

fn of_two_dimensions(algorithm: &str, seed: i64, parallelism: u32) -> SearchSpec {
    spec(json!({"algorithm": algorithm, "maxTrials": 40, "parallelism": parallelism, "seed": seed, "parameters": [
        {"name": "learningRate", "range": {"min": 1e-6, "max": 1e-1, "scale": "Log"}},
        {"name": "dropout", "range": {"min": 0.0, "max": 0.9}},
    ]}))
}

#[test]
fn tpe_finds_more_than_random_search() {
    for parallelism in [1, 4] {
        let regret = |algorithm: &str| {
            let regrets: Vec<f64> = (0..40)
                .map(|seed| {
                    let search = of_two_dimensions(algorithm, seed, parallelism);
                    let (trials, best, _) = drive(search, &Hyperparameters::default(), false, |_| 0, two_dimensions);
                    assert_eq!(trials.len(), 40);
                    1.0 - trials[best.unwrap()].results[0]
                })
                .collect();
            regrets.iter().sum::<f64>() / regrets.len() as f64
        };
        let (tpe, random) = (regret("TPE"), regret("Random"));
        println!("parallelism {parallelism}: mean regret of TPE {tpe:.4}, of random search {random:.4}");
        assert!(tpe < random * 0.6, "parallelism {parallelism}: TPE {tpe}, random {random}");
    }
}

#[test]
fn tpe_learns_which_option_is_good() {
    let search = spec(json!({"algorithm": "TPE", "maxTrials": 60, "parameters": [
        {"name": "optimizer", "choices": ["SGD", "Adam", "AdamW", "RMSprop"]},
        {"name": "batchSize", "values": [8, 16, 32, 64, 128]},
        {"name": "learningRate", "range": {"min": 1e-6, "max": 1e-2, "scale": "Log"}},
    ]}));
    let measure = |assignment: &Assignment, _| {
        let optimizer = f64::from(u8::from(assignment.0[&ParameterName::Optimizer] == Setting::Name("AdamW".into())));
        optimizer - (number(assignment, ParameterName::BatchSize).log2() - 5.0).abs()
    };
    let (trials, best, _) = drive(search, &Hyperparameters::default(), false, |_| 0, measure);
    let is_adamw = |trial: &&Trial| trial.assignment.0[&ParameterName::Optimizer] == Setting::Name("AdamW".into());
    let late = trials[30..].iter().filter(is_adamw).count();
    assert!(late > 15, "{late} of the last 30 trials have the better optimizer");
    assert_eq!(number(&trials[best.unwrap()].assignment, ParameterName::BatchSize), 32.0);
}

/// A learning curve: the final quality is a hash of the learning rate, and what is missing of it falls with the budget.
fn curve(assignment: &Assignment, budget: u64) -> f64 {
    let rate = number(assignment, ParameterName::LearningRate);
    let mut random = Random::new(0, &[rate.to_bits()]);
    let (quality, slowness) = (random.unit(), 0.2 + 0.2 * random.unit());
    quality - slowness / (budget as f64).sqrt()
}

#[test]
fn asha_finds_the_best_arm_with_a_fraction_of_the_budget() {
    let whole = 81;
    let base = base(json!({"maxSteps": whole}));
    let mut found = 0;
    for seed in 0..20 {
        let search = spec(json!({"algorithm": "ASHA", "maxTrials": 81, "parallelism": 4, "seed": seed,
            "asha": {"reductionFactor": 3, "minimumSteps": 1},
            "parameters": [{"name": "learningRate", "range": {"min": 1e-6, "max": 1e-1, "scale": "Log"}}]}));
        let mut order = Random::new(seed, &[7]);
        let (trials, best, spent) = drive(search, &base, false, |running| order.index(running), curve);
        let full = 81 * whole;
        assert!(spent * 6 < full, "{spent} of {full} steps");
        let of_rung = |rung: usize| trials.iter().filter(|trial| trial.results.len() > rung).count();
        for rung in 0..4 {
            let (here, next) = (of_rung(rung), of_rung(rung + 1));
            // The paper: asynchrony promotes some that are not among the top in the end, about the square root.
            assert!(next >= here / 3 && next <= here / 3 + (here as f64).sqrt() as usize + 1, "{here} {next}");
            let mut ranked: Vec<&Trial> = trials.iter().filter(|trial| trial.results.len() > rung).collect();
            ranked.sort_by(|one, other| other.results[rung].total_cmp(&one.results[rung]));
            assert!(ranked[..here / 3].iter().all(|trial| trial.results.len() > rung + 1), "the top third goes on");
        }
        let truth = |index: &usize| curve(&trials[*index].assignment, whole);
        let arm = (0..trials.len()).max_by(|one, other| truth(one).total_cmp(&truth(other))).unwrap();
        assert!(truth(&best.unwrap()) > truth(&arm) - 0.03);
        found += usize::from(best == Some(arm));
    }
    assert!(found >= 15, "the best arm in {found} of 20 searches");
}

#[test]
fn a_killed_search_goes_on_identically() {
    let base = base(json!({"maxSteps": 27}));
    for algorithm in ["Random", "TPE", "ASHA"] {
        for parallelism in [1, 3] {
            let search = of_two_dimensions(algorithm, 5, parallelism);
            let run = |forget| {
                let mut order = Random::new(3, &[]);
                drive(
                    search.clone(),
                    &base,
                    forget,
                    move |running| order.index(running),
                    |assignment, budget| two_dimensions(assignment, 0) - 1.0 / budget as f64,
                )
            };
            let (uninterrupted, resumed) = (run(false), run(true));
            assert_eq!(uninterrupted, resumed, "{algorithm} {parallelism}");
            let other = drive(SearchSpec { seed: 6, ..search.clone() }, &base, false, |_| 0, two_dimensions);
            assert_ne!(other.0[0].assignment, resumed.0[0].assignment, "another seed, another search");
        }
    }
}

#[test]
fn failed_trials_are_never_chosen() {
    let base = base(json!({"maxSteps": 9}));
    for algorithm in ["Random", "TPE", "ASHA"] {
        // Large learning rates diverge, and would be the best otherwise.
        let measure = |assignment: &Assignment, budget: u64| {
            let rate = number(assignment, ParameterName::LearningRate);
            if rate > 1e-3 && budget > 1 { f64::NAN } else { rate }
        };
        let (trials, best, _) = drive(of_two_dimensions(algorithm, 1, 2), &base, true, |_| 0, measure);
        let best = &trials[best.unwrap()];
        assert!(best.results.iter().all(|result| result.is_finite()));
        assert!(number(&best.assignment, ParameterName::LearningRate) <= 1e-3, "{algorithm}: {best:?}");
        let (trials, best, _) = drive(of_two_dimensions(algorithm, 1, 2), &base, true, |_| 0, |_, _| f64::NAN);
        assert_eq!((trials.len(), best), (40, None), "{algorithm}: all failed");
        // A crash is not a number, but a state.
        let search = Search::new(&of_two_dimensions(algorithm, 1, 1), &base).unwrap();
        let Next::Start(first) = search.next(&[]) else { panic!() };
        let mut crashed = Trial::new(first[0].clone());
        crashed.results = vec![2.0];
        crashed.fail();
        assert_eq!(search.best(&[crashed.clone()]), None);
        assert!(matches!(search.next(&[crashed]), Next::Start(_)));
    }
}

#[test]
fn goals_ties_and_small_spaces() {
    let search = json!({"maxTrials": 100, "algorithm": "TPE", "objective": {"metric": "Accuracy", "goal": "Minimize"},
        "parameters": [{"name": "batchSize", "values": [8, 16, 32]}, {"name": "epochs", "range": {"min": 1, "max": 4}}]});
    let size = |assignment: &Assignment, _| number(assignment, ParameterName::BatchSize);
    let (trials, best, _) = drive(spec(search), &Hyperparameters::default(), false, |_| 0, size);
    let names: BTreeSet<String> = trials.iter().map(Trial::name).collect();
    assert_eq!((trials.len(), names.len()), (12, 12), "each of the twelve once");
    let first = trials.iter().position(|trial| trial.results == [8.0]);
    assert_eq!(best, first, "the smallest, and of equals the first");
}

#[test]
fn the_order_of_parameters_is_of_no_account() {
    let mut search = of_two_dimensions("TPE", 2, 1);
    let run = |search: &SearchSpec| drive(search.clone(), &Hyperparameters::default(), false, |_| 0, two_dimensions);
    let before = run(&search);
    search.parameters.reverse();
    assert_eq!(run(&search), before);
}

#[test]
fn wrong_searches_are_refused_in_words() {
    let range = |name: &str, range: Value| json!({"parameters": [{"name": name, "range": range}]});
    for (search, base, part) in [
        (json!({"parameters": []}), json!({}), "no parameters"),
        (json!({"parameters": [{"name": "l1"}]}), json!({}), "exactly one of range, values and choices"),
        (range("learningRate", json!({"min": 0.1, "max": 0.1})), json!({}), "min must be below max"),
        (range("learningRate", json!({"min": 0.1, "max": 99})), json!({}), "99 is not between 0.000000001 and 10"),
        (range("l2", json!({"min": 0, "max": 1, "scale": "Log"})), json!({}), "the Log scale requires min above 0"),
        (
            range("l2", json!({"min": 0.1, "max": 1, "scale": "Log", "step": 0.1})),
            json!({}),
            "step requires the Linear",
        ),
        (range("batchSize", json!({"min": 8.5, "max": 32})), json!({}), "batchSize: 8.5 is not a whole number"),
        (range("batchSize", json!({"min": 8, "max": 32, "step": 0.5})), json!({}), "step must be a whole number"),
        (
            range("optimizer", json!({"min": 0, "max": 1})),
            json!({}),
            "optimizer: choices is for optimizer, schedule and precision",
        ),
        (
            json!({"parameters": [{"name": "l1", "choices": ["a"]}]}),
            json!({}),
            "l1: choices is for optimizer, schedule and precision",
        ),
        (
            json!({"parameters": [{"name": "optimizer", "choices": ["AdamW", "Adagrad"]}]}),
            json!({}),
            "optimizer: unknown variant `Adagrad`",
        ),
        (range("epochs", json!({"min": 1, "max": 5})), json!({"maxSteps": 9}), "already has maxSteps"),
        (
            json!({"algorithm": "ASHA", "asha": {"minimumSteps": 5}, "parameters": [{"name": "l1", "values": [0.1]}]}),
            json!({"epochs": 4}),
            "so set minimumEpochs",
        ),
        (
            json!({"algorithm": "ASHA", "parameters": [{"name": "epochs", "values": [3, 4]}]}),
            json!({}),
            "ASHA chooses it",
        ),
        (
            json!({"asha": {}, "parameters": [{"name": "l1", "values": [0.1]}]}),
            json!({}),
            "requires the algorithm ASHA",
        ),
        (
            json!({"parameters": [{"name": "l1", "values": [0.1]}, {"name": "l1", "values": [0.2]}]}),
            json!({}),
            "l1 is there twice",
        ),
    ] {
        let error = Search::new(&spec(search.clone()), &serde_json::from_value(base).unwrap()).err();
        assert!(error.as_ref().is_some_and(|error| error.contains(part)), "{search}: {error:?}");
    }
}

#[test]
fn assignments_become_specifications() {
    let assignment = |value: Value| serde_json::from_value::<Assignment>(value).unwrap();
    let mut before = train_spec();
    before.hyperparameters.max_steps = Some(100);
    before.hyperparameters.search = Some(of_two_dimensions("TPE", 0, 1));
    let wanted =
        assignment(json!({"batchSize": 64, "learningRate": 3e-5, "optimizer": "SGD", "dropout": 0.25, "epochs": 2}));
    let after = apply(&wanted, &before).unwrap();
    let h = &after.hyperparameters;
    assert_eq!((h.batch_size, h.learning_rate, h.epochs, h.max_steps), (64, 3e-5, Some(2), None));
    assert_eq!((h.dropout, &after.model), (Some(0.25), &before.model));
    assert!(h.search.is_none() && serde_json::to_string(&after).unwrap().contains("\"optimizer\":\"SGD\""));
    for (value, part) in [
        (json!({"batchSize": 0}), "batchSize: 0 is not between 1 and 65536"),
        (json!({"batchSize": 8.5}), "8.5 is not a whole number"),
        (json!({"optimizer": "Adagrad"}), "optimizer: unknown variant `Adagrad`"),
        (json!({"optimizer": 3}), "optimizer: 3 is a number"),
        (json!({"dropout": 0.95}), "dropout: 0.95 is not between 0 and 0.9"),
        (json!({"dropout": "much"}), "\"much\" is not a number"),
    ] {
        let error = apply(&assignment(value), &before).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let unknown = serde_json::from_value::<Assignment>(json!({"learningrate": 1.0})).unwrap_err().to_string();
    assert!(unknown.contains("unknown variant `learningrate`") && unknown.contains("`learningRate`"), "{unknown}");

    // Texts and JSON give it back, and the name with it.
    assert_eq!(Assignment::from_strings(&wanted.to_strings()).unwrap(), wanted);
    let again = assignment(serde_json::to_value(&wanted).unwrap());
    assert_eq!((again.name(), again), (wanted.name(), wanted.clone()));
    assert_eq!(wanted.to_string(), "batchSize=64, dropout=0.25, epochs=2, learningRate=0.00003, optimizer=SGD");
    assert_eq!(wanted.name().len(), 10);
    assert!(Assignment::from_strings(&BTreeMap::from([("x".into(), "1".into())])).is_err());
}

#[test]
fn rungs_shorten_the_training() {
    let search = spec(json!({"algorithm": "ASHA", "asha": {"reductionFactor": 2},
        "parameters": [{"name": "weightDecay", "values": [0.0, 0.1]}]}));
    let assignment = Assignment([(ParameterName::WeightDecay, Setting::Number(0.1))].into());
    let mut job = train_spec();
    job.hyperparameters.epochs = Some(8);
    let of_epochs = Search::new(&search, &job.hyperparameters).unwrap();
    assert_eq!((of_epochs.budgets(), of_epochs.unit()), ([1, 2, 4, 8].as_slice(), Unit::Epochs));
    let epochs = |rung| of_epochs.specification(&assignment, rung, &job).unwrap().hyperparameters.epochs;
    assert_eq!((epochs(0), epochs(2), epochs(3)), (Some(1), Some(4), Some(8)));
    job.hyperparameters.epochs = None;
    job.hyperparameters.max_steps = Some(1000);
    let of_steps = Search::new(&search, &job.hyperparameters).unwrap();
    assert_eq!((of_steps.budgets(), of_steps.unit()), ([16, 32, 63, 125, 250, 500, 1000].as_slice(), Unit::Steps));
    let first = of_steps.specification(&assignment, 0, &job).unwrap().hyperparameters;
    assert_eq!((first.max_steps, first.epochs, first.weight_decay), (Some(16), None, 0.1));
}

#[test]
fn every_name_is_a_field() {
    // Whoever adds a name finds out whether it is one.
    let all = "accumulateSteps batchSize beta1 beta2 clipNorm dropout epochs epsilon l1 l2 learningRate maxSequenceLength \
               maxSteps momentum optimizer precision schedule seed warmupRatio weightDecay";
    let schema = serde_json::to_value(schemars::schema_for!(ParameterName)).unwrap();
    let mut names: Vec<&str> = schema["enum"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names.join(" "), all);
    for name in names {
        crate::limits::Limits::of(name.parse().unwrap()).unwrap();
    }
}

/// A range with its name, and whether its numbers are whole.
fn parameters() -> impl Strategy<Value = Vec<Value>> {
    let real = (1e-6..0.4_f64, 1e-3..0.5_f64, any::<bool>(), proptest::option::of(1e-3..0.3_f64)).prop_map(
        |(min, width, log, step)| {
            let mut range = json!({"min": min, "max": min + width, "scale": if log { "Log" } else { "Linear" }});
            if let Some(step) = step.filter(|_| !log) {
                range["step"] = json!(step);
            }
            json!({"name": "weightDecay", "range": range})
        },
    );
    let whole =
        (1..200_u32, 1..500_u32, any::<bool>(), proptest::option::of(1..40_u32)).prop_map(|(min, width, log, step)| {
            let mut range = json!({"min": min, "max": min + width, "scale": if log { "Log" } else { "Linear" }});
            if let Some(step) = step.filter(|_| !log) {
                range["step"] = json!(step);
            }
            json!({"name": "batchSize", "range": range})
        });
    let values = proptest::collection::vec(1e-6..1.0_f64, 1..6)
        .prop_map(|values| json!({"name": "learningRate", "values": values}));
    let choices = proptest::sample::subsequence(vec!["SGD", "Adam", "AdamW", "RMSprop"], 1..4)
        .prop_map(|names| json!({"name": "optimizer", "choices": names}));
    (real, whole, values, choices).prop_map(|(a, b, c, d)| vec![a, b, c, d])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn assignments_stay_in_their_ranges_and_on_their_steps(
        parameters in parameters(),
        algorithm in proptest::sample::select(vec!["Random", "TPE", "ASHA"]),
        seed in 0..i64::MAX,
        parallelism in 1..5_u32,
    ) {
        let search = spec(json!({
            "algorithm": algorithm, "maxTrials": 25, "parallelism": parallelism, "seed": seed, "parameters": parameters,
        }));
        let mut noise = Random::new(seed, &[1]);
        let metric = std::cell::RefCell::new(Random::new(seed, &[2]));
        let measure = |_: &Assignment, _| {
            let metric = metric.borrow_mut().unit();
            if metric < 0.1 { f64::NAN } else { metric }
        };
        let (trials, best, _) =
            drive(search, &base(json!({"epochs": 9})), false, |running| noise.index(running), measure);
        let sizes = parameters.iter().map(|parameter| match (parameter.get("range"), parameter["name"].as_str()) {
            (Some(range), name) => {
                let step = range.get("step").and_then(Value::as_f64).or((name == Some("batchSize")).then_some(1.0));
                let width = range["max"].as_f64().unwrap() - range["min"].as_f64().unwrap();
                step.map_or(f64::INFINITY, |step| (width / step + 1e-9).floor() + 1.0)
            }
            (None, _) => parameter.get("values").or(parameter.get("choices")).unwrap().as_array().unwrap().len() as f64,
        });
        let size = sizes.product::<f64>();
        prop_assert_eq!(trials.len() as f64, size.min(25.0), "as many as there are different ones");
        let distinct: BTreeSet<String> = trials.iter().map(|trial| trial.assignment.to_string()).collect();
        prop_assert_eq!(distinct.len(), trials.len());
        prop_assert!(best.is_none_or(|best| trials[best].results.iter().all(|result| result.is_finite())));
        for trial in &trials {
            apply(&trial.assignment, &train_spec()).unwrap();
            for parameter in &parameters {
                let setting = &trial.assignment.0[&parameter["name"].as_str().unwrap().parse().unwrap()];
                let value = serde_json::to_value(setting).unwrap();
                if let Some(range) = parameter.get("range") {
                    let (min, max) = (range["min"].as_f64().unwrap(), range["max"].as_f64().unwrap());
                    let number = value.as_f64().unwrap();
                    prop_assert!((min..=max).contains(&number), "{} {}", number, range);
                    if parameter["name"] == "batchSize" {
                        prop_assert!(value.is_i64(), "{}", value);
                    }
                    if let Some(step) = range.get("step").and_then(Value::as_f64) {
                        let steps = (number - min) / step;
                        prop_assert!((steps - steps.round()).abs() < 1e-6, "{} {}", number, range);
                    }
                } else {
                    let all = parameter.get("values").or(parameter.get("choices")).unwrap();
                    prop_assert!(all.as_array().unwrap().contains(&value), "{} {}", value, all);
                }
            }
        }
    }
}

/// The examples that the API server decides by CEL, and contract's own test by the rules of other fields.
#[test]
fn examples_of_rules_are_decided_as_the_api_server_does() {
    let examples: Value = serde_json::from_str(include_str!("../../contract/tests/rules.json")).unwrap();
    let searches = |example: &Value, kind: &str| -> Vec<(SearchSpec, Hyperparameters)> {
        let patches = example[kind].as_array().unwrap().iter();
        let searches = patches.filter(|patch| patch["hyperparameters"]["search"].is_object());
        searches.map(|patch| (spec(patch["hyperparameters"]["search"].clone()), Hyperparameters::default())).collect()
    };
    let mut count = 0;
    for example in examples.as_array().unwrap() {
        let message = example["message"].as_str().unwrap();
        for (search, base) in searches(example, "refused") {
            let error = Search::new(&search, &base).err().unwrap_or_default();
            assert!(error.contains(message), "{message:?} is not in {error:?}: {search:?}");
            count += 1;
        }
        for (search, base) in searches(example, "accepted") {
            assert_eq!(Search::new(&search, &base).err(), None, "{search:?}");
        }
    }
    assert!(count >= 10, "only {count} examples");
}
