//! Mechanisms that have nothing ready for a request: a process, or what is in it, has to be made first.

use std::sync::Arc;

use super::desk::{Desk, MODEL, Request};
use super::process::Process;
use super::service::{Answered, Procedure};
use pswitch_protocol::{ToWorker, monotonic_ns};

/// How a process that trains is made to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Killed, whatever it does: stop-and-start.
    Killed,
    /// Told to stop and to end, and waited for: two processes.
    Ended,
}

/// A process that trains, or one that serves: a request ends the first and starts the second, which loads the model from
/// disk.
pub(crate) struct Restarting {
    desk: Arc<Desk>,
    ending: Ending,
    trains: Option<Process>,
    /// Answers further requests until training gets the device again.
    serves: Option<Process>,
    /// Steps of processes that are gone.
    steps_before: u64,
}

impl Restarting {
    pub(crate) fn new(desk: Arc<Desk>, ending: Ending) -> Self {
        Self { desk, ending, trains: None, serves: None, steps_before: 0 }
    }

    /// Ends training; when it computed no more.
    fn end_training(&mut self, mut process: Process) -> anyhow::Result<u64> {
        // A process that has failed is as good as gone, but whoever measures has to hear of it.
        self.steps_before += process.steps()?;
        match self.ending {
            Ending::Killed => {
                process.kill()?;
                Ok(monotonic_ns())
            }
            Ending::Ended => {
                process.set_stop(true)?;
                // It may not have begun yet: then it says so when it has.
                let stopped_ns = process.await_pause()?;
                process.end()?;
                Ok(stopped_ns)
            }
        }
    }
}

impl Procedure for Restarting {
    fn train(&mut self) -> anyhow::Result<()> {
        if let Some(serves) = self.serves.take() {
            serves.end()?;
        }
        if self.trains.is_none() {
            let bytes = self.desk.training_bytes();
            let mut process = self.desk.start(&[], bytes, false)?;
            self.desk.train(&mut process, bytes)?;
            self.trains = Some(process);
        }
        Ok(())
    }

    fn is_training(&mut self) -> anyhow::Result<bool> {
        self.trains.as_mut().map_or(Ok(false), Process::is_training)
    }

    fn steps(&mut self) -> anyhow::Result<u64> {
        Ok(self.steps_before + self.trains.as_mut().map_or(Ok(0), Process::steps)?)
    }

    fn answer(&mut self, request: &Request) -> anyhow::Result<Answered> {
        let stopped_ns = match self.trains.take() {
            Some(trains) => Some(self.end_training(trains)?),
            None => None,
        };
        if let Some(serves) = &mut self.serves {
            let executed = self.desk.bring_and_run(serves, request, Vec::new())?;
            return Ok(Answered { executed, stopped_ns, switched: false });
        }
        let mut process = self.desk.start(&[], self.desk.room.bytes(), false)?;
        self.desk.load(&mut process, true)?;
        let executed = self.desk.bring_and_run(&mut process, request, self.desk.whole())?;
        self.serves = Some(process);
        Ok(Answered { executed, stopped_ns, switched: true })
    }
}

/// One process that trains or serves: a request has it forget the task, load the model from disk and run it.
pub(crate) struct OneProcess {
    desk: Arc<Desk>,
    process: Process,
    does: Does,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    Nothing,
    Train,
    Serve,
}

impl OneProcess {
    pub(crate) fn new(desk: Arc<Desk>) -> anyhow::Result<Self> {
        let process = desk.start(&[], desk.either_bytes(), false)?;
        Ok(Self { desk, process, does: Does::Nothing })
    }
}

impl Procedure for OneProcess {
    fn train(&mut self) -> anyhow::Result<()> {
        match self.does {
            Does::Train => return Ok(()),
            Does::Serve => self.process.send(&ToWorker::Unload { model: MODEL }, &[])?,
            Does::Nothing => {}
        }
        self.does = Does::Train;
        self.desk.train(&mut self.process, self.desk.either_bytes())
    }

    fn is_training(&mut self) -> anyhow::Result<bool> {
        Ok(self.does == Does::Train && self.process.is_training()?)
    }

    fn steps(&mut self) -> anyhow::Result<u64> {
        self.process.steps()
    }

    fn answer(&mut self, request: &Request) -> anyhow::Result<Answered> {
        if self.does == Does::Serve {
            let executed = self.desk.bring_and_run(&mut self.process, request, Vec::new())?;
            return Ok(Answered { executed, stopped_ns: None, switched: false });
        }
        let mut stopped_ns = None;
        if self.does == Does::Train {
            self.process.set_stop(true)?;
            stopped_ns = Some(self.process.await_pause()?);
            self.process.send(&ToWorker::DropTask, &[])?;
            // It would stop the execution, too.
            self.process.set_stop(false)?;
        }
        self.does = Does::Serve;
        self.desk.load(&mut self.process, true)?;
        let executed = self.desk.bring_and_run(&mut self.process, request, self.desk.whole())?;
        Ok(Answered { executed, stopped_ns, switched: true })
    }
}
