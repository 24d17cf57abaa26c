use std::{future::ready, sync::atomic::Ordering, time::Duration};

use athanor_contract::serve::ServeLimits;
use axum::http::HeaderMap;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream as streams};
use tonic::{Code, transport::server::TcpIncoming};

use super::{
    protocol::{
        InferTensorContents, ModelStreamInferResponse,
        grpc_inference_service_client::GrpcInferenceServiceClient,
        grpc_inference_service_server::GrpcInferenceServiceServer,
        infer_parameter::ParameterChoice::{self, BoolParam, DoubleParam, Int64Param, StringParam},
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    *,
};
use crate::test_support::{self, Gate, shout, until};

fn limits() -> ServeLimits {
    ServeLimits { max_inputs: 4, queue_inputs: 8, max_batch_inputs: 8, ..ServeLimits::default() }
}

fn writer() -> (Arc<Service>, Arc<Gate>) {
    test_support::language_model(limits())
}

fn input(name: &str, datatype: &str, shape: &[i64], contents: InferTensorContents) -> InferInputTensor {
    let (name, datatype, shape) = (name.into(), datatype.into(), shape.into());
    InferInputTensor { name, datatype, shape, parameters: Default::default(), contents: Some(contents) }
}

fn texts(name: &str, texts: &[&str]) -> InferInputTensor {
    let bytes_contents = texts.iter().map(|text| Bytes::copy_from_slice(text.as_bytes())).collect();
    let contents = InferTensorContents { bytes_contents, ..Default::default() };
    input(name, "BYTES", &[texts.len() as i64], contents)
}

fn request(model: &str, id: &str, inputs: Vec<InferInputTensor>) -> ModelInferRequest {
    ModelInferRequest { model_name: model.into(), id: id.into(), inputs, ..Default::default() }
}

/// A request whose answer is `answer`, by the most probable tokens.
fn ask(id: &str, answer: &str, parameters: &[(&str, ParameterChoice)]) -> ModelInferRequest {
    let mut asked = request("writer", id, vec![texts("text_input", &[&format!("[{answer}]")])]);
    set(&mut asked, &[("temperature", Int64Param(0))]);
    set(&mut asked, parameters);
    asked
}

fn set(request: &mut ModelInferRequest, parameters: &[(&str, ParameterChoice)]) {
    let parameter = |choice: &ParameterChoice| protocol::InferParameter { parameter_choice: Some(choice.clone()) };
    request.parameters.extend(parameters.iter().map(|(name, choice)| ((*name).to_owned(), parameter(choice))));
}

/// Text, finish reason, and tokens of prompt and answer.
fn shown(response: &ModelInferResponse) -> (String, String, u64, u64) {
    let (text, ending) = generation::decode(response).unwrap();
    let ending = ending.unwrap();
    (text, ending.finish_reason, ending.prompt_tokens, ending.completion_tokens)
}

#[tokio::test]
async fn texts_become_vectors() {
    let service = test_support::embedding_model();
    let mut asked = request("vectors", "7", vec![texts("text", &["abc de", "x"])]);
    let response = answers::whole(&service, &asked, &HeaderMap::new()).await.unwrap();
    assert_eq!((&*response.id, &*response.model_version, response.outputs.len()), ("7", "vectors-1", 1));
    assert_eq!((&*response.outputs[0].name, &*response.outputs[0].datatype), ("embedding", "FP32"));
    assert_eq!(response.outputs[0].shape, [2, 2]);
    let expected = [3.0, 2.0, 1.0, 0.0];
    assert_eq!(response.outputs[0].contents.as_ref().unwrap().fp32_contents, expected);
    assert_eq!(generation::reported_tokens(&response), Some(3));

    asked.inputs[0].contents = None;
    asked.raw_input_contents = vec![Bytes::from_static(b"\x06\0\0\0abc de\x01\0\0\0x")];
    let response = answers::whole(&service, &asked, &HeaderMap::new()).await.unwrap();
    assert_eq!(response.outputs[0].contents, None);
    assert_eq!(contents::output_floats(&response, "embedding").unwrap(), expected);

    let mut no_output = request("vectors", "", vec![texts("text", &["a"])]);
    no_output.outputs = vec![InferRequestedOutputTensor { name: "label".into(), ..Default::default() }];
    let mut old = request("vectors", "", vec![texts("text", &["a"])]);
    old.model_version = Some("vectors-0".into());
    for (wrong, code, part) in [
        (no_output, Code::InvalidArgument, "\"embedding\""),
        (old, Code::NotFound, "vectors-0"),
        (request("other", "", Vec::new()), Code::NotFound, "\"other\""),
        (request("vectors", "", vec![texts("text", &["a"; 4])]), Code::InvalidArgument, "at most 3"),
        (request("vectors", "", vec![texts("text", &["a", ""])]), Code::InvalidArgument, "input 1 is empty"),
        (request("vectors", "", vec![texts("text_input", &["a"])]), Code::InvalidArgument, "\"text_input\""),
    ] {
        let status = answers::whole(&service, &wrong, &HeaderMap::new()).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(part), "{part}: {status}");
    }
}

#[tokio::test]
async fn parameters_come_as_parameters_inputs_or_json() {
    let (service, _) = writer();
    let whole = answers::whole(&service, &ask("7", "hello", &[]), &HeaderMap::new()).await.unwrap();
    // The prompt is seven bytes and a token that begins the answer; the token that ends the answer is one of it.
    assert_eq!(shown(&whole), ("hello".into(), "stop".into(), 8, 6));
    assert_eq!((whole.outputs[0].shape.as_slice(), &*whole.id), ([1].as_slice(), "7"));

    let messages = r#"[{"role": "user", "content": "[hi]"}]"#;
    let mut chat = request("writer", "", vec![texts("messages", &[messages])]);
    set(&mut chat, &[("temperature", DoubleParam(0.0))]);
    let chat = answers::whole(&service, &chat, &HeaderMap::new()).await.unwrap();
    assert_eq!(shown(&chat), ("hi".into(), "stop".into(), "user: [hi]\n".len() as u64 + 1, 3));

    let mut by_input = ask("", "hello", &[]);
    let two = InferTensorContents { int_contents: vec![2], ..Default::default() };
    by_input.inputs.push(input("max_tokens", "INT32", &[1, 1], two));
    let mut stop_words = ask("", "hello", &[]);
    stop_words.inputs.push(texts("stop_words", &["", "x", "ll"]));
    let vllm = r#"{"max_tokens": "2", "top_p": "0.9"}"#;
    for (asked, text, reason) in [
        (ask("", "hello", &[("max_tokens", Int64Param(2))]), "he", "length"),
        (by_input, "he", "length"),
        (ask("", "hello", &[("sampling_parameters", StringParam(vllm.into()))]), "he", "length"),
        (ask("", "hello", &[("stop", StringParam("lo".into()))]), "hel", "stop"),
        (stop_words, "he", "stop"),
        (ask("", "hello", &[("sequence_id", Int64Param(1)), ("priority", Int64Param(1))]), "hello", "stop"),
        (ask("", "hello", &[("exclude_input_in_output", BoolParam(true))]), "hello", "stop"),
        (ask("", "hello", &[("stream", BoolParam(false))]), "hello", "stop"),
    ] {
        let response = answers::whole(&service, &asked, &HeaderMap::new()).await.unwrap();
        let (found, found_reason, ..) = shown(&response);
        assert_eq!((&*found, &*found_reason), (text, reason), "{asked:?}");
    }
}

#[tokio::test]
async fn wrong_requests_to_a_language_model_are_refused_with_a_reason() {
    let (service, gate) = writer();
    let wrong = |name: &str, choice: ParameterChoice| ask("", "hello", &[(name, choice)]);
    let with = |inputs: Vec<InferInputTensor>| request("writer", "", inputs);
    let mut no_output = ask("", "a", &[]);
    no_output.outputs = vec![InferRequestedOutputTensor { name: "text".into(), ..Default::default() }];
    let (tool, user) = (r#"[{"role": "tool", "content": "x"}]"#, r#"[{"role": "user", "content": "x"}]"#);
    for (asked, part) in [
        (with(Vec::new()), "one of the inputs"),
        (with(vec![texts("text_input", &["a"]), texts("messages", &[user])]), "one of the inputs"),
        (with(vec![texts("text_input", &["a", "b"])]), "one element"),
        (with(vec![texts("text_input", &[""])]), "input 0 is empty"),
        (with(vec![texts("messages", &["{"])]), "messages: not JSON"),
        (with(vec![texts("messages", &["[]"])]), "the list is empty"),
        (with(vec![texts("messages", &[tool])]), "cannot be rendered"),
        (with(vec![texts("text_input", &[&"x".repeat(300)])]), "exceed the context"),
        (wrong("top_p", DoubleParam(2.0)), "top_p: 2 is not between"),
        (wrong("max_tokens", Int64Param(0)), "max_tokens: 0 is less than 1"),
        (wrong("max_tokens", StringParam("many".into())), "max_tokens"),
        (wrong("n", Int64Param(2)), "one answer"),
        (wrong("model", StringParam("writer".into())), "model_name"),
        (wrong("beam_width", Int64Param(2)), "no such parameter"),
        (wrong("stream", BoolParam(true)), "ModelStreamInfer"),
        (wrong("exclude_input_in_output", BoolParam(false)), "never begins with its prompt"),
        (wrong("sampling_parameters", StringParam(r#"{"temperature": 1}"#.into())), "given twice"),
        (wrong("sampling_parameters", StringParam("7".into())), "a JSON object"),
        (no_output, "\"text_output\""),
    ] {
        let before = gate.batches.load(Ordering::SeqCst);
        let status = answers::whole(&service, &asked, &HeaderMap::new()).await.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(part), "{part}: {status}");
        assert_eq!(gate.batches.load(Ordering::SeqCst), before, "the model ran: {part}");
    }
    let status = answers::whole(&service, &ask("", "ab!", &[]), &HeaderMap::new()).await.unwrap_err();
    assert_eq!((status.code(), status.message().contains("out of memory")), (Code::Internal, true), "{status}");
    assert!(!status.metadata().contains_key("x-athanor-failure"));
    let status = answers::whole(&service, &ask("", "ab?", &[]), &HeaderMap::new()).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert_eq!(status.metadata().get("x-athanor-failure").unwrap(), "not_finite");
    let mut both = ask("", "hello", &[]);
    both.raw_input_contents = vec![Bytes::from_static(b"\x01\0\0\0a")];
    assert_eq!(answers::whole(&service, &both, &HeaderMap::new()).await.unwrap_err().code(), Code::InvalidArgument);
    service.drain();
    assert_eq!(
        answers::whole(&service, &ask("", "a", &[]), &HeaderMap::new()).await.unwrap_err().code(),
        Code::Unavailable
    );
}

fn opened(service: &Arc<Service>, ready: &Readiness) -> stream::Opened {
    let (service, ready) = (service.clone(), ready.clone());
    stream::Opened { service, request_id: "r".into(), incoming: Default::default(), ready, capacity: None }
}

/// Whether a response is the last one to its request.
fn is_last(response: &ModelStreamInferResponse) -> bool {
    generation::is_final(response.infer_response.as_ref().unwrap())
}

const STREAM: (&str, ParameterChoice) = ("stream", BoolParam(true));

#[tokio::test]
async fn requests_of_a_stream_are_answered_piece_by_piece_or_whole() {
    let (service, _) = writer();
    let requests = [
        ask("a", "abdc", &[STREAM, ("stop", StringParam("d!".into()))]),
        ask("b", "whole", &[]),
        ask("c", "hello", &[STREAM, ("top_p", DoubleParam(2.0))]),
        ask("d", "ab?", &[STREAM]),
    ];
    let responses = stream::respond(opened(&service, &Readiness::new()), streams::iter(requests.map(Ok)));
    let responses: Vec<_> = responses.try_collect().await.unwrap();
    let of = |id: &str| -> Vec<&ModelStreamInferResponse> {
        let own = |response: &&ModelStreamInferResponse| response.infer_response.as_ref().unwrap().id == id;
        responses.iter().filter(own).collect()
    };
    let read = |response: &&ModelStreamInferResponse| {
        let (text, ending) = generation::decode(response.infer_response.as_ref().unwrap()).unwrap();
        (text, ending.map(|ending| (ending.finish_reason, ending.prompt_tokens, ending.completion_tokens)))
    };
    // "d" is held back until it is clear that no "!" follows.
    let end = Some(("stop".to_owned(), 7, 5));
    let pieces: Vec<_> = of("a").iter().map(read).collect();
    assert_eq!(pieces, [("a".into(), None), ("b".into(), None), ("dc".into(), None), (String::new(), end)]);
    assert_eq!(of("a").iter().map(|one| is_last(one)).collect::<Vec<_>>(), [false, false, false, true]);
    let whole: Vec<_> = of("b").iter().map(read).collect();
    assert_eq!(whole, [("whole".into(), Some(("stop".into(), 8, 6)))]);
    assert!(is_last(of("b")[0]));
    assert_eq!(of("c").len(), 1);
    assert!(of("c")[0].error_message.starts_with("top_p: 2 is not"), "{:?}", of("c"));
    let (broken, pieces) = of("d").split_last().map(|(last, rest)| (*last, rest.len())).unwrap();
    assert_eq!((pieces, broken.error_message.contains("not finite"), is_last(broken)), (2, true, true));
}

#[tokio::test]
async fn errors_are_statuses_for_clients_that_ask_for_it() {
    let (service, _) = writer();
    let mut opened = opened(&service, &Readiness::new());
    opened.incoming.insert(stream::STATUS_ERRORS, "true".parse().unwrap());
    let requests = streams::iter([Ok(ask("a", "hello", &[STREAM, ("top_p", DoubleParam(2.0))]))]);
    let status = stream::respond(opened, requests).next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

/// Holds the gate until the sender is dropped.
async fn hold(gate: Arc<Gate>) -> std::sync::mpsc::Sender<()> {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _guard = gate.lock.lock().unwrap();
        locked.send(()).unwrap();
        let _ = held.recv();
    });
    is_locked.await.unwrap();
    release
}

#[tokio::test]
async fn a_stream_that_is_dropped_cancels_its_answers() {
    let (service, gate) = writer();
    let load = || service.generator().unwrap().load();
    for more in [vec![], vec![STREAM]] {
        let release = hold(gate.clone()).await;
        let before = gate.batches.load(Ordering::SeqCst);
        let asked = ask("a", &"x".repeat(100), &more);
        let requests = streams::once(ready(Ok(asked))).chain(streams::pending());
        let mut responses = stream::respond(opened(&service, &Readiness::new()), requests);
        let reading = tokio::spawn(async move { responses.next().await });
        until("the model runs", || gate.batches.load(Ordering::SeqCst) > before).await;
        reading.abort();
        assert!(reading.await.unwrap_err().is_cancelled());
        drop(release);
        until("nothing runs", || load().running == 0 && load().waiting == 0 && load().used_blocks == 0).await;
        assert!(gate.batches.load(Ordering::SeqCst) < before + 10, "100 tokens were not generated");
    }
}

#[tokio::test]
async fn a_process_that_leaves_completes_answers_and_reads_no_more_requests() {
    let (service, gate) = writer();
    let ready = Readiness::new();
    ready.set(true);
    let release = hold(gate.clone()).await;
    let requests = streams::once(std::future::ready(Ok(ask("a", "hello", &[STREAM])))).chain(streams::pending());
    let responses = stream::respond(opened(&service, &ready), requests);
    let reading = tokio::spawn(responses.collect::<Vec<_>>());
    until("the model runs", || gate.batches.load(Ordering::SeqCst) > 0).await;
    ready.set(false);
    drop(release);
    let mut responses = tokio::time::timeout(Duration::from_secs(5), reading).await.unwrap().unwrap();
    let status = responses.pop().unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let text = |response: ModelStreamInferResponse| generation::decode(&response.infer_response.unwrap()).unwrap().0;
    let texts: Vec<String> = responses.into_iter().map(|response| text(response.unwrap())).collect();
    assert_eq!(texts.concat(), "hello");
}

#[tokio::test]
async fn the_protocol_is_served_with_metadata_and_streams() {
    let (service, _) = writer();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(GrpcInferenceServiceServer::new(Inference::new(service, Readiness::new())));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    let mut client = GrpcInferenceServiceClient::connect(format!("http://{address}")).await.unwrap();

    let asked = ModelMetadataRequest { name: "writer".into(), version: None };
    let metadata = client.model_metadata(asked).await.unwrap().into_inner();
    let names: Vec<&str> = metadata.inputs.iter().map(|input| &*input.name).collect();
    assert_eq!((names[..2].to_vec(), &*metadata.outputs[0].name), (vec!["text_input", "messages"], "text_output"));

    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let requests = streams::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let response = client.model_stream_infer(requests).await.unwrap();
    assert_eq!(response.metadata().get("x-athanor-revision").unwrap(), "writer-1");
    let mut responses = response.into_inner();
    // A request is answered before the next one is sent.
    for (id, answer) in [("1", "one"), ("2", "two")] {
        sender.send(ask(id, answer, &[STREAM])).unwrap();
        let mut text = String::new();
        loop {
            let response = responses.message().await.unwrap().unwrap();
            let inner = response.infer_response.as_ref().unwrap();
            assert_eq!(&*inner.id, id);
            text.push_str(&generation::decode(inner).unwrap().0);
            if is_last(&response) {
                break;
            }
        }
        assert_eq!(text, answer);
    }
    drop(sender);
    assert_eq!(responses.message().await.unwrap(), None);
}

#[tokio::test]
async fn an_adapter_is_chosen_by_the_models_name_and_as_a_revision_by_metadata() {
    let (service, _) = writer();
    service.load_adapter("loud", shout()).await.unwrap();
    let answer = async |model: &str, metadata: Option<&str>| {
        let mut asked = ask("", "abc", &[]);
        asked.model_name = model.into();
        let mut incoming = HeaderMap::new();
        incoming.extend(metadata.map(|name| (headers::ADAPTER, headers::text(name))));
        let response = answers::whole(&service, &asked, &incoming).await?;
        Ok::<_, Status>((shown(&response).0, response.model_name, response.model_version))
    };
    let expect = |text: &str, model: &str, version: &str| (text.to_owned(), model.to_owned(), version.to_owned());
    let own = &service.revision;
    assert_eq!(answer("writer", None).await.unwrap(), expect("abc", "writer", own));
    assert_eq!(answer("loud", None).await.unwrap(), expect("ABC", "loud", own));
    assert_eq!(answer("writer", Some("loud")).await.unwrap(), expect("ABC", "writer", "loud"));
    let status = answer("writer", Some("gone")).await.unwrap_err();
    // By the name a router sees that the adapter is not loaded here.
    assert_eq!(
        (status.code(), status.metadata().get("x-athanor-revision").unwrap().to_str().unwrap()),
        (Code::NotFound, &**own)
    );
    assert_eq!(answer("gone", None).await.unwrap_err().code(), Code::NotFound);
}
