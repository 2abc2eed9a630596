//! State that makes room for a model, piece by piece, while the model comes in.

use std::sync::Arc;

use pswitch_device::{CopyStream, DeviceError, Event};

use super::lane::Lane;
use super::{COPY_IN, COPY_OUT, COPY_WITHIN, CopyIn, CopyOut, CopyWithin, MAKE_ROOM, cannot};
use crate::TransferError;

/// Copies of state are this long: a newcomer is late by one, and what else crosses the link comes between two.
const PIECE_BYTES: u64 = 8 << 20;

/// A piece of state, and whether its copy to the host is enqueued.
struct Piece {
    copy: CopyOut,
    saved: bool,
}

impl Piece {
    fn begin(&self) -> u64 {
        self.copy.from.address().0
    }

    fn end(&self) -> u64 {
        self.begin() + self.copy.from.bytes()
    }
}

/// The state that one transfer saves.
pub(super) struct Room<'a> {
    /// In order of their places.
    pieces: Vec<Piece>,
    lane: &'a Lane,
    /// Behind the last piece whose copy is enqueued.
    last: Option<Arc<dyn Event>>,
}

impl<'a> Room<'a> {
    /// `lane` is that by which the state goes.
    pub(super) fn new(save: &[CopyOut], lane: &'a Lane) -> Result<Self, DeviceError> {
        let mut pieces = Vec::new();
        for CopyOut { from, to } in save {
            for (offset, bytes) in cut(from.bytes()) {
                let copy = CopyOut { from: from.sub(offset, bytes)?, to: to.sub(offset, bytes)? };
                pieces.push(Piece { copy, saved: false });
            }
        }
        pieces.sort_by_key(Piece::begin);
        Ok(Self { pieces, lane, last: None })
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
            let next = self.pieces.iter().position(|piece| piece.end() > at && !piece.saved);
            let next = next.filter(|&next| self.pieces[next].begin() < begin + bytes);
            let until = match next {
                None => bytes,
                Some(next) if self.pieces[next].begin() > at => self.pieces[next].begin() - begin,
                Some(next) => {
                    let saved = self.save(next)?;
                    stream.wait_event(&saved).map_err(cannot(MAKE_ROOM))?;
                    (self.pieces[next].end() - begin).min(bytes)
                }
            };
            let part = part(copy, done, until - done).map_err(cannot(COPY_IN))?;
            stream.copy_in(&part.from, &part.to).map_err(cannot(COPY_IN))?;
            done = until;
        }
        Ok(())
    }

    /// Saves what nothing was copied over, if all is `well`, and lets the stream wait for all that was enqueued.
    pub(super) fn finish(mut self, stream: &mut dyn CopyStream, well: bool) -> Result<(), TransferError> {
        for piece in (0..self.pieces.len()).filter(|_| well) {
            if !self.pieces[piece].saved {
                self.save(piece)?;
            }
        }
        self.last.map_or(Ok(()), |last| stream.wait_event(&last).map_err(cannot(MAKE_ROOM)))
    }

    fn save(&mut self, piece: usize) -> Result<Arc<dyn Event>, TransferError> {
        let piece = &mut self.pieces[piece];
        let saved = self.lane.enqueue(|stream| {
            stream.copy_out(&piece.copy.from, &piece.copy.to)?;
            stream.record()
        });
        let saved = saved.map_err(cannot(COPY_OUT))?;
        piece.saved = true;
        self.last = Some(Arc::clone(&saved));
        Ok(saved)
    }
}

/// Sets state aside, ahead of all that comes on the stream, and of all that comes by `lane`, which may save it from there.
pub(super) fn set_aside(
    stream: &mut dyn CopyStream,
    copies: &[CopyWithin],
    lane: &Lane,
) -> Result<(), TransferError> {
    if copies.is_empty() {
        return Ok(());
    }
    copies
        .iter()
        .try_for_each(|copy| stream.copy_within(&copy.from, &copy.to))
        .map_err(cannot(COPY_WITHIN))?;
    let aside = stream.record().map_err(cannot(MAKE_ROOM))?;
    lane.enqueue(|stream| stream.wait_event(&aside)).map_err(cannot(MAKE_ROOM))
}

/// Copies state back, in pieces.
pub(super) fn bring_back(stream: &mut dyn CopyStream, copy: &CopyIn) -> Result<(), DeviceError> {
    cut(copy.to.bytes()).try_for_each(|(offset, bytes)| {
        let part = part(copy, offset, bytes)?;
        stream.copy_in(&part.from, &part.to)
    })
}

/// Offsets and lengths of the pieces of so many bytes.
fn cut(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let pieces = bytes.div_ceil(PIECE_BYTES);
    (0..pieces).map(move |piece| {
        let offset = piece * PIECE_BYTES;
        (offset, PIECE_BYTES.min(bytes - offset))
    })
}

fn part(copy: &CopyIn, offset: u64, bytes: u64) -> Result<CopyIn, DeviceError> {
    Ok(CopyIn { from: copy.from.sub(offset, bytes)?, to: copy.to.sub(offset, bytes)? })
}
