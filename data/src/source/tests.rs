use std::{collections::BTreeMap, process::Stdio, sync::Mutex};

use athanor_contract::train::{Columns, DataSpec};
use axum::{
    Router,
    body::Body,
    extract::{Query, Request},
    http::{Response, StatusCode, header},
    response::IntoResponse,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::{pattern::divide, *};
use crate::{Dataset, read::read_with};

const ROWS: &str = "text,label\nalpha,x\nbeta,y\n";

async fn read_uri(uri: String, hub: &Hub) -> Result<Dataset, DataError> {
    let source =
        Source { name: "s".into(), uri: Some(uri), format: None, kafka: None, columns: Columns::default(), part: None };
    let spec = spec(source);
    read_with(&spec, context(&|_| {}, hub)).await
}

fn context<'a>(report: Report<'a>, hub: &'a Hub) -> Context<'a> {
    Context { needs_labels: true, report, hub, snapshots: None }
}

/// As a manifest with this source alone gives it.
fn spec(source: Source) -> DataSpec {
    serde_json::from_value(serde_json::json!({"sources": [source]})).unwrap()
}

fn texts(data: &Dataset) -> Vec<&str> {
    (0..data.rows.len()).map(|row| data.rows.text(row)).collect()
}

fn user(error: DataError) -> String {
    assert!(matches!(error, DataError::User(_)), "the user's: {error}");
    error.to_string()
}

fn other(error: DataError) -> String {
    assert!(matches!(error, DataError::Other(_)), "not the user's: {error}");
    error.to_string()
}

#[test]
fn patterns_are_divided_at_the_folder_above() {
    for (pattern, folder, below) in [
        ("file:///d/*.jsonl", "file:///d/", "*.jsonl"),
        ("s3://b/p/**/*.parquet", "s3://b/p/", "**/*.parquet"),
        ("s3://b/p-{a,b}/x.csv", "s3://b/", "p-{a,b}/x.csv"),
        ("plain/x.csv", "plain/", "x.csv"),
    ] {
        assert_eq!(divide(pattern), (folder, below));
    }
    assert!(is_pattern("s3://b/[ab].csv") && !is_pattern("https://h/x.csv?a=*") && !is_pattern("file:///x.csv"));
}

#[tokio::test]
async fn a_pattern_means_the_files_that_match_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().canonicalize().unwrap();
    std::fs::create_dir_all(root.join("deep/er")).unwrap();
    for (name, text) in
        [("b.csv", "b"), ("a.csv", "a"), ("deep/c.csv", "c"), ("deep/er/with space.csv", "d"), ("x.txt", "no")]
    {
        std::fs::write(root.join(name), format!("text,label\n{text},x\n")).unwrap();
    }
    let read =
        |pattern: &str| read_uri(format!("file://{}/{pattern}", root.display()), &Hub { endpoint: None, token: None });
    assert_eq!(texts(&read("*.csv").await.unwrap()), ["a", "b"]);
    assert_eq!(texts(&read("**/*.csv").await.unwrap()), ["a", "b", "c", "d"]);
    assert_eq!(texts(&read("deep/*/*.csv").await.unwrap()), ["d"]);
    assert_eq!(texts(&read("{a,deep/c}.csv").await.unwrap()), ["a", "c"]);
    let data = read("?.csv").await.unwrap();
    assert_eq!(data.rows.place(1), format!("file://{}/b.csv row 2", root.display()));
    let digest = read("**/*.csv").await.unwrap().digest;
    std::fs::rename(root.join("a.csv"), root.join("z.csv")).unwrap();
    assert_ne!(read("**/*.csv").await.unwrap().digest, digest);

    assert!(user(read("*.jsonl").await.unwrap_err()).ends_with("/*.jsonl: no file matches"));
    assert!(user(read("absent/*.csv").await.unwrap_err()).ends_with("/absent/*.csv: no file matches"));
    assert!(user(read("[.csv").await.unwrap_err()).contains("/[.csv: not a pattern of file names: "));
    assert!(user(read("**").await.unwrap_err()).contains("x.txt: the task needs labels"));
    assert!(user(read("absent.csv").await.unwrap_err()).ends_with("absent.csv: nothing there"));
}

#[tokio::test]
async fn progress_tells_bytes_and_rows() {
    let folder = tempfile::tempdir().unwrap();
    let row = "{\"text\": \"a longer text, so that there is more than one piece of the file\", \"label\": 1}\n";
    let content = row.repeat(20_000);
    for name in ["a.jsonl", "b.jsonl"] {
        std::fs::write(folder.path().join(name), &content).unwrap();
    }
    let seen = Mutex::new(Vec::new());
    let uri = Some(format!("file://{}/*.jsonl", folder.path().display()));
    let source = Source { name: "s".into(), uri, format: None, kafka: None, columns: Columns::default(), part: None };
    let spec = spec(source);
    let report = |progress: Progress<'_>| {
        let Progress::Reading { source, bytes_read, bytes_total, rows, .. } = progress else { panic!("{progress:?}") };
        seen.lock().unwrap().push((source.to_owned(), bytes_read, bytes_total, rows));
    };
    let data = read_with(&spec, context(&report, &Hub::default())).await.unwrap();
    assert_eq!(data.rows.len(), 1);
    let seen = seen.into_inner().unwrap();
    let total = 2 * content.len() as u64;
    assert!(seen.len() > 10 && seen.is_sorted_by_key(|moment| (moment.1, moment.3)), "{seen:?}");
    assert_eq!(seen.last().unwrap(), &("s".to_owned(), total, Some(total), 40_000));
}

#[tokio::test]
async fn a_source_is_a_uri_or_a_topic() {
    let source =
        Source { name: "s".into(), uri: None, format: None, kafka: None, columns: Columns::default(), part: None };
    let spec = spec(source);
    let error = read_with(&spec, context(&|_| {}, &Hub::default())).await.unwrap_err();
    assert_eq!(user(error), "source s: set exactly one of uri and kafka");
}

/// Serves every request by one function, and returns the address.
async fn serve<R: IntoResponse>(answer: impl Fn(Request) -> R + Clone + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answer = move |request: Request| {
        let answer = answer(request).into_response();
        async move { answer }
    };
    let router = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

#[tokio::test]
async fn files_come_by_http() {
    let address = serve(|request: Request| match request.uri().path() {
        "/rows.csv" => (StatusCode::OK, ROWS),
        "/signed.csv" if request.uri().query() == Some("signature=s3cret&part=1") => (StatusCode::OK, ROWS),
        "/signed.csv" => (StatusCode::FORBIDDEN, "no"),
        "/broken.csv" => (StatusCode::INTERNAL_SERVER_ERROR, "out of order"),
        "/secret.csv" => (StatusCode::FORBIDDEN, "no"),
        _ => (StatusCode::NOT_FOUND, "no such thing"),
    })
    .await;
    let hub = Hub::default();
    let read = |path: &str| read_uri(format!("{address}/{path}"), &hub);
    assert_eq!(texts(&read("rows.csv?key=*").await.unwrap()), ["alpha", "beta"]);
    // A query may be the key to a file: it is sent, and not told.
    let signed = read("signed.csv?signature=s3cret&part=1").await.unwrap();
    assert_eq!((texts(&signed), signed.rows.place(0)), (vec!["alpha", "beta"], format!("{address}/signed.csv row 2")));
    let error = user(read("signed.csv?signature=wr0ng").await.unwrap_err());
    assert_eq!(error, format!("{address}/signed.csv: the server answers 403 Forbidden"));
    assert_eq!(user(read("absent.csv").await.unwrap_err()), format!("{address}/absent.csv: nothing there"));
    let error = user(read("secret.csv").await.unwrap_err());
    assert!(error.starts_with(&format!("{address}/secret.csv: access refused")), "{error}");
    let error = other(read("broken.csv").await.unwrap_err());
    assert!(error.starts_with(&format!("{address}/broken.csv: the store does not answer: ")), "{error}");
}

#[tokio::test]
async fn a_body_that_is_too_short_is_no_file() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", ROWS.len() + 100);
            let _ = stream.write_all(&[head.as_bytes(), ROWS.as_bytes()].concat()).await;
        }
    });
    let error = other(read_uri(format!("http://{address}/rows.csv"), &Hub::default()).await.unwrap_err());
    assert!(error.starts_with(&format!("http://{address}/rows.csv: ")), "{error}");
}

#[tokio::test]
async fn a_body_that_comes_in_chunks_is_read_to_its_end() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let read = stream.read(&mut request).await.unwrap();
            let is_whole = request[..read].starts_with(b"GET /whole.csv");
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
            let (one, two) = ROWS.split_at(13);
            let end = if is_whole { "0\r\n\r\n" } else { "" };
            let body = format!("{:x}\r\n{one}\r\n{:x}\r\n{two}\r\n{end}", one.len(), two.len());
            let _ = stream.write_all(&[head, &body].concat().into_bytes()).await;
        }
    });
    let hub = Hub::default();
    let read = |name: &str| read_uri(format!("http://{address}/{name}"), &hub);
    let data = read("whole.csv").await.unwrap();
    assert_eq!(texts(&data), ["alpha", "beta"]);
    let error = other(read("cut.csv").await.unwrap_err());
    assert!(error.starts_with(&format!("http://{address}/cut.csv: the store does not answer: ")), "{error}");
}

#[tokio::test]
async fn a_server_that_fails_before_it_sends_anything_is_asked_again() {
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    let address = serve(move |request: Request| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        let status = match request.uri().path() {
            "/gone.csv" => StatusCode::GONE,
            _ if number == 0 => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::OK,
        };
        Response::builder().status(status).body(Body::from(ROWS)).unwrap()
    })
    .await;
    let hub = Hub::default();
    let read = |name: &str| read_uri(format!("{address}/{name}?key=secret"), &hub);
    assert_eq!(texts(&read("rows.csv").await.unwrap()), ["alpha", "beta"]);
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    let error = user(read("gone.csv").await.unwrap_err());
    assert!(error.contains("410 Gone") && !error.contains("secret"), "{error}");
    assert_eq!(asked.load(Ordering::Relaxed), 3, "what the server refuses is not asked for again");
}

/// Answers as the Hub does: a listing of a revision, and files by range with digest and commit in the headers.
async fn serve_hub() -> String {
    serve(|request: Request| {
        let path = request.uri().path().to_owned();
        let refused = |status: StatusCode| Response::builder().status(status).body(Body::from("no")).unwrap();
        if path.contains("/team/gated") {
            match request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap()) {
                Some("Bearer right") => {}
                Some(_) => return refused(StatusCode::FORBIDDEN),
                None => return refused(StatusCode::UNAUTHORIZED),
            }
        }
        if path == "/api/datasets/team/rows/revision/main" {
            let files = ["README.md", "data/a.csv", "data/b.csv", "data/deep/c.csv"];
            let files: Vec<_> = files.iter().map(|name| serde_json::json!({"rfilename": name})).collect();
            let info = serde_json::json!({"sha": "abc", "siblings": files}).to_string();
            return Response::builder()
                .header(header::CONTENT_TYPE, "application/json")
                .body(Body::from(info))
                .unwrap();
        }
        let content = match path.as_str() {
            "/datasets/team/rows/resolve/main/data/a.csv" => ROWS.to_owned(),
            "/datasets/team/rows/resolve/main/data/b.csv" => ROWS.replace("alpha", "gamma"),
            "/datasets/team/rows/resolve/v1/data/a.csv" => ROWS.replace("alpha", "old"),
            "/datasets/team/gated/resolve/main/a.csv" => ROWS.to_owned(),
            _ => return refused(StatusCode::NOT_FOUND),
        };
        let range = request.headers().get(header::RANGE).map_or("bytes=0-", |range| range.to_str().unwrap());
        let (begin, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
        let begin: usize = begin.parse().unwrap();
        let end = end.parse().unwrap_or(usize::MAX).min(content.len() - 1);
        Response::builder()
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, format!("bytes {begin}-{end}/{}", content.len()))
            .header(header::ETAG, format!("\"{}\"", sha256_hex(content.as_bytes())))
            .header("x-repo-commit", "abc")
            .body(Body::from(content[begin..=end].to_owned()))
            .unwrap()
    })
    .await
}

#[tokio::test]
async fn files_come_from_the_hub() {
    let hub = Hub { endpoint: Some(serve_hub().await), token: None };
    let read = |path: &str| read_uri(format!("hf://datasets/{path}"), &hub);
    let data = read("team/rows/data/a.csv").await.unwrap();
    assert_eq!(texts(&data), ["alpha", "beta"]);
    assert_eq!(data.rows.place(0), "hf://datasets/team/rows/data/a.csv row 2");
    assert_eq!(texts(&read("team/rows@v1/data/a.csv").await.unwrap()), ["old", "beta"]);
    let data = read("team/rows/data/*.csv").await.unwrap();
    assert_eq!(texts(&data), ["alpha", "beta", "gamma"]);
    assert_eq!(data.rows.place(2), "hf://datasets/team/rows/data/b.csv row 2");
    for (path, total) in [("data/a.csv", Some(ROWS.len() as u64)), ("data/*.csv", None)] {
        let totals = Mutex::new(Vec::new());
        let report = |progress: Progress<'_>| {
            let Progress::Reading { bytes_total, .. } = progress else { panic!("{progress:?}") };
            totals.lock().unwrap().push(bytes_total);
        };
        let uri = Some(format!("hf://datasets/team/rows/{path}"));
        let source =
            Source { name: "s".into(), uri, format: None, kafka: None, columns: Columns::default(), part: None };
        read_with(&spec(source), context(&report, &hub)).await.unwrap();
        let totals = totals.into_inner().unwrap();
        assert!(!totals.is_empty() && totals.iter().all(|told| *told == total), "{path}: {totals:?}");
    }

    assert_eq!(
        user(read("team/rows/data/*.tsv").await.unwrap_err()),
        "hf://datasets/team/rows/data/*.tsv: no file matches"
    );
    assert_eq!(
        user(read("team/rows/absent.csv").await.unwrap_err()),
        "hf://datasets/team/rows/absent.csv: nothing there"
    );
    assert_eq!(user(read("team/none/*.csv").await.unwrap_err()), "hf://datasets/team/none/*.csv: nothing there");
    assert!(user(read("team/rows").await.unwrap_err()).contains("has to be of the form"));
}

#[tokio::test]
async fn a_gated_dataset_needs_the_right_token() {
    let endpoint = Some(serve_hub().await);
    for token in [None, Some("wrong".to_owned())] {
        let hub = Hub { endpoint: endpoint.clone(), token };
        for path in ["a.csv", "*.csv"] {
            let error = user(read_uri(format!("hf://datasets/team/gated/{path}"), &hub).await.unwrap_err());
            assert!(
                error.contains("access refused: the dataset is gated, private or not there; set HF_TOKEN"),
                "{error}"
            );
        }
    }
    let hub = Hub { endpoint, token: Some("right".into()) };
    assert_eq!(texts(&read_uri("hf://datasets/team/gated/a.csv".into(), &hub).await.unwrap()), ["alpha", "beta"]);
    let hub = Hub { endpoint: Some("http://127.0.0.1:1".into()), token: None };
    let error = other(read_uri("hf://datasets/team/rows/a.csv".into(), &hub).await.unwrap_err());
    assert!(error.starts_with("hf://datasets/team/rows/a.csv: the hub does not answer: "), "{error}");
}

/// Which part of the protocols of object stores the three have in common, and where they differ.
#[derive(Clone, Copy, PartialEq)]
enum Store {
    /// And Google's, whose XML is the same.
    S3,
    Azure,
}

/// Answers as a bucket (or container) `fruit` with some files does, two of them a page; the bucket `secret` refuses everything.
fn answer_as(store: Store, request: &Request) -> Response<Body> {
    let files: BTreeMap<&str, String> = ["a", "b", "c", "d"]
        .into_iter()
        .zip(["rows/a.csv", "rows/b.csv", "rows/deep/c.csv", "top.csv"])
        .map(|(text, name)| (name, format!("text,label\n{text},x\n")))
        .chain([("rows/b.txt", "no".to_owned()), ("rows/z.csv", "text,label\nz,y\n".to_owned())])
        .collect();
    let refused = |status: StatusCode| Response::builder().status(status).body(Body::empty()).unwrap();
    let path = request.uri().path().replace("%2F", "/").replace("%2E", ".");
    let (bucket, name) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
    match bucket {
        "fruit" => {}
        "secret" => return refused(StatusCode::FORBIDDEN),
        _ => return refused(StatusCode::NOT_FOUND),
    }
    let query: BTreeMap<String, String> = Query::try_from_uri(request.uri()).unwrap().0;
    if !query.contains_key("list-type") && query.get("comp").is_none_or(|what| what != "list") {
        let Some(content) = files.get(name) else { return refused(StatusCode::NOT_FOUND) };
        return Response::builder()
            .header(header::LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT")
            .header(header::ETAG, "\"1\"")
            .body(Body::from(content.clone()))
            .unwrap();
    }
    let prefix = query.get("prefix").map_or("", String::as_str);
    let after = query.get("continuation-token").or(query.get("marker")).map_or("", String::as_str);
    let is_flat = query.contains_key("delimiter");
    let mut listed = files.iter().filter(|(name, _)| {
        **name > after && name.strip_prefix(prefix).is_some_and(|rest| !is_flat || !rest.contains('/'))
    });
    let page: Vec<_> = listed.by_ref().take(2).collect();
    let next = listed.next().and(page.last()).map_or("", |(name, _)| *name);
    let entries = page.iter().map(|(name, content)| {
        let size = content.len();
        match store {
            Store::S3 => format!(
                "<Contents><Key>{name}</Key><Size>{size}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            ),
            Store::Azure => format!(
                "<Blob><Name>{name}</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified>\
                 <Content-Length>{size}</Content-Length><Content-Type>text/csv</Content-Type></Properties></Blob>"
            ),
        }
    });
    let entries: String = entries.collect();
    let text = match store {
        Store::S3 if next.is_empty() => format!("<ListBucketResult>{entries}</ListBucketResult>"),
        Store::S3 => format!(
            "<ListBucketResult>{entries}<NextContinuationToken>{next}</NextContinuationToken></ListBucketResult>"
        ),
        Store::Azure => {
            format!("<EnumerationResults><Blobs>{entries}</Blobs><NextMarker>{next}</NextMarker></EnumerationResults>")
        }
    };
    Response::new(Body::from(text))
}

/// Tells this program that it is the one that reads.
const READER: &str = "ATHANOR_TEST_READER";

/// Endpoints and keys come from the environment, which belongs to a process: another one reads from the servers of this one.
#[tokio::test]
async fn files_come_from_object_stores() {
    if std::env::var_os(READER).is_some() {
        return read_object_stores().await;
    }
    let s3 = serve(|request: Request| answer_as(Store::S3, &request)).await;
    let azure = serve(|request: Request| answer_as(Store::Azure, &request)).await;
    let output = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "source::tests::files_come_from_object_stores", "--nocapture"])
        .env(READER, "1")
        .envs([("AWS_ENDPOINT_URL", &s3), ("GOOGLE_BASE_URL", &s3), ("AZURE_STORAGE_ENDPOINT", &azure)])
        .envs([("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_REGION", "here")])
        .envs([("GOOGLE_SKIP_SIGNATURE", "true")])
        .envs([("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")])
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

async fn read_object_stores() {
    let hub = Hub::default();
    for scheme in ["s3", "gs", "az"] {
        let read = |path: &str| read_uri(format!("{scheme}://{path}"), &hub);
        let data = read("fruit/rows/a.csv").await.unwrap();
        assert_eq!(texts(&data), ["a"], "{scheme}");
        assert_eq!(data.rows.place(0), format!("{scheme}://fruit/rows/a.csv row 2"));
        for (pattern, expected) in [
            ("rows/*.csv", ["a", "b", "z"].as_slice()),
            ("**/*.csv", &["a", "b", "c", "z", "d"]),
            ("rows/{a,deep/c}.csv", &["a", "c"]),
            ("*.csv", &["d"]),
        ] {
            let data = read(&format!("fruit/{pattern}")).await.unwrap();
            assert_eq!(texts(&data), expected, "{scheme}, {pattern}");
        }
        let missing = user(read("fruit/rows/absent.csv").await.unwrap_err());
        assert_eq!(missing, format!("{scheme}://fruit/rows/absent.csv: nothing there"));
        let missing = user(read("fruit/rows/*.tsv").await.unwrap_err());
        assert_eq!(missing, format!("{scheme}://fruit/rows/*.tsv: no file matches"));
        for path in ["a.csv", "*.csv"] {
            let error = user(read(&format!("secret/{path}")).await.unwrap_err());
            assert!(error.starts_with(&format!("{scheme}://secret")) && error.contains("access refused"), "{error}");
        }
    }
}
