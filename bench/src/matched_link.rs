//! A link of the host device that takes as long for a model's weights as the model computes: where plans matter most.

use std::sync::Arc;

use anyhow::Context as _;
use pswitch_controller::Bandwidth;

use crate::caller::Caller;
use crate::progress;
use crate::serving::{Bench, Plan, Serving, Zygotes};
use crate::stats::{Samples, Summary};
use crate::subject::{Served, Subject};

/// Requests ahead of those that count: each worker has touched each page by then.
const WARM_UP: usize = 4;

/// Such a link, and what it was matched to.
#[derive(Debug)]
pub(crate) struct MatchedLink {
    /// From the decision to the outputs of the resident model, on a link that costs nothing.
    pub(crate) compute_ms: Summary,
    pub(crate) bandwidth: Bandwidth,
}

impl MatchedLink {
    /// Measures so many requests on a server of their own.
    pub(crate) fn find(
        subject: &Subject,
        serving: &Serving,
        served: Served,
        requests: usize,
        zygotes: &mut Zygotes,
    ) -> anyhow::Result<Self> {
        progress::say(format_args!(
            "how long '{}' computes with {} threads ...",
            subject.name, served.threads
        ));
        let plan = Plan {
            serving,
            served,
            models: vec![(subject.name.clone(), &subject.archive)],
            homes_bytes: Some(subject.span_bytes),
            link_bandwidth: None,
            training_size: None,
            training_gives_way: false,
        };
        let bench = Bench::start(plan, zygotes, Arc::new(|_| ()))?;
        let mut caller = Caller::new(&subject.name, subject.examples(served)?);
        let mut compute = Samples::default();
        for request in 0..WARM_UP + requests {
            let call = bench.call(&mut caller)?;
            if request >= WARM_UP {
                compute.push_ms(call.timings.compute);
            }
        }
        bench.stop()?;
        let compute_ms = compute.summary().context("nothing was measured")?;
        let bandwidth = bandwidth(subject.span_bytes, compute_ms.median)?;
        let megabytes_per_s = bandwidth.bytes_per_s() / 1e6;
        progress::say(format_args!(
            "{:.1} ms; a link of {megabytes_per_s:.0} MB/s takes as long ...",
            compute_ms.median
        ));
        Ok(Self { compute_ms, bandwidth })
    }
}

/// As many threads as leave a core to the link: on the host it is a thread that copies.
pub(crate) fn threads_beside_the_link() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cores.saturating_sub(1).max(1)).unwrap_or(1)
}

/// The bandwidth at which so many bytes take so long.
fn bandwidth(bytes: u64, ms: f64) -> anyhow::Result<Bandwidth> {
    // Rounding the 54th bit of a size changes nothing.
    #[allow(clippy::cast_precision_loss)]
    let bytes_per_s = bytes as f64 / (ms / 1e3);
    Ok(format!("{bytes_per_s:.0}B/s").parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_takes_as_long_as_computing() {
        let link = bandwidth(240_000_000, 120.0).unwrap();
        assert_eq!(link.bytes_per_s(), 2e9);
        assert!(bandwidth(0, 10.0).is_err());
    }
}
