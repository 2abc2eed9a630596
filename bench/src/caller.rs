//! A client of one model: sends the same request again and again and checks every answer.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use pswitch_controller::{Answer, InferOptions, InferenceService as _, Server, TensorSpec, Timings};
use tokio::runtime::Runtime;

use crate::subject::{Example, Tensor};

/// What it cost to be answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// From the moment at which the inputs lay in their slot to the answer.
    pub(crate) latency: Duration,
    pub(crate) timings: Timings,
}

#[derive(Debug)]
pub(crate) struct Caller {
    model: String,
    example: Example,
    /// What every answer is compared with: eager PyTorch's, or the first one.
    expected: Option<Vec<Tensor>>,
    reference: &'static str,
}

impl Caller {
    pub(crate) fn new(model: &str, example: Example) -> Self {
        let reference = if example.outputs.is_some() { "eager PyTorch" } else { "the first answer" };
        Self { model: model.to_owned(), expected: example.outputs.clone(), example, reference }
    }

    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// What answers are compared with.
    pub(crate) fn reference(&self) -> &'static str {
        self.reference
    }

    /// Sends one request and waits for its answer.
    ///
    /// # Errors
    /// When the server refuses, and when an output is not to the last bit what it should be.
    pub(crate) fn call(&mut self, runtime: &Runtime, server: &Server) -> anyhow::Result<Call> {
        let failed = || format!("a request to '{}' failed", self.model);
        let specs: Vec<TensorSpec> = self.example.inputs.iter().map(|(spec, _)| spec.clone()).collect();
        let mut submission = server.reserve(&self.model, None, &specs).with_context(failed)?;
        for (index, (_, data)) in self.example.inputs.iter().enumerate() {
            submission.append(index, data).with_context(failed)?;
        }
        let begun = Instant::now();
        let answer =
            runtime.block_on(server.infer(submission, InferOptions::default())).with_context(failed)?;
        let latency = begun.elapsed();
        self.check(&answer)?;
        Ok(Call { latency, timings: answer.timings })
    }

    fn check(&mut self, answer: &Answer) -> anyhow::Result<()> {
        let Some(expected) = &self.expected else {
            let outputs = answer.outputs.iter();
            self.expected =
                Some(outputs.map(|output| (output.spec.shape.clone(), output.data.to_vec())).collect());
            return Ok(());
        };
        for (place, output) in answer.outputs.iter().enumerate() {
            let same = expected
                .get(place)
                .is_some_and(|(shape, data)| *shape == output.spec.shape && *data == output.data);
            if !same {
                let Self { model, reference, .. } = self;
                bail!(
                    "wrong output: '{}' of '{model}' is not {reference}'s to the last bit",
                    output.spec.name
                );
            }
        }
        Ok(())
    }
}
