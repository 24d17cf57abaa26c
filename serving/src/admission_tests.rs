//! Listeners against clients that are slow, silent, or many.

use std::{convert::Infallible, future::poll_fn, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use athanor_telemetry::Readiness;
use axum::{
    Router,
    body::{Body, HttpBody},
    http::{HeaderMap, Request, Response, StatusCode},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use hyper_util::{client::legacy, rt::TokioExecutor};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Channel};

use crate::{
    api::{
        inference::{
            Inference,
            protocol::{
                InferTensorContents, ModelInferRequest, ServerLiveRequest,
                grpc_inference_service_client::GrpcInferenceServiceClient,
                grpc_inference_service_server::GrpcInferenceServiceServer, model_infer_request::InferInputTensor,
            },
        },
        openai,
    },
    capacity::Capacity,
    lifecycle::{Bounds, accept, listen},
    service::Service,
    test_support::{self, until},
    tls::Protocol,
};

const SOON: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(5);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A frame of settings that changes none.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

type Client = GrpcInferenceServiceClient<Channel>;

/// A listener until it is dropped.
struct Listener {
    address: SocketAddr,
    _task: JoinSet<()>,
}

async fn listening(bounds: Bounds, app: Router) -> Listener {
    let listener = listen("127.0.0.1", 0).await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut task = JoinSet::new();
    task.spawn(accept(listener, app, bounds, None, CancellationToken::new()));
    Listener { address, _task: task }
}

/// The protocol of gRPC.
async fn grpc(bounds: Bounds, service: Arc<Service>) -> Listener {
    let inference = GrpcInferenceServiceServer::new(Inference::new(service, Readiness::new()));
    listening(bounds, tonic::service::Routes::new(inference).prepare().into_axum_router()).await
}

impl Listener {
    async fn client(&self) -> Client {
        Client::connect(format!("http://{}", self.address)).await.unwrap()
    }

    /// Calls a method with whatever body.
    async fn call(&self, method: &str, body: Body) -> Response<Body> {
        let client = legacy::Client::builder(TokioExecutor::new()).http2_only(true).build_http();
        let uri = format!("http://{}/inference.GRPCInferenceService/{method}", self.address);
        let request = Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        let response = timeout(PATIENCE, client.request(request.body(body).unwrap())).await.expect("an answer");
        response.unwrap().map(Body::new)
    }
}

async fn is_live(client: &mut Client) -> bool {
    let answer = client.server_live(ServerLiveRequest {});
    timeout(PATIENCE, answer).await.is_ok_and(|answer| answer.is_ok())
}

fn infer(text: &str) -> ModelInferRequest {
    let bytes_contents = vec![Bytes::copy_from_slice(text.as_bytes())];
    let input = InferInputTensor {
        name: "text".into(),
        datatype: "BYTES".into(),
        shape: vec![1],
        contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
        ..Default::default()
    };
    ModelInferRequest { model_name: "reviews".into(), inputs: vec![input], ..Default::default() }
}

/// A message as gRPC sends it.
fn framed(message: &ModelInferRequest) -> Vec<u8> {
    let message = message.encode_to_vec();
    [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat()
}

/// A body that sends these bytes and then nothing, and does not end.
fn hanging(bytes: Vec<u8>) -> Body {
    let sent = stream::iter([Ok::<_, Infallible>(Bytes::from(bytes))]);
    Body::from_stream(sent.chain(stream::pending()))
}

fn status(headers: &HeaderMap) -> Code {
    Code::from_bytes(headers["grpc-status"].as_bytes())
}

#[tokio::test]
async fn a_connection_of_http2_without_a_request_is_closed() {
    let bounds = Bounds { connections: 1, head: SOON, ..Bounds::new(Protocol::Http2) };
    let listener = grpc(bounds, test_support::service().0).await;
    let shaken = [PREFACE, SETTINGS].concat();
    // The head of a request that does not end, too.
    let half = [&shaken[..], &[0, 0, 9, 1, 4, 0, 0, 0, 1, 0x82]].concat();
    for sent in [&b""[..], &PREFACE[..10], &shaken, &half] {
        let mut silent = TcpStream::connect(listener.address).await.unwrap();
        silent.write_all(sent).await.unwrap();
        let mut received = Vec::new();
        // A connection that was reset is closed as well.
        let _ = timeout(PATIENCE, silent.read_to_end(&mut received)).await.expect("the connection is closed");
        // Its place is free.
        assert!(is_live(&mut listener.client().await).await, "{sent:?}");
    }
}

#[tokio::test]
async fn a_client_that_is_long_idle_makes_room_and_loses_nothing() {
    let bounds = Bounds { connections: 1, absence: SOON, ..Bounds::new(Protocol::Http2) };
    let listener = grpc(bounds, test_support::service().0).await;
    let mut first = listener.client().await;
    for _ in 0..3 {
        assert!(is_live(&mut first).await);
        let mut second = listener.client().await;
        assert!(is_live(&mut second).await, "the first one was not asked to go");
    }
}

#[tokio::test]
async fn a_message_has_a_time_limit_and_a_stream_of_them_has_none() {
    let bounds = Bounds { message: SOON, ..Bounds::new(Protocol::Http2) };
    let listener = grpc(bounds, test_support::service().0).await;
    let whole = framed(&infer("great"));
    let half = whole[..whole.len() / 2].to_vec();
    for (method, sent) in [
        ("ModelInfer", Vec::new()),
        ("ModelInfer", half.clone()),
        // The message is there, but the call goes on.
        ("ModelInfer", whole.clone()),
    ] {
        let response = listener.call(method, hanging(sent.clone())).await;
        assert_eq!(status(response.headers()), Code::DeadlineExceeded, "{method} {sent:?}");
    }
    for (sent, messages) in [(Vec::new(), 0), (half.clone(), 0), ([whole, half].concat(), 1)] {
        let mut body = listener.call("ModelStreamInfer", hanging(sent)).await.into_body();
        let mut answers = 0;
        let trailers = loop {
            let frame = timeout(PATIENCE, poll_fn(|context| Pin::new(&mut body).poll_frame(context))).await;
            let frame = frame.expect("a frame").expect("trailers come last").unwrap();
            match frame.into_trailers() {
                Ok(trailers) => break trailers,
                Err(_) => answers += 1,
            }
        };
        assert_eq!((answers, status(&trailers)), (messages, Code::DeadlineExceeded));
    }

    let (sender, receiver) = mpsc::unbounded_channel();
    let requests = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let mut client = listener.client().await;
    let mut responses = client.model_stream_infer(requests).await.unwrap().into_inner();
    for _ in 0..2 {
        sender.send(infer("great")).unwrap();
        let response = timeout(PATIENCE, responses.message()).await.expect("an answer").unwrap().unwrap();
        assert_eq!(response.error_message, "");
        tokio::time::sleep(2 * SOON).await;
    }
}

#[tokio::test]
async fn messages_beyond_the_memory_for_bodies_are_refused() {
    let capacity = Capacity::new(2000);
    let bounds = Bounds { capacity: capacity.clone(), ..Bounds::new(Protocol::Http2) };
    let (service, gate) = test_support::service();
    let listener = Arc::new(grpc(bounds, service).await);
    let (long, short) = (infer(&"a ".repeat(800)), infer(&"a ".repeat(400)));
    let half = framed(&long)[..1500].to_vec();
    let mut slow = JoinSet::new();
    slow.spawn({
        let listener = listener.clone();
        async move { listener.call("ModelInfer", hanging(half)).await }
    });
    until("the half of a message", || capacity.free().0 == 500).await;
    let mut client = listener.client().await;
    let refused = client.model_infer(short.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("2000 bytes"), "{refused}");
    drop(slow);
    until("what the slow client held", || capacity.free().0 == 2000).await;

    // A message is held until it has been answered.
    let (release, held) = std::sync::mpsc::channel::<()>();
    let model = gate.clone();
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _guard = model.lock.lock().unwrap();
        locked.send(()).unwrap();
        let _ = held.recv();
    });
    is_locked.await.unwrap();
    let bytes = short.encoded_len();
    let mut asking = client.clone();
    let asked = short.clone();
    let answered = tokio::spawn(async move { asking.model_infer(asked).await });
    until("a message", || capacity.free().0 == 2000 - framed(&short).len()).await;
    let (sender, receiver) = mpsc::unbounded_channel();
    let requests = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let mut responses = client.model_stream_infer(requests).await.unwrap().into_inner();
    sender.send(short.clone()).unwrap();
    until("a message of a stream", || capacity.free().0 == 2000 - framed(&short).len() - bytes).await;
    sender.send(short).unwrap();
    let refused = timeout(PATIENCE, responses.message()).await.expect("a refusal").unwrap().unwrap();
    assert!(refused.error_message.contains("2000 bytes"), "{refused:?}");
    drop((release, responses));
    assert!(answered.await.unwrap().is_ok());
    until("all of it", || capacity.free().0 == 2000).await;
    assert!(client.model_infer(long).await.is_ok());
}

#[tokio::test]
async fn calls_beyond_the_largest_number_are_refused() {
    let capacity = Capacity::with_calls(1 << 20, 1);
    let bounds = Bounds { capacity: capacity.clone(), ..Bounds::new(Protocol::Http2) };
    let listener = grpc(bounds, test_support::service().0).await;
    let mut client = listener.client().await;
    let (sender, receiver) = mpsc::unbounded_channel();
    let requests = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let opened = client.model_stream_infer(requests).await.unwrap();
    // On another connection as well.
    let refused = listener.client().await.server_live(ServerLiveRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    drop((sender, opened));
    until("the end of the stream", || capacity.free().1 == 1).await;
    assert!(is_live(&mut client).await);
}

#[tokio::test]
async fn bodies_beyond_the_memory_for_them_are_answered_429() {
    let capacity = Capacity::new(400);
    let bounds = Bounds { capacity: capacity.clone(), ..Bounds::new(Protocol::Http1) };
    let listener = listening(bounds, openai::app(test_support::service().0, Router::new())).await;
    let head = |length: usize| {
        format!("POST /v1/classify HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n")
    };
    let mut slow = TcpStream::connect(listener.address).await.unwrap();
    slow.write_all(format!("{}{}", head(290), " ".repeat(250)).as_bytes()).await.unwrap();
    until("a part of a body", || capacity.free().0 == 150).await;
    let body = format!(r#"{{"input": "{}"}}"#, "a".repeat(200));
    let ask = async || {
        let mut stream = TcpStream::connect(listener.address).await.unwrap();
        stream.write_all(format!("{}{body}", head(body.len())).as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("an answer").unwrap();
        answer
    };
    let refused = ask().await;
    assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1\r\n"), "{refused}");
    assert!(refused.contains("overloaded") && refused.contains("400 bytes"), "{refused}");
    drop(slow);
    until("what the slow client held", || capacity.free().0 == 400).await;
    let answer = ask().await;
    assert!(answer.starts_with(&format!("HTTP/1.1 {}", StatusCode::OK)), "{answer}");
    until("all of it", || capacity.free().0 == 400).await;
}
