//! GGUF files: every value and block format, files that are cut off or damaged, and real models against transformers
//! (`models/tests/golden/make_gguf.py`).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use athanor_models::weights::gguf::{Gguf, Value, names};
use rand::{Rng, SeedableRng, rngs::StdRng};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The GGUF file of a model that `scripts/fetch` has.
fn model(folder: &str, part: &str) -> PathBuf {
    let models = std::env::var_os("ATHANOR_MODELS").expect("ATHANOR_MODELS, by `. scripts/env`");
    let folder = Path::new(&models).join(folder);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|_| panic!("{}: run scripts/fetch {part}", folder.display()));
    let mut files = files.map(|file| file.unwrap().path());
    files.find(|file| file.extension().is_some_and(|ending| ending == "gguf")).expect("a GGUF file")
}

/// Writes GGUF files for tests.
struct Writer(Vec<u8>);

impl Writer {
    fn new(version: u32, tensors: u64, entries: u64) -> Self {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        Self(bytes)
    }

    fn string(mut self, text: &str) -> Self {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text.as_bytes());
        self
    }

    fn bytes(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend(bytes.as_ref());
        self
    }

    fn u32(self, value: u32) -> Self {
        self.bytes(value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.bytes(value.to_le_bytes())
    }

    fn key(self, key: &str, kind: u32) -> Self {
        self.string(key).u32(kind)
    }

    fn text(self, key: &str, value: &str) -> Self {
        self.key(key, 8).string(value)
    }

    fn number(self, key: &str, value: u32) -> Self {
        self.key(key, 4).u32(value)
    }

    /// The entry of a tensor; `shape` with the innermost dimension first.
    fn tensor(self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        let entry = shape.iter().fold(self.string(name).u32(shape.len() as u32), |entry, size| entry.u64(*size));
        entry.u32(kind).u64(offset)
    }

    fn data(mut self, bytes: &[u8]) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32), 0);
        self.bytes(bytes)
    }

    /// The error of a file with these bytes, without the file's name; or the file.
    fn open(&self) -> Result<(Gguf, tempfile::NamedTempFile), String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &self.0).unwrap();
        match Gguf::open(file.path()) {
            Ok(gguf) => Ok((gguf, file)),
            Err(error) => {
                let text = error.to_string();
                let name = file.path().display().to_string();
                assert!(text.starts_with(&name), "{text} does not name its file");
                Err(text.strip_prefix(&format!("{name}: ")).unwrap().to_owned())
            }
        }
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn every_block_format_is_that_of_the_python_package_bit_for_bit() {
    let gguf = Gguf::open(&golden("blocks.gguf")).unwrap();
    let expected = std::fs::read(golden("blocks.f32")).unwrap();
    let mut rest = expected.as_slice();
    for tensor in gguf.tensors() {
        assert_eq!(tensor.name, tensor.format.name());
        let values = gguf.read(tensor).unwrap();
        assert_eq!(values.len() as i64, tensor.shape.iter().product::<i64>());
        let (own, other) = rest.split_at(values.len() * 4);
        for (index, (value, bytes)) in values.iter().zip(own.chunks_exact(4)).enumerate() {
            let expected = f32::from_le_bytes(bytes.try_into().unwrap());
            assert_eq!(value.to_bits(), expected.to_bits(), "{} {index}: {value} is not {expected}", tensor.name);
        }
        rest = other;
    }
    assert_eq!((gguf.tensors().len(), rest.len()), (15, 0));
}

#[test]
fn values_of_every_type_are_read() {
    let gguf = Gguf::open(&golden("blocks.gguf")).unwrap();
    let metadata = gguf.metadata();
    for (key, value) in [
        ("u8", Value::Unsigned(255)),
        ("i8", Value::Signed(-128)),
        ("u16", Value::Unsigned(65_535)),
        ("i16", Value::Signed(-32_768)),
        ("u32", Value::Unsigned(u32::MAX.into())),
        ("i32", Value::Signed(i32::MIN.into())),
        ("u64", Value::Unsigned(u64::MAX)),
        ("i64", Value::Signed(i64::MIN)),
        ("f32", Value::F32(1e-5)),
        ("f64", Value::F64(1e-5)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("ä\n漢".into())),
        ("strings", Value::Array(["", "x", "漢"].map(|text| Value::String(text.into())).into())),
    ] {
        assert_eq!(metadata.get(&format!("value.{key}")), Some(&value), "{key}");
    }
    assert_eq!(metadata.float("value.f32").unwrap(), Some(1e-5), "the number that was meant");
    assert_eq!(metadata.integers("value.integers").unwrap(), Some(vec![1, 2, 3]));
    assert_eq!(metadata.strings("value.missing").unwrap(), None);
    let error = metadata.integer("value.string").unwrap_err().to_string();
    assert!(
        error.ends_with("field value.string: must be a whole number that is not negative, but is a string"),
        "{error}"
    );
    assert!(metadata.integer("value.i8").is_err());
}

/// Arrays of arrays of one number, `depth` of them.
fn nested(depth: usize) -> Writer {
    let mut file = Writer::new(3, 0, 1).key("nested", 9);
    for _ in 1..depth {
        file = file.u32(9).u64(1);
    }
    file.u32(0).u64(1).bytes([7])
}

#[test]
fn older_files_and_nested_arrays_are_read() {
    let (gguf, _file) = nested(4).open().unwrap();
    let inner = Value::Array(vec![Value::Unsigned(7)]);
    let expected = (1..4).fold(inner, |inner, _| Value::Array(vec![inner]));
    assert_eq!(gguf.metadata().get("nested"), Some(&expected));

    let file = Writer::new(2, 1, 1).number("general.alignment", 32).tensor("x", &[2, 3], 0, 0);
    let (gguf, _file) = file.data(&floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])).open().unwrap();
    assert_eq!(gguf.tensors()[0].shape, [3, 2]);
    assert_eq!(gguf.read(&gguf.tensors()[0]).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
}

#[test]
fn what_cannot_be_is_refused_with_its_place() {
    let one =
        |shape: &[u64], kind: u32, offset: u64| Writer::new(3, 1, 0).tensor("x", shape, kind, offset).data(&[0; 256]);
    let huge = u64::MAX / 2;
    for (file, expected) in [
        (Writer(b"GGUX____".to_vec()), "offset 0: not a GGUF file"),
        (Writer(b"GG".to_vec()), "offset 0: the file ends within its header, after 2 bytes"),
        (Writer::new(4, 0, 0), "offset 4: version 4 of GGUF; known are 2 and 3"),
        (Writer::new(3_u32.swap_bytes(), 0, 0), "offset 4: a big-endian file, which is not supported"),
        (Writer::new(3, huge, 0), &format!("offset 8: {huge} tensors do not fit into 8 bytes")),
        (Writer::new(3, 0, 1_000_000), "offset 16: 1000000 metadata entries do not fit into 0 bytes"),
        (Writer::new(3, 0, 1).string("a").u32(8).u64(huge), &format!("offset 37: a string of {huge} bytes")),
        (Writer::new(3, 0, 1).key("a", 9).u32(4).u64(huge), &format!("offset 41: {huge} array elements do not fit")),
        (Writer::new(3, 0, 1).key("a", 13).u64(0), "offset 37: key a: unknown type 13 of a value"),
        (Writer::new(3, 0, 1).key("a", 7).bytes([2]), "offset 37: key a: 2 is not a boolean"),
        (Writer::new(3, 0, 1).u64(2).bytes([0xff, 0xfe]).u64(0), "offset 24: a key is not UTF-8"),
        (Writer::new(3, 0, 2).number("a", 1).number("a", 2), "key a is there twice"),
        (nested(5), "key nested: more than 4 arrays inside each other"),
        (Writer::new(3, 0, 1).number("general.alignment", 24), "field general.alignment: 24 is not a power of two"),
        (one(&[32], 15, 0), "tensor x: offset 24: its type Q8_K is not supported; supported are F32, F16, BF16, Q4_0"),
        (one(&[32], 77, 0), "tensor x: offset 24: its type number 77 is not supported"),
        (one(&[33], 2, 0), "tensor x: offset 24: rows of 33 are not whole Q4_0 blocks of 32"),
        (one(&[32, 0], 0, 0), "tensor x: offset 24: impossible shape [32, 0]"),
        (one(&[1 << 40, 1 << 40], 0, 0), "tensor x: offset 24: impossible shape"),
        (one(&[1 << 40], 0, 0), "tensor x: offset 24: shape [1099511627776] is larger than the file"),
        (one(&[64], 0, 32), "tensor x: lies at bytes 96 to 352, but the file has"),
        (one(&[1], 0, 3), "tensor x: its offset 3 is not a multiple of 32"),
        (one(&[1], 0, u64::MAX - 31), "tensor x: its offset"),
        (one(&[1; 5], 0, 0), "offset 24: tensor x: 5 dimensions; possible are 1 to 4"),
        (Writer::new(3, 2, 0).tensor("x", &[1], 0, 0).tensor("x", &[1], 0, 0).data(&[0; 4]), "tensor x is there twice"),
    ] {
        let error = file.open().err().unwrap_or_else(|| panic!("{expected} is accepted"));
        assert!(error.starts_with(expected) || error.ends_with(expected), "{error:?} is not {expected:?}");
    }
}

/// Reads everything of a file.
fn read_all(path: &Path) -> Result<(), athanor_models::LoadError> {
    let gguf = Gguf::open(path)?;
    for tensor in gguf.tensors() {
        gguf.read(tensor)?;
    }
    gguf.config()?;
    gguf.weights().try_for_each(|weight| weight.map(drop))
}

#[test]
fn a_file_that_is_cut_off_or_damaged_is_an_error_and_no_crash() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let whole = std::fs::read(golden("blocks.gguf")).unwrap();
    let gguf = Gguf::open(&golden("blocks.gguf")).unwrap();
    let end = gguf.tensors().iter().map(|tensor| tensor.offset + tensor.bytes).max().unwrap();
    let header = gguf.tensors().iter().map(|tensor| tensor.offset).min().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    for round in 0..200 {
        // The last ones are around the last byte of data.
        let length = if round < 190 { random.random_range(0..whole.len() as u64) } else { end + round - 195 };
        std::fs::write(file.path(), &whole[..(length as usize).min(whole.len())]).unwrap();
        let opened = Gguf::open(file.path());
        assert_eq!(opened.is_ok(), length >= end, "{length} of {} bytes, seed {seed}", whole.len());
        if let Ok(gguf) = opened {
            gguf.tensors().iter().for_each(|tensor| drop(gguf.read(tensor).unwrap()));
        }
    }
    for source in [golden("blocks.gguf"), golden("sentencepiece.gguf")] {
        let whole = std::fs::read(source).unwrap();
        let header = (header as usize).min(whole.len());
        for _ in 0..2_000 {
            let mut damaged = whole.clone();
            for _ in 0..random.random_range(1..4) {
                damaged[random.random_range(0..header)] = random.random();
            }
            std::fs::write(file.path(), &damaged).unwrap();
            if let Err(error) = read_all(file.path()) {
                assert!(error.to_string().starts_with(&file.path().display().to_string()), "{error}, seed {seed}");
            }
        }
    }
}

/// A tiny file of an architecture with one layer: two heads of four, one key head.
fn tiny(architecture: &str) -> Writer {
    let key = |name: &str| format!("{architecture}.{name}");
    let numbers = |count: usize| floats(&(0..count).map(|i| i as f32).collect::<Vec<_>>());
    let mut file = Writer::new(3, 4, 9)
        .text("general.architecture", architecture)
        .number(&key("block_count"), 1)
        .number(&key("context_length"), 64)
        .number(&key("embedding_length"), 8)
        .number(&key("feed_forward_length"), 16)
        .number(&key("attention.head_count"), 2)
        .number(&key("attention.head_count_kv"), 1)
        .key(&key("attention.layer_norm_rms_epsilon"), 6)
        .bytes(1e-6_f32.to_le_bytes())
        .number("tokenizer.ggml.eos_token_id", 3);
    let shapes: [(&str, &[u64]); 4] = [
        ("token_embd.weight", &[8, 10]),
        ("blk.0.attn_q.weight", &[8, 8]),
        ("blk.0.attn_k.weight", &[8, 4]),
        ("blk.0.attn_q.bias", &[8]),
    ];
    let mut data = Vec::new();
    for (name, shape) in shapes {
        file = file.tensor(name, shape, 0, data.len() as u64);
        data.extend(numbers(shape.iter().product::<u64>() as usize));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.data(&data)
}

#[test]
fn llama_files_have_their_query_and_key_rows_put_back() {
    for (architecture, permuted) in [("llama", true), ("mistral", true), ("qwen2", false), ("qwen3", false)] {
        let (gguf, _file) = tiny(architecture).open().unwrap();
        let weights: BTreeMap<_, _> =
            gguf.weights().map(|w| w.map(|w| (w.name.clone(), w))).collect::<Result<_, _>>().unwrap();
        let names: Vec<&str> = weights.keys().map(String::as_str).collect();
        let layer = |part: &str| format!("model.layers.0.self_attn.{part}");
        let parts = ["k_proj.weight", "q_proj.bias", "q_proj.weight"].map(layer);
        let [key, bias, query] = parts.each_ref().map(String::as_str);
        assert_eq!(names, ["model.embed_tokens.weight", key, bias, query]);
        // A head's rows are stored 0, half, 1, half + 1: rows 0 2 1 3 of each head come out.
        let order = if permuted { [0, 2, 1, 3, 4, 6, 5, 7] } else { [0, 1, 2, 3, 4, 5, 6, 7] };
        let query = &weights[&layer("q_proj.weight")];
        let expected: Vec<f32> =
            order.iter().flat_map(|row| (0..8).map(move |column| (row * 8 + column) as f32)).collect();
        assert_eq!(query.read().unwrap(), expected, "{architecture}");
        let bias: Vec<f32> = order.map(|row| row as f32).to_vec();
        assert_eq!(weights[&layer("q_proj.bias")].read().unwrap(), bias, "{architecture}");
        assert_eq!(weights[&layer("k_proj.weight")].read().unwrap(), expected[..32], "{architecture}");
        let tensor = query.tensor(Kind::Float, Device::Cpu).unwrap();
        assert!(tensor.equal(&Tensor::from_slice(&expected).reshape([8, 8])), "{architecture}");
        let narrow = query.tensor(Kind::BFloat16, Device::Cpu).unwrap();
        assert_eq!((narrow.kind(), narrow.to_kind(Kind::Float).equal(&tensor)), (Kind::BFloat16, true));
    }
}

#[test]
fn a_configuration_has_the_fields_of_hugging_face() {
    let (gguf, _file) = tiny("llama").open().unwrap();
    let expected = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 8,
        "intermediate_size": 16, "max_position_embeddings": 64, "num_attention_heads": 2, "num_hidden_layers": 1,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true, "vocab_size": 10,
        "head_dim": 4, "attention_bias": true, "mlp_bias": false, "eos_token_id": 3,
    });
    assert_eq!(gguf.config().unwrap(), expected);
    assert_eq!(gguf.generation_config().unwrap(), serde_json::json!({"eos_token_id": 3}));
    let (qwen, _file) = tiny("qwen2").open().unwrap();
    let config = qwen.config().unwrap();
    assert_eq!(
        (&config["model_type"], config.get("head_dim"), config.get("attention_bias")),
        (&"qwen2".into(), None, None)
    );

    let (other, _file) = tiny("gemma").open().unwrap();
    let error = other.config().unwrap_err().to_string();
    assert!(
        error.contains("general.architecture: \"gemma\" is not supported; supported are llama, mistral"),
        "{error}"
    );
    let (without, _file) = Writer::new(3, 0, 1).text("general.architecture", "llama").open().unwrap();
    let error = without.config().unwrap_err().to_string();
    assert!(error.contains("field llama.embedding_length: missing"), "{error}");
    let unknown =
        Writer::new(3, 1, 1).text("general.architecture", "llama").tensor("blk.0.ffn_gate_exps.weight", &[1], 0, 0);
    let (unknown, _file) = unknown.data(&[0; 4]).open().unwrap();
    let error = unknown.weights().next().unwrap().unwrap_err().to_string();
    assert!(error.contains("tensor blk.0.ffn_gate_exps.weight: the llama family has no such tensor"), "{error}");
    assert_eq!(names::hugging_face("blk.12.ffn_down.weight").unwrap(), "model.layers.12.mlp.down_proj.weight");
    assert_eq!(names::hugging_face("blk.x.ffn_down.weight"), None);
}

/// Compares configuration and all weights with what transformers made of the same file.
fn compare(file: &Path, name: &str) {
    let expected: serde_json::Value = serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap();
    let gguf = Gguf::open(file).unwrap();
    let config = gguf.config().unwrap();
    for (field, value) in expected["config"].as_object().unwrap() {
        match (value.as_f64(), config[field].as_f64()) {
            // transformers shows the FP32 number's digits.
            (Some(value), Some(own)) => assert_eq!(own as f32, value as f32, "{field}"),
            _ => assert_eq!(&config[field], value, "{field}"),
        }
    }
    let mut digests = BTreeMap::new();
    for weight in gguf.weights() {
        let weight = weight.unwrap();
        let values = weight.read().unwrap();
        let mut hasher = Sha256::new();
        values.chunks(1 << 16).for_each(|chunk| hasher.update(floats(chunk)));
        let digest: String = hasher.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        digests.insert(weight.name, serde_json::Value::from(digest));
    }
    let mut expected = expected["weights"].as_object().unwrap().clone();
    if config["tie_word_embeddings"] == true {
        expected.remove("lm_head.weight");
    }
    assert_eq!(digests.len(), expected.len());
    for (name, digest) in &expected {
        assert_eq!(digests.get(name), Some(digest), "{name}");
    }
}

#[test]
fn smollm2_has_the_weights_that_transformers_loads() {
    compare(&model("smollm2-135m", "smollm2"), "smollm2.json");
}

/// `cargo test --release -p athanor-models --test gguf -- --ignored`
#[test]
#[ignore = "needs scripts/fetch qwen-coder-0.5b"]
fn qwen_has_the_weights_that_transformers_loads() {
    compare(&model("qwen2.5-coder-0.5b", "qwen-coder-0.5b"), "qwen-coder-0.5b.json");
}
