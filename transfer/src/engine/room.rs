//! State that makes room for a model, piece by piece, while the model comes in.

use std::sync::Arc;

use pswitch_device::{CopyStream, DeviceError, DeviceSlice, Event};

use super::lane::Lane;
use super::{COPY_IN, COPY_OUT, COPY_WITHIN, CopyIn, CopyOut, CopyWithin, MAKE_ROOM, cannot};
use crate::TransferError;

/// Copies of state to the host are this long: a newcomer is late by one, and what else crosses the link comes between two.
const PIECE_BYTES: u64 = 8 << 20;

/// Copies within the device are: memory is some ten times as fast as the link.
const ASIDE_BYTES: u64 = 32 << 20;

/// Where a piece of state goes.
enum Leave {
    Save(CopyOut),
    SetAside(CopyWithin),
}

/// A piece of state, and whether the device was told to copy it.
struct Piece {
    leave: Leave,
    left: bool,
}

impl Piece {
    fn place(&self) -> &DeviceSlice {
        match &self.leave {
            Leave::Save(copy) => &copy.from,
            Leave::SetAside(copy) => &copy.from,
        }
    }

    fn begin(&self) -> u64 {
        self.place().address().0
    }

    fn end(&self) -> u64 {
        self.begin() + self.place().bytes()
    }
}

/// The state that makes room for one transfer.
pub(super) struct Room<'a> {
    /// In order of their places.
    pieces: Vec<Piece>,
    lane: &'a Lane,
}

impl<'a> Room<'a> {
    /// `lane` is that by which the state goes.
    pub(super) fn new(
        save: &[CopyOut],
        set_aside: &[CopyWithin],
        lane: &'a Lane,
    ) -> Result<Self, DeviceError> {
        let mut pieces = Vec::new();
        let mut add = |leave| pieces.push(Piece { leave, left: false });
        for CopyOut { from, to } in save {
            for (offset, bytes) in cut(from.bytes(), PIECE_BYTES) {
                let (from, to) = (from.sub(offset, bytes)?, to.sub(offset, bytes)?);
                add(Leave::Save(CopyOut { from, to }));
            }
        }
        for CopyWithin { from, to } in set_aside {
            for (offset, bytes) in cut(from.bytes(), ASIDE_BYTES) {
                let (from, to) = (from.sub(offset, bytes)?, to.sub(offset, bytes)?);
                add(Leave::SetAside(CopyWithin { from, to }));
            }
        }
        pieces.sort_by_key(Piece::begin);
        Ok(Self { pieces, lane })
    }

    /// Copies weights in: at once where nothing lies, and behind each piece of state that does.
    pub(super) fn copy_in(
        &mut self,
        stream: &mut dyn CopyStream,
        copy: &CopyIn,
    ) -> Result<(), TransferError> {
        let (begin, bytes) = (copy.to.address().0, copy.to.bytes());
        let mut done = 0;
        while done < bytes {
            let at = begin + done;
            let next = self.pieces.iter().position(|piece| piece.end() > at && !piece.left);
            let next = next.filter(|&next| self.pieces[next].begin() < begin + bytes);
            let until = match next {
                None => bytes,
                Some(next) if self.pieces[next].begin() > at => self.pieces[next].begin() - begin,
                Some(next) => {
                    let left = self.leave(next)?;
                    stream.wait_event(&left).map_err(cannot(MAKE_ROOM))?;
                    (self.pieces[next].end() - begin).min(bytes)
                }
            };
            let part = part(copy, done, until - done).map_err(cannot(COPY_IN))?;
            stream.copy_in(&part.from, &part.to).map_err(cannot(COPY_IN))?;
            done = until;
        }
        Ok(())
    }

    /// Has what nothing was copied over leave, if all is `well`, and lets the stream wait for all that was enqueued, also if not
    /// all of it was.
    pub(super) fn finish(mut self, stream: &mut dyn CopyStream, well: bool) -> Result<(), TransferError> {
        let left = (0..self.pieces.len())
            .filter(|_| well)
            .try_for_each(|piece| if self.pieces[piece].left { Ok(()) } else { self.leave(piece).map(drop) });
        if !self.pieces.iter().any(|piece| piece.left) {
            return left;
        }
        // Also behind a copy that was enqueued and is not known by an event of its own.
        let last = self.lane.enqueue(|stream| stream.record());
        let waits = last.and_then(|last| stream.wait_event(&last)).map_err(cannot(MAKE_ROOM));
        left.and(waits)
    }

    fn leave(&mut self, piece: usize) -> Result<Arc<dyn Event>, TransferError> {
        let Piece { leave, left } = &mut self.pieces[piece];
        *left = true;
        let (what, gone) = self.lane.enqueue(|stream| {
            let (what, copied) = match leave {
                Leave::Save(CopyOut { from, to }) => (COPY_OUT, stream.copy_out(from, to)),
                Leave::SetAside(CopyWithin { from, to }) => (COPY_WITHIN, stream.copy_within(from, to)),
            };
            (what, copied.and_then(|()| stream.record()))
        });
        gone.map_err(cannot(what))
    }
}

/// Copies state back, in pieces.
pub(super) fn bring_back(stream: &mut dyn CopyStream, copy: &CopyIn) -> Result<(), DeviceError> {
    cut(copy.to.bytes(), PIECE_BYTES).try_for_each(|(offset, bytes)| {
        let part = part(copy, offset, bytes)?;
        stream.copy_in(&part.from, &part.to)
    })
}

/// Offsets and lengths of the pieces of so many bytes, each but the last so long.
fn cut(bytes: u64, piece_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..bytes.div_ceil(piece_bytes)).map(move |piece| {
        let offset = piece * piece_bytes;
        (offset, piece_bytes.min(bytes - offset))
    })
}

fn part(copy: &CopyIn, offset: u64, bytes: u64) -> Result<CopyIn, DeviceError> {
    Ok(CopyIn { from: copy.from.sub(offset, bytes)?, to: copy.to.sub(offset, bytes)? })
}
