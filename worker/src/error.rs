use pswitch_protocol::FaultClass;

/// Why a model cannot be built. The server goes on without it.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The graph calls an operator that this libtorch does not have.
    #[error("node '{node}'{place}: {reason}; export the model with operators of PyTorch 2.11")]
    UnknownOperator {
        /// The node.
        node: String,
        /// Its line of Python, led by a space and in parentheses; empty if unknown.
        place: String,
        /// libtorch's words.
        reason: String,
    },
    /// An argument does not fit the operator's schema.
    #[error("node '{node}'{place}: {target} does not take the arguments of the graph: {reason}")]
    Argument {
        /// The node.
        node: String,
        /// Its line of Python, led by a space and in parentheses; empty if unknown.
        place: String,
        /// The operator.
        target: String,
        /// What does not fit.
        reason: String,
    },
    /// The program changes its own weights or buffers: its answers would depend on what ran before.
    #[error(
        "node '{node}'{place} writes to '{weight}': a model that serves must not change its weights or buffers; \
         export it in eval mode"
    )]
    ChangesState {
        /// The node, or "the program's end".
        node: String,
        /// Its line of Python, led by a space and in parentheses; empty if unknown.
        place: String,
        /// The weight.
        weight: String,
    },
    /// A training program writes to a parameter or constant.
    #[error(
        "node '{node}'{place} writes to '{weight}': only the optimizer changes parameters while a program trains, and \
         nobody changes constants"
    )]
    ChangesParameter {
        /// The node.
        node: String,
        /// Its line of Python, led by a space and in parentheses; empty if unknown.
        place: String,
        /// The parameter or constant.
        weight: String,
    },
    /// The program cannot be trained.
    #[error("{reason}")]
    Training {
        /// What is missing or too much, and what to do.
        reason: String,
    },
    /// libtorch refused a view of the span.
    #[error("weight '{weight}' cannot be viewed in the pool: {reason}")]
    Weight {
        /// The weight.
        weight: String,
        /// libtorch's words.
        reason: String,
    },
}

/// Why a training task cannot begin, or go on from a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The program cannot be trained.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Configuration or data cannot be read, or mean nothing.
    #[error(transparent)]
    Train(#[from] pswitch_train::TrainError),
    /// The data are not what the program takes.
    #[error("input '{input}': {reason}")]
    Data {
        /// The program's input.
        input: String,
        /// What was found, what is needed.
        reason: String,
    },
    /// The checkpoint is another task's.
    #[error("checkpoint '{}' is another task's: {reason}; give the task another folder for its checkpoints, or take it away", path.display())]
    Checkpoint {
        /// The file.
        path: std::path::PathBuf,
        /// What differs.
        reason: String,
    },
    /// libtorch refused to copy the state.
    #[error(transparent)]
    Run(RunError),
}

/// Why an execution gave no outputs. The executable is ready for the next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RunError {
    /// What the answer to the client depends on.
    pub class: FaultClass,
    /// One line: the node, its place and the reason.
    pub message: String,
}

/// Why a worker process ends before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The connection to the controller broke, or what came over it was not a message.
    #[error("the connection to the controller failed")]
    Protocol(#[from] pswitch_protocol::ProtocolError),
    /// A device call failed.
    #[error("the device failed")]
    Device(#[from] pswitch_device::DeviceError),
    /// A message names something that does not exist, or comes at the wrong time.
    #[error("the controller broke the protocol: {0}")]
    Order(String),
    /// libtorch kept memory of an execution beyond its end; the worker must not run another.
    #[error("libtorch kept {bytes} bytes of an execution's arena")]
    Kept {
        /// How many.
        bytes: u64,
    },
    /// Something of a training step asked for memory when the step had ended already; the worker must not run another.
    #[error("a training step computes on after its end: {reason}")]
    ComputesOn {
        /// What libtorch said of it.
        reason: String,
    },
    /// The state of a task that has done all its steps cannot be copied, and so not be written.
    #[error("the state of a training task cannot be read: {reason}")]
    Unread {
        /// libtorch's words.
        reason: String,
    },
    /// libtorch cannot compute on the GPU.
    #[error("{reason}")]
    Libtorch {
        /// Why, and what to do.
        reason: String,
    },
    /// A process could not be set up.
    #[error("{operation} failed")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// `fork` is only safe in a process with one thread.
    #[error("the zygote must be forked before the first thread starts, {threads} are running")]
    TooLate {
        /// How many.
        threads: usize,
    },
}
