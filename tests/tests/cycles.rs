//! The files of a crate depend on each other in one direction, and none of them is longer than 500 lines. (clippy refuses
//! functions of more than 80: clippy.toml.)
//!
//! A file depends on another one if its production code names an item of that file: by a path that begins with `crate`,
//! `super` or `self`, or with the name of a module that the file declares. A re-export (`pub use`) is no dependency of
//! its file; paths through it lead to the file that defines the item. Tests are left out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// Crates that are checked.
const CRATES: [&str; 16] = [
    "contract",
    "cpu",
    "crds",
    "data",
    "feedback",
    "models",
    "operator",
    "router",
    "search",
    "server",
    "serving",
    "store",
    "telemetry",
    "tests",
    "torch",
    "trainer",
];
/// Most lines of a production file.
const MOST_LINES: usize = 500;

/// The production code of one file.
struct File {
    path: PathBuf,
    /// Tokens: words, `::` and single characters.
    tokens: Vec<String>,
    /// Modules that the file declares.
    children: BTreeSet<String>,
    /// Names that the file re-exports, with the path of each. `*` stands for all names of a module.
    exports: Vec<(String, Vec<String>)>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Whether a file below `folder`, the sources of a crate, holds tests alone.
fn is_test(path: &Path, folder: &Path) -> bool {
    let path = path.strip_prefix(folder).unwrap();
    let name = path.file_stem().unwrap().to_string_lossy();
    name == "tests" || name.ends_with("_tests") || path.components().any(|part| part.as_os_str() == "tests")
}

fn sources(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            sources(&path, endings, found);
        } else if endings.iter().any(|ending| path.extension().is_some_and(|extension| extension == *ending)) {
            found.push(path);
        }
    }
    found.sort();
}

/// A file without comments, literals, and everything from its test module on.
fn production(text: &str) -> String {
    let mut kept = String::new();
    let mut skips = false;
    for line in text.lines() {
        if line.trim() == "#[cfg(test)]" {
            skips = true;
            continue;
        }
        // A test module stands last in its file; another item for tests ends with its own line.
        let item = line.trim_start_matches("pub(crate) ");
        if skips && !item.starts_with("mod ") && !line.trim_start().starts_with('#') {
            skips = false;
            if !line.trim_end().ends_with(';') {
                kept.push_str("fn skipped_head() {\n");
            }
            continue;
        }
        if skips && line.trim_end().ends_with('{') {
            break;
        }
        if skips {
            skips = line.trim_start().starts_with('#');
            continue;
        }
        kept.push_str(&without_literals(line));
        kept.push('\n');
    }
    kept
}

fn without_literals(line: &str) -> String {
    let mut kept = String::new();
    let mut letters = line.chars().peekable();
    let mut quoted = false;
    while let Some(letter) = letters.next() {
        match letter {
            '\\' if quoted => drop(letters.next()),
            '"' => quoted = !quoted,
            '/' if !quoted && letters.peek() == Some(&'/') => break,
            _ if quoted => {}
            letter => kept.push(letter),
        }
    }
    kept
}

fn tokens(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut word = String::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter.is_alphanumeric() || letter == '_' {
            word.push(letter);
            continue;
        }
        if !word.is_empty() {
            found.push(std::mem::take(&mut word));
        }
        if letter == ':' && letters.peek() == Some(&':') {
            letters.next();
            found.push("::".into());
        } else if !letter.is_whitespace() {
            found.push(letter.into());
        }
    }
    found
}

/// All paths of a `use` tree that begins at `at`, each with the name it gets, and where the tree ends.
fn tree(tokens: &[String], mut at: usize, prefix: &[String], found: &mut Vec<(String, Vec<String>)>) -> usize {
    let mut path = prefix.to_vec();
    loop {
        match tokens.get(at).map(String::as_str) {
            Some("{") => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    at = tree(tokens, at, &path, found);
                    if tokens.get(at).is_some_and(|token| token == ",") {
                        at += 1;
                    }
                }
                return at + 1;
            }
            Some("::") => at += 1,
            Some("as") => {
                found.push((tokens[at + 1].clone(), path));
                return at + 2;
            }
            Some(",") | Some("}") | Some(";") | None => {
                if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
                    path.pop();
                }
                if let Some(last) = path.last().cloned() {
                    found.push((last, path));
                }
                return at;
            }
            Some(word) => {
                path.push(word.to_owned());
                at += 1;
            }
        }
    }
}

fn parse(path: PathBuf) -> File {
    let tokens = tokens(&production(&std::fs::read_to_string(&path).unwrap()));
    let mut file = File { path, tokens: Vec::new(), children: BTreeSet::new(), exports: Vec::new() };
    let mut at = 0;
    while at < tokens.len() {
        let is_public = tokens[at] == "pub";
        let mut next = at + usize::from(is_public);
        if is_public && tokens.get(next).is_some_and(|token| token == "(") {
            next = (next..tokens.len()).find(|&at| tokens[at] == ")").map_or(tokens.len(), |at| at + 1);
        }
        match tokens.get(next).map(String::as_str) {
            Some("mod") if tokens.get(next + 2).is_some_and(|token| token == ";") => {
                file.children.insert(tokens[next + 1].clone());
                at = next + 3;
            }
            Some("use") if is_public => {
                at = tree(&tokens, next + 1, &[], &mut file.exports);
            }
            _ => {
                file.tokens.push(tokens[at].clone());
                at += 1;
            }
        }
    }
    file
}

/// The files of a crate by module path.
struct Modules(BTreeMap<Vec<String>, File>);

impl Modules {
    fn of(name: &str) -> Self {
        let folder = root().join(name).join("src");
        let mut paths = Vec::new();
        sources(&folder, &["rs"], &mut paths);
        let module = |path: &Path| {
            let relative = path.strip_prefix(&folder).unwrap().with_extension("");
            let mut parts: Vec<String> =
                relative.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
            if parts.last().is_some_and(|last| ["lib", "mod"].contains(&last.as_str())) {
                parts.pop();
            }
            parts
        };
        let production = paths.into_iter().filter(|path| !is_test(path, &folder) && !path.ends_with("src/main.rs"));
        let programs = folder.join("bin");
        Self(production.filter(|path| !path.starts_with(&programs)).map(|path| (module(&path), parse(path))).collect())
    }

    /// The path from the crate's root that `path` means in `module`.
    fn absolute(&self, module: &[String], path: &[String]) -> Option<Vec<String>> {
        let mut base = module.to_vec();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => {
                base.clear();
                rest = &rest[1..];
            }
            "self" => rest = &rest[1..],
            "super" => {}
            child if self.0.get(module)?.children.contains(child) => {}
            _ => return None,
        }
        while rest.first().is_some_and(|part| part == "super") {
            base.pop()?;
            rest = &rest[1..];
        }
        base.extend_from_slice(rest);
        Some(base)
    }

    /// The module whose file defines the item, re-exports followed.
    fn definition(&self, path: &[String], depth: usize) -> Option<Vec<String>> {
        let length = (0..=path.len()).rev().find(|&length| self.0.contains_key(&path[..length]))?;
        let (module, rest) = path.split_at(length);
        let Some(name) = rest.first().filter(|_| depth < 16) else { return Some(module.to_vec()) };
        for (exported, to) in &self.0[module].exports {
            if exported != name && exported != "*" {
                continue;
            }
            let mut to = self.absolute(module, to)?;
            if exported == "*" {
                to.pop();
                to.push(name.clone());
            }
            to.extend_from_slice(&rest[1..]);
            if exported == name {
                return self.definition(&to, depth + 1);
            }
        }
        Some(module.to_vec())
    }

    /// Modules that each module depends on.
    fn graph(&self) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
        let mut graph = BTreeMap::new();
        for (module, file) in &self.0 {
            let mut paths = Vec::new();
            let mut at = 0;
            while at < file.tokens.len() {
                let begins = at == 0 || !["::", "."].contains(&file.tokens[at - 1].as_str());
                if file.tokens[at] == "use" {
                    at = tree(&file.tokens, at + 1, &[], &mut paths);
                } else if begins && file.tokens.get(at + 1).is_some_and(|next| next == "::") {
                    let mut path = vec![file.tokens[at].clone()];
                    while file.tokens.get(at + 1).is_some_and(|next| next == "::")
                        && file
                            .tokens
                            .get(at + 2)
                            .is_some_and(|word| word.chars().all(|c| c.is_alphanumeric() || c == '_'))
                    {
                        path.push(file.tokens[at + 2].clone());
                        at += 2;
                    }
                    paths.push((String::new(), path));
                    at += 1;
                } else {
                    at += 1;
                }
            }
            let used = paths.iter().filter_map(|(_, path)| self.definition(&self.absolute(module, path)?, 0));
            graph.insert(module.clone(), used.filter(|used| used != module).collect());
        }
        graph
    }
}

/// Modules that reach each other, group by group.
fn cycles(graph: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>) -> Vec<BTreeSet<Vec<String>>> {
    let reach = |from: &Vec<String>| {
        let mut found = BTreeSet::new();
        let mut open = vec![from];
        while let Some(module) = open.pop() {
            for next in graph.get(module).into_iter().flatten() {
                if found.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        found
    };
    let reached: BTreeMap<_, _> = graph.keys().map(|module| (module, reach(module))).collect();
    let mut groups: Vec<BTreeSet<Vec<String>>> = Vec::new();
    for (module, found) in &reached {
        if found.contains(*module) && !groups.iter().any(|group| group.contains(*module)) {
            groups.push(found.iter().filter(|other| reached[other].contains(*module)).cloned().collect());
        }
    }
    groups
}

#[test]
fn no_files_of_a_crate_import_each_other_in_a_circle() {
    let mut messages = Vec::new();
    for name in CRATES {
        let modules = Modules::of(name);
        assert!(!modules.0.is_empty(), "{name} has no files");
        let graph = modules.graph();
        for group in cycles(&graph) {
            let edges = group
                .iter()
                .flat_map(|from| graph[from].iter().filter(|to| group.contains(*to)).map(move |to| (from, to)));
            let show = |module: &Vec<String>| {
                let path = &modules.0[module].path;
                path.strip_prefix(root().join(name)).unwrap().display().to_string()
            };
            let edges: Vec<String> = edges.map(|(from, to)| format!("  {} -> {}", show(from), show(to))).collect();
            messages.push(format!("{name}:\n{}", edges.join("\n")));
        }
    }
    assert!(messages.is_empty(), "files import each other in a circle\n{}", messages.join("\n"));
}

#[test]
fn no_production_file_is_longer_than_500_lines() {
    let mut long = Vec::new();
    for name in CRATES {
        let (folder, mut paths) = (root().join(name).join("src"), Vec::new());
        sources(&folder, &["rs", "cpp", "hpp"], &mut paths);
        for path in paths.into_iter().filter(|path| !is_test(path, &folder)) {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = text.lines().take_while(|line| !line.starts_with("mod tests {")).count();
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            if lines > MOST_LINES {
                long.push(format!("{name}: {lines} lines"));
            }
        }
    }
    assert!(long.is_empty(), "files of more than {MOST_LINES} lines:\n{}", long.join("\n"));
}

#[test]
fn a_circle_is_found_through_re_exports_and_children() {
    let file = |text: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.rs");
        std::fs::write(&path, text).unwrap();
        parse(path)
    };
    let module = |path: &str| path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let files = |texts: &[(&str, &str)]| Modules(texts.iter().map(|(path, text)| (module(path), file(text))).collect());
    let circle = files(&[
        ("", "mod a;\nmod b;\npub use a::{A, One as Two};"),
        ("a", "use crate::b::B;\npub struct A;"),
        ("b", "pub mod c;\npub struct B;"),
        (
            "b::c",
            "//! Comments may name crate::b::B.\nfn c() -> super::super::Two { d() }\nconst TEXT: &str = \"crate::b::B\";",
        ),
    ]);
    assert_eq!(cycles(&circle.graph()), Vec::<BTreeSet<_>>::new());
    assert_eq!(circle.graph()[&module("b::c")], [module("a")].into());
    let circle = files(&[
        ("", "mod a;\nmod b;\npub use a::{A, One as Two};"),
        ("a", "use crate::b::{self, B};\npub struct A;"),
        ("b", "pub mod c;\npub struct B;\nfn f() { c::f() }"),
        ("b::c", "use crate::{Other, Two};\n#[cfg(test)]\nmod tests {\n    use crate::b::B;\n}"),
    ]);
    assert_eq!(cycles(&circle.graph()), [["a", "b", "b::c"].map(module).into()]);
}
