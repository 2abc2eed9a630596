//! A client of one model: sends the same few requests again and again and checks every answer.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pswitch_controller::{Answer, InferOptions, InferenceService as _, Server, Timings};
use tokio::runtime::Runtime;

use crate::keep_alive::{self, Connection, Parameters};
use crate::subject::{Example, Tensor};

/// What it cost to be answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// When the inputs lay in their slot.
    pub(crate) begun: Instant,
    /// From then to the answer.
    pub(crate) latency: Duration,
    pub(crate) timings: Timings,
}

impl Call {
    /// What of it lay inside the server: from the inputs in their slot to the outputs in theirs.
    pub(crate) fn inside(&self) -> Duration {
        self.timings.queue + self.timings.switch + self.timings.compute
    }
}

#[derive(Debug)]
pub(crate) struct Caller {
    model: String,
    turns: Vec<Turn>,
    /// Which comes next.
    next: usize,
}

/// One of the requests that take turns.
#[derive(Debug)]
struct Turn {
    example: Example,
    /// What every answer is compared with: eager PyTorch's, or the first one.
    expected: Option<Vec<Tensor>>,
    /// As an HTTP client sends it.
    request: Vec<u8>,
}

/// An answer that was not the right one.
#[derive(Debug)]
pub(crate) struct WrongOutput(String);

impl fmt::Display for WrongOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wrong output: {}", self.0)
    }
}

impl std::error::Error for WrongOutput {}

impl Caller {
    /// At least one example.
    pub(crate) fn new(model: &str, examples: Vec<Example>) -> Self {
        let turn = |example: Example| Turn {
            expected: example.outputs.clone(),
            request: keep_alive::request(model, &example),
            example,
        };
        Self { model: model.to_owned(), turns: examples.into_iter().map(turn).collect(), next: 0 }
    }

    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// What answers are compared with.
    pub(crate) fn reference(&self) -> &str {
        self.turns.first().map_or("", |turn| &turn.example.reference)
    }

    /// How many requests take turns.
    pub(crate) fn turns(&self) -> usize {
        self.turns.len()
    }

    fn turn(&mut self) -> usize {
        let turn = self.next;
        self.next = (turn + 1) % self.turns.len();
        turn
    }

    /// Sends the next request and waits for its answer.
    ///
    /// # Errors
    /// A `ServiceError` when the server refuses, [`WrongOutput`] when an output is not to the last bit what it should be.
    pub(crate) fn call(&mut self, runtime: &Runtime, server: &Server) -> anyhow::Result<Call> {
        let turn = self.turn();
        let (call, answer) = runtime.block_on(self.send(turn, server))?;
        if self.turns[turn].expected.is_none() {
            let outputs = answer.outputs.iter();
            self.turns[turn].expected =
                Some(outputs.map(|output| (output.spec.shape.clone(), output.data.to_vec())).collect());
        }
        self.check(turn, &answer)?;
        Ok(call)
    }

    /// As [`call`](Self::call), beside other requests: of one of the turns, and what is expected has to be known.
    pub(crate) async fn call_turn(&self, turn: usize, server: &Server) -> anyhow::Result<Call> {
        let (call, answer) = self.send(turn, server).await?;
        self.check(turn, &answer)?;
        Ok(call)
    }

    async fn send(&self, turn: usize, server: &Server) -> anyhow::Result<(Call, Answer)> {
        let failed = || format!("a request to '{}' failed", self.model);
        let example = &self.turns[turn].example;
        let mut submission = server.reserve(&self.model, None, &example.specs()).with_context(failed)?;
        for (index, (_, data)) in example.inputs.iter().enumerate() {
            submission.append(index, data).with_context(failed)?;
        }
        let begun = Instant::now();
        let answer = server.infer(submission, InferOptions::default()).await.with_context(failed)?;
        Ok((Call { begun, latency: begun.elapsed(), timings: answer.timings }, answer))
    }

    /// As [`call`](Self::call), over HTTP: how long the client waits, and where the server says that the time went.
    pub(crate) fn call_http(
        &mut self,
        connection: &mut Connection,
    ) -> anyhow::Result<(Duration, Parameters)> {
        let turn = self.turn();
        let answered = connection.round(&self.turns[turn].request);
        let answered = answered.with_context(|| format!("a request to '{}' failed", self.model))?;
        self.check_bytes(turn, connection.data())?;
        Ok(answered)
    }

    /// As a client that is not connected yet: how long that, the request and its answer take together, and where the server
    /// says that the time went. Without a reference the first answer that came this way is what others are compared with.
    pub(crate) fn ask(&mut self, address: SocketAddr) -> anyhow::Result<(Duration, Parameters)> {
        let turn = self.turn();
        let failed = || format!("a request to '{}' failed", self.model);
        let begun = Instant::now();
        let mut connection = Connection::open(address).with_context(failed)?;
        let (_, parameters) = connection.round(&self.turns[turn].request).with_context(failed)?;
        let latency = begun.elapsed();
        if self.turns[turn].expected.is_none() {
            let data = connection.data().to_vec();
            self.turns[turn].expected = Some(vec![(vec![data.len() as u64], data)]);
        }
        self.check_bytes(turn, connection.data())?;
        Ok((latency, parameters))
    }

    fn check(&self, turn: usize, answer: &Answer) -> anyhow::Result<()> {
        let expected = self.turns[turn].expected.as_ref();
        let expected = expected.context("there is no answer yet to compare with")?;
        for (place, output) in answer.outputs.iter().enumerate() {
            let same = expected
                .get(place)
                .is_some_and(|(shape, data)| *shape == output.spec.shape && *data == output.data);
            if !same {
                return Err(self.wrong(&format!("'{}'", output.spec.name)));
            }
        }
        Ok(())
    }

    /// Checks outputs that came as bytes, one after the other. What is expected has to be known.
    fn check_bytes(&self, turn: usize, data: &[u8]) -> anyhow::Result<()> {
        let expected = self.turns[turn].expected.as_ref();
        let expected = expected.context("there is no answer yet to compare with")?;
        let mut rest = data;
        for (place, (_, output)) in expected.iter().enumerate() {
            rest =
                rest.strip_prefix(output.as_slice()).ok_or_else(|| self.wrong(&format!("output {place}")))?;
        }
        ensure!(rest.is_empty(), "'{}' answers with {} bytes too many", self.model, rest.len());
        Ok(())
    }

    fn wrong(&self, output: &str) -> anyhow::Error {
        let reference = self.reference();
        WrongOutput(format!("{output} of '{}' is not to the last bit that of {reference}", self.model)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(outputs: Option<Vec<Tensor>>) -> Caller {
        let example = Example { inputs: Vec::new(), outputs, reference: "eager PyTorch".to_owned() };
        Caller::new("m", vec![example.clone(), example])
    }

    #[test]
    fn requests_take_turns() {
        let mut caller = caller(None);
        assert_eq!([(); 3].map(|()| caller.turn()), [0, 1, 0]);
    }

    #[test]
    fn bytes_are_all_outputs_one_after_the_other() {
        let caller = caller(Some(vec![(vec![2], vec![1, 2]), (vec![1], vec![3])]));
        caller.check_bytes(0, &[1, 2, 3]).unwrap();
        let error = |data: &[u8]| caller.check_bytes(1, data).unwrap_err().to_string();
        assert_eq!(
            error(&[1, 2, 4]),
            "wrong output: output 1 of 'm' is not to the last bit that of eager PyTorch"
        );
        assert!(error(&[1]).starts_with("wrong output: output 0"));
        assert!(caller.check_bytes(1, &[1]).unwrap_err().is::<WrongOutput>());
        assert_eq!(error(&[1, 2, 3, 4]), "'m' answers with 1 bytes too many");
    }

    #[test]
    fn nothing_is_right_before_something_is_known() {
        assert!(caller(None).check_bytes(0, &[]).is_err());
    }
}
