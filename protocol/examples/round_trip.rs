//! Two ends of a connection: a message with a descriptor one way, an answer back.

use std::os::fd::AsFd;

use pswitch_protocol::{Channel, ExitCause, FromZygote, ToZygote};

fn main() -> Result<(), pswitch_protocol::ProtocolError> {
    let (controller, zygote) = Channel::pair()?;
    let (_kept, for_worker) = Channel::pair()?;
    controller.send(&ToZygote::Fork { worker: 1 }, &[for_worker.as_fd()])?;

    let (message, descriptors) = zygote.receive::<ToZygote>()?.expect("sent above");
    println!("zygote got {message:?} with {} descriptor", descriptors.len());
    zygote.send(&FromZygote::Exited { worker: 1, cause: ExitCause::Code(0) }, &[])?;

    let (answer, _) = controller.receive::<FromZygote>()?.expect("sent above");
    println!("controller got {answer:?}");
    Ok(())
}
