//! Names that processes share are written in `contract/src/process.rs` alone: a search of the workspace's production
//! code.

use std::path::{Path, PathBuf};

use athanor_contract::process::{annotation, api, file, header, label, path, port, variable};

/// Crates that are tests.
const SKIPPED: [&str; 1] = ["tests"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Lines of production code, without comments and what follows `#[cfg(test)]`; attributes of kube's derive take
/// literals only.
fn production(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().take_while(|(_, line)| line.trim() != "#[cfg(test)]");
    let lines = lines.map(|(number, line)| (number + 1, line.trim()));
    lines.filter(|(_, line)| {
        !["//", "doc = ", "group = ", "version = ", "kind = ", "plural = "].iter().any(|start| line.starts_with(start))
    })
}

fn has_number(line: &str, number: u16) -> bool {
    let number = number.to_string();
    let is_part =
        |character: Option<char>| character.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
    line.match_indices(&number)
        .any(|(at, _)| !is_part(line[..at].chars().next_back()) && !is_part(line[at + number.len()..].chars().next()))
}

#[test]
fn no_shared_name_is_written_elsewhere() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(workspace).unwrap() {
        let folder = entry.unwrap().path();
        let is_skipped = SKIPPED.iter().any(|name| folder.ends_with(name));
        if folder.join("Cargo.toml").exists() && folder.join("src").exists() && !is_skipped {
            sources(&folder.join("src"), &mut files);
        }
    }
    let is_test = |path: &Path| {
        path.strip_prefix(workspace).unwrap().with_extension("").iter().any(|part| {
            let name = part.to_string_lossy();
            name == "tests" || name.ends_with("_tests") || name == "test_support"
        })
    };
    files.retain(|path| !is_test(path) && !path.ends_with("contract/src/process.rs"));
    assert!(files.len() > 200, "only {} files", files.len());
    let texts = [
        "ATHANOR_",
        variable::JOB_COMPLETION_INDEX,
        path::CONFIG,
        path::MODEL_CACHE,
        path::ENGINE_MODEL,
        path::SPOOL,
        path::TERMINATION_LOG,
        header::REQUEST_ID,
        header::REVISION,
        header::ADAPTER,
        label::FINE_TUNE_JOB,
        label::DEPLOYMENT,
        label::SEARCH,
        label::REVISION,
        annotation::TRIAL,
        annotation::APPROVE,
        annotation::CONFIG,
        api::API_VERSION,
    ];
    // A text that begins a literal; messages may name a variable or a file in the middle of one.
    let quoted = texts.map(|text| format!("\"{text}"));
    let mounted = [file::TRAIN, file::SERVE, file::ADAPTERS, file::ROUTER, file::MONITOR];
    let whole = mounted
        .into_iter()
        .chain([path::ANALYSIS, api::GROUP, api::VERSION])
        .map(|text| format!("\"{text}\""))
        .collect::<Vec<_>>();
    let ports = [
        port::HTTP,
        port::GRPC,
        port::TRAINER_METRICS,
        port::ROUTER_OPS,
        port::MONITOR_OPS,
        port::OPERATOR_OPS,
        port::PROGRESS,
        port::RENDEZVOUS,
    ];
    let mut found = Vec::new();
    for path in &files {
        let text = std::fs::read_to_string(path).unwrap();
        for (number, line) in production(&text) {
            let names = quoted.iter().chain(&whole).any(|text| line.contains(text.as_str()));
            if names || ports.iter().any(|port| has_number(line, *port)) {
                found.push(format!("{}:{number}: {line}", path.strip_prefix(workspace).unwrap().display()));
            }
        }
    }
    assert!(found.is_empty(), "use the constants of athanor_contract::process:\n{}", found.join("\n"));
}

#[test]
fn the_search_finds_what_it_looks_for() {
    let text = "// \"ATHANOR_X\"\nlet port = 9100;\n#[cfg(test)]\nlet port = 9101;\n";
    let lines: Vec<(usize, &str)> = production(text).collect();
    assert_eq!(lines, [(2, "let port = 9100;")]);
    assert!(has_number(lines[0].1, 9100) && has_number("\"0.0.0.0:9100\"", 9100));
    assert!(!has_number("let x = 19100;", 9100) && !has_number("1.9100", 9100));
}
