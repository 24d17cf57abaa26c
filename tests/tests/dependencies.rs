//! The dependency table of ARCHITECTURE.md, checked against what cargo says.

use std::{collections::BTreeSet, process::Command};

/// Crates that each crate of ours may use of ours, and other crates it must not reach, directly or through others.
const TABLE: [(&str, &[&str], &[&str]); 16] = [
    ("contract", &[], &["kube", "tch", "tokio"]),
    ("telemetry", &[], &["kube", "tch"]),
    ("store", &["contract"], &["kube", "tch"]),
    ("cpu", &[], &["kube", "tch", "tokio"]),
    ("crds", &["contract"], &["kube-client", "tch"]),
    ("torch", &["contract"], &["kube", "axum", "tonic", "rdkafka"]),
    ("models", &["contract", "cpu", "torch"], &["kube", "axum", "tonic", "reqwest", "rdkafka"]),
    ("feedback", &["contract", "store", "telemetry"], &["tch"]),
    ("data", &["contract", "feedback", "store", "telemetry"], &["kube", "tch"]),
    ("search", &["contract"], &["kube", "tch", "tokio"]),
    ("operator", &["contract", "crds", "search", "telemetry"], &["tch", "rdkafka"]),
    ("trainer", &["contract", "cpu", "data", "feedback", "models", "search", "store", "telemetry", "torch"], &["kube"]),
    ("router", &["contract", "feedback", "serving", "store", "telemetry"], &["tch"]),
    ("server", &["contract", "cpu", "models", "serving", "store", "telemetry", "torch"], &["kube", "rdkafka"]),
    ("serving", &["contract", "telemetry"], &["kube", "rdkafka", "tch"]),
    ("tests", &["contract", "crds"], &["tch"]),
];

/// Names of what a package of ours reaches through normal dependencies when it is built by itself (not for tests or
/// build scripts).
fn reach(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--edges=normal", "--prefix=none", "--format={p}", "--package", package])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    tree.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// Folders of the workspace's members.
fn members() -> BTreeSet<String> {
    let manifest = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml")).unwrap();
    let line = manifest.lines().find(|line| line.starts_with("members")).unwrap();
    line.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The lines around the table of ARCHITECTURE.md.
const MARKERS: [&str; 2] = ["<!-- dependencies: begin -->\n", "<!-- dependencies: end -->\n"];

/// The table as ARCHITECTURE.md shows it.
fn markdown() -> String {
    let list = |names: &[&str], none: &str| if names.is_empty() { none.to_owned() } else { names.join(", ") };
    let row = |(name, allowed, forbidden): &(&str, &[&str], &[&str])| {
        format!("| {name} | {} | {} |\n", list(allowed, "nothing of ours"), list(forbidden, "-"))
    };
    let rows: String = TABLE.iter().map(row).collect();
    format!("| crate | may use | must not reach |\n|---|---|---|\n{rows}")
}

/// `ATHANOR_REWRITE=1` writes the table into ARCHITECTURE.md instead of comparing.
#[test]
fn the_document_shows_the_table_of_this_test() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../ARCHITECTURE.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (before, rest) = text.split_once(MARKERS[0]).unwrap();
    let (shown, after) = rest.split_once(MARKERS[1]).unwrap();
    if std::env::var_os("ATHANOR_REWRITE").is_some() {
        std::fs::write(path, [before, MARKERS[0], &markdown(), MARKERS[1], after].concat()).unwrap();
        return;
    }
    assert_eq!(shown, markdown(), "run this test with ATHANOR_REWRITE=1");
}

#[test]
fn crates_use_only_what_the_table_allows() {
    let listed: BTreeSet<String> = TABLE.iter().map(|row| row.0.to_owned()).collect();
    assert_eq!(members(), listed, "the table and the workspace differ");
    for (name, allowed, forbidden) in TABLE {
        let package = format!("athanor-{name}");
        let reached = reach(&package);
        assert!(reached.contains(&package), "cargo tree says nothing about {package}");
        for ours in reached.iter().filter_map(|used| used.strip_prefix("athanor-")) {
            assert!(ours == name || allowed.contains(&ours), "{name} uses {ours}, which the table does not allow");
        }
        for forbidden in forbidden {
            assert!(!reached.contains(*forbidden), "{name} reaches {forbidden}, which the table forbids");
        }
    }
}

/// Kubernetes clients are in few places: trainer and servers have none, the router only where it reads its configuration,
/// the operator only where it watches, writes and elects. The steps of a reconcile write through `Cluster`, which only
/// `apply` and `status` have.
#[test]
fn the_kubernetes_client_stays_where_it_belongs() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let output = Command::new("grep")
        .args([
            "-rlE",
            "\\bkube(::|_runtime)",
            "--include=*.rs",
            "trainer",
            "server",
            "serving",
            "router",
            "models",
            "torch",
        ])
        .current_dir(root)
        .output()
        .unwrap();
    for file in String::from_utf8(output.stdout).unwrap().lines() {
        assert!(
            ["router/src/source/kubernetes.rs", "router/src/main.rs"].contains(&file),
            "{file} uses a Kubernetes client"
        );
    }
    let mut kinds = 0;
    for path in sources(&format!("{root}/operator/src").into()) {
        // An HTTP client (for the routers' counts) is another thing.
        let text = std::fs::read_to_string(&path).unwrap().replace("reqwest::Client", "");
        let names = |wanted| text.split(|letter: char| !letter.is_alphanumeric()).any(|word| word == wanted);
        let stem = path.file_stem().unwrap().to_str().unwrap();
        if stem.ends_with("tests") {
            continue;
        }
        let is_kind = path.components().any(|part| {
            let part = part.as_os_str();
            part == "finetunejob" || part == "modeldeployment"
        });
        kinds += usize::from(is_kind);
        if is_kind {
            assert!(!names("Client"), "{} names a Kubernetes client", path.display());
            assert!(
                !names("Cluster") || ["apply", "status", "mod"].contains(&stem),
                "{} names the writer to the cluster",
                path.display()
            );
        } else {
            let may = ["cluster", "context", "controllers", "lease", "main"].contains(&stem);
            assert!(!names("Client") || may, "{} names a Kubernetes client", path.display());
        }
    }
    assert!(kinds > 20, "only {kinds} files of the two kinds were found");
}

/// All Rust files below a folder.
fn sources(folder: &std::path::PathBuf) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}
