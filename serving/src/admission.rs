//! What stands between a connection and the application: it counts the connection's requests and the bytes of their bodies, and
//! limits the time in which a message of gRPC arrives.
//!
//! The bytes of a body are held until its answer has been sent; of a stream of messages, those of the one that is arriving. Whoever
//! works on a message of a stream holds its bytes itself ([`Capacity::of`]).

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    BoxError,
    body::{Body, HttpBody},
    http::Request,
    response::Response,
};
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use http_body::{Frame, SizeHint};
use tokio::{
    sync::watch,
    time::{Sleep, sleep},
};
use tonic::Status;
use tower::{Service, ServiceExt};

use crate::{
    capacity::{Capacity, Held},
    tls::Protocol,
};

/// The call whose client may send messages for as long as it likes.
const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
/// Bytes in front of each message of gRPC: a flag and the length.
const PREFIX: usize = 5;

/// The application of one connection.
#[derive(Clone)]
pub struct Admission {
    pub app: axum::Router,
    pub protocol: Protocol,
    pub capacity: Capacity,
    /// Longest time in which a message of gRPC arrives.
    pub message: Duration,
    pub calls: Calls,
}

impl<B> Service<Request<B>> for Admission
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let running = self.calls.begin();
        let (place, messages) = match self.protocol {
            // A connection has one request at a time, and the application limits the time of its body.
            Protocol::Http1 => (Held::default(), None),
            Protocol::Http2 => match self.capacity.call() {
                Ok(place) => (place, Some(Messages::new(request.uri().path() == STREAM, self.message))),
                Err(full) => return ready(Ok(Status::from(full).into_http())).boxed(),
            },
        };
        let held = Arc::<Mutex<Held>>::default();
        let (capacity, shared) = (self.capacity.clone(), held.clone());
        let mut request = request.map(|body| {
            Body::new(Metered { body: Body::new(body), capacity, held: shared, is_refused: false, messages })
        });
        request.extensions_mut().insert(self.capacity.clone());
        let answer = self.app.clone().oneshot(request);
        let kept = (held, place, running);
        async move { answer.await.map(|response| response.map(|body| Body::new(Kept { body, _kept: kept }))) }.boxed()
    }
}

/// The requests of one connection.
#[derive(Clone, Debug, Default)]
pub struct Calls(watch::Sender<Count>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    begun: u64,
    running: usize,
}

/// Counts a request while it lives.
struct Running(Calls);

impl Calls {
    fn begin(&self) -> Running {
        self.0.send_modify(|count| {
            count.begun += 1;
            count.running += 1;
        });
        Running(self.clone())
    }

    /// Whether the connection has not had a request yet.
    pub fn is_new(&self) -> bool {
        self.0.borrow().begun == 0
    }

    /// Resolves once the connection has had no request in progress for a time: `first` before it has had one, then `later`.
    pub async fn absent(&self, first: Duration, later: Duration) {
        let mut counts = self.0.subscribe();
        loop {
            // Fails only when there is no sender left, and this is one.
            let begun = match counts.wait_for(|count| count.running == 0).await {
                Ok(count) => count.begun,
                Err(_) => return,
            };
            let time = if begun == 0 { first } else { later };
            if tokio::time::timeout(time, counts.wait_for(|count| count.begun != begun)).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| count.running -= 1);
    }
}

/// The body of a request, whose bytes are taken from the capacity as they arrive.
struct Metered {
    body: Body,
    capacity: Capacity,
    held: Arc<Mutex<Held>>,
    /// After the refusal the rest may be read, to be thrown away.
    is_refused: bool,
    /// Absent: it is not of gRPC.
    messages: Option<Messages>,
}

impl HttpBody for Metered {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) else {
            let Some(messages) = &mut this.messages else { return Poll::Pending };
            let late = ready!(messages.poll_late(context));
            return Poll::Ready(Some(Err(late.into())));
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other.map(|frame| frame.map_err(Into::into))),
        };
        if let Some(data) = frame.data_ref().filter(|_| !this.is_refused) {
            let partial = this.messages.as_mut().and_then(|messages| messages.arrived(data));
            let mut held = this.held.lock().unwrap_or_else(PoisonError::into_inner);
            if partial.is_some() {
                *held = Held::default();
            }
            match this.capacity.hold(partial.unwrap_or(data.len())) {
                Ok(taken) => held.add(taken),
                Err(full) => {
                    this.is_refused = true;
                    let is_grpc = this.messages.is_some();
                    let error: BoxError = if is_grpc { Status::from(full).into() } else { full.into() };
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Follows the messages of a call and the time that they take.
struct Messages {
    /// Whether the client may send nothing for any time between two messages.
    is_stream: bool,
    limit: Duration,
    /// When what is arriving has to be there. Absent: nothing is.
    deadline: Option<Pin<Box<Sleep>>>,
    /// Bytes of the present message's prefix so far, and the length in them.
    prefix: usize,
    length: u32,
    /// Bytes of the present message that are still to come.
    left: usize,
}

impl Messages {
    fn new(is_stream: bool, limit: Duration) -> Self {
        let deadline = Some(Box::pin(sleep(limit)));
        Self { is_stream, limit, deadline, prefix: 0, length: 0, left: 0 }
    }

    /// Takes note of bytes. If they complete messages of a stream, it returns how many of them belong to the next one.
    fn arrived(&mut self, mut data: &[u8]) -> Option<usize> {
        let mut next = None;
        while let Some(&byte) = data.first() {
            if self.left > 0 {
                let part = self.left.min(data.len());
                self.left -= part;
                data = &data[part..];
            } else {
                if self.prefix > 0 {
                    self.length = self.length << 8 | u32::from(byte);
                }
                self.prefix += 1;
                data = &data[1..];
                if self.prefix < PREFIX {
                    continue;
                }
                self.left = self.length as usize;
                (self.prefix, self.length) = (0, 0);
            }
            if self.left == 0 {
                next = Some(data.len());
            }
        }
        if !self.is_stream {
            return None;
        }
        let is_between = self.prefix == 0 && self.left == 0;
        if is_between && next.is_some() {
            self.deadline = None;
        } else if !is_between && (next.is_some() || self.deadline.is_none()) {
            self.deadline = Some(Box::pin(sleep(self.limit)));
        }
        next
    }

    /// The status of a call whose message is late.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Status> {
        let Some(deadline) = &mut self.deadline else { return Poll::Pending };
        ready!(deadline.as_mut().poll(context));
        let message = format!("the message did not arrive within {} s", self.limit.as_secs_f64());
        Poll::Ready(Status::deadline_exceeded(message))
    }
}

/// The body of an answer with what is kept until it has been sent.
struct Kept<K> {
    body: Body,
    _kept: K,
}

impl<K: Unpin> HttpBody for Kept<K> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend((length as u32).to_be_bytes());
        bytes.resize(PREFIX + length, b'x');
        bytes
    }

    #[tokio::test]
    async fn messages_are_told_apart_wherever_the_bytes_are_cut() {
        let bytes = [message(3), message(0), message(300), message(1)[..4].to_vec()].concat();
        for size in 1..bytes.len() {
            let mut messages = Messages::new(true, Duration::from_secs(60));
            let mut held = 0;
            for part in bytes.chunks(size) {
                held = messages.arrived(part).unwrap_or(held + part.len());
                assert_eq!(messages.deadline.is_none(), held == 0, "chunks of {size}");
            }
            assert_eq!((held, messages.prefix, messages.left), (4, 4, 0), "chunks of {size}");
        }
        let mut silent = Messages::new(true, Duration::from_secs(60));
        assert_eq!(silent.arrived(&[]), None);
        assert!(silent.deadline.is_some(), "an empty frame is no message");
        let mut unary = Messages::new(false, Duration::from_secs(60));
        assert_eq!(unary.arrived(&bytes), None);
        assert!(unary.deadline.is_some(), "a call of one message has to end as well");
    }
}
