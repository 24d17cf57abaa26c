use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use ::parquet::{
    data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int32Type, Int64Type},
    file::writer::SerializedFileWriter,
    schema::parser::parse_message_type,
};
use athanor_contract::train::{Columns, OnBadRow};

use super::*;
use crate::{Rows, builder::Builder, reading::LONGEST_ROW};

/// Parses a file by its name.
fn parse_all(name: &str, bytes: &[u8], columns: &Columns, needs_labels: bool) -> Result<Rows, String> {
    let count = Arc::<AtomicU64>::default();
    let read = || {
        let (format, compression) = of_name(name, None)?;
        let mut builder = Builder::new(None, OnBadRow::Fail)?;
        builder.begin_source(0);
        let mut reading = Reading::new(name, columns, needs_labels, count.clone(), builder);
        parse(format, compression, bytes, &mut reading)?;
        Ok(reading.into_builder().finish().0)
    };
    let rows = read().map_err(|error: DataError| {
        assert!(matches!(error, DataError::User(_)), "the user's: {error}");
        error.to_string()
    })?;
    assert!(count.load(Ordering::Relaxed) >= rows.len() as u64);
    Ok(rows)
}

fn texts(name: &str, bytes: &[u8]) -> Result<Vec<(String, String)>, String> {
    let rows = parse_all(name, bytes, &Columns::default(), true)?;
    Ok((0..rows.len()).map(|row| (rows.text(row).to_owned(), rows.label(row).unwrap_or_default().to_owned())).collect())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstandard(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// Text, label, pair and group as columns of different types; the second label is null.
fn parquet_file() -> Vec<u8> {
    let schema = "message rows { required binary text (UTF8); optional int64 label; required double score; \
                  required boolean flag; required int32 small (UINT_32); repeated binary tags (UTF8); \
                  required int32 day (DATE); required binary raw; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    for group in 0..2 {
        let text = |text: &str| ByteArray::from(format!("{text}{group}").into_bytes());
        let mut row_group = writer.next_row_group().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[text("it's "), text("b")], None, None).unwrap();
        column.close().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[-1], Some(&[1, 0]), None).unwrap();
        column.close().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<DoubleType>().write_batch(&[1.0, 0.5], None, None).unwrap();
        column.close().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<BoolType>().write_batch(&[true, false], None, None).unwrap();
        column.close().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&[-1, 7], None, None).unwrap();
        column.close().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[text("t"), text("u")], Some(&[1, 1]), Some(&[0, 0])).unwrap();
        column.close().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&[1, 2], None, None).unwrap();
        column.close().unwrap();
        let mut column = row_group.next_column().unwrap().unwrap();
        let raw = [ByteArray::from("fine"), ByteArray::from(vec![0xff, 0xfe])];
        column.typed::<ByteArrayType>().write_batch(&raw, None, None).unwrap();
        column.close().unwrap();
        row_group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

/// A PDF with a line of text on each page, uncompressed.
fn pdf_file(pages: &[&str]) -> Vec<u8> {
    let kids: Vec<String> = (0..pages.len()).map(|page| format!("{} 0 R", 4 + 2 * page)).collect();
    let mut objects = vec![
        "<< /Type /Catalog /Pages 2 0 R >>".to_owned(),
        format!("<< /Type /Pages /Kids [{}] /Count {} >>", kids.join(" "), pages.len()),
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>".to_owned(),
    ];
    for (page, text) in pages.iter().enumerate() {
        objects.push(format!(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> /Contents {} 0 R >>",
            5 + 2 * page
        ));
        let content = match *text {
            "" => String::new(),
            "{BROKEN}" => "BT /F9 12 Tf 72 700 Td (text) Tj ET".to_owned(),
            text => format!("BT /F1 12 Tf 72 700 Td ({text}) Tj ET"),
        };
        objects.push(format!("<< /Length {} >>\nstream\n{content}\nendstream", content.len()));
    }
    pdf_of(&objects.iter().map(String::as_bytes).collect::<Vec<_>>())
}

/// A PDF of these objects, the first of which is the catalog.
fn pdf_of(objects: &[&[u8]]) -> Vec<u8> {
    let mut file = b"%PDF-1.4\n".to_vec();
    let mut offsets = Vec::new();
    for (number, object) in (1..).zip(objects) {
        offsets.push(file.len());
        file.extend_from_slice(format!("{number} 0 obj\n").as_bytes());
        file.extend_from_slice(object);
        file.extend_from_slice(b"\nendobj\n");
    }
    let start = file.len();
    file.extend_from_slice(format!("xref\n0 {}\n0000000000 65535 f \n", objects.len() + 1).as_bytes());
    for offset in offsets {
        file.extend_from_slice(format!("{offset:010} 00000 n \n").as_bytes());
    }
    let size = objects.len() + 1;
    let trailer = format!("trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n");
    file.extend_from_slice(trailer.as_bytes());
    file
}

#[test]
fn a_hostile_pdf_is_a_mistake_of_its_file() {
    let one_page = |page: &[u8], content: &[u8], form: &[u8]| {
        let tree: [&[u8]; 2] = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"];
        pdf_of(&[tree[0], tree[1], page, content, form])
    };
    let page =
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /XObject << /F 5 0 R >> >> >>";
    let stream = b"<< /Length 5 >>\nstream\n/F Do\nendstream";
    let form =
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /F 5 0 R >> >> /Length 5 >>\n\
                 stream\n/F Do\nendstream";
    let draws_itself = one_page(page, stream, form);
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::copy(&mut std::io::repeat(0).take(1 << 30), &mut encoder).unwrap();
    let zeros = encoder.finish().unwrap();
    let mut inflates = format!("<< /Filter /FlateDecode /Length {} >>\nstream\n", zeros.len()).into_bytes();
    inflates.extend_from_slice(&zeros);
    inflates.extend_from_slice(b"\nendstream");
    let inflates = one_page(page, &inflates, form);
    // Without an end the reader looks for the resources of the page, which is its own parent.
    let no_end = one_page(b"<< /Type /Page /Parent 3 0 R /Contents 4 0 R >>", stream, form);
    for (file, part) in
        [(draws_itself, "its objects are nested too deeply"), (inflates, " MiB of memory"), (no_end, "it")]
    {
        let error = parse_all("x.pdf", &file, &Columns::default(), false).unwrap_err();
        assert!(error.starts_with("x.pdf: not readable as PDF: it") && error.contains(part), "{error}");
    }
}

#[test]
fn a_file_that_inflates_without_bounds_is_a_mistake() {
    let line = [vec![b'x'; (1 << 20) - 1], vec![b'\n']].concat();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    for _ in 0..1100 {
        encoder.write_all(&line).unwrap();
    }
    for _ in 0..1100 {
        gz.write_all(&line).unwrap();
    }
    for (name, file) in [("x.txt.zst", encoder.finish().unwrap()), ("x.txt.gz", gz.finish().unwrap())] {
        let error = parse_all(name, &file, &Columns::default(), false).unwrap_err();
        assert!(error.starts_with(&format!("{name} row 10")), "{error}");
        assert!(error.ends_with("the file inflates to more than 1 GiB and more than 200 times its size"), "{error}");
    }
}

#[test]
fn bad_rows_are_left_out_and_counted_if_the_job_wants_that() {
    let damaged = pdf_file(&["One", "{BROKEN}", "Three"]);
    type Case<'a> = (&'a str, &'a [u8], bool, &'a [&'a str], &'a [&'a str]);
    let cases: [Case; 4] = [
        (
            "x.jsonl",
            b"{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\"}\nno\n{\"text\": \"\xff\", \"label\": 1}\n{\"text\": \"c\", \"label\": 0}\n",
            true,
            &["a", "c"],
            &["x.jsonl row 2: field \"label\" is missing", "x.jsonl row 3: not JSON", "x.jsonl row 4: not UTF-8"],
        ),
        ("x.csv", b"text,label\na,1\n ,0\nb,0\n", true, &["a", "b"], &["x.csv row 3: field \"text\" is empty"]),
        ("x.txt", b"a\n\xff\nb\n", false, &["a", "b"], &["x.txt row 2: not UTF-8 (byte 2 of the file)"]),
        ("x.pdf", &damaged, false, &["One", "Three"], &["x.pdf row 2: the page is not readable: "]),
    ];
    for (name, bytes, needs_labels, texts, mistakes) in cases {
        let (format, compression) = of_name(name, None).unwrap();
        let mut builder = Builder::new(None, OnBadRow::Skip).unwrap();
        builder.begin_source(0);
        let mut reading = Reading::new(name, &Columns::default(), needs_labels, Arc::default(), builder);
        parse(format, compression, bytes, &mut reading).unwrap();
        let (rows, skipped, _) = reading.into_builder().finish();
        assert_eq!((0..rows.len()).map(|row| rows.text(row)).collect::<Vec<_>>(), texts, "{name}");
        assert_eq!(skipped.rows, mistakes.len() as u64, "{name}: {:?}", skipped.examples);
        for (found, expected) in std::iter::zip(&skipped.examples, mistakes) {
            assert!(found.starts_with(expected), "{found}");
        }
    }
}

#[test]
fn formats_with_columns_give_the_same_rows() {
    let expected = Ok(vec![("it's \"fine\"".to_owned(), "1".to_owned()), ("b".to_owned(), "0".to_owned())]);
    for (name, content) in [
        (
            "x.jsonl",
            "{\"text\": \"it's \\\"fine\\\"\", \"label\": 1}\n\n{\"label\": \"0\", \"text\": \"b\", \"more\": [{\"a\": 1}]}\n",
        ),
        (
            "x.ndjson",
            "\u{feff}{\"label\": 1, \"\\u0074ext\": \"it's \\\"fine\\\"\"}\r\n{\"label\": \"0\", \"text\": \"b\"}",
        ),
        ("x.csv", "\u{feff}label,text\n1,\"it's \"\"fine\"\"\"\n0,b\n"),
        ("s3://b/x.TSV", "text\tlabel\nit's \"fine\"\t1\nb\t0"),
        ("s3://b/x.tsv?version=7", "text\tlabel\nit's \"fine\"\t1\nb\t0"),
    ] {
        assert_eq!(texts(name, content.as_bytes()), expected, "{name}");
        for compressed in [format!("{name}.gz"), format!("{name}.zst")] {
            if !name.contains('?') {
                let bytes =
                    if compressed.ends_with("gz") { gzip(content.as_bytes()) } else { zstandard(content.as_bytes()) };
                assert_eq!(texts(&compressed, &bytes), expected, "{compressed}");
            }
        }
    }
    // Several members or frames are one file, as gzip and zstd themselves have it.
    let two = [gzip(b"{\"text\": \"it's \\\"fine\\\"\", \"label\": 1}\n"), gzip(b"{\"text\": \"b\", \"label\": 0}\n")]
        .concat();
    assert_eq!(texts("x.jsonl.gz", &two), expected);
    let two = [zstandard(b"text,label\n\"it's \"\"fine\"\"\",1\n"), zstandard(b"b,0\n")].concat();
    assert_eq!(texts("x.csv.zst", &two), expected);
}

#[test]
fn numbers_and_booleans_are_labels_as_json_writes_them() {
    let lines =
        b"{\"text\": \"a\", \"label\": 1.0}\n{\"text\": \"b\", \"label\": -3}\n{\"text\": \"c\", \"label\": true}\n\
                  {\"text\": 12, \"label\": 1e3}";
    let labels: Vec<_> = texts("x.jsonl", lines).unwrap().into_iter().map(|(_, label)| label).collect();
    assert_eq!(labels, ["1.0", "-3", "true", "1000.0"]);
}

#[test]
fn pairs_groups_and_rows_without_labels() {
    let columns = Columns {
        text: "question".into(),
        pair: Some("answer".into()),
        group: Some("page".into()),
        ..Columns::default()
    };
    for (name, content) in [
        (
            "x.jsonl",
            "{\"question\": \"q\", \"answer\": \"a\", \"page\": 7, \"label\": null}\n{\"question\": \"q\", \"answer\": \"b\", \"page\": 7}\n",
        ),
        ("x.csv", "page,answer,question,label\n7,a,q,\n7,b,q, \n"),
        ("x.tsv", "page\tanswer\tquestion\n7\ta\tq\n7\tb\tq\n"),
    ] {
        let rows = parse_all(name, content.as_bytes(), &columns, false).unwrap();
        assert_eq!(rows.len(), 2, "{name}: another pair is another row");
        let all = |row| (rows.text(row), rows.pair(row), rows.group(row), rows.label(row));
        assert_eq!((all(0), all(1)), (("q", Some("a"), Some("7"), None), ("q", Some("b"), Some("7"), None)), "{name}");
        assert!(parse_all(name, content.as_bytes(), &columns, true).is_err(), "{name}: labels are needed");
    }
    let missing = parse_all("x.jsonl", b"{\"question\": \"q\", \"answer\": \"a\"}", &columns, false).unwrap_err();
    assert_eq!(missing, "x.jsonl row 1: field \"page\" is missing");
    let missing = parse_all("x.csv", b"question,answer\nq,a\n", &columns, false).unwrap_err();
    assert_eq!(missing, "x.csv row 1: no column is named \"page\", the header has: question, answer");
    let empty = parse_all("x.csv", b"question,answer,page\nq,,7\n", &columns, false).unwrap_err();
    assert_eq!(empty, "x.csv row 2: field \"answer\" is empty");
    // One column may serve twice.
    let columns = Columns { group: Some("label".into()), ..Columns::default() };
    let rows = parse_all("x.jsonl", b"{\"text\": \"q\", \"label\": \"a\"}", &columns, true).unwrap();
    assert_eq!((rows.label(0), rows.group(0)), (Some("a"), Some("a")));
}

#[test]
fn conversations_and_completions() {
    let columns = Columns { messages: Some("chat".into()), ..Columns::default() };
    let chat = r#"[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]"#;
    let lines = format!("{{\"chat\": {chat}}}\n{{\"chat\": {}}}", serde_json::json!(chat.replace("\"q", "\"r")));
    let csv =
        format!("chat\n\"{}\"\n\"{}\"\n", chat.replace('"', "\"\""), chat.replace("\"q", "\"r").replace('"', "\"\""));
    for (name, content) in [("x.jsonl", lines), ("x.csv", csv)] {
        let rows = parse_all(name, content.as_bytes(), &columns, false).unwrap();
        assert_eq!(rows.len(), 2, "{name}");
        for (row, question) in ["q", "r"].iter().enumerate() {
            assert!(rows.is_conversation(row));
            assert_eq!(rows.text(row), format!("[{{\"content\":\"{question}\",\"role\":\"user\"}}]"), "{name}");
            assert_eq!(rows.pair(row), Some("{\"content\":\"a\",\"role\":\"assistant\"}"), "{name}");
        }
    }
    let bad = "{\"chat\": [{\"role\": \"user\", \"content\": \"q\"}]}\n{\"chat\": 5}\n{}";
    let error = parse_all("x.jsonl", bad.as_bytes(), &columns, false).unwrap_err();
    let expected = [
        "x.jsonl row 1: field \"chat\": the last message is not the assistant's",
        "x.jsonl row 2: field \"chat\": not a JSON list of messages: ",
        "x.jsonl row 3: field \"chat\" is missing",
    ];
    assert!(std::iter::zip(error.lines(), expected).all(|(line, start)| line.starts_with(start)), "{error}");
    let columns = Columns { prompt: Some("p".into()), completion: Some("c".into()), ..Columns::default() };
    let rows = parse_all("x.jsonl", b"{\"p\": \"2+2=\", \"c\": 4, \"text\": \"unused\"}", &columns, false).unwrap();
    assert_eq!((rows.text(0), rows.pair(0), rows.is_conversation(0)), ("2+2=", Some("4"), false));
    let missing = parse_all("x.csv", b"p\nq\n", &columns, false).unwrap_err();
    assert_eq!(missing, "x.csv row 1: no column is named \"c\", the header has: p");
}

#[test]
fn a_label_that_comes_later_is_taken() {
    let lines = b"{\"text\": \"a\"}\n{\"text\": \"b\", \"label\": \"x\"}\n{\"text\": \"a\", \"label\": \"y\"}\n{\"text\": \"b\", \"label\": \"z\"}";
    let rows = parse_all("x.jsonl", lines, &Columns::default(), false).unwrap();
    assert_eq!((rows.len(), rows.label(0), rows.label(1)), (2, Some("y"), Some("x")));
}

#[test]
fn parquet_columns_are_text_numbers_or_booleans() {
    let file = parquet_file();
    let columns = |text: &str, label: &str| Columns { text: text.into(), label: label.into(), ..Columns::default() };
    let read = |text: &str, label: &str, needs_labels: bool| {
        parse_all("x.parquet", &file, &columns(text, label), needs_labels).map(|rows| {
            (0..rows.len())
                .map(|row| format!("{}={}", rows.text(row), rows.label(row).unwrap_or("-")))
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(read("text", "score", true).unwrap(), ["it's 0=1.0", "b0=0.5", "it's 1=1.0", "b1=0.5"]);
    assert_eq!(read("text", "flag", true).unwrap()[..2], ["it's 0=true", "b0=false"]);
    assert_eq!(read("text", "small", true).unwrap()[..2], ["it's 0=4294967295", "b0=7"]);
    assert_eq!(read("text", "label", false).unwrap(), ["it's 0=-1", "b0=-", "it's 1=-1", "b1=-"]);
    assert_eq!(read("text", "absent", false).unwrap()[0], "it's 0=-");
    let rows = parse_all("x.parquet", &file, &columns("text", "score"), true).unwrap();
    assert_eq!((rows.place(0), rows.place(3)), ("x.parquet row 1".into(), "x.parquet row 4".into()));
    for compressed in [("x.parquet.gz", gzip(&file)), ("x.parquet.zst", zstandard(&file))] {
        assert_eq!(parse_all(compressed.0, &compressed.1, &columns("text", "score"), true).unwrap().len(), 4);
    }
    let twice = |mistake: &str| format!("x.parquet row 2: {mistake}\nx.parquet row 4: {mistake}");
    assert_eq!(read("text", "label", true).unwrap_err(), twice("field \"label\" is missing"));
    let absent = read("text", "absent", true).unwrap_err();
    let names = "text, label, score, flag, small, tags, day, raw";
    assert_eq!(absent, format!("x.parquet: no column is named \"absent\", the file has: {names}"));
    assert_eq!(read("tags", "label", true).unwrap_err(), "x.parquet: column \"tags\" is not text");
    assert_eq!(read("text", "day", true).unwrap_err(), "x.parquet: column \"day\" is not text");
    assert_eq!(read("raw", "score", true).unwrap_err(), twice("field \"raw\" is not UTF-8"));
    let mut cut = file.clone();
    cut.truncate(file.len() - 9);
    for (bytes, part) in [
        (&b"PAR1 is how it begins"[..], "not a Parquet file: "),
        (b"", "not a Parquet file: "),
        (&cut, "not a Parquet file: "),
    ] {
        let error = parse_all("x.parquet", bytes, &Columns::default(), true).unwrap_err();
        assert!(error.starts_with("x.parquet: ") && error.contains(part), "{error}");
    }
    let mut damaged = file.clone();
    damaged[4..40].fill(0xee);
    let error = parse_all("x.parquet", &damaged, &columns("text", "score"), true).unwrap_err();
    assert!(error.starts_with("x.parquet row 1: damaged Parquet: "), "{error}");
}

#[test]
fn documents_are_rows_without_labels() {
    let read = |name: &str, bytes: &[u8]| {
        parse_all(name, bytes, &Columns::default(), false).map(|rows| {
            (0..rows.len()).map(|row| format!("{}: {}", rows.place(row), rows.text(row))).collect::<Vec<_>>()
        })
    };
    assert_eq!(read("x.txt", b"one\n\n \t\ntwo\r\n").unwrap(), ["x.txt row 1: one", "x.txt row 4: two"]);
    assert_eq!(read("x.html", b"<p>Tea &amp; cake<script>x</script>").unwrap(), ["x.html row 1: Tea & cake"]);
    assert_eq!(read("x.htm.gz", &gzip(b"<p>Tea")).unwrap(), ["x.htm.gz row 1: Tea"]);
    let pages = pdf_file(&["Hello page one", "", "And three"]);
    assert_eq!(read("x.pdf", &pages).unwrap(), ["x.pdf row 1: Hello page one", "x.pdf row 3: And three"]);
    assert_eq!(read("x.pdf.zst", &zstandard(&pages)).unwrap().len(), 2);
    // Its second page has a font that is not there.
    let damaged = pdf_file(&["One", "{BROKEN}", "Three"]);
    let error = read("x.pdf", &damaged).unwrap_err();
    assert_eq!(error, "x.pdf row 2: the page is not readable: it is damaged");

    let cases: [(&str, &[u8], &str); 11] = [
        ("x.txt", b"", "x.txt: the file is empty"),
        ("x.txt", b"a\n\xc3\x28\n", "x.txt row 2: not UTF-8 (byte 2 of the file)"),
        ("x.html", b"", "x.html: the file is empty"),
        ("x.html", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "x.html: not HTML: the file is binary"),
        ("x.html", b"<p>\n\xff", "x.html row 2: not UTF-8 (byte 4 of the file)"),
        ("x.html", b"<script>1</script> ", "x.html: no text in the page"),
        ("x.pdf", b"", "x.pdf: the file is empty"),
        ("x.pdf", b"PK\x03\x04", "x.pdf: not a PDF"),
        ("x.pdf", b"%PDF-1.4\nand no more", "x.pdf: not readable as PDF: "),
        ("x.pdf", &pdf_file(&["", ""]), "x.pdf: no text on its 2 pages: pictures of text need optical"),
        ("x.pdf.gz", b"%PDF-1.4", "x.pdf.gz row 1: the file is cut off or damaged: "),
    ];
    for (name, content, part) in cases {
        let error = read(name, content).unwrap_err();
        assert!(error.starts_with(part), "{error}");
    }
    let labels = parse_all("x.txt", b"a", &Columns::default(), true).unwrap_err();
    assert!(
        labels.starts_with("x.txt: the task needs labels, and files of the format Text have none: give rows"),
        "{labels}"
    );
    let pair = Columns { pair: Some("b".into()), ..Columns::default() };
    assert!(
        parse_all("x.html", b"a", &pair, false)
            .unwrap_err()
            .starts_with("x.html: files of the format Html have no columns.pair")
    );
    let group = Columns { group: Some("b".into()), ..Columns::default() };
    assert!(
        parse_all("x.pdf", b"a", &group, false)
            .unwrap_err()
            .starts_with("x.pdf: files of the format Pdf have no columns.group")
    );
}

#[test]
fn errors_name_file_row_and_field() {
    let row = "{\"text\": \"a\", \"label\": \"b\"}\n";
    let cases: [(&str, &[u8], &str); 18] = [
        ("x.jsonl", &[row, "{\"text\": \"a\"}"].concat().into_bytes(), "x.jsonl row 2: field \"label\" is missing"),
        ("x.jsonl", b"{\"text\": [], \"label\": \"b\"}", "x.jsonl row 1: field \"text\" is not text"),
        ("x.jsonl", b"{\"text\": \"a\", \"label\": null}", "x.jsonl row 1: field \"label\" is not text"),
        ("x.jsonl", b"{\"text\": \"a\", \"label\": {\"b\": 1}}", "x.jsonl row 1: field \"label\" is not text"),
        ("x.jsonl", b"\n[1]", "x.jsonl row 2: not a JSON object"),
        ("x.jsonl", b"{", "x.jsonl row 1: not JSON"),
        ("x.jsonl", b"nonsense", "x.jsonl row 1: not JSON"),
        ("x.jsonl", b"{\"text\": \"a\", \"label\": \"b\"} {}", "x.jsonl row 1: not JSON: trailing characters"),
        ("x.jsonl", &[row.as_bytes(), b"\xff"].concat(), "x.jsonl row 2: not UTF-8 (byte 28 of the file)"),
        ("x.jsonl", b" \n\n", "x.jsonl: the file is empty"),
        ("x.csv", b"text,class\na,b\n", "x.csv row 1: no column is named \"label\", the header has: text, class"),
        ("x.csv", b"text,label\na,b\n ,b\n", "x.csv row 3: field \"text\" is empty"),
        ("x.csv", b"text,label\na,b,c\n", "x.csv row 2: "),
        ("x.csv", b"text,label\na,b\n\xff,b\n", "x.csv row 3: field \"text\" is not UTF-8"),
        ("x.csv", b"text,\xff\na,b\n", "x.csv row 1: "),
        ("x.csv", b"\n", "x.csv: the file is empty"),
        (
            "x.docx",
            b"PK",
            "has to end in .jsonl, .csv, .tsv, .parquet, .txt, .pdf or .html, each also with .gz or .zst behind it",
        ),
        ("folder.csv/x", b"", "has to end in .jsonl, .csv"),
    ];
    for (name, content, part) in cases {
        let error = texts(name, content).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn the_first_ten_mistakes_of_a_file_are_told_at_once() {
    let row = "{\"text\": \"a\", \"label\": \"b\"}\n";
    let error = texts("x.jsonl", format!("[]\n{row}{{}}\n{row}{{\n").as_bytes()).unwrap_err();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines[..2], ["x.jsonl row 1: not a JSON object", "x.jsonl row 3: field \"text\" is missing"]);
    assert!(lines.len() == 3 && lines[2].starts_with("x.jsonl row 5: not JSON: "), "{error}");
    let error = texts("x.csv", b"text,label\n ,b\na,b\na, \na,b,c\n").unwrap_err();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines[..2], ["x.csv row 2: field \"text\" is empty", "x.csv row 4: field \"label\" is empty"]);
    assert!(lines.len() == 3 && lines[2].starts_with("x.csv row 5: "), "{error}");
    let error = texts("x.jsonl", "{}\n".repeat(12).as_bytes()).unwrap_err();
    assert_eq!(
        (error.lines().count(), error.lines().last().unwrap()),
        (10, "x.jsonl row 10: field \"text\" is missing")
    );
}

#[test]
fn a_compressed_file_that_is_cut_off_or_none_is_named() {
    let lines: String =
        (0..2000_u64).map(|n| format!("{{\"text\": \"text {n} {}\", \"label\": \"x\"}}\n", n * n * 7919)).collect();
    for (name, whole) in [("x.jsonl.gz", gzip(lines.as_bytes())), ("x.jsonl.zst", zstandard(lines.as_bytes()))] {
        assert_eq!(texts(name, &whole).unwrap().len(), 2000);
        let error = texts(name, &whole[..whole.len() / 2]).unwrap_err();
        assert!(
            error.starts_with(&format!("{name} row ")) && error.contains(": the file is cut off or damaged: "),
            "{error}"
        );
        let error = texts(name, &whole[..whole.len() - 1]).unwrap_err();
        assert!(error.contains("the file is cut off or damaged"), "{error}");
        let error = texts(name, lines.as_bytes()).unwrap_err();
        assert!(error.starts_with(&format!("{name} row 1: the file is cut off or damaged: ")), "{error}");
        let csv = texts(&name.replace("jsonl", "csv"), &whole[..whole.len() / 2]).unwrap_err();
        assert!(csv.contains("the file is cut off or damaged") || csv.contains("no column"), "{csv}");
        assert!(texts(name, b"").is_err());
    }
}

#[test]
fn a_row_longer_than_64_mib_is_refused() {
    let long = "x".repeat(LONGEST_ROW + 1);
    let csv = texts("x.csv", format!("text,label\na,b\n\"{long}{}", "y".repeat(1 << 20)).as_bytes()).unwrap_err();
    assert!(csv.ends_with(": longer than 64 MiB") && csv.starts_with("x.csv row "), "{csv}");
    assert_eq!(texts("x.jsonl", format!("\n{long}").as_bytes()).unwrap_err(), "x.jsonl row 2: longer than 64 MiB");
    let text = parse_all("x.txt", long.as_bytes(), &Columns::default(), false).unwrap_err();
    assert_eq!(text, "x.txt row 1: longer than 64 MiB");
    let html = parse_all("x.html", long.as_bytes(), &Columns::default(), false).unwrap_err();
    assert_eq!(html, "x.html: longer than 64 MiB");
    // As long as is allowed.
    let text = parse_all("x.txt", &long.as_bytes()[1..], &Columns::default(), false).unwrap();
    assert_eq!(text.text(0).len(), LONGEST_ROW);
}

#[test]
fn a_given_format_goes_before_the_ending() {
    let given = of_name("s3://b/part-0001", Some(DataFormat::Csv)).unwrap();
    assert_eq!(given, (DataFormat::Csv, Compression::None));
    assert_eq!(of_name("x.txt.gz", Some(DataFormat::JsonLines)).unwrap(), (DataFormat::JsonLines, Compression::Gzip));
    assert_eq!(of_name("https://h/x.PARQUET?a=b.csv#c", None).unwrap(), (DataFormat::Parquet, Compression::None));
}
