use athanor_contract::train::{CleanSpec, Columns, ConflictingLabels, HeldOutPart};

use super::*;

fn source(name: &str, uri: String) -> Source {
    Source { name: name.into(), uri: Some(uri), format: None, kafka: None, columns: Columns::default(), part: None }
}

/// As a manifest with these sources alone gives it.
fn spec_of(sources: Vec<Source>) -> DataSpec {
    serde_json::from_value(serde_json::json!({"sources": sources})).unwrap()
}

async fn read_labelled(spec: &DataSpec) -> Result<Dataset, DataError> {
    read(spec, true, &|_| {}).await
}

#[tokio::test]
async fn the_digest_follows_content_and_split() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    let mut spec = spec_of(vec![source("rows", format!("file://{}", file.display()))]);
    std::fs::write(&file, "{\"text\": \"a\", \"label\": \"x\"}\n").unwrap();
    let first = read_labelled(&spec).await.unwrap();
    assert_eq!(first.rows.len(), 1);
    assert_eq!(read_labelled(&spec).await.unwrap().digest, first.digest);
    spec.split.seed = 1;
    assert_ne!(read_labelled(&spec).await.unwrap().digest, first.digest);
    spec.split.seed = 0;
    spec.clean = Some(CleanSpec::default());
    assert_ne!(read_labelled(&spec).await.unwrap().digest, first.digest);
    spec.clean = None;
    std::fs::write(&file, "{\"text\": \"b\", \"label\": \"x\"}\n").unwrap();
    assert_ne!(read_labelled(&spec).await.unwrap().digest, first.digest);
    spec.sources[0].uri = Some(format!("file://{}", folder.path().join("rows.csv").display()));
    std::fs::write(folder.path().join("rows.csv"), "text,label\n").unwrap();
    let error = read_labelled(&spec).await.unwrap_err().to_string();
    assert!(error.contains("source rows: no labelled rows in file:///") && error.ends_with("rows.csv"), "{error}");
}

/// The digest of 0.1: checkpoints and retrainings are named by it.
#[test]
fn a_digest_covers_what_it_always_has() {
    let spec = spec_of(vec![source("s", "file:///x.csv".into())]);
    let identities = [Identity { source: &spec.sources[0], content: "c" }];
    assert_eq!(
        serde_json::to_string(&(identities, &spec.split)).unwrap(),
        r#"[[{"source":{"name":"s","uri":"file:///x.csv","columns":{"text":"text","label":"label"}},"content":"c"}],{"validationPercent":10,"testPercent":10,"seed":0}]"#
    );
}

#[tokio::test]
async fn a_text_is_kept_once_in_a_source_with_its_first_label() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.csv"), "text,label\na,x\nb,x\na,y\n").unwrap();
    std::fs::write(folder.path().join("b.csv"), "text,label\nc,y\na,z\n").unwrap();
    let uri = |name: &str| format!("file://{}/{name}", folder.path().display());
    let mut spec = spec_of(vec![source("both", uri("*.csv")), source("second", uri("b.csv"))]);
    let rows = |data: &Dataset| {
        let row = |row| {
            format!("{}/{}={}", data.sources[data.rows.source(row)], data.rows.text(row), data.rows.label(row).unwrap())
        };
        (0..data.rows.len()).map(row).collect::<Vec<_>>()
    };
    let data = read_labelled(&spec).await.unwrap();
    assert_eq!(rows(&data), ["both/a=x", "both/b=x", "both/c=y", "second/c=y", "second/a=z"]);
    assert_eq!(data.rows.place(2), format!("{} row 2", uri("b.csv")));
    assert!(data.cleaning.is_none() && data.clusters.is_none());

    // Cleaning decides the same way, and can be told otherwise.
    spec.clean = Some(CleanSpec::default());
    let cleaned = read_labelled(&spec).await.unwrap();
    assert_eq!(rows(&cleaned), rows(&data));
    let report = cleaned.cleaning.unwrap();
    assert_eq!((report.rows, report.kept), (7, 5));
    spec.clean = Some(CleanSpec { conflicting_labels: ConflictingLabels::Fail, ..CleanSpec::default() });
    assert!(matches!(read_labelled(&spec).await, Err(DataError::User(_))));
    spec.clean = Some(CleanSpec { minimum_length: Some(2), ..CleanSpec::default() });
    let error = read_labelled(&spec).await.unwrap_err().to_string();
    assert_eq!(error, "data.clean removed all of the 7 rows");
}

#[tokio::test]
async fn texts_and_pairs_are_cleaned_and_near_duplicates_found() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.csv");
    let long = "the quick brown fox jumps over the lazy dog and runs away from";
    std::fs::write(&file, format!("q,a,label\n  one  two ,mail me@example.com,x\n{long} it,b,y\n{long} me,b,y\n"))
        .unwrap();
    let mut source = source("s", format!("file://{}", file.display()));
    source.columns = Columns { text: "q".into(), pair: Some("a".into()), ..Columns::default() };
    let clean: CleanSpec =
        serde_json::from_str(r#"{"collapseWhitespace": true, "redact": ["Email"], "nearDuplicates": {}}"#).unwrap();
    let spec = DataSpec { clean: Some(clean), ..spec_of(vec![source]) };
    let data = read_labelled(&spec).await.unwrap();
    assert_eq!((data.rows.text(0), data.rows.pair(0)), ("one two", Some("mail [EMAIL]")));
    let clusters = data.clusters.unwrap();
    assert!(clusters[0] != clusters[1] && clusters[1] == clusters[2], "{clusters:?}");
    let report = data.cleaning.unwrap();
    assert_eq!((report.rows, report.kept), (3, 3));
    assert!(report.steps.len() >= 3, "{report:?}");
}

#[tokio::test]
async fn a_text_of_a_held_out_source_is_found_as_it_is_cleaned() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, rows: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("text,label\n{rows}")).unwrap();
        source(name.trim_end_matches(".csv"), format!("file://{}", path.display()))
    };
    let test = Source { part: Some(HeldOutPart::Test), ..file("test.csv", "one two,x\n") };
    let validation = Source { part: Some(HeldOutPart::Validation), ..file("validation.csv", "four,y\n") };
    let mut spec = spec_of(vec![file("own.csv", "one  two,x\nthree,y\n"), validation, test]);
    let data = read_labelled(&spec).await.unwrap();
    let parts = data.split(&spec.split).unwrap();
    assert_eq!((parts.train, parts.overlap.unwrap().rows), (vec![0, 1], 0));
    spec.clean = Some(CleanSpec { collapse_whitespace: true, ..CleanSpec::default() });
    let cleaned = read_labelled(&spec).await.unwrap();
    let parts = cleaned.split(&spec.split).unwrap();
    assert_eq!((parts.train, parts.validation, parts.test), (vec![1], vec![2], vec![3]));
    assert_eq!(parts.overlap.unwrap().rows, 1);
    spec.sources[2].part = None;
    assert_ne!(read_labelled(&spec).await.unwrap().digest, cleaned.digest, "the digest covers the parts");
}
