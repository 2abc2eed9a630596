//! State that makes room by way of other memory of the device.

use std::sync::{Arc, Mutex, PoisonError};

use pswitch_device::{CopyStream, DeviceError, DeviceSlice, Event};

use super::lane::Lane;
use super::{COPY_OUT, CopyOut, MAKE_ROOM, SET_ASIDE, SetAside, cannot, room};
use crate::TransferError;

/// Each state lies at a multiple of this in the memory that it is set aside in.
const ALIGNMENT_BYTES: u64 = 512;

/// State on its way to the host, by memory that nobody may write to before it is there.
#[derive(Debug, Clone)]
struct UnderWay {
    memory: DeviceSlice,
    /// Behind the last copy to the host.
    end: Arc<dyn Event>,
}

/// All state that is set aside and not yet on the host.
#[derive(Debug, Default)]
pub(super) struct Asides(Mutex<Vec<UnderWay>>);

impl Asides {
    /// Lets a stream wait until what is set aside in some memory is on the host.
    pub(super) fn await_those_in(
        &self,
        memory: &DeviceSlice,
        stream: &mut dyn CopyStream,
    ) -> Result<(), TransferError> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.is_empty() {
            return Ok(());
        }
        // What has failed holds nothing any more.
        all.retain(|it| it.end.is_complete().is_ok_and(|complete| !complete));
        let in_place = all.iter().filter(|it| overlap(&it.memory, memory));
        in_place.map(|it| &it.end).try_for_each(|end| stream.wait_event(end)).map_err(cannot(MAKE_ROOM))
    }

    /// Sets state aside, before anything is copied over it.
    pub(super) fn set_aside(
        &self,
        what: &SetAside,
        stream: &mut dyn CopyStream,
    ) -> Result<(), TransferError> {
        self.await_those_in(&what.memory, stream)?;
        let mut copies = what.pairs();
        copies
            .try_for_each(|pair| {
                let (copy, aside) = pair?;
                stream.copy_within(&copy.from, &aside)
            })
            .map_err(cannot(SET_ASIDE))
    }

    /// Has it copied to the host, if all of it `is_aside`, when the weights are there, which `landed` says: both at once would
    /// slow either down.
    pub(super) fn save(
        &self,
        what: &SetAside,
        lane: &Lane,
        landed: Result<Arc<dyn Event>, TransferError>,
        is_aside: bool,
    ) {
        let end = lane.run(what.id, what.bytes(), |stream| {
            stream.wait_event(&landed?).map_err(cannot(MAKE_ROOM))?;
            if !is_aside {
                return Err(TransferError::NotSetAside);
            }
            let mut copies = what.pairs();
            copies
                .try_for_each(|pair| {
                    let (copy, aside) = pair?;
                    room::cut(copy.to.bytes()).try_for_each(|(offset, bytes)| {
                        stream.copy_out(&aside.sub(offset, bytes)?, &copy.to.sub(offset, bytes)?)
                    })
                })
                .map_err(cannot(COPY_OUT))
        });
        if let Some(end) = end {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(UnderWay { memory: what.memory.clone(), end });
        }
    }
}

impl SetAside {
    /// How much memory it takes to set so many bytes of some states aside.
    pub fn needed_bytes(states: impl IntoIterator<Item = u64>) -> u64 {
        states.into_iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT_BYTES)).sum()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.save.iter().map(|copy| copy.from.bytes()).sum()
    }

    /// Each part of the state, and where it is set aside.
    fn pairs(&self) -> impl Iterator<Item = Result<(&CopyOut, DeviceSlice), DeviceError>> {
        let mut offset = 0;
        self.save.iter().map(move |copy| {
            let at = offset;
            offset += copy.from.bytes().next_multiple_of(ALIGNMENT_BYTES);
            Ok((copy, self.memory.sub(at, copy.from.bytes())?))
        })
    }

    /// An error if the memory is too short, or lies where the state does.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        self.pairs().try_for_each(|pair| {
            let (copy, aside) = pair?;
            match self.save.iter().find(|other| overlap(&other.from, &aside)) {
                None if copy.from.bytes() == copy.to.bytes() => Ok(()),
                None => {
                    Err(DeviceError::UnequalCopy { from_bytes: copy.from.bytes(), to_bytes: copy.to.bytes() })
                }
                Some(other) => Err(DeviceError::OverlappingCopy {
                    from_offset: other.from.offset(),
                    to_offset: aside.offset(),
                    bytes: aside.bytes(),
                }),
            }
        })
    }
}

fn overlap(one: &DeviceSlice, other: &DeviceSlice) -> bool {
    let range = |slice: &DeviceSlice| (slice.address().0, slice.address().0 + slice.bytes());
    let ((begin, end), (other_begin, other_end)) = (range(one), range(other));
    begin < other_end && other_begin < end
}
