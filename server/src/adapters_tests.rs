//! Which adapters a server has while its file changes, with a model by a rule that takes adapters of one module, `shout`.

use athanor_contract::serve::ServeLimits;
use athanor_models::{load, lora};
use athanor_serving::test_support;
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use tokio::sync::oneshot;

use super::*;

/// A folder with an adapter of one module.
fn adapter(module: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let settings = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module]});
    std::fs::write(folder.path().join(lora::CONFIG), settings.to_string()).unwrap();
    let ones = |shape: [i64; 2]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let name = |part: &str| format!("base_model.model.{module}.lora_{part}.weight");
    let named = [(name("A"), ones([2, 8])), (name("B"), ones([6, 2]))];
    load::save(&folder.path().join(lora::WEIGHTS), &named).unwrap();
    folder
}

fn config(name: &str, folder: &TempDir) -> AdapterConfig {
    AdapterConfig { name: name.into(), uri: format!("file://{}", folder.path().display()) }
}

/// Replaces the file, as a mounted ConfigMap is replaced.
fn write(file: &Path, adapters: &[AdapterConfig]) {
    let text = serde_json::to_string(&AdaptersFile { adapters: adapters.to_vec() }).unwrap();
    let part = file.with_extension("part");
    std::fs::write(&part, text).unwrap();
    std::fs::rename(&part, file).unwrap();
}

fn names(service: &Service) -> Vec<String> {
    service.adapters().iter().map(|adapter| adapter.name().to_string()).collect()
}

fn service() -> Arc<Service> {
    test_support::language_model(ServeLimits::default()).0
}

/// Loads that failed in this process so far.
fn failed() -> u64 {
    let text = athanor_telemetry::metrics().render();
    let line = text.lines().find_map(|line| line.strip_prefix("athanor_server_adapter_load_failures_total "));
    line.map_or(0, |number| number.parse().unwrap())
}

#[tokio::test]
async fn adapters_follow_the_file() {
    let (shout, other, place) = (adapter("shout"), adapter("whisper"), tempfile::tempdir().unwrap());
    let file = place.path().join("adapters.json");
    let service = service();
    let fixed = config("fixed", &shout);
    let mut adapters = Adapters::start(service.clone(), vec![fixed.clone()], file.clone()).await.unwrap();
    assert_eq!(names(&service), ["fixed"]);
    let start = Instant::now();
    write(&file, &[config("a", &shout), config("b", &shout)]);
    adapters.sync(start).await;
    assert_eq!(names(&service), ["a", "b", "fixed"]);
    let kept = service.adapter("b").unwrap();
    // One that the model refuses, one that is not there, one whose name is taken, and one more.
    let before = failed();
    let absent = AdapterConfig { name: "absent".into(), uri: "file:///nowhere/at/all".into() };
    let taken = config("fixed", &other);
    write(&file, &[config("wrong", &other), absent, taken, config("b", &shout), config("c", &shout)]);
    adapters.sync(start).await;
    assert_eq!(names(&service), ["b", "c", "fixed"]);
    assert_eq!(service.adapter("b"), Some(kept.clone()), "an adapter that stays is not loaded again");
    assert!(failed() >= before + 3, "{} failures before, {} now", before, failed());
    // What failed is tried again, but not at once.
    assert_eq!(adapters.failed.len(), 3);
    let mended = adapters.failed.keys().find(|config| config.name == "wrong").unwrap().clone();
    std::fs::copy(shout.path().join(lora::WEIGHTS), other.path().join(lora::WEIGHTS)).unwrap();
    adapters.sync(start + FIRST_RETRY / 2).await;
    assert_eq!(names(&service), ["b", "c", "fixed"]);
    adapters.sync(start + FIRST_RETRY).await;
    assert_eq!(names(&service), ["b", "c", "fixed", "wrong"]);
    assert!(
        !adapters.failed.contains_key(&mended) && adapters.failed.values().all(|retry| retry.pause == FIRST_RETRY * 2)
    );
    // Another folder under the same name.
    let moved = adapter("shout");
    write(&file, &[config("b", &moved)]);
    adapters.sync(start).await;
    assert_eq!(names(&service), ["b", "fixed"]);
    assert_ne!(service.adapter("b"), Some(kept));
    assert!(adapters.failed.is_empty());
    // A file that cannot be read changes nothing; without the file there are only those of the configuration.
    for text in ["{", "3", r#"{"adapters": [{"name": "a"}]}"#, r#"{"adapters": [], "other": 1}"#] {
        std::fs::write(&file, text).unwrap();
        adapters.sync(start).await;
        assert_eq!(names(&service), ["b", "fixed"], "{text}");
        assert!(adapters.unreadable.as_ref().unwrap().contains("adapters.json"), "{:?}", adapters.unreadable);
    }
    std::fs::remove_file(&file).unwrap();
    adapters.sync(start).await;
    assert_eq!(names(&service), ["fixed"]);
    assert_eq!(adapters.unreadable, None);
}

#[tokio::test]
async fn a_bad_adapter_of_the_configuration_fails_the_start_and_one_of_the_file_does_not() {
    let (shout, other, place) = (adapter("shout"), adapter("whisper"), tempfile::tempdir().unwrap());
    let file = place.path().join("adapters.json");
    for configured in [
        vec![config("a", &other)],
        vec![config("a", &shout), config("a", &shout)],
        vec![config("writer", &shout)],
        vec![config("a,b", &shout)],
    ] {
        let name = configured[0].name.clone();
        let error = Adapters::start(service(), configured, file.clone()).await.err().unwrap();
        assert!(format!("{error:#}").contains(&name), "{error:#}");
    }
    write(&file, &[config("bad", &other), config("good", &shout)]);
    let service = service();
    Adapters::start(service.clone(), Vec::new(), file.clone()).await.unwrap();
    assert_eq!(names(&service), ["good"], "the file is read before the server is ready");
    // A classifier has no adapters, and needs none.
    let classifier = test_support::service().0;
    Adapters::start(classifier.clone(), Vec::new(), file).await.unwrap();
    assert!(names(&classifier).is_empty());
}

#[tokio::test]
async fn the_file_is_watched_until_the_shutdown() {
    let (shout, place) = (adapter("shout"), tempfile::tempdir().unwrap());
    let file = place.path().join("adapters.json");
    let service = service();
    let adapters = Adapters::start(service.clone(), Vec::new(), file.clone()).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let watch = tokio::spawn(adapters.run(async {
        let _ = stopped.await;
    }));
    let reached = async |expected: &[&str]| {
        for _ in 0..600 {
            if names(&service) == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("still {:?}", names(&service));
    };
    write(&file, &[config("a", &shout)]);
    reached(&["a"]).await;
    write(&file, &[config("b", &shout), config("c", &shout)]);
    reached(&["b", "c"]).await;
    std::fs::remove_file(&file).unwrap();
    reached(&[]).await;
    stop.send(()).unwrap();
    watch.await.unwrap();
}
