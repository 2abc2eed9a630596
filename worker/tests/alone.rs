//! Workers with memory of their own: what they answer, and what they refuse to do.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread::{self, JoinHandle};

use pswitch_device::SharedMemory;
use pswitch_model::Archive;
use pswitch_protocol::{
    Attach, Bring, Channel, DeviceSpec, Elsewhere, Execute, FromWorker, LoadModel, Region, ToWorker,
    WorkerMemory, control,
};
use pswitch_worker::{WorkerError, serve};

const MEMORY_BYTES: u64 = 64 << 20;
const SLOTS_BYTES: u64 = 4096;
const DOORBELLS: Region = Region { offset: 0, bytes: 4096 };
const SPAN: Region = Region { offset: 4096, bytes: 32 << 20 };
const ARENA: Region = Region { offset: SPAN.offset + SPAN.bytes, bytes: 1 << 20 };

/// A worker on a thread of this process, attached to memory of its own.
struct Worker {
    channel: Channel,
    thread: JoinHandle<Result<(), WorkerError>>,
    // What it maps.
    _shared: [SharedMemory; 2],
}

impl Worker {
    fn attach() -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        let thread = thread::spawn(move || serve(&theirs));
        let slots = SharedMemory::create("slots", SLOTS_BYTES).unwrap();
        let control = SharedMemory::create("control", control::BLOCK_BYTES).unwrap();
        let attach = Attach {
            worker: 0,
            device: DeviceSpec { id: "host".to_owned(), threads: 1 },
            memory: WorkerMemory::Own { bytes: MEMORY_BYTES, link_bytes_per_s: None },
            slots_bytes: SLOTS_BYTES,
            arenas: Vec::new(),
            control: 0,
            control_bytes: control::BLOCK_BYTES,
            spin_us: 0,
            waits_by_kernels: false,
            deterministic: false,
        };
        channel.send(&ToWorker::Attach(attach), &[slots.fd().as_fd(), control.fd().as_fd()]).unwrap();
        let worker = Self { channel, thread, _shared: [slots, control] };
        assert_eq!(worker.hear(), FromWorker::Attached);
        worker
    }

    fn hear(&self) -> FromWorker {
        self.channel.receive().unwrap().expect("the worker is still there").0
    }

    fn tell(&self, message: &ToWorker) {
        self.channel.send(message, &[]).unwrap();
    }

    fn load(&self, keeps_weights: bool) -> Archive {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fixtures/odd-weights/model.pt2");
        let archive = Archive::open(&path).expect("run `cargo xtask fixtures`");
        self.tell(&ToWorker::Load(LoadModel {
            model: 0,
            name: "odd-weights".to_owned(),
            path: path.display().to_string(),
            digest: archive.digest(),
            span: SPAN,
            doorbells: DOORBELLS,
            tables: Vec::new(),
            host_span_bytes: None,
            keeps_weights,
        }));
        assert_eq!(self.hear(), FromWorker::Loaded { model: 0, error: None });
        archive
    }

    /// Why it has ended.
    fn refusal(self) -> String {
        let error = self.thread.join().unwrap().unwrap_err();
        assert!(matches!(error, WorkerError::Order(_) | WorkerError::Device(_)), "{error:?}");
        std::error::Error::source(&error).map_or(error.to_string(), |source| format!("{error}: {source}"))
    }
}

fn bring(archive: &Archive) -> ToWorker {
    let whole = Region { offset: 0, bytes: archive.program().span().used_bytes };
    let input_doorbell = ARENA.offset + ARENA.bytes - 512;
    ToWorker::Bring(Bring { model: 0, inputs: Vec::new(), input_doorbell, groups: vec![whole] })
}

#[test]
fn weights_are_brought_from_a_copy_that_is_kept() {
    let worker = Worker::attach();
    let archive = worker.load(false);
    worker.tell(&bring(&archive));
    let refusal = worker.refusal();
    assert!(refusal.ends_with("to bring weights of which the worker has no copy"), "{refusal}");

    let worker = Worker::attach();
    let archive = worker.load(true);
    worker.tell(&bring(&archive));
    worker.tell(&ToWorker::Shutdown);
    worker.thread.join().unwrap().unwrap();
}

#[test]
fn weights_that_lie_nowhere_are_not_run() {
    let worker = Worker::attach();
    let archive = worker.load(true);
    let part = Region { offset: 0, bytes: archive.program().span().used_bytes };
    worker.tell(&ToWorker::Move { model: 0, part, to: Elsewhere::Allocated });
    worker.tell(&ToWorker::Release { model: 0 });
    worker.tell(&ToWorker::Execute(Execute {
        execution: 1,
        model: 0,
        inputs: Vec::new(),
        input_doorbell: ARENA.offset,
        home: SPAN.offset,
        arena: ARENA,
        resident: true,
        held_back: false,
        host_tables: false,
        outputs: Region { offset: 0, bytes: SLOTS_BYTES },
        profile: None,
        doorbell_timeout_ms: 1,
    }));
    let refusal = worker.refusal();
    assert!(refusal.ends_with("to run 'odd-weights', whose weights lie nowhere"), "{refusal}");
}

#[test]
fn a_weight_is_not_cut_in_two() {
    let worker = Worker::attach();
    worker.load(true);
    worker.tell(&ToWorker::Move { model: 0, part: Region { offset: 0, bytes: 1 }, to: Elsewhere::Allocated });
    let refusal = worker.refusal();
    assert!(refusal.ends_with("to cut a weight of 'odd-weights' in two"), "{refusal}");
}

#[test]
fn the_host_has_no_managed_memory() {
    let worker = Worker::attach();
    worker.load(true);
    let part = Region { offset: 0, bytes: 512 };
    worker.tell(&ToWorker::Move { model: 0, part, to: Elsewhere::Managed });
    let refusal = worker.refusal();
    assert!(refusal.contains("device host is not available"), "{refusal}");
}
