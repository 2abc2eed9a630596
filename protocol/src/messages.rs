use serde::{Deserialize, Serialize};

/// Raised with every change of a message; both ends come from one build, so only equal versions talk.
pub const PROTOCOL_VERSION: u16 = 12;

/// Numbers of a profile behind those of the nodes: what a wait costs, and what a copy of the device's least length takes, with
/// its doorbell, beside the model's computation; 0 if that is not known.
pub const PROFILE_COSTS: u64 = 2;

/// Bytes in a mapping that both processes know; which mapping the field's name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Offset of the first byte.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Which device a worker opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// As configured: `host`, `host:1`, `cuda:0`.
    pub id: String,
    /// Threads that one operator may use on the CPU; 0 leaves libtorch's own choice.
    pub threads: u32,
}

/// Which memory of the device a worker computes in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerMemory {
    /// The pool of its server, by the handle that its device describes.
    Pool(Vec<u8>),
    /// Memory that the worker allocates itself. It is alone with it: nobody else copies inputs and weights there.
    Own {
        /// How much.
        bytes: u64,
        /// Bytes a second that cross the link, on a host device that is to have a slow one.
        link_bytes_per_s: Option<u64>,
    },
}

/// First message to a worker. Descriptors: the slots', the control page's, then those of the pool's handle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Number of the worker in its server, for logs.
    pub worker: u32,
    /// Device to open.
    pub device: DeviceSpec,
    /// What it computes in; called the pool either way.
    pub memory: WorkerMemory,
    /// Length of the slot memory.
    pub slots_bytes: u64,
    /// Places in the pool of which executions are given one each: graphs can be made for them in advance.
    pub arenas: Vec<Region>,
    /// Offset of this worker's block in the control page; see [`control`](crate::control).
    pub control: u64,
    /// Length of the control page.
    pub control_bytes: u64,
    /// How long to look for the next message before sleeping, in microseconds.
    pub spin_us: u64,
    /// Whether it may wait by kernels, which keep the GPU from others: no other process of the server computes on it while this
    /// worker executes.
    pub waits_by_kernels: bool,
    /// Whether libtorch is to choose kernels that give the same bits every time.
    pub deterministic: bool,
}

/// Build a model over its home in the pool. A descriptor comes along if [`host_span_bytes`](Self::host_span_bytes) is
/// given: that of the span in the host store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadModel {
    /// Number of the model in its server.
    pub model: u32,
    /// Name, for logs and messages.
    pub name: String,
    /// Archive to read the graph from.
    pub path: String,
    /// Digest of the archive that the controller has read: the file must not have changed since.
    pub digest: u64,
    /// Home of the span in the pool: where an execution finds it, unless it is [told otherwise](Execute::home).
    pub span: Region,
    /// Doorbells of the model in the pool, one 4-byte word a group.
    pub doorbells: Region,
    /// Storages of the program that may be read from the host store, ascending.
    pub tables: Vec<u32>,
    /// Length of the span in the host store, if any may.
    pub host_span_bytes: Option<u64>,
    /// Whether the worker reads the weights from the archive and keeps a pinned copy, to [bring](Bring) them from.
    pub keeps_weights: bool,
}

/// Copy inputs and weights, in this order, and ring for each: what a worker with memory of its own does for itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bring {
    /// The model.
    pub model: u32,
    /// Places in the slot memory, and in the pool.
    pub inputs: Vec<(Region, Region)>,
    /// Word in the pool that rings behind the inputs.
    pub input_doorbell: u64,
    /// Parts of the span, counted from its begin, behind each of which the model's next doorbell rings; from the copy that
    /// the worker keeps.
    pub groups: Vec<Region>,
}

/// Where weights lie that are not in their home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Elsewhere {
    /// In memory that another process has allocated, by its handle.
    Opened(Vec<u8>),
    /// In memory that the worker allocates now.
    Allocated,
    /// In memory whose pages move to the device when they are touched there, allocated now.
    Managed,
}

/// A tensor's place in shared memory, dense and in row-major order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedTensor {
    /// Code of the element type, as in the archive.
    pub dtype: u8,
    /// Sizes, outermost first.
    pub shape: Vec<u64>,
    /// Its bytes: of inputs in the pool, of outputs in the slot memory.
    pub at: Region,
}

/// What an execution is given for one input of the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InputValue {
    /// A tensor on its way into the pool.
    Tensor(PlacedTensor),
    /// An integer of a program that takes integers.
    Integer(i64),
}

/// Run a model once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execute {
    /// Number that the answer carries.
    pub execution: u64,
    /// Model to run.
    pub model: u32,
    /// Inputs in the order of the program's inputs, those fixed at export left out.
    pub inputs: Vec<InputValue>,
    /// Word in the pool that is rung when the inputs have landed; the worker clears it.
    pub input_doorbell: u64,
    /// Where the span begins in the pool. The model may have been built over another place; doorbells are where they were.
    pub home: u64,
    /// Place in the pool for all that the execution allocates.
    pub arena: Region,
    /// Whether all of the weights are at `home`: then no group is waited for.
    pub resident: bool,
    /// Whether a GPU computes nothing of it before [`LET_GO`](crate::control::LET_GO) says so: training is on its way to a gate.
    pub held_back: bool,
    /// Whether tables are read from the host store while the weights are on their way; otherwise they are waited for.
    pub host_tables: bool,
    /// Place in the slot memory for the outputs.
    pub outputs: Region,
    /// Place in the slot memory for one `f32` of microseconds a node and [those behind them](PROFILE_COSTS), when the execution
    /// is to be profiled.
    pub profile: Option<Region>,
    /// Longest wait for a doorbell before the execution gives up.
    pub doorbell_timeout_ms: u64,
}

/// Prepare a training task: its state is filled from the archive, or from its latest checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareTask {
    /// Name, for logs and messages.
    pub name: String,
    /// The text of its configuration, with the archive's path.
    pub config: String,
    /// Digest of the archive that the controller has read: the file must not have changed since.
    pub digest: u64,
    /// Place in the pool for its state.
    pub state: Region,
}

/// Controller to worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Map what is shared; answered by [`FromWorker::Attached`].
    Attach(Attach),
    /// Build a model; answered by [`FromWorker::Loaded`].
    Load(LoadModel),
    /// Forget a model; not answered.
    Unload {
        /// The model.
        model: u32,
    },
    /// Groups of a model from now on; not answered. Until then the whole model is one group.
    Plan {
        /// The model.
        model: u32,
        /// For every group the node that waits at its doorbell, never falling: the first that uses its bytes, or an earlier one.
        wait_nodes: Vec<u32>,
        /// The same for every table that may be read from the host store; their doorbells follow those of the groups.
        table_nodes: Vec<u32>,
    },
    /// A request comes in, and this worker may get it: look for the order before sleeping. Not answered.
    LookOut {
        /// Whether the GPU has nothing else to do, so that it may be used to get ready.
        rehearse: bool,
    },
    /// Run a model; answered by [`FromWorker::Finished`].
    Execute(Execute),
    /// Copy inputs and weights; not answered. Only for a worker with memory of its own.
    Bring(Bring),
    /// Have a part of a model's weights lie elsewhere than in its home; not answered. Descriptors: those of the handle.
    Move {
        /// The model.
        model: u32,
        /// The part, counted from the span's begin.
        part: Region,
        /// Where it lies from now on.
        to: Elsewhere,
    },
    /// Send managed memory back to the host; not answered.
    SendBack {
        /// The model.
        model: u32,
    },
    /// Give back all memory that parts of a model were moved to; not answered. They have to be moved again before it runs.
    Release {
        /// The model.
        model: u32,
    },
    /// Prepare a training task, the only one of this worker; answered by [`FromWorker::TaskReady`].
    PrepareTask(PrepareTask),
    /// Train until the stop word says [`END`](crate::control::END) or all steps are done: [`FromWorker::TaskStep`] for every
    /// step, [`FromWorker::TaskHeld`] whenever it stands still on the way, [`FromWorker::TaskLeft`] if a step ends before it is
    /// whole, and at last [`FromWorker::TaskPaused`]. Messages wait meanwhile.
    Train {
        /// Place in the pool for all that a step allocates.
        arena: Region,
        /// Whether the stop word may say [`HOLD`](crate::control::HOLD): more may be queued then on a GPU, which stands still
        /// by itself.
        holds: bool,
    },
    /// Write a checkpoint now, if the task has a place for them; answered by [`FromWorker::TaskCopied`] and then
    /// [`FromWorker::TaskSaved`].
    SaveTask,
    /// Forget the training task: its memory may be used otherwise; not answered.
    DropTask,
    /// End in good order.
    Shutdown,
}

/// How far a training task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskExtent {
    /// Steps that count already, from a checkpoint.
    pub steps_done: u64,
    /// Steps that it has in all.
    pub total_steps: u64,
}

/// A step that counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskStep {
    /// Its number, from 0.
    pub step: u64,
    /// The mean loss of its batches.
    pub loss: f64,
    /// The learning rate.
    pub rate: f64,
    /// Rows that it was computed from.
    pub samples: u64,
    /// How long it took, in nanoseconds, without the time in which it stood still.
    pub took_ns: u64,
    /// The most that it had of its arena at a time.
    pub peak_bytes: u64,
}

/// Why a task computes no more for now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskPause {
    /// The stop word said that it is to end.
    Stopped {
        /// How long a step that was thrown away had taken, in nanoseconds; none if it stopped between two.
        discarded_ns: Option<u64>,
        /// `CLOCK_MONOTONIC` when it computed no more, in nanoseconds.
        at_ns: u64,
    },
    /// All steps are done.
    Finished,
    /// It cannot go on.
    Failed {
        /// One line.
        reason: String,
        /// Whether its state is as before the step that failed: it can be written down.
        is_sound: bool,
    },
}

/// Why an execution gave no output, as far as the answer to the client depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultClass {
    /// The model refused the values of the inputs (an index out of range, sizes that do not match).
    Input,
    /// The arena is too small for the activations.
    OutOfMemory,
    /// The outputs are larger than the place given.
    OutputsTooLarge {
        /// What they need.
        needed_bytes: u64,
    },
    /// The stop flag was set.
    Stopped,
    /// A doorbell was poisoned or never rung: the weights did not come.
    Transfer,
    /// Anything else that libtorch raised.
    Model,
}

/// An execution that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutionFault {
    /// What the answer depends on.
    pub class: FaultClass,
    /// First line of the reason, with the operator's name and place.
    pub message: String,
}

/// An execution that succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executed {
    /// Outputs in the program's order, in the slot memory.
    pub outputs: Vec<PlacedTensor>,
    /// `CLOCK_MONOTONIC` when the first layer began, in nanoseconds.
    pub first_layer_ns: u64,
    /// `CLOCK_MONOTONIC` when the outputs lay in their place, in nanoseconds.
    pub finished_ns: u64,
    /// Time spent waiting for groups, in nanoseconds.
    pub waited_ns: u64,
}

/// Worker to controller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// Pool, slots and control page are mapped.
    Attached,
    /// A model is built.
    Loaded {
        /// The model.
        model: u32,
        /// Why it could not be, if so.
        error: Option<String>,
    },
    /// An execution ended.
    Finished {
        /// Its number.
        execution: u64,
        /// Its end.
        result: Result<Executed, ExecutionFault>,
        /// Whether the worker ends now: it takes no other execution. If there is a fault, the device may be at work on
        /// this one until the worker is gone.
        ends: bool,
    },
    /// A training task is prepared, or why it cannot be.
    TaskReady {
        /// How far it is.
        result: Result<TaskExtent, String>,
    },
    /// A step counts.
    TaskStep(TaskStep),
    /// A checkpoint was written, or why it could not be. May come at any time, also while others train. That of the last step is tried
    /// again and again until it was written.
    TaskSaved {
        /// Steps that it stands for.
        step: u64,
        /// Its file.
        result: Result<String, String>,
    },
    /// All that a checkpoint needs of the pool is copied.
    TaskCopied,
    /// The task stands still where it is, as the stop word says.
    TaskHeld {
        /// `CLOCK_MONOTONIC` when it computed no more, in nanoseconds.
        at_ns: u64,
    },
    /// The step under way ends before it is whole. Nothing of the task reads or writes the pool any more until it is told to
    /// train; what is left to be tidied up lies elsewhere. [`TaskPaused`](Self::TaskPaused) follows.
    TaskLeft {
        /// `CLOCK_MONOTONIC` when it computed no more, in nanoseconds.
        at_ns: u64,
    },
    /// The task computes no more until it is told to.
    TaskPaused(TaskPause),
}

/// Controller to zygote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToZygote {
    /// Fork a worker that speaks on the socket sent along.
    Fork {
        /// Number of the worker; unique in the server's life.
        worker: u32,
    },
    /// Kill a worker if it still runs; [`FromZygote::Exited`] follows.
    Kill {
        /// The worker.
        worker: u32,
    },
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitCause {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for ExitCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Zygote to controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromZygote {
    /// A worker runs.
    Forked {
        /// The worker.
        worker: u32,
        /// Its process.
        pid: i32,
    },
    /// A worker could not be forked.
    ForkFailed {
        /// The worker.
        worker: u32,
        /// The system's reason.
        reason: String,
    },
    /// A worker is gone and reaped: it writes nothing any more.
    Exited {
        /// The worker.
        worker: u32,
        /// How it ended.
        cause: ExitCause,
    },
}

/// Now on `CLOCK_MONOTONIC`, which all processes of a machine share, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|time| std::time::Duration::from(time).as_nanos())
        .map_or(0, |nanos| u64::try_from(nanos).unwrap_or(u64::MAX))
}
