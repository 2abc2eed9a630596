//! What a request costs in the scheduler: the four events of its life, with other requests waiting.
//!
//! `cargo bench -p pswitch-controller --bench scheduler` prints, for some numbers of models and of requests that wait,
//! the time of all four together: submitted, transfer landed, execution finished (with the reply and the next
//! execution), and the same for requests with deadlines. Models overlap in pairs where they do not all fit, so that every
//! turn is a switch.

use std::error::Error;
use std::time::{Duration, Instant};

use pswitch_controller::scheduler::{
    Action, Event, Homes, ModelLimits, Outcome, RequestId, Scheduler, SchedulerOptions, WorkerId,
};
use pswitch_mem_pool::{Ledger, ModelId, PoolError, PoolLayout};

const ROUNDS: u32 = 200;
const REQUESTS_A_ROUND: u32 = 200;
const SPAN_BYTES: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    println!("nanoseconds a request, of {ROUNDS} rounds of {REQUESTS_A_ROUND} requests");
    println!("{:>7} {:>8} {:>10} {:>8} {:>8} {:>8}", "models", "waiting", "room for", "median", "p10", "p90");
    for (models, waiting, fit) in [
        (1, 0, 1),
        (10, 0, 10),
        (10, 100, 10),
        (10, 100, 5),
        (100, 100, 50),
        (100, 1000, 50),
        (1000, 1000, 500),
    ] {
        let mut times = measure(models, waiting, fit)?;
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_nanos();
        println!("{models:>7} {waiting:>8} {fit:>10} {:>8} {:>8} {:>8}", at(50), at(10), at(90));
    }
    Ok(())
}

/// The time of a request, once a round.
fn measure(models: u32, waiting: u32, fit: u32) -> Result<Vec<Duration>, PoolError> {
    let options = SchedulerOptions {
        max_consecutive: 16,
        max_wait: Duration::from_millis(250),
        queue_limit: usize::MAX,
        execution_timeout: Duration::from_secs(30),
        stop_grace: Duration::from_secs(2),
        attempts: 2,
        prefetch: true,
        homes: Homes::Fixed,
    };
    // Half a span more than fits: what does not fit side by side lies over others.
    let pool_bytes = u64::from(fit) * SPAN_BYTES + SPAN_BYTES / 2 + SPAN_BYTES;
    let layout = PoolLayout::new(pool_bytes, 1, SPAN_BYTES)?;
    let mut scheduler = Scheduler::new(Ledger::new(&layout), options);
    for model in 0..models {
        scheduler.place(ModelId(model), SPAN_BYTES, 4, ModelLimits::default())?;
    }
    let mut driver = Driver { scheduler, models, next: 0, now: Instant::now(), actions: Vec::new() };
    for worker in [0, 1] {
        driver.tell(Event::WorkerReady { worker: WorkerId(worker) });
    }
    for _ in 0..waiting {
        driver.submit();
    }
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for _ in 0..REQUESTS_A_ROUND {
            driver.submit();
            driver.finish_one();
        }
        times.push(begin.elapsed() / REQUESTS_A_ROUND);
    }
    Ok(times)
}

struct Driver {
    scheduler: Scheduler,
    models: u32,
    next: u64,
    now: Instant,
    /// What the scheduler wanted and the driver has not done yet.
    actions: Vec<Action>,
}

impl Driver {
    fn tell(&mut self, event: Event) {
        self.now += Duration::from_micros(1);
        self.actions.extend(self.scheduler.handle(event, self.now));
    }

    /// Models in a fixed disorder; every request has a deadline.
    fn submit(&mut self) {
        let (request, deadline) = (RequestId(self.next), Some(self.now + Duration::from_secs(60)));
        let model = ModelId(u32::try_from(self.next * 7919 % u64::from(self.models)).unwrap_or(0));
        self.next += 1;
        self.tell(Event::Submitted { request, model, deadline });
    }

    /// Lets all transfers land and executions finish that have begun, until a request has been answered.
    fn finish_one(&mut self) {
        loop {
            let mut answered = false;
            for action in std::mem::take(&mut self.actions) {
                match action {
                    Action::Execute { execution, transfer, .. } => {
                        self.tell(Event::TransferLanded { transfer });
                        self.tell(Event::ExecutionFinished { execution, outcome: Outcome::Completed });
                    }
                    Action::Prefetch { transfer, .. } => self.tell(Event::TransferLanded { transfer }),
                    Action::Reply { .. } => answered = true,
                    _ => {}
                }
            }
            if answered || self.actions.is_empty() {
                return;
            }
        }
    }
}
