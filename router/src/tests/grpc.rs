//! Language and embedding models over gRPC on their way through the router.

use std::future::{pending, ready};

use athanor_contract::event::{Generation, GenerationInput, TokenUsage};
use athanor_serving::api::inference::{
    generation,
    protocol::{
        InferParameter, ModelInferResponse, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
        ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse,
        ServerReadyResponse, infer_parameter::ParameterChoice,
    },
    stream::Responses,
};
use athanor_telemetry::Readiness;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use tonic::{Code, Response, Status, Streaming, transport::Channel};

use super::{
    streams::{PATIENCE, counted, load, until, with_limit},
    *,
};

/// A client's stream.
pub struct Client {
    sender: mpsc::UnboundedSender<ModelInferRequest>,
    responses: Streaming<ModelStreamInferResponse>,
    _connection: GrpcInferenceServiceClient<Channel>,
}

impl Client {
    /// Opens a stream with metadata.
    pub async fn connect(router: SocketAddr, metadata: &[(&'static str, &str)]) -> Result<Self, Status> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let requests = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
        let mut request = tonic::Request::new(requests);
        for (name, value) in metadata {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let mut client = GrpcInferenceServiceClient::connect(format!("http://{router}")).await.unwrap();
        let responses = client.model_stream_infer(request).await?.into_inner();
        Ok(Self { sender, responses, _connection: client })
    }

    pub fn send(&self, request: ModelInferRequest) {
        self.sender.send(request).unwrap();
    }

    /// The next response; an error if the stream has ended with a status.
    async fn next(&mut self) -> Result<Option<ModelStreamInferResponse>, Status> {
        tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("a response")
    }

    /// The responses to one request.
    pub async fn answer(&mut self) -> Vec<ModelStreamInferResponse> {
        let mut all = Vec::new();
        while all.last().is_none_or(|last| !generation::is_final(inner(last))) {
            all.push(self.next().await.unwrap().expect("a last response"));
        }
        all
    }
}

fn inner(response: &ModelStreamInferResponse) -> &ModelInferResponse {
    response.infer_response.as_ref().unwrap()
}

pub fn parameter(response: &ModelStreamInferResponse, name: &str) -> String {
    match &inner(response).parameters[name].parameter_choice {
        Some(ParameterChoice::StringParam(text)) => text.clone(),
        other => panic!("{other:?}"),
    }
}

/// The text of an answer.
pub fn text(responses: &[ModelStreamInferResponse]) -> String {
    responses.iter().map(|response| generation::decode(inner(response)).unwrap_or_default().0).collect()
}

fn bytes_input(name: &str, text: &str) -> InferInputTensor {
    let bytes_contents = vec![bytes::Bytes::copy_from_slice(text.as_bytes())];
    InferInputTensor {
        name: name.into(),
        datatype: "BYTES".into(),
        shape: vec![1],
        contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
        ..Default::default()
    }
}

fn request(id: &str, input: InferInputTensor, is_stream: bool) -> ModelInferRequest {
    let parameter = |choice| InferParameter { parameter_choice: Some(choice) };
    let parameters = [
        ("temperature".to_owned(), parameter(ParameterChoice::Int64Param(0))),
        ("stream".to_owned(), parameter(ParameterChoice::BoolParam(is_stream))),
    ];
    ModelInferRequest {
        model_name: "writer".into(),
        id: id.into(),
        inputs: vec![input],
        parameters: parameters.into(),
        ..Default::default()
    }
}

/// A request whose answer is `answer`.
pub fn ask(id: &str, answer: &str, is_stream: bool) -> ModelInferRequest {
    request(id, bytes_input("text_input", &format!("[{answer}]")), is_stream)
}

fn recording() -> RouterConfig {
    let mut config = config(&[("a", 100)]);
    config.events = Some(EventsConfig::new("nowhere:9092", "t"));
    config
}

/// A router before these servers of revision a.
async fn router(
    config: RouterConfig,
    servers: &[SocketAddr],
    ready: Readiness,
) -> (Arc<Gateway>, Arc<Kept>, SocketAddr) {
    let gateway = gateway(config, &[]);
    let address = |&server: &SocketAddr| Address { http: server, grpc: Some(server), draining: false };
    gateway.registry.set_endpoints("a", servers.iter().map(address).collect());
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    gateway.labels.set("a".into(), Vec::new());
    let router = serve_grpc(Passing::new(gateway.clone(), ready)).await;
    (gateway, kept, router)
}

async fn writer() -> SocketAddr {
    let (service, _) = test_support::language_model(Default::default());
    serve_grpc(Inference::new(service, Readiness::new())).await
}

pub fn generations(kept: &Kept) -> Vec<Generation> {
    let events = kept.events.lock().unwrap();
    let generation = |event: &Event| match &event.data {
        EventData::Generation(generation) => Some(generation.clone()),
        _ => None,
    };
    events.iter().filter_map(generation).collect()
}

#[tokio::test]
async fn answers_over_a_stream_are_recorded_and_take_feedback() {
    let (gateway, kept, router) = router(recording(), &[writer().await], Readiness::new()).await;
    let mut client = Client::connect(router, &[]).await.unwrap();
    client.send(ask("1", "hello", true));
    let streamed = client.answer().await;
    until("the first event", || generations(&kept).len() == 1).await;
    let messages = r#"[{"role": "user", "content": "[hi]"}]"#;
    client.send(request("2", bytes_input("messages", messages), false));
    let whole = client.answer().await;
    assert_eq!((text(&streamed), text(&whole)), ("hello".into(), "hi".into()));
    assert_eq!((streamed.len(), whole.len()), (6, 1), "a response for each letter, and the end");
    assert_eq!((&*inner(&streamed[0]).id, &*inner(&whole[0]).id), ("1", "2"));
    let ids = [parameter(&streamed[0], "x-request-id"), parameter(&whole[0], "x-request-id")];
    assert!(streamed.iter().all(|response| parameter(response, "x-request-id") == ids[0]));
    assert_eq!(parameter(&whole[0], "x-athanor-revision"), "a");

    until("the events", || generations(&kept).len() == 2).await;
    let recorded = generations(&kept);
    let seen: Vec<_> = recorded.iter().map(|g| (&*g.request_id, &*g.answer, &*g.finish_reason)).collect();
    assert_eq!(seen, [(&*ids[0], "hello", "stop"), (&*ids[1], "hi", "stop")]);
    assert_eq!(recorded[0].usage, Some(TokenUsage { prompt_tokens: 8, completion_tokens: 6 }));
    assert_eq!(recorded[0].input, GenerationInput::Prompt("[hello]".into()));
    assert_eq!(recorded[1].input, GenerationInput::Messages(serde_json::from_str(messages).unwrap()));
    for id in &ids {
        let feedback = Request::builder().method(Method::POST).uri("/v1/feedback");
        let item = format!(r#"{{"request_id": "{id}", "rating": 1}}"#);
        assert_eq!(send(&gateway, feedback, &item).await.0.status, StatusCode::ACCEPTED);
    }
    assert_eq!(counted(&gateway), (2, 0));
    drop(client);
    until("the end of the load", || (load(&gateway), gateway.running.count()) == (0, 0)).await;
}

#[tokio::test]
async fn one_answer_and_vectors_pass_through() {
    let (gateway, kept, address) = router(recording(), &[writer().await], Readiness::new()).await;
    let mut client = GrpcInferenceServiceClient::connect(format!("http://{address}")).await.unwrap();
    let response = client.model_infer(ask("1", "hello", false)).await.unwrap();
    let id = response.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
    assert!(gateway.ids.verify(&id).is_ok(), "{id}");
    let (answer, ending) = generation::decode(response.get_ref()).unwrap();
    assert_eq!((&*answer, &*ending.unwrap().finish_reason), ("hello", "stop"));
    let recorded = generations(&kept);
    assert_eq!((recorded.len(), &*recorded[0].request_id, &*recorded[0].answer), (1, &*id, "hello"));
    assert_eq!(client.model_infer(ask("1", "hello", true)).await.unwrap_err().code(), Code::InvalidArgument);

    let vectors = serve_grpc(Inference::new(test_support::embedding_model(), Readiness::new())).await;
    let (gateway, kept, address) = router(recording(), &[vectors], Readiness::new()).await;
    let mut client = GrpcInferenceServiceClient::connect(format!("http://{address}")).await.unwrap();
    let response = client.model_infer(infer("vectors", &["abc de"])).await.unwrap();
    let id = response.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
    assert!(gateway.ids.verify(&id).is_err(), "there is nothing to learn from a vector");
    assert_eq!(response.get_ref().outputs[0].contents.as_ref().unwrap().fp32_contents, [3.0, 2.0]);
    assert_eq!((kept.events.lock().unwrap().len(), counted(&gateway)), (0, (1, 0)));
}

/// What a server does with a stream.
#[derive(Clone, Copy)]
enum Script {
    /// It cannot.
    Unavailable,
    /// It breaks off after a response.
    Break,
    /// Nothing follows a response.
    Hang,
}

struct Fake {
    script: Script,
    asked: Arc<AtomicUsize>,
    /// Cancelled when the responses to a request are dropped.
    dropped: CancellationToken,
}

impl Fake {
    async fn serve(script: Script) -> (SocketAddr, Arc<AtomicUsize>, CancellationToken) {
        let (asked, dropped) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let fake = Self { script, asked: asked.clone(), dropped: dropped.clone() };
        (serve_grpc(fake).await, asked, dropped)
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Fake {
    async fn server_live(&self, _: tonic::Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn server_ready(
        &self,
        _: tonic::Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn model_ready(&self, _: tonic::Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn server_metadata(
        &self,
        _: tonic::Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn model_metadata(
        &self,
        _: tonic::Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn model_infer(&self, _: tonic::Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type ModelStreamInferStream = Responses;

    async fn model_stream_infer(
        &self,
        _: tonic::Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Responses>, Status> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut response = ModelInferResponse::default();
        generation::encode(false, "x", None, &mut response);
        let first = Ok(ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) });
        let rest = match self.script {
            Script::Unavailable => return Err(Status::unavailable("starting")),
            Script::Break => stream::once(ready(Err(Status::internal("killed")))).boxed(),
            Script::Hang => stream::once(pending()).boxed(),
        };
        let guard = self.dropped.clone().drop_guard();
        let guarded = stream::once(ready(first)).chain(rest).map(move |response| {
            let _ = &guard;
            response
        });
        Ok(Response::new(guarded.boxed()))
    }
}

#[tokio::test]
async fn a_request_is_sent_again_before_its_first_response_and_not_after() {
    let (unavailable, asked, _) = Fake::serve(Script::Unavailable).await;
    let servers = [nobody().await, unavailable, writer().await];
    let (_, _, address) = router(recording(), &servers, Readiness::new()).await;
    let mut client = Client::connect(address, &[]).await.unwrap();
    let mut requests = 0;
    while asked.load(Ordering::Relaxed) == 0 {
        requests += 1;
        assert!(requests < 1_000, "the server that is unavailable was never asked");
        client.send(ask("1", "hello", true));
        assert_eq!(text(&client.answer().await), "hello");
    }

    let (breaking, asked, _) = Fake::serve(Script::Break).await;
    let (gateway, kept, address) = router(recording(), &[breaking], Readiness::new()).await;
    let mut client = Client::connect(address, &[]).await.unwrap();
    client.send(ask("7", "hello", true));
    let responses = client.answer().await;
    assert_eq!((responses.len(), text(&responses[..1])), (2, "x".into()));
    assert_eq!(responses[1].error_message, "the answer broke off: killed");
    assert_eq!(inner(&responses[1]).id, "7");
    assert_eq!((asked.load(Ordering::Relaxed), counted(&gateway)), (1, (1, 1)));
    // The stream goes on, and what broke off is not recorded.
    client.send(ask("8", "hello", true));
    assert_eq!(client.answer().await.len(), 2);
    assert!(generations(&kept).is_empty());

    let mut client = Client::connect(address, &[("triton_grpc_error", "true")]).await.unwrap();
    client.send(ask("9", "hello", true));
    assert_eq!(text(&[client.next().await.unwrap().unwrap()]), "x");
    let status = client.next().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Internal, "the answer broke off: killed"));
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_answers() {
    let (hanging, _, dropped) = Fake::serve(Script::Hang).await;
    let (gateway, _, address) = router(recording(), &[hanging], Readiness::new()).await;
    let mut client = Client::connect(address, &[]).await.unwrap();
    client.send(ask("1", "hello", true));
    assert_eq!(text(&[client.next().await.unwrap().unwrap()]), "x");
    assert_eq!((load(&gateway), gateway.running.count()), (1, 1), "an answer is load until its end");
    assert!(!dropped.is_cancelled());
    drop(client);
    tokio::time::timeout(PATIENCE, dropped.cancelled()).await.expect("the answer is dropped");
    until("the end of the load", || (load(&gateway), gateway.running.count()) == (0, 0)).await;
    assert_eq!(counted(&gateway), (1, 0), "a client that leaves is no error of the revision");
}

#[tokio::test]
async fn an_answer_over_a_stream_has_a_time_limit() {
    let (hanging, _, dropped) = Fake::serve(Script::Hang).await;
    let (gateway, _, address) = router(with_limit(1), &[hanging], Readiness::new()).await;
    let mut client = Client::connect(address, &[]).await.unwrap();
    client.send(ask("1", "hello", true));
    let responses = client.answer().await;
    assert_eq!(responses.last().unwrap().error_message, "the answer was not complete within 1 s");
    tokio::time::timeout(PATIENCE, dropped.cancelled()).await.expect("the answer is dropped");
    assert_eq!(counted(&gateway), (1, 1));
}

#[tokio::test]
async fn a_router_that_leaves_ends_streams_after_their_answers() {
    let ready = Readiness::new();
    ready.set(true);
    let (_, _, address) = router(recording(), &[writer().await], ready.clone()).await;
    let mut client = Client::connect(address, &[]).await.unwrap();
    client.send(ask("1", "hello", true));
    assert_eq!(text(&client.answer().await), "hello");
    ready.set(false);
    assert_eq!(client.next().await.unwrap_err().code(), Code::Unavailable);
}
