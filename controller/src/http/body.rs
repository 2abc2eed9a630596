//! Bodies of requests as they arrive, and of responses as they leave.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout;

use super::reject::Reject;
use crate::service::{ErrorClass, ServiceError};

/// How long a rejected request's body is read on and thrown away.
const LINGER_TIME: Duration = Duration::from_secs(10);
/// How much of it.
const LINGER_BYTES: u64 = 256 << 20;

/// The body of a request, chunk by chunk, with its limits.
pub(super) struct BodyReader {
    body: Body,
    /// What has arrived and was not asked for yet.
    ahead: Bytes,
    /// Bytes that have arrived.
    received: u64,
    /// What `Content-Length` says; a body in chunks has none.
    declared: Option<u64>,
    limit_bytes: u64,
    idle: Duration,
}

impl BodyReader {
    /// A reader of a body that must not be longer than `limit_bytes` nor pause longer than `idle`.
    pub(super) fn new(headers: &HeaderMap, body: Body, limit_bytes: u64, idle: Duration) -> Self {
        let declared = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse().ok());
        Self { body, ahead: Bytes::new(), received: 0, declared, limit_bytes, idle }
    }

    /// The length of the body, where the client has told.
    pub(super) fn declared(&self) -> Option<u64> {
        self.declared
    }

    /// Refuses a body whose length is known to be over the limit.
    pub(super) fn check_declared(&self) -> Result<(), Reject> {
        match self.declared {
            Some(declared) if declared > self.limit_bytes => Err(self.too_large(declared)),
            _ => Ok(()),
        }
    }

    /// The next piece of the body, at most `at_most` bytes; `None` at its end.
    pub(super) async fn next(&mut self, at_most: u64) -> Result<Option<Bytes>, Reject> {
        while self.ahead.is_empty() {
            match self.frame().await? {
                Some(data) => self.ahead = data,
                None => return Ok(None),
            }
        }
        let at_most = usize::try_from(at_most).unwrap_or(usize::MAX).min(self.ahead.len());
        Ok(Some(self.ahead.split_to(at_most)))
    }

    /// The next `length` bytes of the body in one piece: without a copy if they arrived as one.
    ///
    /// # Errors
    /// A body that ends before names `what`, expected and found.
    pub(super) async fn take(&mut self, length: u64, what: &str) -> Result<Bytes, Reject> {
        let Some(first) = self.next(length).await? else {
            if length == 0 {
                return Ok(Bytes::new());
            }
            return Err(Reject::bad(format!("the body ends before {what}, which has {length} bytes")));
        };
        if first.len() as u64 == length {
            return Ok(first);
        }
        let mut collected = first.to_vec();
        loop {
            let missing = length - collected.len() as u64;
            if missing == 0 {
                return Ok(collected.into());
            }
            let Some(piece) = self.next(missing).await? else {
                let found = collected.len();
                return Err(Reject::bad(format!("the body ends inside {what}: {found} of {length} bytes")));
            };
            collected.extend_from_slice(&piece);
        }
    }

    /// All the rest of the body in one piece, at most `limit_bytes`.
    pub(super) async fn take_rest(&mut self, limit_bytes: u64) -> Result<Bytes, Reject> {
        let Some(mut collected) = self.next(u64::MAX).await? else { return Ok(Bytes::new()) };
        let mut more: Option<Vec<u8>> = None;
        while let Some(piece) = self.next(u64::MAX).await? {
            let all = more.get_or_insert_with(|| collected.to_vec());
            all.extend_from_slice(&piece);
            check_size("JSON", all.len() as u64, limit_bytes)?;
        }
        check_size("JSON", collected.len() as u64, limit_bytes)?;
        if let Some(all) = more {
            collected = all.into();
        }
        Ok(collected)
    }

    /// Refuses a body that goes on.
    pub(super) async fn expect_end(&mut self) -> Result<(), Reject> {
        match self.next(u64::MAX).await? {
            None => Ok(()),
            Some(piece) => {
                let message = format!(
                    "the body goes on after the last tensor: {} bytes were announced, at least {} more came",
                    self.received - (self.ahead.len() + piece.len()) as u64,
                    self.ahead.len() + piece.len()
                );
                Err(Reject::bad(message))
            }
        }
    }

    /// Reads on and throws away, for some time, beside the response that rejects the request.
    ///
    /// Most clients send all of a request before they look at the response; a connection closed before would take the
    /// response with it.
    pub(super) fn linger(mut self) {
        if self.body.is_end_stream() {
            return;
        }
        tokio::spawn(async move {
            let drained = timeout(LINGER_TIME, async {
                self.limit_bytes = u64::MAX;
                while self.received < LINGER_BYTES {
                    match self.frame().await {
                        Ok(Some(_)) => {}
                        Ok(None) | Err(_) => break,
                    }
                }
            });
            // Whether it ended or the time did: the connection is free now.
            let _ = drained.await;
        });
    }

    async fn frame(&mut self) -> Result<Option<Bytes>, Reject> {
        loop {
            let next = std::future::poll_fn(|context| Pin::new(&mut self.body).poll_frame(context));
            let Ok(frame) = timeout(self.idle, next).await else { return Err(self.stalled()) };
            let frame = match frame {
                None => return Ok(None),
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    let message = format!("the body broke off after {} bytes: {error}", self.received);
                    return Err(Reject::bad(message));
                }
            };
            // Trailers are ignored.
            let Ok(data) = frame.into_data() else { continue };
            self.received += data.len() as u64;
            if self.received > self.limit_bytes {
                return Err(self.too_large(self.received));
            }
            return Ok(Some(data));
        }
    }

    fn too_large(&self, asked_bytes: u64) -> Reject {
        let what = "a request's body".to_owned();
        ServiceError::TooLarge { what, asked_bytes, limit_bytes: self.limit_bytes }.into()
    }

    fn stalled(&self) -> Reject {
        let announced = self.declared.map(|declared| format!(" of {declared}")).unwrap_or_default();
        let message = format!(
            "the body stopped arriving: {}{announced} bytes came, then none for {:.1} s",
            self.received,
            self.idle.as_secs_f64()
        );
        Reject::new(ErrorClass::InvalidRequest, StatusCode::REQUEST_TIMEOUT, message)
    }
}

/// Refuses `what` if it is too large.
pub(super) fn check_size(what: &str, asked_bytes: u64, limit_bytes: u64) -> Result<(), Reject> {
    if asked_bytes > limit_bytes {
        return Err(ServiceError::TooLarge { what: what.to_owned(), asked_bytes, limit_bytes }.into());
    }
    Ok(())
}

/// The body of a response in pieces that lie where they are: JSON, then tensors in their slot.
pub(super) struct Pieces {
    pieces: VecDeque<Bytes>,
    left_bytes: u64,
}

impl Pieces {
    pub(super) fn new(pieces: impl IntoIterator<Item = Bytes>) -> Self {
        let pieces: VecDeque<Bytes> = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
        let left_bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        Self { pieces, left_bytes }
    }

    pub(super) fn length(&self) -> u64 {
        self.left_bytes
    }
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.pieces.pop_front();
        if let Some(piece) = &piece {
            self.left_bytes -= piece.len() as u64;
        }
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left_bytes)
    }
}
