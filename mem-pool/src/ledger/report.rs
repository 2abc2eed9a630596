use std::collections::BTreeSet;
use std::fmt;

use crate::ledger::{Ledger, Residency};
use crate::{ArenaId, Home, ModelId, Range};

/// What a [`Ledger`] knows, at one moment. `Display` makes a table of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerReport {
    /// All models, in order.
    pub models: Vec<ModelReport>,
    /// All arenas, in order.
    pub arenas: Vec<ArenaReport>,
    /// Bytes for homes in all.
    pub homes_bytes: u64,
    /// Bytes of spans that are resident.
    pub resident_bytes: u64,
    /// Bytes of spans that are moving.
    pub moving_bytes: u64,
    /// Bytes that all spans would need to be resident at once.
    pub placed_bytes: u64,
    /// Doorbell words that belong to models.
    pub doorbells: u64,
    /// Doorbell words in all.
    pub doorbells_capacity: u64,
}

/// One model in a [`LedgerReport`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelReport {
    /// Which.
    pub model: ModelId,
    /// Its place now.
    pub home: Home,
    /// Where its span is.
    pub state: Residency,
    /// How many hold it: executions, and who keeps it in its place.
    pub leases: usize,
}

/// One arena in a [`LedgerReport`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaReport {
    /// Which.
    pub arena: ArenaId,
    /// Its place.
    pub range: Range,
    /// The model that is executed in it.
    pub held_by: Option<ModelId>,
}

impl Ledger {
    /// What it knows now.
    pub fn report(&self) -> LedgerReport {
        let models: Vec<ModelReport> = self
            .models
            .iter()
            .map(|(&model, it)| ModelReport { model, home: it.home, state: it.state, leases: it.holders() })
            .collect();
        let arena = |(index, arena): (u32, &super::Arena)| ArenaReport {
            arena: ArenaId(index),
            range: arena.range,
            held_by: arena.held.as_ref().map(|held| held.model),
        };
        let bytes_in = |state: &[Residency]| {
            models.iter().filter(|it| state.contains(&it.state)).map(|it| it.home.span.bytes).sum()
        };
        LedgerReport {
            arenas: (0..).zip(&self.arenas).map(arena).collect(),
            homes_bytes: self.homes.bytes,
            resident_bytes: bytes_in(&[Residency::Resident]),
            moving_bytes: bytes_in(&[Residency::Moving]),
            placed_bytes: bytes_in(&[Residency::Host, Residency::Moving, Residency::Resident]),
            doorbells: self.free_doorbells.in_use_bytes() / Home::DOORBELL_BYTES,
            doorbells_capacity: self.doorbells.bytes / Home::DOORBELL_BYTES,
            models,
        }
    }

    /// Checks all invariants: homes and doorbells lie in their parts of the pool, no two models share a doorbell, no two
    /// models that are moving or resident share a byte, leases are held only on those, and every lease holds exactly
    /// one arena.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.free_doorbells.check()?;
        let models: Vec<_> = self.models.iter().collect();
        let mut doorbell_bytes = 0;
        for (index, (id, account)) in models.iter().enumerate() {
            let Home { span, doorbells } = account.home;
            if !self.homes.contains(&span) || !self.doorbells.contains(&doorbells) {
                return Err(format!(
                    "{id} is placed at {span} with doorbells at {doorbells}, outside its parts"
                ));
            }
            if !self.homes.contains(&account.own) || account.own.bytes != span.bytes {
                return Err(format!("{id} was placed at {}, for {span}", account.own));
            }
            doorbell_bytes += doorbells.bytes;
            let held = self.arenas.iter().flat_map(|arena| &arena.held).filter(|held| held.model == **id);
            if held.count() != account.leases {
                return Err(format!("{id} has {} leases, but another number of arenas", account.leases));
            }
            if account.leases > 0 && account.state == Residency::Host {
                return Err(format!("{id} is leased and on the host"));
            }
            if account.held && account.state != Residency::Resident {
                return Err(format!("{id} is kept in its place and not there"));
            }
            for (other_id, other) in &models[index + 1..] {
                if doorbells.overlaps(&other.home.doorbells) {
                    return Err(format!("{id} and {other_id} share doorbells"));
                }
                let both_here = account.state != Residency::Host && other.state != Residency::Host;
                if both_here && span.overlaps(&other.home.span) {
                    return Err(format!("{id} and {other_id} are both in the pool and overlap"));
                }
            }
        }
        if doorbell_bytes != self.free_doorbells.in_use_bytes() {
            return Err(format!(
                "models have {doorbell_bytes} bytes of doorbells, another number is allocated"
            ));
        }
        let held: Vec<_> = self.arenas.iter().flat_map(|arena| &arena.held).collect();
        if let Some(held) = held.iter().find(|held| !self.models.contains_key(&held.model)) {
            return Err(format!("an arena is held by {}, which is gone", held.model));
        }
        if held.iter().map(|held| held.serial).collect::<BTreeSet<_>>().len() != held.len() {
            return Err("one lease holds two arenas".to_owned());
        }
        Ok(())
    }
}

impl fmt::Display for LedgerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<12} {:<9} {:>6} {:>14} {:>14} {:>9}",
            "model", "state", "leases", "offset", "bytes", "doorbells"
        )?;
        for ModelReport { model, home, state, leases } in &self.models {
            let Home { span, doorbells } = home;
            let words = doorbells.bytes / Home::DOORBELL_BYTES;
            let model = model.to_string();
            writeln!(
                f,
                "{model:<12} {state:<9} {leases:>6} {:>14} {:>14} {words:>9}",
                span.offset, span.bytes
            )?;
        }
        for ArenaReport { arena, range, held_by } in &self.arenas {
            let holder = held_by.map_or_else(|| "free".to_owned(), |model| format!("held by {model}"));
            let arena = arena.to_string();
            writeln!(f, "{arena:<12} {holder:<16} {:>14} {:>14}", range.offset, range.bytes)?;
        }
        let Self {
            homes_bytes,
            resident_bytes,
            moving_bytes,
            placed_bytes,
            doorbells,
            doorbells_capacity,
            ..
        } = self;
        write!(
            f,
            "{resident_bytes} bytes resident, {moving_bytes} moving, {placed_bytes} placed in {homes_bytes}; \
             {doorbells} of {doorbells_capacity} doorbells in use"
        )
    }
}
